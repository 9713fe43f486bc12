"""Kernels compiled for GPUs that are not here: what they take of them, and by which instructions.

Numbers of registers and spills are those of the ptxas that comes with Triton.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from compiled_kernels import AMD, NVIDIA, SHARED, C, Case, cases, tiles_of
from ktransformers.operators import kernels
from ktransformers.operators.kernels.expert_upload import BLOCK as UPLOADED
from ktransformers.operators.kernels.int4_weight import Int4Format
from triton_aot import Compiled

ALL = cases()
ON_NVIDIA = [case for case in ALL if case.target != AMD]
WEIGHTS = [case for case in ON_NVIDIA if case.kernel.startswith("int4")]
PACKED = [case for case in ON_NVIDIA if case.kernel == "packed_experts_kernel"]
ATTENTION = [case for case in ON_NVIDIA if case.kernel in ("decode_parts", "prefill_rows")]
FP8 = [case for case in ATTENTION if case.kind == "fp8e4nv"]
COPY = r"cp\.async\.cg\.shared\.global \[[^;]*\], 0x10"  # 16 bytes, past the registers


def spills_allowed(case: Case) -> int:
    """Return the bytes of local memory of a thread that are known."""
    # 128 tokens with a scale for every 64 inputs want a little more than 255 registers.
    if case.kernel == "int4_linear_kernel" and case.format == Int4Format(64, True):
        return 64
    # A tile of fp8 passes through registers on its way to bf16.
    return 8 if case in FP8 else 0


@pytest.mark.parametrize("case", ALL, ids=str)
def test_programs_fit_the_registers_and_the_shared_memory(
    case: Case, compiled: dict[Case, Compiled]
) -> None:
    resources = compiled[case].resources
    assert resources.spills <= spills_allowed(case)
    assert resources.shared <= SHARED[case.target]


@pytest.mark.parametrize("case", [case for case in WEIGHTS if case.size <= 16], ids=str)
def test_programs_that_wait_for_weights_share_a_processor(
    case: Case, compiled: dict[Case, Compiled]
) -> None:
    resources = compiled[case].resources
    assert resources.registers <= 128
    consumer = SHARED["sm_89" if case.target == "sm_80" else case.target]  # sm_86 runs sm_80's
    assert resources.shared <= consumer // 3


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_weights_go_from_16_byte_loads_through_registers_to_tensor_cores(
    case: Case, compiled: dict[Case, Compiled]
) -> None:
    found = compiled[case]
    assert found.count(COPY) > 0
    assert found.count(r"lop3\.b32 .*0x000f000f") >= 4
    if case.kernel != "int4_linear_kernel":
        assert found.count(r"wgmma\.mma_async|mma\.sync") > 0
        return
    on_hopper = case.target == "sm_90" and case.size > 8  # wgmma has no tile of eight
    multiply = r"wgmma\.mma_async" if on_hopper else r"mma\.sync"
    assert found.count(multiply) > 0
    unpacking = found.ptx.index("lop3.b32")
    last = [match.start() for match in re.finditer(multiply, found.ptx)][-1]
    assert "st.shared" not in found.ptx[unpacking:last]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_the_cpus_weights_go_from_16_byte_loads_through_registers_to_tensor_cores(
    case: Case, compiled: dict[Case, Compiled]
) -> None:
    found = compiled[case]
    assert found.count(COPY) > 0
    multiply = r"wgmma\.mma_async" if case.target == "sm_90" else r"mma\.sync"
    at = [match.start() for match in re.finditer(multiply, found.ptx)]
    assert at
    if case.kind.endswith("down"):  # of gate and up the first writes its sums before the other
        assert "st.shared" not in found.ptx[at[0] : at[-1]]
    consumer = SHARED["sm_89" if case.target == "sm_80" else case.target]  # sm_86 runs sm_80's
    assert found.resources.shared <= consumer


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_products_of_attention_are_the_tensor_cores(
    case: Case, compiled: dict[Case, Compiled]
) -> None:
    of_warp, of_group = (compiled[case].count(rf"{name}\.") for name in (r"mma\.sync", "wgmma"))
    assert (of_group if case.size > 16 and case.target == "sm_90" else of_warp) > 0


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_latents_are_read_16_bytes_at_a_time(case: Case, compiled: dict[Case, Compiled]) -> None:
    """A tile of keys is read by so many instructions of a thread, before the loop and in it."""
    tiles, in_bf16 = tiles_of(case), case.kind == "bf16"
    each = tiles.keys * C * (2 if in_bf16 else 1) // (tiles.num_warps * 32 * 16)
    copies = compiled[case].count(COPY)
    assert copies + compiled[case].count(r"ld\.global\S*\.v4\.b32") >= each
    if in_bf16:
        assert copies >= 2 * each


@pytest.mark.parametrize("case", [case for case in ON_NVIDIA if "sum" in case.kernel], ids=str)
def test_sums_read_16_bytes_at_a_time(case: Case, compiled: dict[Case, Compiled]) -> None:
    assert compiled[case].count(r"ld\.global\S*\.v4\.") >= 4


@pytest.mark.parametrize(
    "case", [case for case in ON_NVIDIA if case.kernel == "append_token"], ids=str
)
def test_a_token_is_moved_by_a_load_and_a_store_of_each_part(
    case: Case, compiled: dict[Case, Compiled]
) -> None:
    """A thread of four warps has four values of a latent, in bf16 or fp8, and one scale or none."""
    wide = r"v2\.b32" if case.kind == "bf16" else r"b32"
    assert compiled[case].count(rf"ld\.global\S*\.{wide}") > 0
    assert compiled[case].count(r"st\.global") == (2 if case.kind == "bf16" else 3)


@pytest.mark.parametrize(
    "case", [case for case in ON_NVIDIA if case.kernel == "expert_upload_kernel"], ids=str
)
def test_an_upload_reads_and_writes_16_bytes_a_thread(
    case: Case, compiled: dict[Case, Compiled]
) -> None:
    times = UPLOADED // 128 // 2  # 128 threads, two words at a time
    assert compiled[case].count(r"ld\.global\.v2\.b64") == times
    assert compiled[case].count(r"st\.global\.v2\.b64") == times


@pytest.mark.parametrize("case", [case for case in ALL if case.target == AMD], ids=str)
def test_amd_gets_the_same_kernels_without_ptx(case: Case, compiled: dict[Case, Compiled]) -> None:
    found = compiled[case]
    assert found.count("global_load_dwordx4") > 0
    if case.size:
        assert found.count("v_mfma") > 0


def test_every_kernel_is_compiled_for_every_gpu() -> None:
    """A kernel is what no other one calls."""
    defined, called = set(), set()
    for path in Path(kernels.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(
                ast.unparse, node.decorator_list
            ):
                defined.add(node.name)
                calls = (each for each in ast.walk(node) if isinstance(each, ast.Call))
                called |= {each.func.id for each in calls if isinstance(each.func, ast.Name)}
    for target in NVIDIA:
        assert {case.kernel for case in ALL if case.target == target} == defined - called
