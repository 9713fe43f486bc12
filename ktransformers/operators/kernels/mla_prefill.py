"""Absorbed latent attention of a chunk of queries per sequence, over a paged cache, on a GPU.

The queries are the last of each sequence's cached tokens, and a query sees no later one. A program
takes a tile of rows, neighbouring queries times all heads, so that each key that it reads serves
all of them; it runs over the keys that its last query sees. See `mla_keys` for the formula and the
shape suffixes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktransformers.cache import LatentPages
from ktransformers.operators.kernels.launch import launched, on_device_of
from ktransformers.operators.kernels.mla_keys import LOG2_E, attend_keys, prepared


@triton.jit
def prefill_rows(
    q_latent_ptr,  # [B, T, H, C], last dimension contiguous
    q_rope_ptr,  # [B, T, H, R], likewise
    out_ptr,  # [B, T, H, C]
    latent_ptr,
    scale_ptr,
    rope_ptr,
    table_ptr,
    lengths_ptr,
    valid_ptr,
    score_scale,
    T,
    H,
    latent_stride_b,
    latent_stride_t,
    latent_stride_h,
    rope_stride_b,
    rope_stride_t,
    rope_stride_h,
    table_stride,
    valid_stride,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend with a tile of rows, queries times heads, of one sequence."""
    b = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    t, h, real = m // H, m % H, m < T * H
    first = tl.load(lengths_ptr + b) - T  # the first query's position
    far_b, far_t, far_h = b.to(tl.int64), t.to(tl.int64), h.to(tl.int64)  # beyond 2^31 values
    latent_row = far_b * latent_stride_b + far_t * latent_stride_t + far_h * latent_stride_h
    rope_row = far_b * rope_stride_b + far_t * rope_stride_t + far_h * rope_stride_h
    q_latent = tl.load(
        q_latent_ptr + latent_row[:, None] + c[None, :],
        mask=real[:, None] & (c < C)[None, :],
        other=0.0,
    )
    q_rope = tl.load(
        q_rope_ptr + rope_row[:, None] + r[None, :],
        mask=real[:, None] & (r < R)[None, :],
        other=0.0,
    )
    if valid_ptr is not None:
        valid_ptr += b * valid_stride
    last = tl.minimum((tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // H, T - 1)
    out, _, total = attend_keys(
        q_latent,
        q_rope,
        first + t + 1,
        0,
        first + last + 1,
        latent_ptr,
        scale_ptr,
        rope_ptr,
        table_ptr + b * table_stride,
        valid_ptr,
        score_scale,
        C,
        R,
        PAGE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_C,
        BLOCK_R,
        WIDEN,
    )
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    row = far_b * T * H + m
    tl.store(
        out_ptr + row[:, None] * C + c[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (c < C)[None, :],
    )


def mla_prefill(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    pages: LatentPages,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with the last T tokens of each sequence; return [B, T, H, C] in the queries' dtype.

    Args:
        q_latent: W_UK^T q_nope, [B, T, H, C], bf16 or fp32, last dimension contiguous.
        q_rope: [B, T, H, R], likewise.
        pages: in the queries' dtype, or in fp8; their lengths count the T tokens.
        scaling: of scores, YaRN's mscale included.
        valid: uint8 [B, >= L], 0 where a token is padding. A query that sees nothing gives zeros.

    Raises ValueError for arguments that do not fit together.
    """
    launch = prepared(prefill_rows, q_latent, q_rope, pages, valid)
    B, T, H, C = q_latent.shape
    out = torch.empty(B, T, H, C, dtype=q_latent.dtype, device=q_latent.device)
    with on_device_of(prefill_rows, q_latent):
        launched(prefill_rows)[triton.cdiv(T * H, launch.rows), B](
            q_latent,
            q_rope,
            out,
            *launch.cached,
            scaling * LOG2_E,
            T,
            H,
            *q_latent.stride()[:3],
            *q_rope.stride()[:3],
            *launch.strides,
            BLOCK_M=launch.rows,
            **launch.constants,
        )
    return out


def mla_prefill_reference(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    pages: LatentPages,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `mla_prefill` should, in fp32, sequence by sequence."""
    T = q_latent.shape[1]
    outputs = []
    for b, length in enumerate(pages.lengths.tolist()):
        rows = pages.block_table[b].long().clamp_min(0)  # what is no page lies beyond the length
        latent, rope = pages.latent.float()[rows], pages.rope.float()[rows]
        if pages.scale is not None:
            latent = latent * pages.scale[rows][..., None]
        latent, rope = latent.flatten(0, 1)[:length], rope.flatten(0, 1)[:length]
        score = torch.einsum("thc,lc->htl", q_latent[b].float(), latent)
        score = scaling * (score + torch.einsum("thr,lr->htl", q_rope[b].float(), rope))
        key, query = torch.arange(length), torch.arange(length - T, length)[:, None]
        seen = (key <= query).to(score.device)
        if valid is not None:
            seen = seen & (valid[b, :length] != 0)
        weight = score.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)  # 0 / 0: saw none
        outputs.append(torch.einsum("htl,lc->thc", weight, latent))
    return torch.stack(outputs)
