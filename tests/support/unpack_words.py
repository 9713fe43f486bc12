"""A kernel around `unpack_int4`, which alone is none."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktransformers.operators.kernels.int4_unpack import unpack_int4


@triton.jit
def unpack_words_kernel(words, out, COUNT: tl.constexpr, PTX: tl.constexpr):
    """Write [4, COUNT]."""
    at = tl.arange(0, COUNT)
    planes = unpack_int4(tl.load(words + at), out.dtype.element_ty, PTX)
    for i in tl.static_range(4):
        tl.store(out + i * COUNT + at, planes[i])


def unpack_words(words: torch.Tensor, dtype: torch.dtype, *, ptx: bool) -> torch.Tensor:
    """Return the nibbles of int16 words minus 8, [4, count]."""
    out = torch.empty(4, len(words), dtype=dtype, device=words.device)
    unpack_words_kernel[(1,)](words, out, COUNT=len(words), PTX=ptx, num_warps=8)
    return out
