"""The kernels of a product with weights in four bits, against dequantised weights.

They run on a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ktransformers.operators.kernels.int4_linear import (
    choose_tiles,
    int4_linear,
    int4_linear_reference,
)
from ktransformers.operators.kernels.int4_unpack import BF16_PTX, FP16_PTX
from ktransformers.operators.kernels.int4_weight import (
    Int4Format,
    Int4Weight,
    dequantise,
    quantise,
)
from ktransformers.operators.kernels.split_sum import split_sum, split_sum_reference
from unpack_words import unpack_words

DTYPES = [torch.float16, torch.bfloat16]
U = 2.0**-24  # unit roundoff of fp32
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of y; bf16 also by truncation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ptx", [False, True])
def test_every_word_unpacks_to_its_nibbles(
    ptx: bool, dtype: torch.dtype, device: torch.device
) -> None:
    if ptx and device.type != "cuda":
        pytest.skip("needs a CUDA GPU: Triton's interpreter runs no PTX")
    words = torch.arange(65536, device=device)
    expected = (words[None] >> 4 * torch.arange(4, device=device)[:, None] & 15) - 8
    wide = dtype if device.type == "cuda" else torch.float32  # the interpreter stores no bf16
    found = unpack_words(words.to(torch.int16), wide, ptx=ptx)
    assert torch.equal(found, expected.to(wide))
    assert torch.equal(expected.to(dtype).long(), expected)


@pytest.mark.parametrize(
    ("ptx", "dtype"), [(FP16_PTX, torch.float16), (BF16_PTX, torch.bfloat16)], ids=["fp16", "bf16"]
)
def test_ptx_as_it_is_written_gives_the_nibbles_of_every_word(ptx: Any, dtype: torch.dtype) -> None:
    low = torch.arange(65536)
    registers = {"$4": low | low.flip(0) << 16}  # two words each
    for line in ptx.value.strip("{}").replace(".reg .b32 word, one, less;", "").split(";"):
        operation, _, rest = line.strip().partition(" ")
        name, *others = [each.strip() for each in rest.split(",")]
        values = [registers[o] if o in registers else torch.tensor(int(o, 0)) for o in others if o]
        if operation == "mov.b32":
            registers[name] = values[0].expand(65536)
        elif operation == "shr.u32":
            registers[name] = values[0] >> values[1]
        elif operation == "lop3.b32":
            assert values[3] == 0b11110000 & 0b11001100 | 0b10101010  # of a & b | c
            registers[name] = values[0] & values[1] | values[2]
        elif operation.startswith("fma.rn."):
            a, b, c = (floats(value, dtype) for value in values)
            registers[name] = bits((a.double() * b.double() + c.double()).to(dtype))
        else:
            assert operation == ""
    for nibble in range(4):
        found = floats(registers[f"${nibble}"], dtype)
        expected = (low >> 4 * nibble & 15) - 8
        assert torch.equal(found, torch.stack((expected, expected.flip(0))).to(dtype))


def floats(register: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the two halves of 32-bit registers, [2, count]."""
    halves = torch.stack((register & 0xFFFF, register >> 16 & 0xFFFF))
    return halves.to(torch.uint16).view(dtype)


def bits(halves: torch.Tensor) -> torch.Tensor:
    """Return registers that hold two halves [2, count]."""
    low, high = halves.view(torch.uint16).long()
    return low | high << 16


def product(
    m: int, n: int, k: int, format: Int4Format, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, Int4Weight]:
    generator = torch.Generator().manual_seed(m * n + k)
    weight = torch.randn(n, k, generator=generator)
    x = torch.randn(m, k, generator=generator).to(dtype)
    return x.to(device), quantise(weight.to(device), format)


def assert_close(
    y: torch.Tensor, x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None
) -> None:
    """Compare with the product in fp64, within what k products and sums in fp32 may lose.

    Sums of sums of groups, then of splits, have fewer roundings each; scale, zero point and bias
    add some. What is summed is q - 8 and, for the zero point, 8 - zero.
    """
    eight = Int4Weight(Int4Format(weight.format.group_size, True), weight.in_features,
                       weight.packed, weight.scale, None)  # fmt: skip
    matrix, symmetric = dequantise(weight).double(), dequantise(eight).double()
    summed = symmetric.abs() + (matrix - symmetric).abs()
    exact, magnitude = x.double() @ matrix.T, x.double().abs() @ summed.T
    if bias is not None:
        exact, magnitude = exact + bias, magnitude + bias.abs()
    bound = (weight.in_features + 5) * U * magnitude
    bound += ROUNDING[y.dtype] * (exact.abs() + bound)
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_format_is_within_the_derived_bound(
    group_size: int, symmetric: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = product(3, 65, 384, Int4Format(group_size, symmetric), dtype, device)
    assert_close(int4_linear(x, weight), x, weight)


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16, 17, 33, 127, 128, 129])
def test_any_number_of_tokens_is_within_the_bound(m: int, device: torch.device) -> None:
    x, weight = product(m, 40, 256, Int4Format(64, True), torch.float16, device)
    assert_close(int4_linear(x, weight), x, weight)


@pytest.mark.parametrize(("m", "n"), [(2, 1), (2, 63), (2, 64), (20, 127), (20, 128), (20, 129)])
def test_any_number_of_outputs_is_within_the_bound(m: int, n: int, device: torch.device) -> None:
    x, weight = product(m, n, 128, Int4Format(32, False), torch.float16, device)
    assert_close(int4_linear(x, weight), x, weight)


@pytest.mark.parametrize(("k", "group_size"), [(1, -1), (96, 32), (127, -1), (129, -1), (192, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_fill_no_panel_are_within_the_bound(
    k: int, group_size: int, symmetric: bool, device: torch.device
) -> None:
    x, weight = product(5, 20, k, Int4Format(group_size, symmetric), torch.float16, device)
    wide = torch.full((5, k + 200), torch.nan, dtype=x.dtype, device=device)
    wide[:, :k] = x  # what lies beyond the inputs counts for nothing
    assert_close(int4_linear(wide[:, :k], weight), x, weight)


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(("m", "k"), [(2, 1024), (2, 1152), (40, 1024)])
def test_bias_is_added_once_however_k_is_split(
    m: int, k: int, group_size: int, device: torch.device
) -> None:
    assert choose_tiles(m, 70, k, symmetric=False).splits > 1
    x, weight = product(m, 70, k, Int4Format(group_size, False), torch.bfloat16, device)
    bias = 100 * torch.randn(70, device=device)
    assert_close(int4_linear(x, weight, bias), x, weight, bias)
    short, narrow = product(m, 70, 128, Int4Format(group_size, False), torch.bfloat16, device)
    assert_close(int4_linear(short, narrow, bias), short, narrow, bias)


def test_rows_may_lie_apart_or_be_none_and_have_more_dimensions(device: torch.device) -> None:
    x, weight = product(6, 20, 256, Int4Format(128, True), torch.float16, device)
    expected = int4_linear(x, weight)
    apart = torch.stack((x, x), dim=1)[:, 0]
    transposed = x.T.contiguous().T
    assert apart.stride() == (512, 1)
    assert transposed.stride() == (1, 6)
    for rows in (apart, transposed):
        assert torch.equal(int4_linear(rows, weight), expected)
    assert torch.equal(int4_linear(x.view(2, 3, 256), weight), expected.view(2, 3, 20))
    assert int4_linear(x.new_empty(4, 0, 256), weight).shape == (4, 0, 20)


def test_reference_is_the_same_product(device: torch.device) -> None:
    x, weight = product(3, 20, 256, Int4Format(64, False), torch.float16, device)
    bias = torch.randn(20, device=device)
    assert_close(int4_linear_reference(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_sum_of_splits_has_the_bits_of_the_reference(
    splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and device.type != "cuda":
        pytest.skip("needs a CUDA GPU: Triton's interpreter truncates to bf16")
    partial = torch.randn(splits, 3, 400, device=device)
    for bias in (None, torch.randn(400, device=device)):
        assert torch.equal(
            split_sum(partial, bias, dtype), split_sum_reference(partial, bias, dtype)
        )


@pytest.mark.parametrize("m", [1, 8, 16, 17, 64, 128, 129, 4096])
def test_tiles_cover_every_panel_and_no_split_is_empty(m: int) -> None:
    for n, k in ((1, 32), (576, 7168), (2048, 7168), (24576, 1536), (8192, 8192), (7168, 18432)):
        tiles = choose_tiles(m, n, k, symmetric=True)
        panels = -(-k // 128)
        assert (tiles.splits - 1) * tiles.panels_per_split < panels
        assert tiles.splits * tiles.panels_per_split >= panels


def test_one_token_of_a_large_layer_keeps_every_processor_reading() -> None:
    tiles = choose_tiles(1, 8192, 8192, symmetric=True)
    assert 8192 // tiles.block_n * tiles.splits >= 4 * 108  # of an A100


def test_what_does_not_fit_is_refused_with_what_was_expected(device: torch.device) -> None:
    x, weight = product(2, 8, 128, Int4Format(128, True), torch.float16, device)
    with pytest.raises(ValueError, match=r"x is torch.float32, expected float16 or bfloat16"):
        int4_linear(x.float(), weight)
    with pytest.raises(ValueError, match=r"x is \[2, 64\], expected \[\*, 128\]"):
        int4_linear(x[:, :64], weight)
    with pytest.raises(ValueError, match=r"bias is torch.float16 \[8\], expected float32 \[8\]"):
        int4_linear(x, weight, torch.zeros(8, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match="x is on meta, expected"):
        int4_linear(x.to("meta"), weight)
