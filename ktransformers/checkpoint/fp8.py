"""Block-scaled FP8, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3, and its inference code).

A weight of R rows and K columns is stored as float8_e4m3fn with one scale for each block of
`bm` x `bk` elements; blocks at the edges may be smaller:

    real[r, k] = weight[r, k] * scale_inv[r // bm, k // bk]

The name `scale_inv` is the format's: the inverse of what the weight was multiplied by.
"""

from __future__ import annotations

from typing import TypeVar

import torch

SCALE_SUFFIX = "_scale_inv"
DEFAULT_BLOCK = (128, 128)  # of the official checkpoints

Row = TypeVar("Row", int, torch.Tensor)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight of `shape`, whose last two dims are blocked."""
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


def scale_row(row: Row, rows: int, block_rows: int) -> Row:
    """Return which row of the scales a row of the weight takes; works on a tensor of rows too.

    Both are counted through leading dims: `row` lies in matrix `row // rows` of the stack.
    """
    return row // rows * -(-rows // block_rows) + row % rows // block_rows


def apply_scales(
    weight: torch.Tensor, row_scales: torch.Tensor, block_columns: int
) -> torch.Tensor:
    """Dequantise an FP8 `weight` [n, K] to float32.

    `row_scales` [n, ceil(K / block_columns)], float32, holds the scales of each row.
    """
    real, factor = _widen(weight)
    row_scales = row_scales * factor
    whole = weight.shape[1] // block_columns
    edge = whole * block_columns
    if whole:
        blocks = real[:, :edge].view(-1, whole, block_columns)
        blocks.mul_(row_scales[:, :whole, None])
    if edge < weight.shape[1]:
        real[:, edge:].mul_(row_scales[:, whole:])
    return real


def _widen(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return float32 values and the factor that they lack of what `weight` means.

    float8_e4m3fn is float16 with a shorter exponent and mantissa: with its bits moved to where
    float16 has them, what is missing is 2 ** (15 - 7), the difference of the exponents' biases.
    NaN alone has other bits. Takes half of the time of torch's conversion, which goes value by
    value.
    """
    bits = weight.view(torch.int8)
    if weight.numel() == 0 or bits.bitwise_and(0x7F).amax() == 0x7F:
        return weight.to(torch.float32), 1
    half = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # the sign came twice
    return half.view(torch.float16).to(torch.float32), 256
