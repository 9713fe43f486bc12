"""Absorbed latent attention of one new token per sequence, over a paged cache, on a GPU.

Split over the keys (flash-decoding): each program takes some heads of one sequence and a part of
its keys, and writes its normalised output and the logarithm to base 2 of its sum; a second pass
weighs the parts:

    out = sum_s 2^(lse_s - max lse) out_s / sum_s 2^(lse_s - max lse)

The grid depends on shapes alone and every length is read on the device, so that a call can be
recorded in a CUDA graph and replayed with other lengths. See `mla_keys` for the formula and the
shape suffixes; S parts of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktransformers.cache import LatentPages
from ktransformers.operators.kernels.launch import launched, on_device_of
from ktransformers.operators.kernels.mla_keys import LOG2_E, attend_keys, padded, prepared
from ktransformers.operators.kernels.mla_prefill import mla_prefill_reference

MAX_PARTS = 64  # what the second pass holds at once
# Keys of a part, at least: it is written and read as 16 fp32 rows, which is 256 bf16 keys and no
# fewer than a sixteenth of them, for 16 heads.
MIN_PART = 256
PROGRAMS = 2  # for each processor of a GPU: their loads overlap
SUM_COLUMNS = 128


@triton.jit
def decode_parts(
    q_latent_ptr,  # [B, H, C], last dimension contiguous
    q_rope_ptr,  # [B, H, R], likewise
    latent_ptr,
    scale_ptr,
    rope_ptr,
    table_ptr,
    lengths_ptr,
    valid_ptr,
    part_ptr,  # fp32 [B, H, S, C]
    lse_ptr,  # fp32 [B, H, S]
    score_scale,
    H,
    latent_stride_b,
    latent_stride_h,
    rope_stride_b,
    rope_stride_h,
    table_stride,
    valid_stride,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend with some heads of one sequence to a part of its keys."""
    b, s, S = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    length = tl.load(lengths_ptr + b)
    each = tl.cdiv(tl.cdiv(length, S), BLOCK_N) * BLOCK_N
    begin = s * each
    end = tl.minimum(begin + each, length)
    lse = tl.full([BLOCK_H], float("-inf"), tl.float32)
    place = b.to(tl.int64) * H * S + s  # of head 0; the next is S further
    if begin < end:
        q_latent = tl.load(
            q_latent_ptr + b * latent_stride_b + h[:, None] * latent_stride_h + c[None, :],
            mask=(h < H)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        q_rope = tl.load(
            q_rope_ptr + b * rope_stride_b + h[:, None] * rope_stride_h + r[None, :],
            mask=(h < H)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        if valid_ptr is not None:
            valid_ptr += b * valid_stride
        out, largest, total = attend_keys(
            q_latent,
            q_rope,
            tl.full([BLOCK_H], end, tl.int32),
            begin,
            end,
            latent_ptr,
            scale_ptr,
            rope_ptr,
            table_ptr + b * table_stride,
            valid_ptr,
            score_scale,
            C,
            R,
            PAGE,
            BLOCK_H,
            BLOCK_N,
            BLOCK_C,
            BLOCK_R,
            WIDEN,
        )
        total = tl.where(total == 0, 1.0, total)  # all is padding
        lse = largest + tl.log2(total)
        out = out / total[:, None]
        tl.store(
            part_ptr + place * C + h[:, None] * (S * C) + c[None, :],
            out,
            mask=(h < H)[:, None] & (c < C)[None, :],
        )
    tl.store(lse_ptr + place + h * S, lse, mask=h < H)


@triton.jit
def sum_parts(
    part_ptr,  # fp32 [B * H, S, C]
    lse_ptr,  # fp32 [B * H, S]
    out_ptr,  # [B * H, C]
    S,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Weigh the parts of one row, for some columns."""
    row = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lse = tl.load(lse_ptr + row * S + s, mask=s < S, other=float("-inf"))
    largest = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    part = tl.load(
        part_ptr + (row * S + s)[:, None] * C + c[None, :],
        mask=(weight > 0)[:, None] & (c < C)[None, :],  # what saw nothing was never written
        other=0.0,
    )
    total = tl.sum(weight, 0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * C + c, out.to(out_ptr.dtype.element_ty), mask=c < C)


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    pages: LatentPages,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
    parts: int | None = None,
) -> torch.Tensor:
    """Attend with the last token of each sequence; return [B, H, C] in the queries' dtype.

    Args:
        q_latent: W_UK^T q_nope, [B, H, C], bf16 or fp32, last dimension contiguous.
        q_rope: [B, H, R], likewise.
        pages: in the queries' dtype, or in fp8; their lengths count the new token.
        scaling: of scores, YaRN's mscale included.
        valid: uint8 [B, >= L], 0 where a token is padding. A query that sees nothing gives zeros.
        parts: into how many to cut the keys; `choose_parts` where it is not given.

    Raises ValueError for arguments that do not fit together.
    """
    launch = prepared(decode_parts, q_latent[:, None], q_rope[:, None], pages, valid)
    (B, H, C), device = q_latent.shape, q_latent.device
    keys = pages.block_table.shape[1] * pages.latent.shape[1]
    head_tiles = triton.cdiv(H, launch.rows)
    S = parts or choose_parts(B * head_tiles, keys, device)
    part = torch.empty(B, H, S, C, dtype=torch.float32, device=device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=device)
    out = torch.empty(B, H, C, dtype=q_latent.dtype, device=device)
    with on_device_of(decode_parts, q_latent):
        launched(decode_parts)[head_tiles, B, S](
            q_latent,
            q_rope,
            *launch.cached,
            part,
            lse,
            scaling * LOG2_E,
            H,
            *q_latent.stride()[:2],
            *q_rope.stride()[:2],
            *launch.strides,
            BLOCK_H=launch.rows,
            **launch.constants,
        )
        columns = min(SUM_COLUMNS, padded(C))
        launched(sum_parts)[B * H, triton.cdiv(C, columns)](
            part, lse, out, S, C=C, BLOCK_S=triton.next_power_of_2(S), BLOCK_C=columns
        )
    return out


def choose_parts(programs: int, keys: int, device: torch.device) -> int:
    """Return into how many parts to cut up to so many keys, each for so many programs."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-PROGRAMS * processors // programs)
    return max(1, min(wanted, MAX_PARTS, keys // MIN_PART))


def mla_decode_reference(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    pages: LatentPages,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `mla_decode` should, in fp32: it is a chunk of one query."""
    one = mla_prefill_reference(
        q_latent[:, None], q_rope[:, None], pages, scaling=scaling, valid=valid
    )
    return one[:, 0]
