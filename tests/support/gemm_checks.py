"""The comparison that every matrix product must pass, and that a faulty one must fail."""

from __future__ import annotations

from typing import Any

import torch

from experts_reference import product_bound
from packed_layer import group_size, same_bits


def pack_integers(q: torch.Tensor, format: str) -> torch.Tensor:
    """Lay integers `[n, k]` out as the format does; n and k need no padding here."""
    n, k = q.shape
    lines = q.reshape(n // 16, 16, k // 4, 4).transpose(1, 2).contiguous()
    if format == "int8":
        return lines.view(torch.uint8).reshape(-1)
    nibbles = (lines + 8).to(torch.uint8).reshape(n // 16, k // 8, 2, 64)
    return (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(-1)


def pack_scales(scale: torch.Tensor, format: str) -> torch.Tensor:
    """Lay scales `[n]`, or `[n, groups]` bf16, out as the format does."""
    if format == "int8":
        return scale
    n, groups = scale.shape
    return scale.reshape(n // 16, 16, groups).transpose(1, 2).contiguous().reshape(-1)


def random_scales(n: int, k: int, format: str) -> torch.Tensor:
    """Draw scales for a matrix `[n, k]`, of either sign where the format has groups."""
    generator = torch.Generator().manual_seed(n)
    size = group_size(format)
    if size is None:
        return torch.rand(n, generator=generator)
    return torch.randn(n, k // size, generator=generator).bfloat16()


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Compute a * b + c with one rounding, all fp32: a of 18 bits and b of 8, so a * b is exact.

    The float64 sum of two fp32-sized numbers may be rounded; rounded to odd, as here, a second
    rounding to fp32 gives what a single one would (Boldo and Melquiond, 2008).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)  # Knuth's two-sum: exact
    bits = total.view(torch.int64)
    towards = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where(
        (lost != 0) & (bits % 2 == 0), torch.where(towards > 0, bits + 1, bits - 1), bits
    )
    return odd.view(torch.float64).float()


def expected_gemm(
    a: torch.Tensor, a_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, format: str
) -> torch.Tensor:
    """Compute what int8_gemm.h and int4_gemm.h say: exact integers, then fp32."""
    size = group_size(format)
    if size is None:
        sums = (a.double() @ w.double().T).to(torch.int32)
        return sums.float() * (a_scale[:, None] * w_scale[None, :])
    total = torch.zeros(a.shape[0], w.shape[0])
    for g in range(a.shape[1] // size):
        group = slice(g * size, (g + 1) * size)
        dot = a[:, group].double() @ w[:, group].double().T
        total = fused_multiply_add(dot.float(), w_scale[:, g].float().expand_as(total), total)
    return a_scale[:, None] * total


def gemm_is_exact(
    native: Any,
    isa: str,
    a: torch.Tensor,
    w: torch.Tensor,
    format: str = "int8",
    rows: torch.Tensor | None = None,
) -> bool:
    """Multiply a `[*, k]` with w `[n, k]`, int8, and compare bit for bit with the formula."""
    n, k = w.shape
    a_scale = torch.rand(a.shape[0], generator=torch.Generator().manual_seed(a.shape[0]))
    w_scale = random_scales(n, k, format)
    groups = k // (group_size(format) or k)
    a_sum = a.reshape(a.shape[0], groups, -1).sum(2, dtype=torch.int32)
    picked = torch.arange(a.shape[0]) if rows is None else rows.long()
    out = torch.full((len(picked), n), torch.nan)
    packed, packed_scale = pack_integers(w, format), pack_scales(w_scale, format)
    native.gemm(a, a_scale, a_sum, packed, packed_scale, out, format, rows=rows, isa=isa)
    return same_bits(out, expected_gemm(a[picked], a_scale[picked], w, w_scale, format))


def bf16_gemm_is_close(
    native: Any,
    isa: str,
    a: torch.Tensor,
    w: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> bool:
    """Multiply bf16 a `[*, k]` with w `[n, k]`, and compare within the derived bound."""
    n, k = w.shape
    packed = w.reshape(n // 16, 16, k // 2, 2).transpose(1, 2).contiguous().view(torch.uint8)
    picked = torch.arange(a.shape[0]) if rows is None else rows.long()
    out = torch.full((len(picked), n), torch.nan)
    none = torch.empty(0)
    native.gemm(a, None, None, packed.reshape(-1), none, out, "bf16", rows=rows, isa=isa)
    x, weight = a[picked].double(), w.double()
    return bool(((out.double() - x @ weight.T).abs() <= product_bound(x, weight, "bf16")).all())


def random_integers(m: int, k: int, seed: int, low: int = -127, high: int = 127) -> torch.Tensor:
    """Draw int8 from a whole range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (m, k), generator=generator, dtype=torch.int8)
