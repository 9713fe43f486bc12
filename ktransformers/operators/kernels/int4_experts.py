"""Routed experts with weights in four bits (w4a16), a layer's all at once.

    y[t] = sum over slots k of w[t, k] * down_e @ (silu(gate_e @ x[t]) * (up_e @ x[t]))

with e the expert of slot [t, k].

Slots are sorted by expert and cut into blocks of one expert each (`blocks_of`), by torch and
without the host's knowing how many there are: a CUDA graph may hold all of it. One kernel does
gate and up with SiLU for a block, and again down with the slot's weight, both by `int4_product`.
Slots are added up in fp32, in their order.

Shape suffixes: T tokens, D hidden_size, E experts, K top_k, F moe_intermediate_size, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ktransformers.operators.kernels.int4_linear import group_sums
from ktransformers.operators.kernels.int4_product import int4_product
from ktransformers.operators.kernels.int4_weight import PANEL, Int4Weight, dequantise
from ktransformers.operators.kernels.launch import (
    as_multiplied,
    check_routing,
    launched,
    on_device_of,
    takes_ptx,
)

CHUNK_TOKENS = 4096  # at a time: what they give per slot is 0.9 GB with V3's sizes


@dataclass(frozen=True, slots=True)
class Blocks:
    """Slots in blocks of one expert each."""

    slots: torch.Tensor  # [B, block_m] int32, of T * K, which itself means none
    experts: torch.Tensor  # [B] int32; E, past the last block
    block_m: int


def choose_block(tokens: int, top_k: int, num_experts: int, *, symmetric: bool) -> int:
    """Return how many slots a block has: about what an expert gets."""
    mean: int = triton.next_power_of_2(triton.cdiv(tokens * top_k, num_experts))
    # Beside 64 slots of gate and as many of up zero points find no room in the registers.
    return min(max(mean, 8), 64 if symmetric else 32)


def blocks_of(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> Blocks:
    """Sort slots [T, K] by expert, each expert's beginning a block of its own.

    An index equal to the number of experts means that the slot is skipped.
    """
    device, count = top_k_index.device, top_k_index.numel()
    experts = top_k_index.flatten().long()
    sizes = torch.zeros(num_experts + 1, dtype=torch.long, device=device)
    sizes.scatter_add_(0, experts, torch.ones_like(experts))
    begins = sizes.cumsum(0) - sizes
    ends_of_blocks = ((sizes[:num_experts] + block_m - 1) // block_m).cumsum(0)
    blocks = min(count, num_experts + count // block_m)  # no more are ever needed
    order = experts.argsort(stable=True)
    expert = experts[order]
    block_begins = torch.nn.functional.pad(ends_of_blocks, (1, 0))[expert] * block_m
    at = block_begins + torch.arange(count, device=device) - begins[expert]
    at = at.where(expert < num_experts, blocks * block_m)  # past the end: cut off
    slots = torch.full((blocks * block_m + 1,), count, dtype=torch.int32, device=device)
    slots[at] = order.int()
    first = torch.arange(blocks, device=device)
    owners = torch.searchsorted(ends_of_blocks, first, right=True).int()
    return Blocks(slots[:-1].view(blocks, block_m), owners, block_m)


@triton.jit
def int4_experts_kernel(
    x,
    sums,
    packed,
    scale,
    zero_point,
    slots,
    experts,
    slot_weights,
    out,
    SLOTS,
    EXPERTS,
    N,
    K,
    PANELS,
    GROUPS,
    SLOTS_PER_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
):
    """Write out[slot, n] for a block of slots and a tile of outputs.

    With slot_weights: the product times the slot's weight. Without: N is 2 F, gate before up, and
    out is silu(gate) * up, [slot, F]. Row slot // SLOTS_PER_ROW of x is multiplied.
    """
    block = tl.program_id(1)
    expert = tl.load(experts + block).to(tl.int64)
    if expert >= EXPERTS:
        return
    slot = tl.load(slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
    row = (tl.minimum(slot, SLOTS - 1) // SLOTS_PER_ROW).to(tl.int64)
    width = N if slot_weights is not None else N // 2
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(outputs, width - 1)
    x_at = x + (row * K)[None, :]
    sums_at = None if sums is None else sums + (row * GROUPS)[None, :]
    packed += expert * PANELS * N * 32
    scale += expert * GROUPS * N
    if zero_point is not None:
        zero_point += expert * GROUPS * N
    y = int4_product(
        x_at, sums_at, packed, scale, zero_point, n, 0, PANELS, N, K,
        GROUP, BLOCK_M, BLOCK_N, EVEN_K, PTX,
    )  # fmt: skip
    if slot_weights is None:
        up = int4_product(
            x_at, sums_at, packed, scale, zero_point, n + width, 0, PANELS, N, K,
            GROUP, BLOCK_M, BLOCK_N, EVEN_K, PTX,
        )  # fmt: skip
        y = y / (1 + tl.exp(-y)) * up
    else:
        y *= tl.load(slot_weights + slot, mask=slot < SLOTS, other=0)[None, :]
    at = slot.to(tl.int64)[None, :] * width + outputs[:, None]
    inside = (slot < SLOTS)[None, :] & (outputs < width)[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def int4_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Int4Weight,
    down: Int4Weight,
) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs, [T, D], in the input's dtype.

    Args:
        hidden_states: [T, D], fp16 or bf16.
        top_k_index: [T, K], integers; the number of experts means "skip this slot".
        top_k_weights: [T, K], floating point.
        gate_up, down: of all experts, [2 F, D] with gate before up, and [D, F].

    Raises ValueError for another shape or dtype.
    """
    _check(hidden_states, top_k_index, top_k_weights, gate_up, down)
    T, K = top_k_index.shape
    E = len(gate_up.packed)
    if T > CHUNK_TOKENS:
        chunks = zip(
            hidden_states.split(CHUNK_TOKENS),
            top_k_index.split(CHUNK_TOKENS),
            top_k_weights.split(CHUNK_TOKENS),
            strict=True,
        )
        return torch.cat([int4_experts(x, i, w, gate_up, down) for x, i, w in chunks])
    if T * K == 0:
        return torch.zeros_like(hidden_states)
    blocks = blocks_of(top_k_index, E, choose_block(T, K, E, symmetric=gate_up.format.symmetric))
    x = as_multiplied(int4_experts_kernel, hidden_states.contiguous())
    F, D = down.in_features, down.out_features
    hidden = torch.zeros(T * K, F, dtype=x.dtype, device=x.device)
    _launch(x, gate_up, blocks, None, K, hidden)
    products = torch.zeros(T * K, D, dtype=torch.float32, device=x.device)
    weights = top_k_weights.contiguous().float()
    _launch(hidden, down, blocks, weights, 1, products)
    return products.view(T, K, D).sum(1).to(hidden_states.dtype)


def _launch(
    x: torch.Tensor,
    weight: Int4Weight,
    blocks: Blocks,
    slot_weights: torch.Tensor | None,
    slots_per_row: int,
    out: torch.Tensor,
) -> None:
    few = blocks.block_m <= 16
    block_n = 64 if few else 128
    E, panels = weight.packed.shape[:2]
    grid = (triton.cdiv(out.shape[1], block_n), len(blocks.experts))
    with on_device_of(int4_experts_kernel, x):
        launched(int4_experts_kernel)[grid](
            x,
            None if weight.format.symmetric else group_sums(x, weight),
            weight.packed,
            weight.scale,
            weight.zero_point,
            blocks.slots,
            blocks.experts,
            slot_weights,
            out,
            len(out),
            E,
            weight.out_features,
            weight.in_features,
            panels,
            weight.groups,
            SLOTS_PER_ROW=slots_per_row,
            GROUP=weight.format.group_size,
            BLOCK_M=blocks.block_m,
            BLOCK_N=block_n,
            EVEN_K=weight.in_features % PANEL == 0,
            PTX=takes_ptx(int4_experts_kernel),
            num_warps=4 if few else 8,
            num_stages=5 if few else 3,
        )


def _check(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Int4Weight,
    down: Int4Weight,
) -> None:
    E, D, F = len(gate_up.packed), gate_up.in_features, down.in_features
    if (len(down.packed), gate_up.out_features, down.out_features) != (E, 2 * F, D):
        raise ValueError(
            f"down is {len(down.packed)} of [{down.out_features}, {F}], expected {E} of "
            f"[{D}, {gate_up.out_features // 2}]"
        )
    if hidden_states.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"hidden_states is {hidden_states.dtype}, expected float16 or bfloat16")
    if hidden_states.ndim != 2 or hidden_states.shape[1] != D:
        raise ValueError(f"hidden_states is {list(hidden_states.shape)}, expected [T, {D}]")
    check_routing(hidden_states, top_k_index, top_k_weights)


def int4_experts_reference(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Int4Weight,
    down: Int4Weight,
) -> torch.Tensor:
    """Dequantise, and compute slot by slot in fp32."""
    E = len(gate_up.packed)
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for token, row in enumerate(hidden_states.float()):
        for expert, weight in zip(top_k_index[token], top_k_weights[token], strict=True):
            if expert == E:
                continue
            gate, up = (dequantise(gate_up[int(expert)]) @ row).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            out[token] += weight.float() * (dequantise(down[int(expert)]) @ hidden)
    return out.to(hidden_states.dtype)
