"""Multi-head latent attention on a GPU, for DeepSeek-V2, V3 and what shares their attention.

`ktransformers.latent_attention` has the formula; here it is always the absorbed form, in Triton
(`kernels/mla_*.py`) or a package that a rule names, which layers on one GPU share. A `LatentCache`
is read and written in place, any other through what its `update` returns. Modules inside that no
rule takes go to the GPU with the operator.

**CUDA graphs.** A step of one new token per sequence of a `LatentCache`, without a mask, can be
recorded after `make_room_in_all(B, 1)`, once it has run before: lengths and page tables are read on
the device, and whatever the host has to do is done by that call. (Recording counts the token as
written, which it is not: `cut` it off.) A replay is

    cache.make_room_in_all(B, 1)
    graph.replay()
    for layer in range(num_layers):
        cache.wrote(layer, 1)

FlashInfer plans on the host and refuses to be recorded.

Shape suffixes: those of `latent_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers import Cache
from typing_extensions import Self

from ktransformers.attention_mask import valid_keys
from ktransformers.base import Checkpoint, Footprint, Operator, Site
from ktransformers.cache import LatentCache, LatentPages
from ktransformers.cache_pages import PAGE_TOKENS
from ktransformers.cache_rounding import check_format
from ktransformers.gpu_operator import GpuOperator
from ktransformers.gpu_options import check_gpu, gpu_device
from ktransformers.latent_attention import (
    DeepseekV2,
    DeepseekV3,
    LatentAttention,
    Output,
    structure,
)

Kernel = Literal["triton", "flashinfer", "flashmla"]
CacheFormat = Literal["bf16", "fp8"]

if TYPE_CHECKING:
    from ktransformers.operators.kernels.mla_kernel import MlaKernel


def _new_kernel(name: Kernel) -> MlaKernel:
    """Return what computes under a name; none of it is imported before a rule is understood."""
    from ktransformers.operators.kernels.mla_flashinfer import FlashInferMla
    from ktransformers.operators.kernels.mla_flashmla import FlashMla
    from ktransformers.operators.kernels.mla_kernel import TritonMla

    kinds = {"triton": TritonMla, "flashinfer": FlashInferMla, "flashmla": FlashMla}
    return kinds[name]()


class GpuMlaAttention(LatentAttention, GpuOperator):
    """Compute latent attention on a GPU, its halves of kv_b_proj in the model's dtype."""

    uk: torch.Tensor  # [H, Dn, C]
    uv: torch.Tensor  # [H, C, Dv]

    def __init__(
        self, module: nn.Module, site: Site, *, kernel: Kernel, cache_format: CacheFormat | None
    ):
        super().__init__(module, site)
        self.device = site.device
        self.kernel = _new_kernel(kernel)
        self.cache_format = cache_format
        self.is_loaded = False
        self.register_packed()

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        site: Site,
        *,
        device: str = "cuda:0",
        kernel: Kernel = "triton",
        cache_format: CacheFormat | None = None,
    ) -> Self:
        """Build the operator for an attention module of DeepSeek-V2 or V3.

        Args:
            device: the GPU; `cpu` only for tests, in Triton's interpreter (TRITON_INTERPRET=1).
            kernel: what computes; nothing else takes its place.
            cache_format: what `LatentCache.for_model` shall keep latents in; fp8 needs a GPU of
                compute capability 8.9 or later. Without it the model's precision.

        Raises ValueError for another module, and for what it does not compute with.
        """
        kind = {DeepseekV2: GpuMlaAttentionV2, DeepseekV3: GpuMlaAttentionV3}[structure(module)]
        for name, value, known in (
            ("kernel", kernel, get_args(Kernel)),
            ("cache_format", cache_format, (*get_args(CacheFormat), None)),
        ):
            if value not in known:
                expected = ", ".join(str(each) for each in known if each is not None)
                raise ValueError(f"{name} {value!r} is not supported (expected {expected})")
        if site.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"takes bfloat16 or float32 activations, not {site.dtype}")
        placed = replace(site, device=gpu_device(device))
        operator = kind(module, placed, kernel=kernel, cache_format=cache_format)
        widths = operator.kv_lora_rank, operator.qk_rope_head_dim
        operator.kernel.check_sizes(operator.num_heads, *widths, site.dtype, cache_format)
        return operator  # type: ignore[return-value]  # a subclass

    def connect(self, operators: Mapping[str, Operator]) -> None:
        """Share the kernel, and what it holds, with the other layers on this GPU."""
        for other in operators.values():
            if isinstance(other, GpuMlaAttention) and (other.kernel.name, other.device) == (
                self.kernel.name,
                self.device,
            ):
                self.kernel = other.kernel
                return

    def check_machine(self) -> None:
        """Refuse a machine without the GPU, without the kernel, or whose GPU has no fp8."""
        if torch.version.hip is not None:
            # Compiled for gfx942 tiles take 108 KiB of its 64 of shared memory, or spill.
            raise ValueError("latent attention has no tiles for AMD's GPUs: leave it on the CPU")
        self.kernel.check_installed()
        check_gpu(self.device)
        self.kernel.check_machine(self.device)
        if self.cache_format is not None:
            check_format(self.cache_format, self.device)

    def computed_by(self) -> str:
        """Name the kernel with its version, and the GPU."""
        return self.kernel.named(self.device)

    def graph_obstacle(self) -> str | None:
        """Say why a step can't be recorded; None where it can."""
        return self.kernel.graph_obstacle

    def packed_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name both halves of kv_b_proj."""
        H, C, dtype = self.num_heads, self.kv_lora_rank, self.site.dtype
        return {
            "uk": ((H, self.qk_nope_head_dim, C), dtype),
            "uv": ((H, C, self.v_head_dim), dtype),
        }

    def packed_format(self) -> str:
        """Say how the halves lie."""
        return f"{self.site.dtype}, W_UK and W_UV transposed per head"

    def footprint(self) -> Footprint:
        """Say what kv_b_proj needs; what attention itself needs depends on the context."""
        return self.footprint_on(self.device)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the one matrix."""
        rows = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return {f"{self.site.name}.kv_b_proj.weight": (rows, self.kv_lora_rank)}

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read kv_b_proj and take its halves apart.

        Raises ValueError, naming file and tensor, for a wrong shape and for NaN or infinity;
        MemoryError where the GPU has no room.
        """
        (weight,) = self.read_weights(checkpoint).values()
        heads = weight.to(self.site.dtype).unflatten(0, (self.num_heads, -1))
        uk, uv = heads.split((self.qk_nope_head_dim, self.v_head_dim), dim=1)
        self.use_packed({"uk": uk, "uv": uv.transpose(1, 2)})

    def use_packed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Bring the halves to the GPU, and with them the modules that no rule took."""
        self.bring(tensors)
        with self.filling_gpu() as home:
            for child in self.children():
                if not isinstance(child, Operator) and not _is_on_meta(child):  # `pack` leaves them
                    child.to(home)
        self.is_loaded = True

    def attend(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        output_attentions: bool | None,
    ) -> Output:
        """Bring activations to the GPU, if they are not there, and the output back."""
        if not self.is_loaded:
            raise RuntimeError(self._refusal("weights are not loaded"))
        angles = _to(position_embeddings, self.device)
        here = hidden_states.to(self.device)
        out, _ = super().attend(here, angles, attention_mask, past_key_values, output_attentions)
        return out.to(hidden_states.device), None

    def compute(
        self,
        q: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """See `LatentAttention.compute`."""
        (B, T), queries = latent.shape[:2], q.shape[1]
        L = T if cache is None else T + int(cache.get_seq_length(self.layer_idx))
        valid = valid_keys(attention_mask, T, L)
        if valid is not None and not self.kernel.takes_padding:
            raise RuntimeError(
                self._refusal(
                    f"kernel {self.kernel.name} takes no padding: give sequences of one length, or "
                    "take triton"
                )
            )
        valid = None if valid is None else valid.to(self.device)
        pages = self._cached(latent, k_rope, cache)
        q_nope, q_rope = q.flatten(0, 1).split((self.qk_nope_head_dim, self.qk_rope_head_dim), -1)
        # A product per head, [H, B * T, Dn] @ [H, Dn, C]; kernels read the result as it lies.
        q_latent = torch.bmm(q_nope.transpose(0, 1), self.uk).transpose(0, 1)
        q_latent, q_rope = (x.unflatten(0, (B, queries)) for x in (q_latent, q_rope))
        out = self.kernel.attend(q_latent, q_rope, pages, scaling=self.scaling, valid=valid)
        values = torch.bmm(out.flatten(0, 1).transpose(0, 1), self.uv)
        return values.transpose(0, 1).reshape(B, queries, -1)

    def _cached(self, latent: torch.Tensor, rope: torch.Tensor, cache: Cache | None) -> LatentPages:
        """Cache the new tokens; return all there are."""
        in_rows = self.kernel.in_rows
        if not isinstance(cache, LatentCache):
            latent, rope, L = self.updated(latent, rope, cache)
            return LatentPages.of_sequences(latent, rope, L, PAGE_TOKENS, in_rows=in_rows)
        # Brings Triton, which packing and looking at plans do without.
        from ktransformers.operators.kernels.mla_append import mla_append

        B, T, C = latent.shape
        sizes = (B, T, C, rope.shape[-1])
        pages = cache.make_room(self.layer_idx, *sizes, latent.device, in_rows=in_rows)
        mla_append(latent, rope, pages)
        cache.wrote(self.layer_idx, T)
        return pages

    def extra_repr(self) -> str:
        """Show sizes, kernel and device where the module tree is printed."""
        sizes = f"num_heads={self.num_heads}, kv_lora_rank={self.kv_lora_rank}"
        return f"{sizes}, kernel={self.kernel.name}, device={self.device}"


def _to(angles: Any, device: torch.device) -> Any:
    """Bring angles, complex or cosines and sines, to a device."""
    if isinstance(angles, torch.Tensor):
        return angles.to(device)
    return tuple(part.to(device) for part in angles)


def _is_on_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


class GpuMlaAttentionV2(DeepseekV2, GpuMlaAttention):
    """In the place of DeepSeek-V2's."""


class GpuMlaAttentionV3(DeepseekV3, GpuMlaAttention):
    """In the place of DeepSeek-V3's."""
