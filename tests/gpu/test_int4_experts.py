"""Routed experts with weights in four bits, against dequantised weights.

They run on a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from ktransformers.operators.kernels.int4_experts import (
    blocks_of,
    choose_block,
    int4_experts,
    int4_experts_reference,
)
from ktransformers.operators.kernels.int4_weight import (
    Int4Format,
    Int4Weight,
    dequantise,
    quantise,
)

E, D, F = 4, 96, 64
U = 2.0**-24  # unit roundoff of fp32


@pytest.mark.parametrize("block_m", [1, 8, 16])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 4), (5, 3), (40, 2)])
def test_every_slot_is_in_one_block_of_its_expert(tokens: int, top_k: int, block_m: int) -> None:
    index = torch.randint(E + 1, (tokens, top_k))  # E: skipped
    blocks = blocks_of(index, E, block_m)
    found: dict[int, int] = {}
    for slots, expert in zip(blocks.slots.tolist(), blocks.experts.tolist(), strict=True):
        real = [slot for slot in slots if slot < index.numel()]
        assert bool(real) == (expert < E)
        found |= dict.fromkeys(real, expert)
    flat = enumerate(index.flatten().tolist())
    assert found == {slot: expert for slot, expert in flat if expert < E}


def test_blocks_hold_what_all_tokens_for_one_expert_need() -> None:
    blocks = blocks_of(torch.full((33, 1), 2), E, 8)
    assert blocks.experts.tolist() == [2] * 5 + [E] * (len(blocks.experts) - 5)
    assert blocks.slots.flatten()[:33].tolist() == list(range(33))


def test_block_is_about_what_an_expert_gets() -> None:
    assert choose_block(1, 8, 256, symmetric=True) == 8
    assert choose_block(512, 8, 256, symmetric=True) == 16
    assert choose_block(4096, 8, 256, symmetric=True) == 64


def experts(format: Int4Format, device: torch.device) -> tuple[Int4Weight, Int4Weight]:
    generator = torch.Generator().manual_seed(0)

    def several(n: int, k: int) -> Int4Weight:
        each = [
            quantise(torch.randn(n, k, generator=generator), format).tensors() for _ in range(E)
        ]
        stacked = {name: torch.stack([one[name] for one in each]).to(device) for name in each[0]}
        return Int4Weight.of(format, k, stacked)

    return several(2 * F, D), several(D, F)


def assert_close(
    y: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Int4Weight,
    down: Int4Weight,
) -> None:
    """Compare with the layer in fp64, within what its steps may lose, one after the other.

    A product of k terms loses k + 5 roundings of fp32 of what is summed, as that of a projection;
    SiLU passes an error on at most 1.1 times, and its exponential may lose 2^-20 itself.
    """
    rounding = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[y.dtype]
    exact, bound = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x).double()
    for token, row in enumerate(x.double()):
        for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
            if expert == E:
                continue
            matrix, summed = matrices(gate_up[expert])
            gate, up = (matrix @ row).chunk(2)
            gate_error, up_error = ((D + 5) * U * (summed @ row.abs())).chunk(2)
            silu = torch.nn.functional.silu(gate)
            silu_error = 1.1 * gate_error + 2.0**-20 * silu.abs()
            hidden = silu * up
            error = silu_error * (up.abs() + up_error) + silu.abs() * up_error
            error += rounding * (hidden.abs() + error)
            matrix, summed = matrices(down[expert])
            exact[token] += weight * (matrix @ hidden)
            lost = matrix.abs() @ error + (F + 5) * U * (summed @ (hidden.abs() + error))
            bound[token] += abs(weight) * lost
    bound += (rounding + 8 * U) * (exact.abs() + bound)
    assert ((y.double() - exact).abs() <= bound).all()
    assert bound.median() < 0.05 * exact.abs().median()


def matrices(weight: Int4Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix, and the magnitude of what its kernel sums: q - 8 and 8 - zero apart."""
    eight = Int4Weight.of(
        Int4Format(weight.format.group_size, True),
        weight.in_features,
        {"packed": weight.packed, "scale": weight.scale},
    )
    matrix, symmetric = dequantise(weight).double(), dequantise(eight).double()
    return matrix, symmetric.abs() + (matrix - symmetric).abs()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", [Int4Format(32, False), Int4Format(-1, True)], ids=str)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (9, 3)])
def test_layer_is_within_the_derived_bound(
    tokens: int, top_k: int, format: Int4Format, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    gate_up, down = experts(format, device)
    x = torch.randn(tokens, D, generator=generator).to(device, dtype)
    index = torch.stack([torch.randperm(E, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    index[-1, -1] = E  # skipped
    index, weights = index.to(device), weights.to(device)
    y = int4_experts(x, index, weights, gate_up, down)
    assert y.dtype == dtype
    assert_close(y, x, index, weights, gate_up, down)
    assert_close(
        int4_experts_reference(x, index, weights, gate_up, down), x, index, weights, gate_up, down
    )


def test_tokens_that_skip_all_experts_get_zeros_and_none_get_nothing(device: torch.device) -> None:
    gate_up, down = experts(Int4Format(32, True), device)
    x = torch.randn(2, D, device=device).half()
    index = torch.tensor([[E, E], [1, E]], device=device)
    y = int4_experts(x, index, torch.ones(2, 2, device=device), gate_up, down)
    assert (y[0] == 0).all()
    assert (y[1] != 0).any()
    assert int4_experts(x[:0], index[:0], torch.ones(0, 2), gate_up, down).shape == (0, D)


def test_many_tokens_are_computed_a_chunk_at_a_time(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    gate_up, down = experts(Int4Format(32, True), device)
    x, index = torch.randn(3, D, device=device).half(), torch.tensor([[1], [2], [1]], device=device)
    weights = torch.rand(3, 1, device=device)
    whole = int4_experts(x, index, weights, gate_up, down)
    monkeypatch.setattr("ktransformers.operators.kernels.int4_experts.CHUNK_TOKENS", 2)
    assert torch.equal(int4_experts(x, index, weights, gate_up, down), whole)


def test_what_does_not_fit_is_refused_with_what_was_expected(device: torch.device) -> None:
    gate_up, down = experts(Int4Format(32, True), device)
    x, index, weights = torch.randn(2, D).half(), torch.zeros(2, 1).long(), torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"hidden_states is \[2, 64\], expected \[T, 96\]"):
        int4_experts(x[:, :64], index, weights, gate_up, down)
    with pytest.raises(ValueError, match=r"hidden_states is torch.float32, expected float16 or"):
        int4_experts(x.float(), index, weights, gate_up, down)
    with pytest.raises(ValueError, match=r"top_k_index is \[1, 1\], expected \[2, K\]"):
        int4_experts(x, index[:1], weights, gate_up, down)
    with pytest.raises(ValueError, match=r"top_k_weights is \[1, 1\], expected \[2, 1\]"):
        int4_experts(x, index, weights[:1], gate_up, down)
    with pytest.raises(ValueError, match=r"down is 4 of \[128, 96\], expected 4 of \[96, 64\]"):
        int4_experts(x, index, weights, gate_up, gate_up)
