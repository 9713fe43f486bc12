"""Multi-head latent attention on the CPU, for DeepSeek-V2, V3 and what shares their attention.

`ktransformers.latent_attention` has the formula. The halves of `kv_b_proj` are kept packed per
head. A `LatentCache` is read in place, any other cache through what its `update` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from transformers import Cache
from typing_extensions import Self

from ktransformers import _native
from ktransformers.attention_mask import valid_keys
from ktransformers.base import Checkpoint, Footprint, Site
from ktransformers.cache import LatentCache, LatentPages
from ktransformers.cpu_options import (
    check_cache_format,
    check_site,
    thread_count,
    weight_format,
)
from ktransformers.latent_attention import DeepseekV2, DeepseekV3, LatentAttention, structure
from ktransformers.packed_weights import LatentWeights
from ktransformers.placement import PlacedTensor


class MlaAttention(LatentAttention):
    """Compute latent attention on the CPU in its absorbed form, or expanded where that is less."""

    uk_packed: torch.Tensor
    uk_scale: torch.Tensor
    uv_packed: torch.Tensor
    uv_scale: torch.Tensor

    def __init__(
        self,
        module: nn.Module,
        site: Site,
        *,
        weight_format: str,
        threads: int,
        cache_format: str | None,
    ):
        super().__init__(module, site)
        self.cache_format = cache_format
        self.weight_format = weight_format
        self.threads = threads
        self.weights = LatentWeights(
            f"{site.name}.kv_b_proj",
            self.num_heads,
            self.kv_lora_rank,
            self.qk_nope_head_dim,
            self.v_head_dim,
            weight_format,
        )
        self._attention: _native.MlaAttention | None = None
        self.register_packed()

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        site: Site,
        *,
        weight: Literal["int8", "int4", "bf16"] = "int8",
        group_size: Literal[32, 64, 128] | None = None,
        threads: int | Literal["auto"] = "auto",
        cache_format: Literal["bf16", "fp32", "int8"] | None = None,
    ) -> Self:
        """Build the operator for an attention module of DeepSeek-V2 or V3.

        Args:
            weight: the format of kv_b_proj's weights.
            group_size: inputs that share a scale, for int4 alone; 128 where it is not given.
            threads: how many to compute with; auto means every physical core that the process may
                run on, within its CPU quota.
            cache_format: what `LatentCache.for_model` shall keep latents in; without it the model's
                precision.

        Raises ValueError for another module, and for one that is not on the CPU.
        """
        kind = {DeepseekV2: MlaAttentionV2, DeepseekV3: MlaAttentionV3}[structure(module)]
        format_name = weight_format(weight, group_size)
        count = thread_count(threads)
        check_cache_format(cache_format)
        check_site(site)
        return kind(  # type: ignore[return-value]  # a subclass
            module,
            site,
            weight_format=format_name,
            threads=count,
            cache_format=cache_format,
        )

    def packed_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name both halves of kv_b_proj, per head, and their scales."""
        return {name: (of.shape, of.dtype) for name, of in self.weights.matrices().items()}

    def packed_format(self) -> str:
        """Say which of the formats of `csrc/` the bytes are in."""
        return f"{self.weight_format}, W_UK transposed and W_UV per head"

    def footprint(self) -> Footprint:
        """Say what kv_b_proj needs; what attention itself needs depends on the context."""
        return self.footprint_on(self.site.device)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the one matrix."""
        return self.weights.shapes()

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read, quantise and pack, head by head.

        Raises ValueError, naming file and tensor, for a wrong shape and for NaN or infinity.
        """
        tensors = self.empty_packed()
        matrices = self.weights.matrices()
        memory = {name: PlacedTensor.whole(of, tensors[name]) for name, of in matrices.items()}
        self.weights.pack(memory, checkpoint)
        self.use_packed(tensors)

    def use_packed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Adopt the packed weights. Raises ValueError where one has not the layout's shape."""
        for name in self.packed_layout():
            setattr(self, name, tensors[name])
        self._attention = self.weights.build(
            {name: [tensor] for name, tensor in tensors.items()},
            qk_rope_head_dim=self.qk_rope_head_dim,
            scaling=self.scaling,
            threads=self.threads,
        )

    def compute(
        self,
        q: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """See `LatentAttention.compute`."""
        if self._attention is None:
            raise RuntimeError(self._refusal("weights are not loaded"))
        pages, L = self._cached(latent, k_rope, cache)
        valid = valid_keys(attention_mask, latent.shape[1], L)
        out = torch.empty(*q.shape[:2], self.num_heads * self.v_head_dim, dtype=q.dtype)
        self._attention.forward(
            q, pages.latent, pages.scale, pages.rope, pages.block_table, pages.lengths, valid, out
        )
        return out

    def _cached(
        self, latent: torch.Tensor, rope: torch.Tensor, cache: Cache | None
    ) -> tuple[LatentPages, int]:
        """Cache the new tokens; return all there are, and how many of each sequence."""
        if isinstance(cache, LatentCache):
            return cache.append(latent, rope, self.layer_idx), cache.get_seq_length(self.layer_idx)
        latent, rope, L = self.updated(latent, rope, cache)
        return LatentPages.of_sequences(latent, rope, L), L

    def extra_repr(self) -> str:
        """Show sizes, format and threads where the module tree is printed."""
        sizes = f"num_heads={self.num_heads}, kv_lora_rank={self.kv_lora_rank}"
        return f"{sizes}, weight={self.weight_format}, threads={self.threads}"


class MlaAttentionV2(DeepseekV2, MlaAttention):
    """In the place of DeepSeek-V2's."""


class MlaAttentionV3(DeepseekV3, MlaAttention):
    """In the place of DeepSeek-V3's."""
