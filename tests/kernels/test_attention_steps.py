"""The steps of attention: the same bits everywhere, and what attention.h says."""

from __future__ import annotations

import numpy
import pytest
import torch

from ktransformers import _native
from native_variants import Variant
from packed_layer import same_bits

NO_MAXIMUM = -3.402823466e38


def softmax_step(
    kernels: Variant,
    isa: str,
    scores: torch.Tensor,
    seen: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    *,
    scale: float = 0.3,
) -> tuple[torch.Tensor, ...]:
    """Return weights [keys, columns], maximum, sum and factor."""
    keys, columns = scores.shape
    maximum, total, factor = maximum.clone(), total.clone(), torch.empty(columns)
    p = torch.empty(keys // 2, columns, 2, dtype=torch.bfloat16)
    kernels.native.softmax_step(scores, scale, seen, maximum, total, factor, p, isa=isa)
    return p.transpose(1, 2).reshape(keys, columns), maximum, total, factor


def random_step(keys: int, columns: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(keys * columns)
    scores = 200 * torch.randn(keys, columns, generator=generator)
    scores[::3] *= 0.01
    seen = torch.randint(0, keys + 1, (columns,), generator=generator).int()
    maximum = torch.where(torch.arange(columns) % 3 == 0, NO_MAXIMUM, torch.zeros(columns))
    return scores, seen, maximum, torch.rand(columns, generator=generator)


@pytest.mark.parametrize("columns", [16, 32, 48, 64])
@pytest.mark.parametrize("keys", [2, 32, 64])
def test_softmax_bits_are_the_portable_ones(kernels: Variant, keys: int, columns: int) -> None:
    step = random_step(keys, columns)
    expected = softmax_step(kernels, "portable", *step)
    got = softmax_step(kernels, kernels.isa, *step)
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(("keys", "columns"), [(2, 16), (64, 48)])
def test_weights_without_rounding_take_the_scores_places(
    kernels: Variant, keys: int, columns: int
) -> None:
    scores, seen, maximum, total = random_step(keys, columns)
    rounded, top, _, factor = softmax_step(kernels, kernels.isa, scores, seen, maximum, total)
    results = []
    for isa in (kernels.isa, "portable"):
        weights, new, sums, factors = (x.clone() for x in (scores, maximum, total, total))
        kernels.native.softmax_step(weights, 0.3, seen, new, sums, factors, None, isa=isa)
        results.append((weights, new, sums, factors))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)
    assert same_bits(weights.bfloat16(), rounded)
    assert same_bits(new, top)
    assert same_bits(factors, factor)
    expected = torch.zeros(columns)
    for row in weights:
        expected = expected + row
    assert same_bits(sums, total * factor + expected)


def test_softmax_is_exact_but_for_roundings(kernels: Variant) -> None:
    """The header counts 4 u for exp2; bf16 2^-8, the argument u of itself."""
    scores, seen, maximum, total = random_step(64, 32)
    p, new, _, factor = softmax_step(kernels, kernels.isa, scores, seen, maximum, total)
    x = (scores * torch.tensor(0.3)).double()
    x[torch.arange(64)[:, None] >= seen] = -torch.inf
    top = torch.maximum(x.amax(0), maximum.double())
    assert same_bits(new, top.float())
    for got, argument, unit in ((p, x - top, 2.0**-8), (factor, maximum.double() - top, 0.0)):
        exact = torch.exp2(argument)
        bound = exact * (unit + 4 * 2.0**-24 + 2.0**-24 * argument.abs().clamp(max=200))
        assert ((got.double() - exact).abs() <= 1.01 * bound + 2.0**-126).all()


def test_sum_is_of_the_rounded_weights_in_ascending_order(kernels: Variant) -> None:
    step = random_step(64, 32)
    p, _, total, factor = softmax_step(kernels, kernels.isa, *step)
    expected = torch.zeros(32)
    for row in p.float():
        expected = expected + row
    assert same_bits(total, step[3] * factor + expected)


def test_exp2_of_whole_numbers_is_exact(kernels: Variant) -> None:
    scores = -torch.arange(128.0)[:, None].repeat(1, 16)
    everything = torch.full((16,), 128, dtype=torch.int32)
    p = softmax_step(
        kernels, kernels.isa, scores, everything, torch.zeros(16), torch.zeros(16), scale=1.0
    )[0]
    expected = torch.exp2(-torch.arange(128.0).double())
    expected[127] = 0.0  # the header flushes it
    assert torch.equal(p.double(), expected[:, None].expand(128, 16))


def test_column_that_sees_nothing_is_left_as_it_was(kernels: Variant) -> None:
    nothing = torch.zeros(16, dtype=torch.int32)
    p, maximum, total, factor = softmax_step(
        kernels,
        kernels.isa,
        torch.full((32, 16), torch.nan),
        nothing,
        torch.full((16,), NO_MAXIMUM),
        torch.zeros(16),
    )
    assert (p == 0).all()
    assert (total == 0).all()
    assert (factor == 1).all()
    assert (maximum == torch.tensor(NO_MAXIMUM)).all()


def test_nan_stays_in_its_column(kernels: Variant) -> None:
    scores, _, maximum, total = random_step(32, 32)
    everything = torch.full((32,), 32, dtype=torch.int32)
    clean = softmax_step(kernels, kernels.isa, scores, everything, maximum, total)
    scores[5, 7] = torch.nan
    got = softmax_step(kernels, kernels.isa, scores, everything, maximum, total)
    others = torch.arange(32) != 7
    for a, b in zip(got, clean, strict=True):
        assert same_bits(a[..., others].contiguous(), b[..., others].contiguous())
    assert got[0][5, 7].isnan()
    assert got[2][7].isnan()


@pytest.mark.parametrize("n", [16, 48, 128])
def test_rows_are_rescaled_and_added(kernels: Variant, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    acc, x = torch.randn(2, 7, n, generator=generator)
    factor = torch.rand(7, generator=generator)
    expected = acc * factor[:, None] + x
    kernels.native.rescale_add(factor, x, acc, isa=kernels.isa)
    assert same_bits(acc, expected)


@pytest.mark.parametrize("group_size", [16, 48, 128])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 48, 127, 128, 129, 300, 512])
def test_latents_are_dequantised_to_bf16(kernels: Variant, n: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(n)
    q = torch.randint(-127, 128, (5, n), generator=generator, dtype=torch.int8)
    scale = torch.rand(5, -(-n // group_size), generator=generator)
    out = torch.empty(5, n, dtype=torch.bfloat16)
    kernels.native.dequantise_rows(q, scale, group_size, out, isa=kernels.isa)
    product = numpy.float32(q.numpy()) * scale.numpy()[:, numpy.arange(n) // group_size]
    assert same_bits(out, torch.from_numpy(product).bfloat16())


@pytest.mark.parametrize("n", [16, 48, 512])
@pytest.mark.parametrize("rows", [2, 32, 64])
def test_pairs_of_rows_are_interleaved_in_panels(kernels: Variant, rows: int, n: int) -> None:
    x = torch.arange(rows * n).to(torch.int16).view(torch.bfloat16).reshape(rows, n)
    packed = torch.empty(n // 16, rows // 2, 16, 2, dtype=torch.bfloat16)
    kernels.native.pair_rows(x, packed, isa=kernels.isa)
    expected = x.reshape(rows // 2, 2, n // 16, 16).permute(2, 0, 3, 1).contiguous()
    assert same_bits(packed, expected)


@pytest.mark.parametrize("n", [8, 16, 288])
@pytest.mark.parametrize("rows", [8, 16, 32])
def test_pairs_are_transposed(kernels: Variant, rows: int, n: int) -> None:
    x = torch.arange(rows * n * 2).to(torch.int16).view(torch.bfloat16).reshape(rows, n, 2)
    out = torch.empty(n, rows, 2, dtype=torch.bfloat16)
    kernels.native.transpose_pairs(x, out, isa=kernels.isa)
    assert same_bits(out, x.transpose(0, 1).contiguous())


def test_sizes_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^columns of x: expected a multiple of 16, got 17$"):
        _native.pair_rows(torch.zeros(2, 17).bfloat16(), torch.zeros(1, 1, 16, 2).bfloat16())
    q, out = torch.zeros(2, 17, dtype=torch.int8), torch.zeros(2, 17).bfloat16()
    with pytest.raises(ValueError, match=r"^group_size: expected a multiple of 16, got 17$"):
        _native.dequantise_rows(q, torch.zeros(2, 1), 17, out)
