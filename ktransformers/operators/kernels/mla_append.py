"""New tokens into a paged latent cache, on a GPU.

Where a token belongs is computed on the device, from the lengths that count it already: a call can
be recorded in a CUDA graph. What fp8 latents are rounded to is `ktransformers.cache`'s; the kernel
moves values as they are. See `mla_keys` for the shape suffixes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktransformers.cache import LatentPages
from ktransformers.cache_rounding import quantised
from ktransformers.operators.kernels.launch import launched, on_device_of
from ktransformers.operators.kernels.mla_keys import padded


@triton.jit
def append_token(
    new_latent_ptr,  # [B, T, C], last dimension contiguous
    new_scale_ptr,  # [B, T], contiguous; or None, like scale_ptr
    new_rope_ptr,  # [B, T, R], last dimension contiguous
    latent_ptr,
    scale_ptr,
    rope_ptr,
    table_ptr,
    lengths_ptr,
    latent_stride_b,
    latent_stride_t,
    rope_stride_b,
    rope_stride_t,
    table_stride,
    latent_row,  # how far a token's row is from the last; pages lie one after another
    rope_row,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write one token of one sequence."""
    t, T, b = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    position = tl.load(lengths_ptr + b) - T + t
    page = tl.load(table_ptr + b * table_stride + position // PAGE).to(tl.int64)
    row = page * PAGE + position % PAGE
    latent = tl.load(new_latent_ptr + b * latent_stride_b + t * latent_stride_t + c, mask=c < C)
    tl.store(latent_ptr + row * latent_row + c, latent, mask=c < C)
    rope = tl.load(new_rope_ptr + b * rope_stride_b + t * rope_stride_t + r, mask=r < R)
    tl.store(rope_ptr + row * rope_row + r, rope, mask=r < R)
    if scale_ptr is not None:
        tl.store(scale_ptr + row, tl.load(new_scale_ptr + b * T + t))


def mla_append(latent: torch.Tensor, rope: torch.Tensor, pages: LatentPages) -> None:
    """Write new tokens, [B, T, C] and [B, T, R], as the last of each sequence that lengths count.

    Raises ValueError for shapes and strides that do not fit together.
    """
    (B, T, C), R = latent.shape, rope.shape[-1]
    P, page = pages.latent.shape[:2]
    found = (rope.shape, pages.latent.shape, pages.rope.shape, pages.lengths.shape)
    wanted = ((B, T, R), (P, page, C), (P, page, R), (B,))
    if found != wanted:
        names = "rope, pages of latents and of rope parts, lengths"
        raise ValueError(f"{names} of shapes {found}, expected {wanted}")
    for values in (pages.latent, pages.rope):
        if values.stride() != (page * values.stride(1), values.stride(1), 1):
            raise ValueError(f"pages of strides {values.stride()}, expected them one after another")
    into, scale = pages.latent, None
    if pages.scale is None:
        latent = latent.to(into.dtype)
    else:
        rows, scale = quantised(latent.reshape(B * T, C), into.dtype)
        latent, into = rows.view(torch.uint8).view(B, T, C), into.view(torch.uint8)
    latent = latent if latent.stride(-1) == 1 else latent.contiguous()
    rope = rope.to(pages.rope.dtype)
    rope = rope if rope.stride(-1) == 1 else rope.contiguous()
    with on_device_of(append_token, latent):
        launched(append_token)[T, B](
            latent,
            scale,
            rope,
            into,
            pages.scale,
            pages.rope,
            pages.block_table,
            pages.lengths,
            *latent.stride()[:2],
            *rope.stride()[:2],
            pages.block_table.stride(0),
            into.stride(1),
            pages.rope.stride(1),
            C=C,
            R=R,
            PAGE=page,
            BLOCK_C=padded(C),
            BLOCK_R=padded(R),
        )


def mla_append_reference(latent: torch.Tensor, rope: torch.Tensor, pages: LatentPages) -> None:
    """Do what `mla_append` should, token by token."""
    page, T = pages.latent.shape[1], latent.shape[1]
    for b, length in enumerate(pages.lengths.tolist()):
        for t in range(T):
            position = length - T + t
            at = int(pages.block_table[b, position // page]), position % page
            row = latent[b, t]
            if pages.scale is not None:
                largest = torch.finfo(pages.latent.dtype).max
                pages.scale[at] = row.float().abs().max() / largest
                row = row.float() / pages.scale[at]
            pages.latent[at] = row.to(pages.latent.dtype)
            pages.rope[at] = rope[b, t].to(pages.rope.dtype)
