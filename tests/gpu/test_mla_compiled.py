"""Kernels of latent attention, compiled for GPUs that are not here at the sizes of real models."""

from __future__ import annotations

from typing import Any

import pytest

from ktransformers.operators.kernels.mla_keys import choose_tiles
from triton_aot import Compiled, Job, compile_all

KERNELS = "ktransformers.operators.kernels"
C, R, PAGE = 512, 64, 64  # of DeepSeek-V2, V2-Lite and V3
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}  # bytes a program may take
PREFILL_ROWS = 1 << 20
TARGETS = ("sm_80", "sm_89", "sm_90")
CASES = [
    *(("decode", 16, "bf16", target) for target in TARGETS),
    *(("decode", 128, "bf16", target) for target in TARGETS),
    *(("prefill", PREFILL_ROWS, "bf16", target) for target in TARGETS[1:]),
    ("decode", 16, "fp8e4nv", "sm_89"),
    ("decode", 128, "fp8e4nv", "sm_90"),
]
# Bytes of local memory of a thread: a tile of fp8 passes through registers on its way to bf16.
SPILLS = {("decode", 16, "fp8e4nv", "sm_89"): 8}


def job(kernel: str, rows: int, cache: str, target: str) -> Job:
    tiles = choose_tiles(rows, (int(target[3]), int(target[4])))
    pointers = dict.fromkeys(("q_latent_ptr", "q_rope_ptr", "rope_ptr"), "*bf16:16")
    pointers |= {"latent_ptr": f"*{cache}:16", "table_ptr": "*i32:16", "lengths_ptr": "*i32:16"}
    constexprs: dict[str, Any] = dict(C=C, R=R, PAGE=PAGE, BLOCK_N=tiles.keys, BLOCK_C=C)
    constexprs |= dict(BLOCK_R=R, WIDEN=False, valid_ptr=None)
    if cache == "bf16":
        constexprs["scale_ptr"] = None
    else:
        pointers["scale_ptr"] = "*fp32:16"
    numbers = {"score_scale": "fp32", "table_stride": "i32", "valid_stride": "i32", "H": "i32:16"}
    axes = "bh" if kernel == "decode" else "bth"
    numbers |= {f"{part}_stride_{axis}": "i32:16" for part in ("latent", "rope") for axis in axes}
    if kernel == "decode":
        name, constexprs["BLOCK_H"] = "mla_decode:decode_parts", tiles.rows
        pointers |= {"part_ptr": "*fp32:16", "lse_ptr": "*fp32:16"}
    else:
        name, constexprs["BLOCK_M"] = "mla_prefill:prefill_rows", tiles.rows
        pointers["out_ptr"], numbers["T"] = "*bf16:16", "i32"
    how = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    return Job(f"{KERNELS}.{name}", {**pointers, **numbers}, target, constexprs, **how)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int, str, str], Compiled]:
    return dict(zip(CASES, compile_all([job(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_tiles_fit_registers_and_shared_memory(case: Any, compiled: Any) -> None:
    resources = compiled[case].resources
    assert resources.spills <= SPILLS.get(case, 0)
    assert resources.shared <= SHARED[case[-1]]


@pytest.mark.parametrize("case", CASES)
def test_products_are_the_tensor_cores(case: Any, compiled: Any) -> None:
    of_warp, of_group = (compiled[case].count(rf"{name}\.") for name in (r"mma\.sync", "wgmma"))
    assert (of_group if case[1] > 16 and case[-1] == "sm_90" else of_warp) > 0


@pytest.mark.parametrize("case", CASES)
def test_latents_are_read_16_bytes_at_a_time(case: Any, compiled: Any) -> None:
    """A tile of keys is read by so many instructions of a thread, before the loop and in it."""
    _, rows, cache, target = case
    tiles = choose_tiles(rows, (int(target[3]), int(target[4])))
    each = tiles.keys * C * (2 if cache == "bf16" else 1) // (tiles.num_warps * 32 * 16)
    copies = compiled[case].count(r"cp\.async\.cg\.shared\.global \[[^;]*0x10")
    assert copies + compiled[case].count(r"ld\.global\S*\.v4\.b32") >= each
    if cache == "bf16":
        assert copies >= 2 * each
