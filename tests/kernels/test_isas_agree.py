"""Every instruction set against portable, over drawn shapes, routings and numbers of tokens.

With integer weights to the bit, whatever the activations hold; with bf16 weights within the bound
of the arithmetic (experts_reference.py). The draws are the same in every run.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts_reference import experts_reference, prepared, product_bound
from native_variants import format_variants, variant
from packed_layer import (
    FORMATS,
    Request,
    dequantised,
    forward,
    pack,
    random_layer,
    random_request,
    same_bits,
)

EXAMPLES = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
EVERY_ISA = pytest.mark.parametrize(("format", "name"), format_variants(*FORMATS))

# Around the sizes of panels, groups, tiles and blocks, and anything between.
SIZES = st.sampled_from([1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160]) | st.integers(1, 160)
TOKENS = st.sampled_from([0, 1, 3, 4, 5, 16, 17, 64, 65, 257]) | st.integers(0, 80)
SEEDS = st.integers(0, 3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SPICES = st.sampled_from([1.0, 0.0, 1e30, 1e-30, 2.0**-140, torch.nan, torch.inf])

layer_of = functools.lru_cache(maxsize=64)(random_layer)


def spiced(x: torch.Tensor, factor: float, seed: int) -> torch.Tensor:
    """Multiply every third row, from a drawn one on."""
    x[seed % 3 :: 3] *= factor
    return x


def routed(request: Request, pattern: str, num_experts: int) -> Request:
    """Send tokens where the pattern says, instead of anywhere."""
    index = request.top_k_index
    if pattern == "one expert":
        index[:] = num_experts - 1
    elif pattern == "none":
        index[:] = num_experts
    elif pattern == "skewed":
        index[index % 2 == 0] = 0
    elif pattern == "each its own":
        index[:] = torch.arange(index.numel()).reshape(index.shape) % num_experts
    return request


PATTERNS = st.sampled_from(["anywhere", "one expert", "none", "skewed", "each its own"])


@EVERY_ISA
def test_experts_agree_with_portable(format: str, name: str) -> None:
    kernels = variant(name)

    @EXAMPLES
    @given(
        E=st.integers(1, 9),
        D=SIZES,
        F=SIZES,
        T=TOKENS,
        K=st.integers(0, 4),
        pattern=PATTERNS,
        spice=SPICES,
        dtype=DTYPES,
        threads=st.integers(1, 3),
        seed=SEEDS,
    )
    def agree(
        E: int,
        D: int,
        F: int,
        T: int,
        K: int,
        pattern: str,
        spice: float,
        dtype: torch.dtype,
        threads: int,
        seed: int,
    ) -> None:
        layer = layer_of(E, D, F, seed, format)
        request = routed(random_request(layer, T, K, dtype, seed), pattern, E)
        native: Any = layer.native(kernels.native, threads=threads, isa=kernels.isa)
        if format == "bf16":
            expected, bound = experts_reference(
                layer.dequantised,
                request.hidden_states,
                request.top_k_index,
                request.top_k_weights,
            )
            assert ((forward(native, request).double() - expected).abs() <= bound).all()
        else:
            spiced(request.hidden_states, spice, seed)
            portable = layer.native(threads=1, isa="portable")
            assert same_bits(forward(native, request), forward(portable, request))

    agree()


@functools.lru_cache(maxsize=64)
def matrix_of(
    n: int, k: int, seed: int, format: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a matrix `[n, k]`: packed, its scales, and what they stand for."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5
    packed, scale = pack(weight, format)
    return packed, scale, dequantised(packed, scale, n, k, format)


@EVERY_ISA
def test_linear_agrees_with_portable(format: str, name: str) -> None:
    kernels = variant(name)

    @EXAMPLES
    @given(
        n=SIZES,
        k=SIZES,
        T=TOKENS,
        spice=SPICES,
        dtype=DTYPES,
        threads=st.integers(1, 3),
        seed=SEEDS,
    )
    def agree(
        n: int, k: int, T: int, spice: float, dtype: torch.dtype, threads: int, seed: int
    ) -> None:
        packed, scale, weight = matrix_of(n, k, seed, format)
        x = torch.randn(T, k, generator=torch.Generator().manual_seed(seed)).to(dtype)

        def project(native: Any, isa: str, threads: int) -> torch.Tensor:
            sizes = {"in_features": k, "out_features": n}
            layer = native.Linear(packed, scale, format=format, **sizes, threads=threads, isa=isa)
            out = torch.full((T, n), torch.nan, dtype=dtype)
            layer.forward(x, out)
            return out

        if format == "bf16":
            seen = prepared(x, format)
            expected, bound = seen @ weight.T, product_bound(seen, weight, format)
            half_step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
            bound += half_step * (expected.abs() + bound) + 1e-37
            out = project(kernels.native, kernels.isa, threads)
            assert ((out.double() - expected).abs() <= bound).all()
        else:
            spiced(x, spice, seed)
            shipped = variant("portable").native
            assert same_bits(
                project(kernels.native, kernels.isa, threads), project(shipped, "portable", 1)
            )

    agree()
