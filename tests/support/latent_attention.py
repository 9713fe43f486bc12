"""Random attention layers and caches, packed as `_native.MlaAttention` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attention_reference import Form, MlaWeights, attention_reference
from ktransformers import _native
from packed_layer import dequantised, pack

GROUP = 128  # int8 latents that share a scale


@dataclass(frozen=True, slots=True)
class Sizes:
    """H, C, R, Dn and Dv."""

    heads: int = 4
    latent: int = 64
    rope: int = 16
    nope: int = 32
    value: int = 32


@dataclass(frozen=True, slots=True)
class Attention:
    """The arguments of the native layer, and what its weights stand for."""

    sizes: Sizes
    tensors: tuple[torch.Tensor, ...]
    weights: MlaWeights

    def native(self, native: Any = _native, *, threads: int = 2, isa: str | None = None) -> Any:
        """Make the native layer."""
        return native.MlaAttention(
            *self.tensors,
            format=self.weights.weight_format,
            num_heads=self.sizes.heads,
            qk_nope_head_dim=self.sizes.nope,
            qk_rope_head_dim=self.sizes.rope,
            v_head_dim=self.sizes.value,
            kv_lora_rank=self.sizes.latent,
            scaling=self.weights.scaling,
            threads=threads,
            isa=isa,
        )


def random_attention(sizes: Sizes, format: str = "bf16", seed: int = 0) -> Attention:
    """Draw normal weights and pack them head by head."""
    generator = torch.Generator().manual_seed(seed)

    def half(n: int, k: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        drawn = torch.randn(sizes.heads, n, k, generator=generator) / inputs**0.5
        packed, scales = zip(*(pack(matrix, format) for matrix in drawn), strict=True)
        pairs = zip(packed, scales, strict=True)
        stands_for = torch.stack([dequantised(p, s, n, k, format) for p, s in pairs])
        return torch.stack(packed), torch.stack(scales), stands_for

    C, Dn, Dv = sizes.latent, sizes.nope, sizes.value
    uk_packed, uk_scale, uk = half(C, Dn, C)
    uv_packed, uv_scale, uv = half(Dv, C, C)
    weights = MlaWeights(uk, uv, (Dn + sizes.rope) ** -0.5, format)
    return Attention(sizes, (uk_packed, uk_scale, uv_packed, uv_scale), weights)


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one call but `out`."""

    q: torch.Tensor
    latent: torch.Tensor
    latent_scale: torch.Tensor | None
    rope: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    valid: torch.Tensor | None

    def sequence(self, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the cache stands for, `[L, C]` and `[L, R]`, and what is seen `[T, L]`."""
        L, T = int(self.lengths[b]), self.q.shape[1]
        pages = self.block_table[b].long()
        latent, rope = self.latent[pages].double(), self.rope[pages]
        if self.latent_scale is not None:
            group = torch.arange(latent.shape[-1]) // GROUP
            latent = latent * self.latent_scale[pages][..., group]
        seen = torch.arange(L) <= torch.arange(L - T, L)[:, None]
        if self.valid is not None:
            seen = seen & (self.valid[b, :L] != 0)
        return latent.flatten(0, 1)[:L], rope.flatten(0, 1)[:L], seen

    def alone(self, b: int) -> Request:
        """Return the same for one of the sequences."""
        one = slice(b, b + 1)
        valid = None if self.valid is None else self.valid[one].contiguous()
        return replace(
            self,
            q=self.q[one].contiguous(),
            block_table=self.block_table[one].contiguous(),
            lengths=self.lengths[one].contiguous(),
            valid=valid,
        )


def random_request(
    sizes: Sizes,
    lengths: Sequence[int],
    tokens: int,
    *,
    page_tokens: int = 16,
    cache: str = "bf16",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> Request:
    """Draw queries, and a cache whose pages lie in any order, some of them nobody's."""
    generator = torch.Generator().manual_seed(seed)
    pages_of = [-(-length // page_tokens) for length in lengths]
    P = sum(pages_of) + 2
    order = torch.randperm(P, generator=generator).int()
    table = torch.full((len(lengths), max(pages_of) + 1), -1, dtype=torch.int32)
    for b, (begin, count) in enumerate(zip(_starts(pages_of), pages_of, strict=True)):
        table[b, :count] = order[begin : begin + count]
    latent = torch.randn(P, page_tokens, sizes.latent, generator=generator)
    rope = torch.randn(P, page_tokens, sizes.rope, generator=generator)
    scale = None
    if cache == "int8":
        latent = torch.randint(-127, 128, latent.shape, generator=generator, dtype=torch.int8)
        groups = -(-sizes.latent // GROUP)
        scale = (torch.rand(P, page_tokens, groups, generator=generator) + 0.5) / 64
    elif cache == "bf16":
        latent, rope = latent.bfloat16(), rope.bfloat16()
    H, width = sizes.heads, sizes.nope + sizes.rope
    q = torch.randn(len(lengths), tokens, H, width, generator=generator).to(dtype)
    return Request(
        q, latent, scale, rope, table, torch.tensor(lengths, dtype=torch.int32), valid=None
    )


def _starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def forward(layer: Any, request: Request, form: Form | None = None) -> torch.Tensor:
    """Call the layer; return its output `[B, T, H * Dv]`."""
    B, T, H = request.q.shape[:3]
    out = torch.full((B, T, H * layer.v_head_dim), torch.nan, dtype=request.q.dtype)
    layer.forward(
        request.q,
        request.latent,
        request.latent_scale,
        request.rope,
        request.block_table,
        request.lengths,
        request.valid,
        out,
        form=form,
    )
    return out


def share_of_bound(of: Attention, request: Request, out: torch.Tensor, form: Form) -> float:
    """Return the largest error over its bound, of all outputs."""
    shares = []
    for b in range(request.q.shape[0]):
        latent, rope, seen = request.sequence(b)
        expected, bound = attention_reference(of.weights, request.q[b], latent, rope, seen, form)
        got = out[b].view(expected.shape).double()
        shares.append(((got - expected).abs() / bound).max())
    return float(torch.stack(shares).max())
