"""Routed experts from the CPU's packed weights, against dequantised weights.

They run on a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from expert_bounds import ROUNDING, experts_and_bound
from ktransformers.operators.kernels.packed_experts import SortedTokens, packed_experts_reference
from ktransformers.operators.kernels.packed_matrices import PackedMatrices, dequantise
from packed_layer import FORMATS, PackedLayer, random_layer

E = 4
NAMES = ("gate_up_packed", "gate_up_scale", "down_packed", "down_scale")


def tensors(layer: PackedLayer, experts: range, device: torch.device) -> dict[str, torch.Tensor]:
    """Return what a buffer of the device holds of some experts."""
    parts = (tensor[experts.start : experts.stop] for tensor in layer.tensors)
    return {
        name: part.flatten().to(device, copy=True) for name, part in zip(NAMES, parts, strict=True)
    }


def matrices(layer: PackedLayer) -> tuple[PackedMatrices, PackedMatrices]:
    D, F = layer.hidden_size, layer.moe_intermediate_size
    gate_up, gate_up_scale, down, down_scale = (tensor.flatten() for tensor in layer.tensors)
    return (
        PackedMatrices(layer.format, F, D, 2, gate_up, gate_up_scale),
        PackedMatrices(layer.format, D, F, 1, down, down_scale),
    )


def request(T: int, K: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(T)
    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    index[-1, -1] = E  # skipped
    x = torch.randn(T, D, generator=generator).to(dtype)
    return x, index, torch.rand(T, K, generator=generator)


def computed(
    layer: PackedLayer,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    pieces: list[range],
    device: torch.device,
) -> torch.Tensor:
    F = layer.moe_intermediate_size
    E = layer.num_experts
    tokens = SortedTokens(x.to(device), index.to(device), weights.to(device), E, layer.format, F)
    for experts in pieces:
        tokens.add(experts, tensors(layer, experts, device))
    return tokens.result().cpu()


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_stand_for_the_matrices_that_were_packed(format: str) -> None:
    layer = random_layer(2, 100, 36, format=format)  # neither padded size is the real one
    gate_up, down = (dequantise(each).double() for each in matrices(layer))
    want = layer.dequantised
    for got, matrix in (
        (gate_up[:, 0], want.gate),
        (gate_up[:, 1], want.up),
        (down[:, 0], want.down),
    ):
        assert torch.allclose(got, matrix, rtol=2**-23, atol=0)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        *((each, torch.bfloat16) for each in FORMATS),
        ("int4-128", torch.float16),
    ],
)
@pytest.mark.parametrize(("tokens", "D", "F"), [(1, 64, 32), (9, 100, 36)])
def test_layer_is_within_the_derived_bound(
    tokens: int, D: int, F: int, format: str, dtype: torch.dtype, device: torch.device
) -> None:
    layer = random_layer(E, D, F, format=format)
    x, index, weights = request(tokens, 3, D, dtype)
    y = computed(layer, x, index, weights, [range(E)], device)
    assert y.dtype == dtype
    w = layer.dequantised
    # With scales of groups weights are no integers; the interpreter is given bf16 as fp32.
    rounded = "int4" in format and (device.type == "cuda" or dtype == torch.float16)
    exact, bound = experts_and_bound(
        x, index, weights, w.gate, w.up, w.down,
        hidden=dtype, weight_rounding=ROUNDING[dtype] if rounded else 0,
    )  # fmt: skip
    reference = packed_experts_reference(x, index, weights, *matrices(layer))
    for got in (y, reference):
        assert ((got.double() - exact).abs() <= bound).all()
    assert bound.median() < (0.5 if rounded else 0.1) * exact.abs().median()


def test_pieces_add_up_to_the_layer_whatever_the_routing(device: torch.device) -> None:
    layer = random_layer(E, 64, 32)
    x, _, weights = request(20, 2, 64, torch.bfloat16)
    everyone = torch.tensor([2, E]).expand(20, 2)  # one expert has them all, and others nobody
    for index in (everyone, torch.randint(E, (20, 2))):
        whole = computed(layer, x, index, weights, [range(E)], device)
        pieces = [range(3, 4), range(2), range(2, 3)]
        got = computed(layer, x, index, weights, pieces, device)
        # Sums of two in fp32, in another order, and rounded to bf16.
        assert torch.allclose(got, whole, rtol=2**-7, atol=2**-20)


def test_many_tokens_are_computed_a_chunk_at_a_time(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    layer = random_layer(E, 64, 32)
    x, index, weights = request(5, 2, 64, torch.bfloat16)
    whole = computed(layer, x, index, weights, [range(E)], device)
    monkeypatch.setattr("ktransformers.operators.kernels.packed_experts.CHUNK_TOKENS", 2)
    assert torch.equal(computed(layer, x, index, weights, [range(E)], device), whole)


def test_no_tokens_give_nothing(device: torch.device) -> None:
    layer = random_layer(E, 64, 32)
    x, index, weights = request(2, 2, 64, torch.bfloat16)
    assert computed(layer, x[:0], index[:0], weights[:0], [range(E)], device).shape == (0, 64)


def test_what_does_not_fit_is_refused_with_what_was_expected(device: torch.device) -> None:
    layer = random_layer(E, 64, 32)
    x, index, weights = request(2, 2, 64, torch.bfloat16)

    def refused(
        match: str,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        in_format: str = "int8",
        width: int = 32,
    ) -> None:
        with pytest.raises(ValueError, match=match):
            SortedTokens(x, index, weights, E, in_format, width).add(
                range(1), tensors(layer, range(1), device)
            )

    refused("hidden_states is torch.float32, expected float16 or", x.float(), index, weights)
    refused(r"hidden_states is \[1, 2, 64\], expected \[T, D\]", x[None], index, weights)
    refused(r"top_k_index is \[1, 2\], expected \[2, K\]", x, index[:1], weights)
    refused(r"top_k_weights is \[2, 1\], expected \[2, 2\]", x, index, weights[:, :1])
    refused(
        r"^gate_up: 4096 bytes and 64 scales, expected 8192 and 128 for 1 x 2 of \[64, 64\] in int",
        *(x, index, weights),
        width=64,
    )
    refused("format 'int5' is none of", x, index, weights, in_format="int5")
    with pytest.raises(
        ValueError, match=r"weights in bf16 meet bfloat16 activations, not torch.fl"
    ):
        computed(
            random_layer(E, 64, 32, format="bf16"), x.half(), index, weights, [range(E)], device
        )
