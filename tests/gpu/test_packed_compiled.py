"""Experts from the CPU's packed weights, compiled for GPUs that are not here."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ktransformers.operators.kernels.packed_experts import MOST_SLOTS, choose_tile
from triton_aot import Compiled, Job, compile_all

SHARED = {"sm_80": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}  # sm_80 serves sm_86 as well
PLANES = {"int8": 4, "bf16": 2, "int4-32": 8, "int4-128": 8}
# sm_89 is compiled as sm_80 is, but for ptxas: one variant.
Variant = tuple[str, str, bool]  # GPU, format, whether gate and up are computed, or down
VARIANTS: list[Variant] = [
    ("sm_80", "int8", True),
    ("sm_80", "int4-128", False),
    ("sm_89", "bf16", True),  # compiled as for sm_80, but for ptxas
    ("sm_90", "int8", False),
    ("sm_90", "int4-32", True),
    ("sm_90", "bf16", False),
]


def job(target: str, format: str, gated: bool) -> Job:
    """V3's sizes, blocks as full as they get."""
    planes, group = PLANES[format], int(format.partition("-")[2] or 0)
    tile = choose_tile(MOST_SLOTS, planes, gated=gated)
    signature = {
        "x": "*bf16:16",
        "words": "*i32:16",
        "slots": "*i32:16",
        "experts": "*i32:16",
        "out": "*bf16:16" if gated else "*fp32:16",
        **dict.fromkeys(("SLOTS", "N", "PADDED_N", "WORDS", "SCALES", "OUT_WORDS"), "i32:16"),
        **dict.fromkeys(("FIRST", "LAST"), "i32"),
    }
    constexprs: dict[str, Any] = {
        "SLOTS_PER_ROW": 8 if gated else 1,
        "PLANES": planes,
        "GROUP": group,
        "BLOCK_M": MOST_SLOTS,
        "BLOCK_N": tile.block_n,
        "BLOCK_Q": tile.block_q,
        "EVEN": True,
    }
    given = {
        "scale": None if format == "bf16" else "*bf16:16" if group else "*fp32:16",
        "slot_weights": None if gated else "*fp32:16",
    }
    signature |= {name: kind for name, kind in given.items() if kind is not None}
    constexprs |= {name: None for name, kind in given.items() if kind is None}
    kernel = "ktransformers.operators.kernels.packed_experts:packed_experts_kernel"
    how = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Job(kernel, signature, target, constexprs, **how)


@pytest.fixture(scope="module")
def compiled() -> dict[Variant, Compiled]:
    return dict(zip(VARIANTS, compile_all([job(*each) for each in VARIANTS]), strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_weights_go_from_16_byte_loads_through_registers_to_tensor_cores(
    variant: Variant, compiled: dict[Variant, Compiled]
) -> None:
    found = compiled[variant]
    assert found.count(r"cp\.async\.cg\.shared\.global \[.*\], 0x10") > 0
    multiply = r"wgmma\.mma_async" if variant[0] == "sm_90" else r"mma\.sync"
    at = [match.start() for match in re.finditer(multiply, found.ptx)]
    assert at
    if not variant[2]:  # of gate and up the first writes its sums before the other begins
        assert "st.shared" not in found.ptx[at[0] : at[-1]]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_programs_fit_the_registers_and_the_shared_memory(
    variant: Variant, compiled: dict[Variant, Compiled]
) -> None:
    resources = compiled[variant].resources
    assert resources.spills == 0
    assert resources.shared <= SHARED[variant[0]]
