"""Multi-head latent attention on the CPU, for DeepSeek-V2, V3 and what shares their attention.

Takes the place of the whole attention module and consumes its `kv_b_proj` alone, whose two halves
W_UK and W_UV it keeps packed per head. With a query q = [q_nope, q_rope] and the cached latent c
and rope part r of each token:

    score = scaling * (q_nope . (W_UK c) + q_rope . r)
          = scaling * ((W_UK^T q_nope) . c + q_rope . r)
    out   = W_UV (sum over tokens of softmax(score) * c)

so that the cache need not be expanded: it is read once for all heads. All other projections and
norms stay modules, are called through their `forward`, and may be claimed by other rules.

A `LatentCache` is read in place, any other cache through what its `update` returns.

Shape suffixes: B sequences, T new tokens, L cached tokens with them, H heads, C kv_lora_rank,
Dn qk_nope_head_dim, R qk_rope_head_dim, Dv v_head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import Cache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from typing_extensions import Self

from ktransformers import _native
from ktransformers.attention_mask import valid_keys
from ktransformers.base import Checkpoint, Footprint, PackedOperator, Site
from ktransformers.cache import LatentCache, LatentPages
from ktransformers.cpu_options import check_site, thread_count, weight_format
from ktransformers.last_position import only_last_position
from ktransformers.packed_weights import LatentWeights
from ktransformers.placement import PlacedTensor

Output = tuple[torch.Tensor, None]  # the second would be the attention weights


class MlaAttention(PackedOperator):
    """Compute latent attention on the CPU in its absorbed form, or expanded where that is less."""

    consumes: ClassVar[tuple[str, ...]] = ("kv_b_proj",)
    causal: ClassVar[bool] = True

    uk_packed: torch.Tensor
    uk_scale: torch.Tensor
    uv_packed: torch.Tensor
    uv_scale: torch.Tensor

    q_proj: nn.Module  # or, where there is a q_lora_rank, the three below
    q_a_proj: nn.Module
    q_a_layernorm: nn.Module
    q_b_proj: nn.Module
    kv_a_proj_with_mqa: nn.Module
    kv_a_layernorm: nn.Module
    o_proj: nn.Module

    def __init__(self, module: nn.Module, site: Site, *, weight_format: str, threads: int):
        super().__init__()
        self.site = site
        self.weight_format = weight_format
        self.threads = threads
        self.layer_idx: int = module.layer_idx  # type: ignore[assignment]  # what attention holds
        self.num_heads: int = module.num_heads  # type: ignore[assignment]
        self.kv_lora_rank: int = module.kv_lora_rank  # type: ignore[assignment]
        self.qk_nope_head_dim: int = module.qk_nope_head_dim  # type: ignore[assignment]
        self.qk_rope_head_dim: int = module.qk_rope_head_dim  # type: ignore[assignment]
        self.v_head_dim: int = module.v_head_dim  # type: ignore[assignment]
        self.scaling: float = module.scaling  # type: ignore[assignment]
        self.is_last = self.layer_idx == site.config.num_hidden_layers - 1
        self.has_q_lora = module.q_lora_rank is not None
        self.weights = LatentWeights(
            f"{site.name}.kv_b_proj",
            self.num_heads,
            self.kv_lora_rank,
            self.qk_nope_head_dim,
            self.v_head_dim,
            weight_format,
        )
        for name, child in module.named_children():
            if name not in self.consumes:
                setattr(self, name, child)
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
    ) -> Self:
        """Build the operator for an attention module of DeepSeek-V2 or V3.

        Args:
            weight: the format of kv_b_proj's weights.
            group_size: inputs that share a scale, for int4 alone; 128 where it is not given.
            threads: how many to compute with; auto means every physical core that the process may
                run on, within its CPU quota.

        Raises ValueError for another module, and for one that is not on the CPU.
        """
        kinds = {v2.DeepseekV2Attention: MlaAttentionV2, v3.DeepseekV3Attention: MlaAttentionV3}
        kind = next((k for old, k in kinds.items() if isinstance(module, old)), None)
        if kind is None:
            raise ValueError(
                "takes the place of a DeepseekV2Attention or DeepseekV3Attention, not of "
                f"{type(module).__name__}"
            )
        if module.num_key_value_groups != 1:
            raise ValueError(f"num_key_value_heads must equal num_heads, {module.num_heads}")
        format_name = weight_format(weight, group_size)
        count = thread_count(threads)
        check_site(site)
        return kind(module, site, weight_format=format_name, threads=count)  # type: ignore[return-value]  # a subclass

    def packed_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name both halves of kv_b_proj, per head, and their scales."""
        return {name: (of.shape, of.dtype) for name, of in self.weights.matrices().items()}

    def packed_format(self) -> str:
        """Say which of the formats of `csrc/` the bytes are in."""
        return f"{self.weight_format}, W_UK transposed and W_UV per head"

    def footprint(self) -> Footprint:
        """Say what kv_b_proj needs; what attention itself needs depends on the context."""
        nbytes = self.packed_bytes()
        flops = 2 * self.num_heads * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        return Footprint(self.site.device, nbytes, flops, nbytes)

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

    def attend(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        output_attentions: bool | None,
    ) -> Output:
        """Return the attention's output, [B, T, hidden_size], in the input's dtype."""
        if self._attention is None:
            raise RuntimeError(self._refusal("weights are not loaded"))
        if output_attentions or (output_attentions is None and self.site.config.output_attentions):
            raise RuntimeError(self._refusal("keeps no attention weights: no output_attentions"))
        self.check_no_gradient(hidden_states)
        B, T = hidden_states.shape[:2]
        last_only = self.is_last and only_last_position()
        asking = hidden_states[:, -1:] if last_only else hidden_states
        q = self._queries(asking).view(B, asking.shape[1], self.num_heads, -1)
        widths = (self.kv_lora_rank, self.qk_rope_head_dim)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split(widths, dim=-1)
        latent = self.kv_a_layernorm(latent)
        q_rope = q[..., self.qk_nope_head_dim :]
        if last_only:
            rotated, _ = self.rotate(q_rope, k_rope[:, -1:], _last(position_embeddings))
            _, k_rope = self.rotate(k_rope[:, :, None], k_rope, position_embeddings)
        else:
            rotated, k_rope = self.rotate(q_rope, k_rope, position_embeddings)
        q_rope.copy_(rotated)
        pages, L = self._cached(latent, k_rope, past_key_values)
        valid = valid_keys(attention_mask, T, L)
        out = torch.empty(*q.shape[:2], self.num_heads * self.v_head_dim, dtype=q.dtype)
        self._attention.forward(
            q, pages.latent, pages.scale, pages.rope, pages.block_table, pages.lengths, valid, out
        )
        return self.o_proj(out).expand(B, T, -1), None  # nothing reads others than the last

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the rope parts of queries [B, T, H, R] and keys [B, T, R]."""
        raise NotImplementedError

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.has_q_lora:
            return self.q_proj(hidden_states)  # type: ignore[no-any-return]  # what a module gives
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))  # type: ignore[no-any-return]  # likewise

    def _cached(
        self, latent: torch.Tensor, rope: torch.Tensor, cache: Cache | None
    ) -> tuple[LatentPages, int]:
        """Cache the new tokens; return all there are, and how many of each sequence."""
        if isinstance(cache, LatentCache):
            return cache.append(latent, rope, self.layer_idx), cache.get_seq_length(self.layer_idx)
        L = latent.shape[1]
        if cache is not None:  # one page per sequence; a static cache has room at its end
            found = cache.update(latent[:, None], rope[:, None], self.layer_idx)
            latent, rope = (states[:, 0] for states in found)
            L = int(cache.get_seq_length(self.layer_idx))
        return LatentPages.of_sequences(latent, rope, L), L

    def extra_repr(self) -> str:
        """Show sizes, format and threads where the module tree is printed."""
        sizes = f"num_heads={self.num_heads}, kv_lora_rank={self.kv_lora_rank}"
        return f"{sizes}, weight={self.weight_format}, threads={self.threads}"


def _last(position_embeddings: Any) -> Any:
    """Return the last position's angles, complex or cosines and sines."""
    if isinstance(position_embeddings, torch.Tensor):
        return position_embeddings[:, -1:]
    return tuple(part[:, -1:] for part in position_embeddings)


class MlaAttentionV2(MlaAttention):
    """With DeepSeek-V2's order of arguments and its rotation, by complex numbers."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Output:
        """See `attend`."""
        asked = kwargs.get("output_attentions")
        return self.attend(
            hidden_states, position_embeddings, attention_mask, past_key_values, asked
        )

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate pairs of neighbours by the angles of `position_embeddings`, [B, T, R / 2]."""
        q, k = v2.apply_rotary_emb(q.transpose(1, 2), k[:, None], position_embeddings)
        return q.transpose(1, 2), k[:, 0]


class MlaAttentionV3(MlaAttention):
    """With DeepSeek-V3's order of arguments and its rotation, by cosines and sines."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Output:
        """See `attend`."""
        asked = kwargs.get("output_attentions")
        return self.attend(
            hidden_states, position_embeddings, attention_mask, past_key_values, asked
        )

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate by cosines and sines, [B, T, R] each; neighbours where the weights say so."""
        interleaved = self.site.config.rope_interleave
        rotate = v3.apply_rotary_pos_emb_interleave if interleaved else v3.apply_rotary_pos_emb
        cos, sin = position_embeddings
        q, k = rotate(q, k[:, :, None], cos, sin, unsqueeze_dim=2)
        return q, k[:, :, 0]
