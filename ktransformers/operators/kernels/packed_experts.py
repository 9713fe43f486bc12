"""Routed experts on a GPU from the weights that the CPU's kernels read, in the same bytes (w8a16).

    y[t] = sum over slots k of w[t, k] * down_e @ (silu(gate_e @ x[t]) * (up_e @ x[t]))

with e the expert of slot [t, k], over those of some experts that lie together: a piece of a layer.

Integers are exact in fp16 and bf16. Scales of an output (int8) meet the sum; those of a group
(int4) meet the weights, which are rounded once.

Slots are sorted by expert (`blocks_of`); gate and up with SiLU are one kernel, down with the slot's
weight is the same again. Slots are added up in fp32, in their order.

Shape suffixes: T tokens, D hidden_size, E experts of the piece, K top_k, F moe_intermediate_size, P
planes, Q words of an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ktransformers.operators.kernels.int4_experts import Blocks, blocks_of
from ktransformers.operators.kernels.launch import as_multiplied, check_routing, on_device_of
from ktransformers.operators.kernels.packed_matrices import PackedMatrices, dequantise, in_planes

CHUNK_TOKENS = 4096  # at a time: what they give per slot is 0.9 GB with V3's sizes
MOST_SLOTS = 64  # of a block: beside gate and up more find no room in the registers


@triton.jit
def _plane(words, j: tl.constexpr, PLANES: tl.constexpr):
    """Return the jth input of each word, as fp32."""
    if PLANES == 4:
        return (words << (24 - 8 * j) >> 24).to(tl.float32)
    elif PLANES == 8:
        return ((words >> (8 * (j % 4) + 4 * (j // 4)) & 15) - 8).to(tl.float32)
    elif j == 0:
        return (words << 16).to(tl.float32, bitcast=True)
    else:
        return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def packed_product(
    x,
    words,
    scale,
    panel,
    lane,
    WORDS,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return a tile of a matrix times activations in planes, [BLOCK_N, BLOCK_M] in fp32.

    x: pointers to the first input of BLOCK_M rows, [1, BLOCK_M].
    words, scale: the matrix; panel, lane: of the tile's outputs, all of them there.
    EVEN: whether BLOCK_Q divides WORDS; what is loaded beyond counts as zero.
    """
    DTYPE: tl.constexpr = x.dtype.scalar.element_ty
    inner = tl.arange(0, BLOCK_Q)
    words_at = words + (panel * WORDS * 16 + lane)[:, None] + inner[None, :] * 16
    inputs_at = x + inner[:, None]
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    for first in range(0, WORDS, BLOCK_Q):
        inside = first + inner < WORDS
        if EVEN:
            loaded = tl.load(words_at + first * 16)
        else:
            loaded = tl.load(words_at + first * 16, mask=inside[None, :], other=0)
        if GROUP > 0:
            group = tl.minimum(first + inner, WORDS - 1) * PLANES // GROUP
            groups = WORDS * PLANES // GROUP
            scales = tl.load(scale + (panel * groups * 16 + lane)[:, None] + group[None, :] * 16)
        for j in tl.static_range(PLANES):
            weights = _plane(loaded, j, PLANES)
            if GROUP > 0:
                weights *= scales.to(tl.float32)
            if EVEN:
                inputs = tl.load(inputs_at + (j * WORDS + first))
            else:
                inputs = tl.load(inputs_at + (j * WORDS + first), mask=inside[:, None], other=0)
            acc = tl.dot(weights.to(DTYPE), inputs, acc)
    if GROUP == 0:
        if scale is not None:
            acc *= tl.load(scale + (panel * 16 + lane))[:, None]
    return acc


@triton.jit
def packed_experts_kernel(
    x,
    words,
    scale,
    slots,
    experts,
    slot_weights,
    out,
    SLOTS,
    FIRST,
    LAST,
    N,
    PADDED_N,
    WORDS,
    SCALES,
    OUT_WORDS,
    SLOTS_PER_ROW: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Write out[slot, n] for a block of slots and a tile of outputs, if its expert is there.

    With slot_weights: the product times the slot's weight. Without: an expert has two matrices,
    gate before up, and out is silu(gate) * up in planes of OUT_WORDS. Row slot // SLOTS_PER_ROW of
    x, which is in planes, is multiplied. The experts are FIRST to LAST; a matrix has SCALES scales.
    """
    block = tl.program_id(1)
    expert = tl.load(experts + block)
    if (expert < FIRST) | (expert >= LAST):
        return
    slot = tl.load(slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
    row = (tl.minimum(slot, SLOTS - 1) // SLOTS_PER_ROW).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Not of the least of outputs and N: neighbours are to be seen as such.
    panel, lane = tl.minimum(outputs // 16, PADDED_N // 16 - 1), outputs % 16
    x_at = x + (row * WORDS * PLANES)[None, :]
    gated: tl.constexpr = slot_weights is None
    matrix = (expert - FIRST).to(tl.int64) * (2 if gated else 1)
    words += matrix * PADDED_N * WORDS
    if scale is not None:
        scale += matrix * SCALES
    y = packed_product(
        x_at, words, scale, panel, lane, WORDS, PLANES, GROUP, BLOCK_M, BLOCK_N, BLOCK_Q, EVEN
    )
    at = slot.to(tl.int64)[None, :]
    if gated:
        words += PADDED_N * WORDS
        if scale is not None:
            scale += SCALES
        up = packed_product(
            x_at, words, scale, panel, lane, WORDS, PLANES, GROUP, BLOCK_M, BLOCK_N, BLOCK_Q, EVEN
        )
        y = y / (1 + tl.exp(-y)) * up
        column = outputs % PLANES * OUT_WORDS + outputs // PLANES
        at = at * OUT_WORDS * PLANES + column[:, None]
    else:
        y *= tl.load(slot_weights + slot, mask=slot < SLOTS, other=0)[None, :]
        at = at * N + outputs[:, None]
    inside = (slot < SLOTS)[None, :] & (outputs < N)[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


class SortedTokens:
    """A layer's tokens, sorted by expert once for all pieces of its weights."""

    def __init__(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        num_experts: int,
        format: str,
        width: int,
    ):
        """Sort the slots.

        Args:
            hidden_states: [T, D], fp16 or bf16.
            top_k_index: [T, K], integers; the number of experts means "skip this slot".
            top_k_weights: [T, K], floating point.
            num_experts: of the layer.
            format: of the weights, a name of csrc/weights/format.h.
            width: F.

        Raises ValueError for another shape or dtype.
        """
        _check_tokens(hidden_states, top_k_index, top_k_weights)
        self.num_experts = num_experts
        self.format, self.width = format, width
        self.dtype = hidden_states.dtype
        self._chunks = [
            (states, weights.contiguous().float(), blocks_of(index, num_experts, block_m))
            for states, index, weights in zip(
                hidden_states.split(CHUNK_TOKENS),
                top_k_index.split(CHUNK_TOKENS),
                top_k_weights.split(CHUNK_TOKENS),
                strict=True,
            )
            for block_m in [choose_block(index.numel(), num_experts)]
            if index.numel()
        ]
        self._out = torch.zeros(
            hidden_states.shape, dtype=torch.float32, device=hidden_states.device
        )

    def add(self, experts: range, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add what some experts give to their tokens.

        Args:
            experts: of the layer, which lie together.
            tensors: their gate_up_packed, gate_up_scale, down_packed and down_scale, flat.

        Raises ValueError for weights of another shape, or of a format that the activations' dtype
        can't hold.
        """
        D, F = self._out.shape[1], self.width
        gate_up, down = (
            PackedMatrices(
                self.format, n, k, each, tensors[f"{name}_packed"], tensors[f"{name}_scale"]
            )
            for name, n, k, each in (("gate_up", F, D, 2), ("down", D, F, 1))
        )
        _check_weights(gate_up, down, experts, self.dtype)
        begin = 0
        for states, weights, blocks in self._chunks:
            out = self._out[begin : begin + len(states)]
            out += _chunk(states, weights, blocks, gate_up, down, experts.start)
            begin += len(states)

    def result(self) -> torch.Tensor:
        """Return the sum so far, [T, D], in the input's dtype."""
        return self._out.to(self.dtype)


def choose_block(slots: int, num_experts: int) -> int:
    """Return how many slots a block has: about what an expert gets."""
    mean: int = triton.next_power_of_2(triton.cdiv(slots, num_experts))
    return min(max(mean, 16), MOST_SLOTS)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program computes, and how."""

    block_n: int  # outputs
    block_q: int  # words at a time
    num_warps: int = 8
    num_stages: int = 3


def choose_tile(block_m: int, planes: int, *, gated: bool) -> Tile:
    """Return a tile for so many slots; gate and up share the registers."""
    return Tile(64 if gated and block_m > 32 else 128, 16 if planes == 8 else 32)


def _chunk(
    states: torch.Tensor,
    weights: torch.Tensor,
    blocks: Blocks,
    gate_up: PackedMatrices,
    down: PackedMatrices,
    first: int,
) -> torch.Tensor:
    """Return what some experts add to a chunk of tokens, [T, D] in fp32."""
    T, K = weights.shape
    x = as_multiplied(packed_experts_kernel, states)
    x = in_planes(x, gate_up.planes, gate_up.words)
    hidden = torch.zeros(T * K, down.planes * down.words, dtype=x.dtype, device=x.device)
    _launch(x, gate_up, blocks, None, K, hidden, T * K, down.words, first)
    products = torch.zeros(T * K, down.n, dtype=torch.float32, device=x.device)
    _launch(hidden, down, blocks, weights, 1, products, T * K, 0, first)
    return products.view(T, K, down.n).sum(1)


def _launch(
    x: torch.Tensor,
    matrices: PackedMatrices,
    blocks: Blocks,
    slot_weights: torch.Tensor | None,
    slots_per_row: int,
    out: torch.Tensor,
    slots: int,
    out_words: int,
    first: int,
) -> None:
    tile = choose_tile(blocks.block_m, matrices.planes, gated=slot_weights is None)
    with on_device_of(packed_experts_kernel, x):
        packed_experts_kernel[(triton.cdiv(matrices.n, tile.block_n), len(blocks.experts))](
            x,
            matrices.packed.view(torch.int32),
            matrices.scale if matrices.scale.numel() else None,
            blocks.slots,
            blocks.experts,
            slot_weights,
            out,
            slots,
            first,
            first + matrices.experts,
            matrices.n,
            matrices.padded_n,
            matrices.words,
            matrices.scale.numel() // (matrices.experts * matrices.each),
            out_words,
            SLOTS_PER_ROW=slots_per_row,
            PLANES=matrices.planes,
            GROUP=matrices.group,
            BLOCK_M=blocks.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_Q=tile.block_q,
            EVEN=matrices.words % tile.block_q == 0,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _check_tokens(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> None:
    if hidden_states.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"hidden_states is {hidden_states.dtype}, expected float16 or bfloat16")
    if hidden_states.ndim != 2:
        raise ValueError(f"hidden_states is {list(hidden_states.shape)}, expected [T, D]")
    check_routing(hidden_states, top_k_index, top_k_weights)


def _check_weights(
    gate_up: PackedMatrices, down: PackedMatrices, experts: range, dtype: torch.dtype
) -> None:
    gate_up.check("gate_up", len(experts))
    down.check("down", len(experts))
    if gate_up.format == "bf16" and dtype != torch.bfloat16:
        raise ValueError(f"weights in bf16 meet bfloat16 activations, not {dtype}")


def packed_experts_reference(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: PackedMatrices,
    down: PackedMatrices,
    first: int = 0,
) -> torch.Tensor:
    """Dequantise, and compute slot by slot in fp32, for the experts that are there."""
    both, last = dequantise(gate_up), dequantise(down)[:, 0]
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for token, row in enumerate(hidden_states.float()):
        for expert, weight in zip(top_k_index[token], top_k_weights[token], strict=True):
            if not first <= expert < first + gate_up.experts:
                continue
            gate, up = both[int(expert) - first] @ row
            hidden = torch.nn.functional.silu(gate) * up
            out[token] += weight.float() * (last[int(expert) - first] @ hidden)
    return out.to(hidden_states.dtype)
