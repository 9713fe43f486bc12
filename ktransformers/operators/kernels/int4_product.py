"""The product that kernels with weights in four bits share: a tile of outputs, over some panels.

    acc[n, m] = sum over groups g of scale[n, g] * (part[n, m, g] + (8 - zero[n, g]) * sums[m, g])
    part[n, m, g] = sum over k in g of (q[n, k] - 8) * x[m, k]

A part is the tensor cores': integers of at most 8, exact in fp16 and bf16, times activations as
they come, in fp32. Scales and zero points meet sums, not weights: no weight is rounded twice, and
none waits for its zero point. `sums` are those of x over each group, which an asymmetric format
needs once for all outputs.

The weight is the left factor at every number of tokens: then eight tokens fill a tile of the
tensor cores, where as rows they would waste half of it; and Hopper takes a left factor out of
registers, where the weights are unpacked. Memory is read as `int4_weight` lays it out, through
several stages of asynchronous copies; scales and zero points, too small for those, are read one
panel ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ktransformers.operators.kernels.int4_unpack import unpack_int4


@triton.jit
def _of_groups(values, panel, n, N, GROUP: tl.constexpr):
    """Load values [G, N] of the groups of a panel: a tuple of as many [BLOCK_N, 1], fp32."""
    if GROUP < 0:
        return (tl.load(values + n).to(tl.float32)[:, None],)
    first = values + tl.cast(panel, tl.int64) * (128 // GROUP) * N + n
    if GROUP == 128:
        return (tl.load(first).to(tl.float32)[:, None],)
    elif GROUP == 64:
        return (tl.load(first).to(tl.float32)[:, None], tl.load(first + N).to(tl.float32)[:, None])
    else:
        return (
            tl.load(first).to(tl.float32)[:, None],
            tl.load(first + N).to(tl.float32)[:, None],
            tl.load(first + 2 * N).to(tl.float32)[:, None],
            tl.load(first + 3 * N).to(tl.float32)[:, None],
        )


@triton.jit
def int4_product(
    x,
    sums,
    packed,
    scale,
    zero_point,
    n,
    first,
    last,
    N,
    K,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return acc [BLOCK_N, BLOCK_M] in fp32.

    x, sums: pointers to the first input and the first group of BLOCK_M tokens, [1, BLOCK_M];
        sums is None where the weight is symmetric.
    packed, scale, zero_point: the weight.
    n: the tile's outputs, [BLOCK_N], all of them there.
    first, last: its panels; not empty.
    EVEN_K: whether panels divide K; what is loaded beyond it counts as zero.
    """
    DTYPE: tl.constexpr = x.dtype.scalar.element_ty
    GROUPS: tl.constexpr = 128 // GROUP if GROUP > 0 else 1  # of a panel
    inner = tl.arange(0, 32)
    words_at = packed + n.to(tl.int64)[:, None] * 32 + inner[None, :]
    inputs_at = x + inner[:, None]
    scales = _of_groups(scale, first, n, N, GROUP)
    if zero_point is not None:
        zeros = _of_groups(zero_point, first, n, N, GROUP)
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    for panel in range(first, last):
        words = tl.load(words_at + tl.cast(panel, tl.int64) * N * 32)
        weights = unpack_int4(words, DTYPE, PTX)
        part = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
        for i in tl.static_range(4):
            at = panel * 128 + 32 * i
            if EVEN_K:
                inputs = tl.load(inputs_at + at)
            else:
                inputs = tl.load(inputs_at + at, mask=at + inner[:, None] < K, other=0)
            if GROUP < 0:
                acc = tl.dot(weights[i], inputs, acc)
            else:
                part = tl.dot(weights[i], inputs, part)
                if (i + 1) * 32 % GROUP == 0:
                    if zero_point is not None:
                        sum_x = tl.load(sums + panel * GROUPS + i * 32 // GROUP)
                        part += (8 - zeros[i * 32 // GROUP]) * sum_x
                    acc += part * scales[i * 32 // GROUP]
                    part = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
        if GROUP > 0:
            ahead = tl.minimum(panel + 1, last - 1)
            scales = _of_groups(scale, ahead, n, N, GROUP)
            if zero_point is not None:
                zeros = _of_groups(zero_point, ahead, n, N, GROUP)
    if GROUP < 0:
        if zero_point is not None:
            if first == 0:  # once, however k is split
                acc += (8 - zeros[0]) * tl.load(sums)
        acc *= scales[0]
    return acc
