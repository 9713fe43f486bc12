"""Rows of queries over a range of cached keys: what absorbed decode and prefill have in common.

With q_c = W_UK^T q_nope and the cached latent c_i and rope part r_i of key i:

    score_i = scaling * (q_c . c_i + q_rope . r_i)
    out     = sum_i softmax(score)_i c_i

so that all heads share one key, and it is read once for a tile of queries and heads. Products are
of the queries' dtype, added up in fp32; the softmax is in fp32, online, to base 2. An fp8 latent
stands for itself times its token's scale, which is applied to scores and weights instead.

Pages are those of `ktransformers.cache`: token i of a sequence is row i % page of its page.

Shape suffixes: B sequences, T queries of each, H heads, L keys, C kv_lora_rank, R
qk_rope_head_dim, P pages; M rows, N keys of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ktransformers.cache import LatentPages
from ktransformers.operators.kernels.launch import is_interpreted

LOG2_E = math.log2(math.e)
MIN_DOT = 16  # the least side of a product of tiles
KEYS = 32  # of a tile: 32 KiB of bf16 latents, of which consumer GPUs hold two beside the queries


@dataclass(frozen=True, slots=True)
class Tiles:
    """How much a program holds, and how it is compiled."""

    rows: int  # of queries times heads
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Launch:
    """What kernels over cached keys are told."""

    rows: int  # of a tile
    cached: tuple[torch.Tensor | None, ...]  # pages and valid, in the kernels' order
    strides: tuple[int, int]  # of the table and of valid
    constants: dict[str, Any]


def choose_tiles(rows: int, capability: tuple[int, int]) -> Tiles:
    """Return tiles for so many rows that share their keys, on a GPU of a compute capability.

    64 rows are what Hopper's `wgmma` multiplies at once, and 216 KiB of shared memory; others take
    what fits the 99 KiB of consumer GPUs. Since a page's number is read before its latents, five
    stages are what has two tiles of these in flight.
    """
    if rows <= MIN_DOT:
        return Tiles(MIN_DOT, KEYS, num_warps=4, num_stages=5)
    if rows <= 2 * MIN_DOT or capability < (9, 0) or capability >= (10, 0):
        return Tiles(2 * MIN_DOT, KEYS, num_warps=8, num_stages=3)
    return Tiles(4 * MIN_DOT, 2 * KEYS, num_warps=8, num_stages=2)


@triton.jit
def attend_keys(
    q_latent,  # [M, BLOCK_C]
    q_rope,  # [M, BLOCK_R]
    visible,  # [M]: a row sees the keys below
    begin,  # a multiple of BLOCK_N
    end,
    latent_ptr,
    scale_ptr,
    rope_ptr,
    table_ptr,  # pages of this sequence
    valid_ptr,  # its flags, 0 for padding; or None
    score_scale,  # scaling * log2(e)
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Return out [M, BLOCK_C], not yet normalised, and for each row the largest score and the sum.

    A row that sees no key gives zeros, and -inf as its largest score. WIDEN has products of fp32,
    which give the same: the interpreter multiplies no bf16.
    """
    DTYPE: tl.constexpr = q_latent.dtype
    if WIDEN:
        q_latent, q_rope = q_latent.to(tl.float32), q_rope.to(tl.float32)
    c, r, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_N):
        page = tl.load(table_ptr + start // PAGE).to(tl.int64)
        row = page * PAGE + start % PAGE + n
        key = start + n
        inside = key < end  # beyond may lie what is no number
        latent = tl.load(
            latent_ptr + row[:, None] * C + c[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        ).to(q_latent.dtype)
        rope = tl.load(
            rope_ptr + row[:, None] * R + r[None, :],
            mask=inside[:, None] & (r < R)[None, :],
            other=0.0,
        ).to(q_rope.dtype)
        score = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
            score *= scale[None, :]
        score = tl.dot(q_rope, tl.trans(rope), score, input_precision="ieee")
        seen = key[None, :] < visible[:, None]
        if valid_ptr is not None:
            seen = seen & (tl.load(valid_ptr + key, mask=inside, other=0) != 0)[None, :]
        score = tl.where(seen, score * score_scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf is no number
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weight, 1)
        if scale_ptr is not None:
            weight *= scale[None, :]
        weight = weight.to(DTYPE).to(latent.dtype)
        out = tl.dot(weight, latent, out * shrink[:, None], input_precision="ieee")
        largest = larger
    return out, largest, total


def padded(width: int) -> int:
    """Return the width of the tile that holds a row."""
    return max(MIN_DOT, int(triton.next_power_of_2(width)))


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability; that of sm_80 for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def prepared(
    kernel: Any,
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    pages: LatentPages,
    valid: torch.Tensor | None,
) -> Launch:
    """Return what decode and prefill tell their kernels alike, of queries [B, T, H, C].

    Raises ValueError for arguments that do not fit together.
    """
    check_attention(q_latent, q_rope, pages, valid)
    (_, T, H, C), R = q_latent.shape, q_rope.shape[-1]
    tiles = choose_tiles(T * H, capability_of(q_latent.device))
    cached = pages.latent, pages.scale, pages.rope, pages.block_table, pages.lengths, valid
    strides = pages.block_table.stride(0), 0 if valid is None else valid.stride(0)
    constants = {
        "C": C,
        "R": R,
        "PAGE": pages.latent.shape[1],
        "BLOCK_N": tiles.keys,
        "BLOCK_C": padded(C),
        "BLOCK_R": padded(R),
        "WIDEN": is_interpreted(kernel),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    return Launch(tiles.rows, cached, strides, constants)


def check_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    pages: LatentPages,
    valid: torch.Tensor | None,
) -> None:
    """Raise ValueError, naming all that is wrong, for arguments that do not fit together.

    Queries are [B, T, H, C] and [B, T, H, R] in bf16 or fp32, their last dimension contiguous.
    """
    B, T, H, C = q_latent.shape
    R, (P, page) = q_rope.shape[-1], pages.latent.shape[:2]
    ints, floats = (torch.int32,), (torch.bfloat16, torch.float32)
    wanted = [
        ("q_latent", q_latent, (B, T, H, C), floats),
        ("q_rope", q_rope, (B, T, H, R), (q_latent.dtype,)),
        ("latent", pages.latent, (P, page, C), (*floats, torch.float8_e4m3fn)),
        ("rope", pages.rope, (P, page, R), floats),
        ("block_table", pages.block_table, (B, pages.block_table.shape[-1]), ints),
        ("lengths", pages.lengths, (B,), ints),
    ]
    if pages.scale is not None:
        wanted.append(("scale", pages.scale, (P, page), (torch.float32,)))
    if valid is not None:
        wanted.append(("valid", valid, (B, valid.shape[-1]), (torch.uint8,)))
    wrong = [
        f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected "
        f"{' or '.join(map(str, dtypes))} {list(shape)} on {q_latent.device}, rows contiguous"
        for name, tensor, shape, dtypes in wanted
        if tensor.shape != shape
        or tensor.dtype not in dtypes
        or tensor.device != q_latent.device
        or tensor.stride(-1) != 1
    ]
    if (pages.latent.dtype == torch.float8_e4m3fn) != (pages.scale is not None):
        wrong.append("scale: there is one for float8_e4m3fn latents, and for those alone")
    if not (pages.latent.is_contiguous() and pages.rope.is_contiguous()):
        wrong.append("latent, rope: lie in rows of both, expected them apart")
    if page % (2 * KEYS):
        wrong.append(f"latent: pages of {page} tokens, expected a multiple of {2 * KEYS}")
    if wrong:
        raise ValueError("latent attention got\n  " + "\n  ".join(wrong))
