"""Matrix products against exact integers, on every instruction set; faults must be noticed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gemm_checks import (
    bf16_gemm_is_close,
    fused_multiply_add,
    gemm_is_exact,
    pack_scales,
    random_integers,
    random_scales,
)
from ktransformers import _native
from native_variants import Variant, format_variants, load_build, variants
from packed_layer import FORMATS, group_size

# Register tiles are 6 rows and 16 or 64 outputs; slices of outputs come in multiples of 32.
ROWS = (1, 2, 3, 5, 6, 7, 11, 12, 13, 31)
OUTPUTS = (32, 64, 96, 160)
INTEGERS = FORMATS[:-1]  # all but bf16


def inputs(format: str) -> tuple[int, ...]:
    """Return numbers of inputs that need no padding."""
    return (128, 384) if format == "int4-128" else (64, 128, 448)


def weights(n: int, k: int, format: str) -> torch.Tensor:
    low, high = (-127, 127) if format == "int8" else (-8, 7)
    return random_integers(n, k, 2, low, high)


@pytest.mark.parametrize("n", OUTPUTS)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("format", "kernels"), format_variants(*INTEGERS), indirect=["kernels"])
def test_product_is_exact(kernels: Variant, format: str, m: int, n: int) -> None:
    for k in inputs(format):
        a = random_integers(m, k, seed=1)
        assert gemm_is_exact(kernels.native, kernels.isa, a, weights(n, k, format), format), k


@pytest.mark.parametrize("n", OUTPUTS)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("kernels", variants("bf16_gemm"), indirect=True)
def test_bf16_product_is_within_the_derived_bound(kernels: Variant, m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(m)
    for k in (32, 64, 480):
        a = torch.randn(m, k, generator=generator).bfloat16()
        w = torch.randn(n, k, generator=generator).bfloat16()
        assert bf16_gemm_is_close(kernels.native, kernels.isa, a, w), k


@pytest.mark.parametrize("n", [16, 48, 80])
@pytest.mark.parametrize("kernels", variants("bf16_gemm"), indirect=True)
def test_bf16_product_takes_an_odd_number_of_panels(kernels: Variant, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    for m in (1, 11, 12, 13, 16, 17, 33):
        a = torch.randn(m, 96, generator=generator).bfloat16()
        w = torch.randn(n, 96, generator=generator).bfloat16()
        assert bf16_gemm_is_close(kernels.native, kernels.isa, a, w), m


@pytest.mark.parametrize("a_value", [-127, 127, 0])
@pytest.mark.parametrize("extreme", [0, 1])
@pytest.mark.parametrize(("format", "kernels"), format_variants(*INTEGERS), indirect=["kernels"])
def test_extremes_do_not_saturate(
    kernels: Variant, format: str, extreme: int, a_value: int
) -> None:
    w_value = ((-127, 127) if format == "int8" else (-8, 7))[extreme]
    a = torch.full((7, 2048), a_value, dtype=torch.int8)
    w = torch.full((96, 2048), w_value, dtype=torch.int8)
    assert gemm_is_exact(kernels.native, kernels.isa, a, w, format)


@pytest.mark.parametrize(("format", "kernels"), format_variants(*INTEGERS), indirect=["kernels"])
def test_largest_k_does_not_overflow(kernels: Variant, format: str) -> None:
    a = torch.full((2, 131072), 127, dtype=torch.int8)
    a[1] = -127
    w = torch.full((32, 131072), 127 if format == "int8" else -8, dtype=torch.int8)
    assert gemm_is_exact(kernels.native, kernels.isa, a, w, format)


@pytest.mark.parametrize(("format", "kernels"), format_variants(*FORMATS), indirect=["kernels"])
def test_rows_are_gathered(kernels: Variant, format: str) -> None:
    a = random_integers(5, 128, seed=3)
    rows = torch.tensor([4, 0, 0, 3, 1, 4, 2, 2], dtype=torch.int32)
    if format == "bf16":
        w = random_integers(64, 128, seed=4)
        assert bf16_gemm_is_close(
            kernels.native, kernels.isa, a.bfloat16(), w.bfloat16(), rows=rows
        )
    else:
        w = weights(64, 128, format)
        assert gemm_is_exact(kernels.native, kernels.isa, a, w, format, rows)


@pytest.mark.parametrize(("format", "kernels"), format_variants(*INTEGERS), indirect=["kernels"])
def test_scale_that_is_nan_makes_its_row_nan_alone(kernels: Variant, format: str) -> None:
    a = torch.zeros(3, 128, dtype=torch.int8)
    a_scale = torch.tensor([1.0, torch.nan, 1.0])
    out = torch.empty(3, 32)
    groups = 128 // (group_size(format) or 128)
    packed = torch.ones(_native.packed_bytes(32, 128, format), dtype=torch.uint8)
    zeros = torch.zeros(3, groups, dtype=torch.int32)
    w_scale = pack_scales(random_scales(32, 128, format).abs(), format)
    kernels.native.gemm(a, a_scale, zeros, packed, w_scale, out, format, isa=kernels.isa)
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert not out[[0, 2]].any()


@pytest.mark.parametrize("kernels", variants("bf16_gemm"), indirect=True)
def test_nan_in_bf16_stays_in_its_row(kernels: Variant) -> None:
    a = torch.ones(3, 64, dtype=torch.bfloat16)
    a[1, 5] = torch.nan
    out = torch.empty(3, 32)
    packed = torch.ones(32 * 64, dtype=torch.bfloat16).view(torch.uint8)
    kernels.native.gemm(a, None, None, packed, torch.empty(0), out, "bf16", isa=kernels.isa)
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert (out[[0, 2]] == 64).all()


def test_reference_rounds_once() -> None:
    """An exact case that two roundings get wrong: 1 + 2^-24 + 2^-60 rounds up, not to even."""
    a, b = torch.tensor([1.0]), torch.tensor([2.0**-24 + 2.0**-31])
    assert fused_multiply_add(a, b, torch.tensor([1.0])).item() == 1 + 2.0**-23
    tie = torch.tensor([2.0**-24])
    assert fused_multiply_add(a, tie, torch.tensor([1.0])).item() == 1
    up = torch.tensor([1.0 + 2.0**-23])
    assert fused_multiply_add(a, tie, up).item() == 1 + 2.0**-22


@pytest.mark.parametrize(
    ("format", "isa"),
    [
        (weight, isa)
        for weight, isa in format_variants("int8", "int4-32", "bf16")
        if isa != "portable" and "-" not in isa and "amx" not in isa
    ],
)
def test_faulty_kernel_is_noticed(format: str, isa: str) -> None:
    """tests/emulation/CMakeLists.txt changes one constant or operand of each kernel."""
    mutant = load_build("mutant")
    if isa not in mutant.isas():
        pytest.skip(f"this process has no {isa}")

    def passes(isa: str) -> bool:
        a = random_integers(6, 64, seed=1)
        if format == "bf16":
            w = random_integers(64, 64, seed=2)
            return bf16_gemm_is_close(mutant, isa, a.bfloat16(), w.bfloat16())
        return gemm_is_exact(mutant, isa, a, weights(64, 64, format), format)

    assert passes("portable")
    assert not passes(isa)


# In a process of its own: two emulators cannot both have SIGILL.
SWAPPED = """
import torch
from gemm_checks import bf16_gemm_is_close, gemm_is_exact, random_integers
from native_variants import load_build
native = load_build("emulated_swapped")
a, w = random_integers(20, 64, seed=1), random_integers(64, 64, seed=2)
print(gemm_is_exact(native, "portable", a, w), gemm_is_exact(native, "amx_int8", a, w))
print(bf16_gemm_is_close(native, "amx_bf16", a.bfloat16(), w.bfloat16()))
"""


@pytest.mark.skipif(
    ("int8_gemm", "amx_int8") not in _native.kernels(), reason="no AMX in this build"
)
def test_amx_that_swaps_its_operands_is_noticed() -> None:
    if "amx_int8" in _native.isas():
        pytest.skip("this machine has an AMX of its own, and emulates none")
    done = subprocess.run(
        [sys.executable, "-c", SWAPPED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True False\nFalse\n"


def test_rows_out_of_range_are_refused() -> None:
    a, w = random_integers(5, 64, seed=3), random_integers(32, 64, seed=4)
    rows = torch.tensor([4, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^rows\[1\] is 5, expected 0 to 4$"):
        gemm_is_exact(_native, "portable", a, w, rows=rows)
