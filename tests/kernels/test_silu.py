"""silu_mul: the same bits everywhere, and close to the exact function."""

from __future__ import annotations

import torch

from native_variants import Variant
from packed_layer import same_bits

SPECIAL = (0.0, -0.0, 1e-40, -1e-40, 87.0, 88.0, 88.5, -86.9, -87.0, -87.1, -88.0, 1e30, -1e30)
NOT_FINITE = (torch.inf, -torch.inf, torch.nan)


def silu_mul(kernels: Variant, gate: torch.Tensor, up: torch.Tensor, isa: str) -> torch.Tensor:
    out = torch.empty_like(gate)
    kernels.native.silu_mul(gate, up, out, isa=isa)
    return out


def test_bits_are_the_portable_ones(kernels: Variant) -> None:
    generator = torch.Generator().manual_seed(0)
    gate = torch.cat([torch.linspace(-100, 100, 9984), torch.tensor(SPECIAL * 3)[:32]])
    for n in (16, 32, 48, 10016):
        rows = gate[-n:].repeat(3, 1)
        up = torch.randn(3, n, generator=generator)
        portable = silu_mul(kernels, rows, up, "portable")
        assert same_bits(silu_mul(kernels, rows, up, kernels.isa), portable), n


def test_error_is_below_eight_roundings(kernels: Variant) -> None:
    """8 u is what experts_reference.py counts: see its derivation. Here up is 1, which is exact."""
    gate = torch.linspace(-80, 80, 160000).reshape(100, 1600)
    exact = torch.nn.functional.silu(gate.double())
    got = silu_mul(kernels, gate, torch.ones_like(gate), kernels.isa).double()
    assert ((got - exact).abs() <= 8 * 2.0**-24 * exact.abs()).all()


def test_far_ends_are_zero_and_the_identity(kernels: Variant) -> None:
    gate = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 200.0, 1e4, 1e30, -1e30] * 2])
    got = silu_mul(kernels, gate, torch.ones_like(gate), kernels.isa)
    assert same_bits(got[gate > 0], gate[gate > 0])
    assert (got[(gate < 0) & (gate > -1e5)].abs() < 2.0**-110).all()


def test_nan_and_infinity_stay_in_their_lane(kernels: Variant) -> None:
    gate = torch.zeros(1, 32)
    gate[0, 3:6] = torch.tensor(NOT_FINITE)
    up = torch.ones(1, 32)
    up[0, 9] = torch.nan
    got = silu_mul(kernels, gate, up, kernels.isa)[0]
    assert got.isnan().nonzero().flatten().tolist() == [5, 9]
    assert got[3] == torch.inf
