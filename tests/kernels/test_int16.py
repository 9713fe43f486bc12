"""Products and quantisation in 16 bits, as attention takes int8 latents: bits, and formulas."""

from __future__ import annotations

import pytest
import torch

from ktransformers import _native
from native_variants import Variant, variants
from packed_layer import same_bits

every_product = pytest.mark.parametrize("kernels", variants("int16_gemm"), indirect=True)


def packed(w: torch.Tensor) -> torch.Tensor:
    """Pack [n, k] as [n / 16, k / 2, 16, 2]."""
    n, k = w.shape
    return w.view(n // 16, 16, k // 2, 2).transpose(1, 2).contiguous()


def draw(m: int, n: int, k: int, *, small: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw rows and weights; those named are in [-127, 127], the others anything."""
    generator = torch.Generator().manual_seed(m * n + k)
    a, w = (
        torch.randint(-most, most + 1, shape, generator=generator).short()
        for shape, most in (
            ((m, k), 127 if small == "a" else 32767),
            ((n, k), 127 if small == "w" else 32767),
        )
    )
    return a, w


@every_product
@pytest.mark.parametrize("small", ["a", "w"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 2), (5, 16, 128), (13, 48, 34), (16, 128, 64), (64, 80, 512)]
)
def test_sums_are_exact_and_scaled_as_the_header_says(
    kernels: Variant, m: int, n: int, k: int, small: str
) -> None:
    a, w = draw(m, n, k, small=small)
    a[0], w[0] = a[0].sign() * a.abs().max(), a[0].sign() * w.abs().max()  # the largest sum
    generator = torch.Generator().manual_seed(k)
    a_scale, c_scale, w_scale = (torch.rand(x, generator=generator) for x in (m, m, n))
    c = torch.randn(m, n, generator=generator)
    sums = (a.long() @ w.long().T).to(torch.int32)
    expected = c * c_scale[:, None] + sums.float() * (a_scale[:, None] * w_scale)
    kernels.native.int16_gemm(a, a_scale, packed(w), w_scale, c_scale, c, isa=kernels.isa)
    assert same_bits(c, expected)


def quantised(
    kernels: Variant, x: torch.Tensor, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q [k, n] and scale [n]."""
    k, n = x.shape
    q, scale = torch.full((k // 2, n, 2), 99, dtype=torch.int16), torch.full((n,), -1.0)
    if factor is None:
        x = x.bfloat16().view(k // 2, 2, n).transpose(1, 2).contiguous()
    kernels.native.quantize_pairs(x, factor, q, scale, isa=kernels.isa)
    return q.transpose(1, 2).reshape(k, n), scale


@pytest.mark.parametrize("has_factors", [True, False])
@pytest.mark.parametrize(("k", "n"), [(2, 8), (64, 16), (96, 40)])
def test_columns_are_quantised_by_the_formula(
    kernels: Variant, k: int, n: int, has_factors: bool
) -> None:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(k, n, generator=generator) * 10.0 ** torch.arange(-4, n - 4)
    factor = torch.rand(k, generator=generator)
    q, scale = quantised(kernels, x, factor if has_factors else None)
    y = x * factor[:, None] if has_factors else x.bfloat16().float()
    amax = y.abs().amax(0)
    assert same_bits(scale, amax / 32767)
    assert torch.equal(q, (y * (torch.tensor(32767.0) / amax)).round().short())
    assert (q.abs().amax(0) == 32767).all()


def test_columns_of_nearly_nothing_are_zeros(kernels: Variant) -> None:
    x = torch.ones(4, 8)
    x[:, 2] = 0.0
    x[:, 5] = 2.0**-112
    q, scale = quantised(kernels, x, torch.ones(4))
    nothing = torch.tensor([False, False, True, False, False, True, False, False])
    assert torch.equal(scale == 0, nothing)
    assert torch.equal((q == 0).all(0), nothing)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_column_that_is_not_finite_has_scale_nan_alone(kernels: Variant, value: float) -> None:
    x = torch.ones(6, 8)
    x[3, 2] = value
    for factor in (torch.ones(6), None):
        q, scale = quantised(kernels, x, factor)
        assert torch.equal(scale.isnan(), torch.arange(8) == 2)
        assert (q[:, 2] == 0).all()
        assert (q[:, :2] == 32767).all()


def test_pairs_may_be_quantised_in_place(kernels: Variant) -> None:
    x = torch.randn(16, 8, 2).bfloat16()
    q, scale = torch.empty(16, 8, 2, dtype=torch.int16), torch.empty(8)
    kernels.native.quantize_pairs(x, None, q, scale, isa=kernels.isa)
    kernels.native.quantize_pairs(x, None, x.view(torch.int16), scale, isa=kernels.isa)
    assert torch.equal(x.view(torch.int16), q)


@pytest.mark.parametrize("n", [1, 15, 16, 40])
def test_rows_are_widened(kernels: Variant, n: int) -> None:
    q = torch.randint(-128, 128, (5, n), dtype=torch.int8)
    out = torch.full((5, n), 99, dtype=torch.int16)
    kernels.native.widen_rows(q, out, isa=kernels.isa)
    assert torch.equal(out, q.short())


def test_sums_that_could_overflow_are_refused() -> None:
    a, w = torch.zeros(1, 514, dtype=torch.int16), torch.zeros(1, 257, 16, 2, dtype=torch.int16)
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"^columns of a=514: expected 1 to 512$"):
        _native.int16_gemm(a, one, w, torch.ones(16), one, torch.zeros(1, 16))
