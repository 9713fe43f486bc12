"""Weights in four bits: their layout, and how far quantising moves them."""

from __future__ import annotations

import pytest
import torch

from ktransformers.operators.kernels.int4_weight import (
    GROUP_SIZES,
    Int4Format,
    dequantise,
    pack,
    quantise,
    unpack,
)
from packed_layer import dequantised as cpu_dequantised
from packed_layer import pack as cpu_pack

FORMATS = [Int4Format(size, symmetric) for size in GROUP_SIZES for symmetric in (True, False)]


@pytest.mark.parametrize("k", [1, 32, 127, 128, 129, 300])
def test_packing_loses_no_integer(k: int) -> None:
    q = torch.randint(16, (5, k), dtype=torch.uint8)
    packed = pack(q)
    assert packed.shape == (-(-k // 128), 5, 32)
    assert torch.equal(unpack(packed, k), q)


def test_word_holds_four_inputs_that_are_32_apart() -> None:
    q = torch.randint(16, (3, 256), dtype=torch.uint8)
    word = int(pack(q)[1, 2, 5]) & 0xFFFF
    assert [word >> 4 * s & 15 for s in range(4)] == [int(q[2, 133 + 32 * s]) for s in range(4)]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_weights_on_the_grid_come_back_exactly(format: Int4Format) -> None:
    group = 256 if format.group_size < 0 else format.group_size
    q = torch.randint(16, (3, 256 // group, group))
    q[..., 0], q[..., 1] = 0, 15  # the search finds a grid only where both ends are used
    zero = torch.full((3, 256 // group, 1), 8)
    if not format.symmetric:
        zero = torch.randint(16, zero.shape)
    scale = 2.0 ** torch.randint(-9, 9, zero.shape)
    weight = (scale * (q - zero)).flatten(1)
    quantised = quantise(weight, format)
    assert torch.equal(dequantise(quantised), weight)
    layout = {name: (tuple(t.shape), t.dtype) for name, t in quantised.tensors().items()}
    assert layout == format.layout(3, 256)


def relative_error(weight: torch.Tensor, dequantised: torch.Tensor) -> float:
    return float((weight - dequantised).norm() / weight.norm())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_symmetric_groups_are_as_good_as_those_of_the_cpu(group_size: int) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    ours = dequantise(quantise(weight, Int4Format(group_size, True)))
    name = f"int4-{group_size}"
    theirs = cpu_dequantised(*cpu_pack(weight, name), 64, 512, name).float()
    # The same search; sums in another order may choose otherwise where two are equally good.
    assert relative_error(weight, ours) == pytest.approx(relative_error(weight, theirs), rel=1e-3)
    assert (ours - theirs).abs().median() == 0


@pytest.mark.parametrize(
    ("format", "error"),
    # What an ideal uniform quantiser with 16 levels reaches on normal weights is 0.107; a small
    # group needs no more range than its own weights have, and an asymmetric one wastes no level.
    [
        (Int4Format(-1, True), 0.12),
        (Int4Format(128, True), 0.105),
        (Int4Format(32, True), 0.085),
        (Int4Format(32, False), 0.08),
    ],
    ids=str,
)
def test_error_on_normal_weights_is_known(format: Int4Format, error: float) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    found = relative_error(weight, dequantise(quantise(weight, format)))
    assert 0.85 * error < found < error


def test_zero_point_serves_weights_of_one_sign() -> None:
    weight = torch.rand(32, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        relative_error(weight, dequantise(quantise(weight, Int4Format(64, symmetric))))
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_of_zeros_and_a_tiny_one_become_zeros(symmetric: bool) -> None:
    weight = torch.randn(2, 96)
    weight[0, :32] = 0
    weight[1, 32:64] = 1e-38
    found = dequantise(quantise(weight, Int4Format(32, symmetric)))
    assert found.isfinite().all()
    assert (found[0, :32] == 0).all()
    assert (found[1, 32:64] == 0).all()
    assert (found[0, 32:] != 0).any()


def test_many_rows_are_quantised_as_few_are() -> None:
    weight = torch.randn(5000, 1024, generator=torch.Generator().manual_seed(0))  # two pieces
    whole = quantise(weight, Int4Format(128, False))
    part = quantise(weight[4090:4100], Int4Format(128, False))
    assert torch.equal(whole.packed[:, 4090:4100], part.packed)
    assert torch.equal(whole.scale[:, 4090:4100], part.scale)


@pytest.mark.parametrize(
    ("group_size", "symmetric", "reason"),
    [
        (16, True, "group_size 16 is not supported"),
        (True, True, "group_size True is not supported"),
        (32, 1, "symmetric 1 is not true or false"),
    ],
)
def test_format_says_what_it_cannot_be(group_size: int, symmetric: bool, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Int4Format(group_size, symmetric)


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features 96 is not a multiple of group_size 64"):
        quantise(torch.randn(2, 96), Int4Format(64, True))
