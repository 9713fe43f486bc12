"""The second pass of a product whose k was split among programs: the sum of their parts.

    y[m, n] = sum over s of partial[s, m, n] + bias[n]

in fp32, in ascending order of s, then rounded once: the same bits every time, which atomic
additions would not give.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktransformers.operators.kernels.launch import launched, on_device_of

BLOCK = 1024


@triton.jit
def split_sum_kernel(partial, bias, out, elements, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum a block of flat [m, n]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.load(partial + at, mask=inside, other=0)
    for split in range(1, SPLITS):
        part = partial + tl.cast(elements, tl.int64) * split
        total += tl.load(part + at, mask=inside, other=0)
    if bias is not None:
        total += tl.load(bias + at % N, mask=inside, other=0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def split_sum(partial: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum over the first dimension of contiguous fp32 [splits, m, n], plus bias [n]."""
    splits, M, N = partial.shape
    assert partial.dtype == torch.float32
    assert partial.is_contiguous()
    out = torch.empty(M, N, dtype=dtype, device=partial.device)
    grid = (triton.cdiv(M * N, BLOCK),)
    with on_device_of(split_sum_kernel, partial):
        launched(split_sum_kernel)[grid](partial, bias, out, M * N, N, SPLITS=splits, BLOCK=BLOCK)
    return out


def split_sum_reference(
    partial: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Do the same in torch."""
    total = partial[0].clone()
    for part in partial[1:]:
        total += part
    return (total if bias is None else total + bias).to(dtype)
