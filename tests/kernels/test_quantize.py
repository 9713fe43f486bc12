"""quantize_rows against numpy, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ktransformers import _native
from native_variants import Variant
from packed_layer import padded

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Vectors are 16 or 32 elements, rows are padded to 64.
WIDTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 1000)


def quantise(kernels: Variant, x: torch.Tensor) -> tuple[Any, Any, Any]:
    m, k = x.shape
    q = torch.full((m, padded(k, 64)), 99, dtype=torch.int8)
    scale, sums = torch.full((m,), -1.0), torch.full((m,), -1, dtype=torch.int32)
    kernels.native.quantize_rows(x, q, scale, sums, isa=kernels.isa)
    return q.numpy(), scale.numpy(), sums.numpy()


def quantise_with_numpy(x: torch.Tensor) -> tuple[Any, Any]:
    """The formula of quantize.h for finite rows, in numpy's fp32."""
    rows = x.float().numpy()
    amax = np.abs(rows).max(axis=1, keepdims=True)
    zero = amax < np.float32(2.0**-120)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(zero, np.float32(0), np.float32(127) / amax)
        scale = np.where(zero, np.float32(0), amax / np.float32(127))
    return np.rint(rows * inverse).astype(np.int8), scale[:, 0]


def check(kernels: Variant, x: torch.Tensor) -> None:
    q, scale, sums = quantise(kernels, x)
    k = x.shape[1]
    expected_q, expected_scale = quantise_with_numpy(x)
    np.testing.assert_array_equal(q[:, :k], expected_q)
    assert not q[:, k:].any()
    np.testing.assert_array_equal(scale.view(np.int32), expected_scale.view(np.int32))
    np.testing.assert_array_equal(sums, expected_q.sum(axis=1, dtype=np.int32))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", WIDTHS)
def test_rows_equal_the_formula(kernels: Variant, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    check(kernels, (torch.randn(5, k, generator=generator) * 3).to(dtype))


def test_ties_round_to_even(kernels: Variant) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, _, _ = quantise(kernels, x)
    assert q[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("magnitude", [2.0**-149, 2.0**-130, 2.0**-120, 2.0**-100, 1e30, 3.4e38])
def test_every_magnitude_stays_in_range(kernels: Variant, magnitude: float) -> None:
    x = torch.tensor([[1.0, -1.0, 0.5, 0.0]]) * magnitude
    check(kernels, x)


def test_row_of_zeros_has_scale_zero(kernels: Variant) -> None:
    q, scale, sums = quantise(kernels, torch.zeros(2, 40))
    assert not q.any()
    assert not scale.any()
    assert not sums.any()


def test_fp16_subnormals_are_exact(kernels: Variant) -> None:
    bits = torch.arange(-32768, 32767, 7, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    check(kernels, values[values.isfinite()][None])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 31, 99])
def test_row_that_is_not_finite_has_scale_nan_alone(
    kernels: Variant, value: float, position: int, dtype: torch.dtype
) -> None:
    x = torch.ones(3, 100, dtype=dtype)
    x[1, position] = value
    q, scale, sums = quantise(kernels, x)
    assert np.isnan(scale).tolist() == [False, True, False]
    assert not q[1].any()
    assert sums[1] == 0
    assert (q[[0, 2], :100] == 127).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_sums_of_groups_are_exact(kernels: Variant, group: int) -> None:
    q = torch.randint(-127, 128, (5, 384), dtype=torch.int8)
    q[0] = -127
    q[1] = 127
    out = torch.full((5, 384 // group), 99, dtype=torch.int32)
    kernels.native.sum_groups(q, out, isa=kernels.isa)
    assert torch.equal(out, q.reshape(5, -1, group).sum(2, dtype=torch.int32))


def test_groups_that_do_not_divide_a_row_are_refused() -> None:
    q = torch.zeros(2, 96, dtype=torch.int8)
    for groups in (0, 2, 4):
        with pytest.raises(ValueError, match=r"^sum: expected columns that divide q's into groups"):
            _native.sum_groups(q, torch.zeros(2, groups, dtype=torch.int32))
