"""Kernels with weights in four bits, compiled for GPUs that are not here, as launches choose them.

Numbers of registers and spills are those of the ptxas that comes with Triton.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from ktransformers.operators.kernels.int4_experts import choose_block
from ktransformers.operators.kernels.int4_linear import choose_tiles
from ktransformers.operators.kernels.int4_weight import Int4Format
from ktransformers.operators.kernels.split_sum import BLOCK
from triton_aot import Compiled, Job, compile_all

KERNELS = "ktransformers.operators.kernels"
# Tokens, format and dtype: every tile that is chosen, every group size.
VARIANTS = (
    (1, Int4Format(128, True), "fp16"),
    (16, Int4Format(32, False), "bf16"),
    (64, Int4Format(-1, False), "fp16"),
    (4096, Int4Format(128, True), "bf16"),
    (4096, Int4Format(64, True), "fp16"),
    (4096, Int4Format(32, False), "bf16"),
)
# sm_89 is compiled as sm_80 is, but for ptxas: not every variant again.
NVIDIA = {"sm_80": VARIANTS, "sm_89": VARIANTS[:1] + VARIANTS[-1:], "sm_90": VARIANTS}
SHARED = {"sm_80": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}  # sm_80 serves sm_86 as well
Variant = tuple[str, int, Int4Format, str | bool]


def linear_job(target: str, m: int, format: Int4Format, dtype: str | bool) -> Job:
    tiles = choose_tiles(m, 8192, 8192, symmetric=format.symmetric)
    one_pass = tiles.splits == 1
    signature = {
        "x": f"*{dtype}:16",
        "sums": "*fp32:16",
        "packed": "*i16:16",
        "scale": "*bf16:16",
        "zero_point": "*u8:16",
        "bias": "*fp32:16",
        "out": f"*{dtype if one_pass else 'fp32'}:16",
        "M": "i32",
        "N": "i32:16",
        "K": "i32:16",
        "x_stride": "i32:16",
        "sums_stride": "i32",
        "panels_per_split": "i32:16",
    }
    constexprs: dict[str, Any] = {
        "GROUP": format.group_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "EVEN_K": True,
        "PTX": target in NVIDIA,
    }
    absent = ([] if one_pass else ["bias"]) + (["zero_point", "sums"] if format.symmetric else [])
    for name in absent:
        del signature[name]
        constexprs[name] = None
    how = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return Job(f"{KERNELS}.int4_linear:int4_linear_kernel", signature, target, constexprs, **how)


def experts_job(target: str, m: int, format: Int4Format, gated: bool) -> Job:
    block_m = choose_block(m, 8, 256, symmetric=format.symmetric)
    signature = {
        "x": "*bf16:16",
        "packed": "*i16:16",
        "scale": "*bf16:16",
        "slots": "*i32:16",
        "experts": "*i32:16",
        "out": "*bf16:16" if gated else "*fp32:16",
        **dict.fromkeys(("N", "K"), "i32:16"),
        **dict.fromkeys(("SLOTS", "EXPERTS", "PANELS", "GROUPS"), "i32"),
    }
    constexprs: dict[str, Any] = {
        "SLOTS_PER_ROW": 8 if gated else 1,
        "GROUP": format.group_size,
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if block_m <= 16 else 128,
        "EVEN_K": True,
        "PTX": True,
    }
    given = {
        "sums": None if format.symmetric else "*fp32:16",
        "zero_point": None if format.symmetric else "*u8:16",
        "slot_weights": None if gated else "*fp32:16",
    }
    signature |= {name: kind for name, kind in given.items() if kind is not None}
    constexprs |= {name: None for name, kind in given.items() if kind is None}
    kernel = f"{KERNELS}.int4_experts:int4_experts_kernel"
    how = {"num_warps": 4, "num_stages": 5} if block_m <= 16 else {"num_warps": 8, "num_stages": 3}
    return Job(kernel, signature, target, constexprs, **how)


ON_NVIDIA = [(target, *variant) for target, variants in NVIDIA.items() for variant in variants]
ON_AMD = ("gfx942", *VARIANTS[1])
# Tokens of a layer with V3's 256 experts, 8 a token; whether gate and up are computed, or down.
EXPERTS = tuple(
    (target, *variant)
    for target in ("sm_80", "sm_90")
    for variant in (
        (1, Int4Format(128, True), True),
        (1, Int4Format(32, False), False),
        (4096, Int4Format(128, False), True),
        (4096, Int4Format(128, True), True),
    )
)
SUM = Job(
    f"{KERNELS}.split_sum:split_sum_kernel",
    {
        "partial": "*fp32:16",
        "bias": "*fp32:16",
        "out": "*bf16:16",
        "elements": "i32:16",
        "N": "i32",
    },
    "sm_80",
    {"SPLITS": 4, "BLOCK": BLOCK},
)


@pytest.fixture(scope="module")
def compiled() -> dict[Variant | str, Compiled]:
    variants: list[Variant] = [*ON_NVIDIA, ON_AMD]
    jobs = [*(linear_job(*each) for each in variants), *(experts_job(*each) for each in EXPERTS)]
    return dict(zip([*variants, *EXPERTS, "sum"], compile_all([*jobs, SUM]), strict=True))


def name(variant: Variant) -> str:
    return "-".join(map(str, variant))


@pytest.mark.parametrize("variant", ON_NVIDIA, ids=name)
def test_weights_go_from_16_byte_loads_through_registers_to_tensor_cores(
    variant: Variant, compiled: dict[Variant | str, Compiled]
) -> None:
    found = compiled[variant]
    assert found.count(r"cp\.async\.cg\.shared\.global \[.*\], 0x10") > 0
    assert found.count(r"lop3\.b32 .*0x000f000f") >= 4
    on_hopper = variant[0] == "sm_90" and variant[1] > 8  # wgmma has no tile of eight
    multiply = r"wgmma\.mma_async" if on_hopper else r"mma\.sync"
    assert found.count(multiply) > 0
    unpacking = found.ptx.index("lop3.b32")
    last = [match.start() for match in re.finditer(multiply, found.ptx)][-1]
    assert "st.shared" not in found.ptx[unpacking:last]


@pytest.mark.parametrize("variant", ON_NVIDIA, ids=name)
def test_programs_fit_the_registers_and_the_shared_memory(
    variant: Variant, compiled: dict[Variant | str, Compiled]
) -> None:
    resources = compiled[variant].resources
    # 128 tokens with a scale for every 64 inputs want a little more than 255 registers.
    assert resources.spills <= (64 if variant[1:3] == (4096, Int4Format(64, True)) else 0)
    assert resources.shared <= SHARED[variant[0]]
    if variant[1] <= 16:  # several programs share a processor, lest it wait for memory
        assert resources.registers <= 128
        assert resources.shared <= SHARED[variant[0]] // 3


@pytest.mark.parametrize("variant", EXPERTS, ids=name)
def test_experts_are_multiplied_as_projections_are(
    variant: Variant, compiled: dict[Variant | str, Compiled]
) -> None:
    found = compiled[variant]
    assert found.count(r"cp\.async\.cg\.shared\.global \[.*\], 0x10") > 0
    assert found.count(r"lop3\.b32 .*0x000f000f") >= 4
    assert found.count(r"wgmma\.mma_async|mma\.sync") > 0
    assert found.resources.spills == 0
    assert found.resources.shared <= SHARED[variant[0]]


def test_amd_gets_the_same_kernel_without_ptx(compiled: dict[Variant | str, Compiled]) -> None:
    found = compiled[ON_AMD]
    assert found.count("v_mfma") > 0
    assert found.count("global_load_dwordx4") > 0
    assert found.resources.spills == 0


def test_sum_of_splits_reads_16_bytes_at_a_time(compiled: dict[Variant | str, Compiled]) -> None:
    assert compiled["sum"].count(r"ld\.global\.v4") >= 4
    assert compiled["sum"].resources.spills == 0
