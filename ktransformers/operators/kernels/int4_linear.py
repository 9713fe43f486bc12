"""A dense projection with weights in four bits (w4a16): y = x @ weight.T + bias.

    y[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n]

The product of a tile is `int4_product`. Where a few tokens leave too few programs to keep the
memory busy, k is split among several, whose parts a second pass adds up (`split_sum`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ktransformers.operators.kernels.int4_product import int4_product
from ktransformers.operators.kernels.int4_weight import PANEL, Int4Weight, dequantise
from ktransformers.operators.kernels.launch import as_multiplied, launched, on_device_of, takes_ptx
from ktransformers.operators.kernels.split_sum import split_sum

# Programs that keep a GPU busy, after the 132 processors of an H100 (a 4090 has 128): one each
# where they compute, some four where they wait for memory.
COMPUTING_PROGRAMS = 132
READING_PROGRAMS = 528
LEAST_PANELS = 4  # of a split: fewer never fill the stages


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut among programs."""

    block_m: int
    block_n: int
    panels_per_split: int
    splits: int
    num_warps: int
    num_stages: int


def choose_tiles(m: int, n: int, k: int, *, symmetric: bool) -> Tiles:
    """Cut a product of m tokens with an [n, k] weight."""
    # Beside 128 tokens zero points find no room in the registers.
    block_m = min(max(triton.next_power_of_2(m), 8), 128 if symmetric else 64)
    reading = block_m <= 16
    block_n = 64 if reading else 128
    panels = triton.cdiv(k, PANEL)
    programs = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    wanted = (READING_PROGRAMS if reading else COMPUTING_PROGRAMS) // programs
    splits = max(min(wanted, panels // LEAST_PANELS), 1)
    panels_per_split = triton.cdiv(panels, splits)
    return Tiles(
        block_m=block_m,
        block_n=block_n,
        panels_per_split=panels_per_split,
        splits=triton.cdiv(panels, panels_per_split),
        num_warps=4 if reading else 8,
        num_stages=5 if reading else 3,
    )


@triton.jit
def int4_linear_kernel(
    x,
    sums,
    packed,
    scale,
    zero_point,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    sums_stride,
    panels_per_split,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
):
    """Write out[split, m, n] for a tile and a split; with one split, that is y.

    Programs next to each other have the same outputs: they share the weight in the L2.
    """
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    n = tl.minimum(outputs, N - 1)
    m = tl.minimum(tokens, M - 1).to(tl.int64)
    first = split * panels_per_split
    last = tl.minimum(first + panels_per_split, (K + 127) // 128)
    x_at = x + (m * x_stride)[None, :]
    sums_at = None if sums is None else sums + (m * sums_stride)[None, :]
    y = int4_product(
        x_at, sums_at, packed, scale, zero_point, n, first, last, N, K,
        GROUP, BLOCK_M, BLOCK_N, EVEN_K, PTX,
    )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + n)[:, None]
    at = (split * M + tokens.to(tl.int64)[None, :]) * N + outputs[:, None]
    inside = (tokens < M)[None, :] & (outputs < N)[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def int4_linear(
    x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x @ weight.T + bias, [*, n] in the dtype of x.

    Args:
        x: [*, k], fp16 or bf16.
        weight: [n, k], on the device of x.
        bias: [n] in fp32.

    Raises ValueError for another shape, dtype or device.
    """
    K, N = weight.in_features, weight.out_features
    _check(x, weight, bias)
    rows = as_multiplied(int4_linear_kernel, x.reshape(-1, K))
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    M = len(rows)
    if M == 0:
        return x.new_empty(*x.shape[:-1], N)
    sums = None if weight.format.symmetric else group_sums(rows, weight)
    tiles = choose_tiles(M, N, K, symmetric=weight.format.symmetric)
    one_pass = tiles.splits == 1
    shape = (M, N) if one_pass else (tiles.splits, M, N)
    out = torch.empty(shape, dtype=rows.dtype if one_pass else torch.float32, device=x.device)
    grid = (triton.cdiv(M, tiles.block_m), triton.cdiv(N, tiles.block_n), tiles.splits)
    with on_device_of(int4_linear_kernel, x):
        launched(int4_linear_kernel)[grid](
            rows,
            sums,
            weight.packed,
            weight.scale,
            weight.zero_point,
            bias if one_pass else None,
            out,
            M,
            N,
            K,
            rows.stride(0),
            weight.groups,
            tiles.panels_per_split,
            GROUP=weight.format.group_size,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            EVEN_K=K % PANEL == 0,
            PTX=takes_ptx(int4_linear_kernel),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    y = out if one_pass else split_sum(out, bias, rows.dtype)
    return y.to(x.dtype).view(*x.shape[:-1], N)


def group_sums(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """Return the sums of x [m, k] over each group of a weight, [m, groups] in fp32.

    Groups past k, which fill up the last panel, have none.
    """
    size = weight.format.group_size
    sums = x.unflatten(1, (-1, size if size > 0 else x.shape[1])).sum(-1, dtype=torch.float32)
    return torch.nn.functional.pad(sums, (0, weight.groups - sums.shape[1]))


def _check(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None) -> None:
    K, N = weight.in_features, weight.out_features
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}, expected float16 or bfloat16")
    if x.shape[-1:] != (K,):
        raise ValueError(f"x is {list(x.shape)}, expected [*, {K}]")
    if x.device != weight.packed.device:
        raise ValueError(f"x is on {x.device}, expected {weight.packed.device}, as the weight is")
    if bias is not None and (bias.shape, bias.dtype) != ((N,), torch.float32):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, expected float32 [{N}]")


def int4_linear_reference(
    x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Dequantise, and multiply in fp32."""
    y = x.float() @ dequantise(weight).T
    return (y if bias is None else y + bias).to(x.dtype)
