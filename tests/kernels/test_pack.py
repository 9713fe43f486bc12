"""The packed layout: what goes in comes out, padding is zero, and NaN is found."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts_reference import quantise_rows
from ktransformers import _native
from native_variants import Variant
from packed_layer import FORMATS, dequantised, k_multiple, pack, padded, scales, unpack


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_unpacked_is_the_quantised_weight(n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    packed, scale = pack(weight)
    expected, expected_scale = quantise_rows(weight)
    assert torch.equal(unpack(packed, n, k).double(), expected)
    assert torch.equal(scale[:n], expected_scale)
    assert not scale[n:].any()


def quantise_group(w: np.ndarray[Any, np.dtype[np.float32]]) -> tuple[list[int], float]:
    """Do what int4_quantize.h says for one group, in its order: integers, and the scale in fp32."""
    f = np.float32

    def lanes_sum(terms: np.ndarray[Any, np.dtype[np.float32]]) -> np.float32:
        s = np.zeros(8, f)
        for eight in terms.reshape(-1, 8):
            s = s + eight
        return np.float32(((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])))

    m = w[np.abs(w).argmax()]
    if abs(m) < 2.0**-100:
        return [0] * len(w), 0.0
    r = w * (f(-8) / m)
    candidates = []
    for i in range(9):
        shrink = f((7 + i / 2) / 8)
        q = np.clip(np.rint(r * shrink), f(-8), f(7))
        e = r - q * (f(1) / shrink)
        candidates.append((lanes_sum(e * e), i, q))
    q = min(candidates, key=lambda c: (c[0], c[1]))[2]
    scale = lanes_sum(r * q) / lanes_sum(q * q) * (m / f(-8))
    return q.astype(int).tolist(), torch.tensor(scale).bfloat16().item()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_int4_searches_each_group_as_the_header_says(
    n: int, k: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    weight[0] = 0
    packed, scale = pack(weight, f"int4-{size}")
    matrix = np.zeros((n, padded(k, size)), np.float32)
    matrix[:, :k] = weight.float().numpy()
    q, by_weight = unpack(packed, n, k, f"int4-{size}"), scales(scale, n, k, f"int4-{size}")
    for j in {0, n // 2, n - 1}:
        for g in range(0, k, size):
            expected, expected_scale = quantise_group(matrix[j, g : g + size])
            assert q[j, g : g + size].tolist() == expected[: k - g]
            assert by_weight[j, g].item() == expected_scale


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 63), (32, 64), (33, 65), (100, 150)])
def test_packed_bytes_are_the_same_on_every_isa(
    kernels: Variant, n: int, k: int, format: str
) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    packed, scale = pack(weight, format, kernels.native, isa=kernels.isa)
    expected, expected_scale = pack(weight, format, isa="portable")
    assert torch.equal(packed, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 63), (32, 64), (33, 65), (100, 50)])
def test_layout_is_lines_of_sixteen_outputs(n: int, k: int, format: str) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    packed, _ = pack(weight, format)
    rows, columns = padded(n, 32), padded(k, k_multiple(format))
    q = unpack(packed, n, k, format)
    matrix = torch.zeros(rows, columns, dtype=q.dtype)
    matrix[:n, :k] = q
    per_line = {"int8": 4, "bf16": 2}.get(format, 8)
    lines = matrix.reshape(rows // 16, 16, columns // per_line, per_line).transpose(1, 2)
    if format.startswith("int4"):
        nibbles = (lines + 8).to(torch.uint8)
        expected = nibbles[..., :4] | nibbles[..., 4:] << 4
    else:
        expected = lines.contiguous().view(torch.uint8)
    assert torch.equal(packed, expected.reshape(-1))


def test_bf16_weights_are_rounded_to_nearest_even() -> None:
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(weight, "bf16")[0], 40, 70, "bf16"), weight.bfloat16())


@pytest.mark.parametrize(("size", "most"), [(32, 0.082), (64, 0.091), (128, 0.098)])
def test_int4_error_on_normal_weights(size: int, most: float) -> None:
    """Plain rounding to the largest weight / 7 gives 0.097, 0.108 and 0.118."""
    weight = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0))
    packed, scale = pack(weight, f"int4-{size}")
    error = dequantised(packed, scale, 256, 2048, f"int4-{size}") - weight
    assert error.norm() / weight.norm() < most


def test_quantisation_error_is_half_a_step() -> None:
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    packed, scale = pack(weight)
    half = scale[:40, None] / 2 * (1 + 2.0**-20)  # and the roundings of the two products
    error = dequantised(packed, scale, 40, 200, "int8") - weight
    assert (error.abs() <= half).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_not_finite_are_counted(
    kernels: Variant, format: str, value: float
) -> None:
    weight = torch.randn(40, 70)
    weight[33, 69] = weight[39, 0] = value
    with pytest.raises(
        ValueError,
        match=r"^weight holds 2 values that are not finite, the first at \[33, 69\]$",
    ):
        pack(weight, format, kernels.native, isa=kernels.isa)


def test_matrices_are_packed_in_several_threads_at_once() -> None:
    weights = [torch.randn(64, 128, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    one_by_one = [pack(weight) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(pack, weights))
    for (a, a_scale), (b, b_scale) in zip(one_by_one, together, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a_scale, b_scale)


def test_numpy_arrays_are_taken_too() -> None:
    weight = np.ones((2, 3), dtype=np.float32)
    packed, scale = np.zeros(2048, dtype=np.uint8), np.zeros(32, dtype=np.float32)
    _native.pack(weight, packed, scale, "int8")  # type: ignore[arg-type]  # anything with DLPack will do
    assert scale[:3].tolist() == [np.float32(1 / 127), np.float32(1 / 127), 0]


@pytest.mark.parametrize(
    ("weight", "packed", "scale", "error", "message"),
    [
        (
            torch.ones(4),
            torch.empty(2048, dtype=torch.uint8),
            torch.empty(32),
            ValueError,
            "weight: expected shape [*, *], got [4]",
        ),
        (
            torch.ones(4, 4, dtype=torch.float64),
            torch.empty(2048, dtype=torch.uint8),
            torch.empty(32),
            TypeError,
            "weight: expected bfloat16 or float16 or float32, got another type",
        ),
        (
            torch.ones(4, 4),
            torch.empty(2047, dtype=torch.uint8),
            torch.empty(32),
            ValueError,
            "packed: expected shape [2048], got [2047]",
        ),
        (
            torch.ones(4, 4),
            torch.empty(2048, dtype=torch.uint8),
            torch.empty(4),
            ValueError,
            "scale: expected shape [32], got [4]",
        ),
        (
            torch.ones(4, 8)[:, ::2],
            torch.empty(2048, dtype=torch.uint8),
            torch.empty(32),
            ValueError,
            "weight: expected a contiguous tensor",
        ),
        (
            "weights",
            torch.empty(2048, dtype=torch.uint8),
            torch.empty(32),
            TypeError,
            "weight: expected a tensor, got str",
        ),
        (
            torch.ones(1, 131073),
            torch.empty(2048, dtype=torch.uint8),
            torch.empty(32),
            ValueError,
            "k=131073: expected 1 to 131072",
        ),
    ],
)
def test_wrong_arguments_get_a_sentence(
    weight: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        _native.pack(weight, packed, scale, "int8")
    assert str(caught.value) == message


def test_tensor_on_another_device_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError, BufferError)):
        _native.pack(
            torch.empty(2, 2, device="meta"),
            torch.empty(2048, dtype=torch.uint8),
            torch.empty(32),
            "int8",
        )


def test_unknown_format_names_those_that_exist() -> None:
    with pytest.raises(
        ValueError,
        match=r"^format 'int3': expected one of int8, int4-32, int4-64, int4-128, bf16$",
    ):
        _native.packed_bytes(1, 1, "int3")
