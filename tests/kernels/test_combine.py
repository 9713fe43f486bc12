"""weighted_add and round_rows against torch, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from native_variants import Variant
from packed_layer import same_bits


@pytest.mark.parametrize("n", [16, 32, 48, 64])
def test_rows_are_added_in_order(kernels: Variant, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    d = torch.randn(9, n, generator=generator)
    weight = torch.randn(9, generator=generator)
    token = torch.tensor([0, 1, 1, 3, 3, 3, 0, 1, 3], dtype=torch.int32)
    y = torch.randn(4, n, generator=generator)
    expected = y.clone()
    for i in range(9):
        expected[token[i]] = expected[token[i]] + weight[i] * d[i]
    kernels.native.weighted_add(d, token, weight, y, isa=kernels.isa)
    assert same_bits(y, expected)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 16, 17, 64, 100])
def test_bf16_rounds_to_nearest_even(kernels: Variant, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    bits = torch.randint(-(2**31), 2**31, (50, n), generator=generator).to(torch.int32)
    y = bits.view(torch.float32)
    y[0] = torch.tensor([1.0]).view(torch.int32).add(0x8000).view(torch.float32)  # a tie
    out = torch.zeros(50, n, dtype=torch.bfloat16)
    kernels.native.round_rows(y, out, isa=kernels.isa)
    expected = torch.where(y.isnan(), torch.nan, y).bfloat16()
    assert same_bits(
        out,
        torch.where(
            y.isnan(), torch.tensor(0x7FC0, dtype=torch.int16).view(torch.bfloat16), expected
        ),
    )


@pytest.mark.parametrize("n", [1, 8, 15, 16, 17, 100])
def test_fp32_is_copied_and_nan_made_one(kernels: Variant, n: int) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -1, 0x3F800000, -(2**31), 0x7F800000])
    y = bits.to(torch.int32).view(torch.float32).repeat(3, n)[:, :n].contiguous()
    out = torch.zeros(3, n)
    kernels.native.round_rows(y, out, isa=kernels.isa)
    quiet = torch.tensor(0x7FC00000, dtype=torch.int32).view(torch.float32)
    assert same_bits(out, torch.where(y.isnan(), quiet, y))
