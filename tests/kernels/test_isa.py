"""Dispatch: what may run, what is asked for, and what did run; and what the objects hold."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import latent_attention
from attention_reference import Form
from ktransformers import _native
from latent_attention import Sizes, random_attention
from native_variants import (
    BUILD,
    ROOT,
    Variant,
    format_variants,
    gemm_of,
    load_build,
    tool,
    variants,
)
from packed_layer import forward, random_layer, random_request

OPERATIONS = {
    *("quantize_rows", "sum_groups", "int8_gemm", "int4_gemm", "bf16_gemm", "int16_gemm"),
    *("quantize_pairs", "silu_mul", "weighted_add", "round_rows", "int4_quantize"),
    *("int8_peak", "int4_peak", "bf16_peak"),
    *("softmax_step", "rescale_add", "dequantise_rows", "widen_rows"),
    *("pair_rows", "transpose_pairs"),
    *("rms_norm", "add_rows", "router_logits"),
}
ISAS = {"portable", "avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}


def missing_isa() -> str:
    missing = sorted(ISAS - set(_native.isas()))
    if not missing:
        pytest.skip("this process has every instruction set")
    return missing[0]


def usable_sentence() -> str:
    return f"this process can use {', '.join(_native.isas())}"


def test_every_operation_has_a_portable_kernel() -> None:
    assert {op for op, isa in _native.kernels() if isa == "portable"} == OPERATIONS
    assert {isa for _, isa in _native.kernels()} <= ISAS
    assert _native.isas()[-1] == "portable"
    assert _native.isa() == _native.isas()[0]


def best(native: Any, operation: str, cap: str) -> str:
    """Return the last instruction set, up to `cap`, that can be used and has such a kernel."""
    levels = [isa for op, isa in native.kernels() if op == operation and isa in native.isas()]
    order = list(reversed(native.isas()))
    return max((isa for isa in levels if order.index(isa) <= order.index(cap)), key=order.index)


@pytest.mark.parametrize(
    ("format", "kernels"), format_variants("int8", "int4-32", "bf16"), indirect=["kernels"]
)
def test_layer_runs_the_kernels_of_its_isa_and_no_others(format: str, kernels: Variant) -> None:
    layer = random_layer(3, 64, 32, format=format)
    native = layer.native(kernels.native, isa=kernels.isa)
    assert native.isa == kernels.isa
    before = kernels.native.kernel_runs()
    # Sixteen rows for each expert: a whole tile of AMX, and no rest that has too few for one.
    request = random_request(layer, 24, 2)
    request.top_k_index[:] = torch.tensor([[0, 1], [1, 2], [2, 0]]).repeat(8, 1)
    forward(native, request)
    after = kernels.native.kernel_runs()
    ran = {kernel for kernel in after if after[kernel] != before[kernel]}
    rows = {"int8": {"quantize_rows"}, "int4-32": {"quantize_rows", "sum_groups"}, "bf16": set()}
    operations = {*rows[format], gemm_of(format), "silu_mul", "weighted_add", "round_rows"}
    assert (gemm_of(format), kernels.isa) in ran
    assert ran == {(op, best(kernels.native, op, kernels.isa)) for op in operations}


@pytest.mark.parametrize("kernels", variants("bf16_gemm"), indirect=True)
def test_attention_runs_the_kernels_of_its_isa_and_no_others(kernels: Variant) -> None:
    of = random_attention(Sizes())
    native = of.native(kernels.native, isa=kernels.isa)
    assert native.isa == kernels.isa
    request = latent_attention.random_request(of.sizes, [40], 20, cache="int8")
    everywhere = {"bf16_gemm", "round_rows", "softmax_step", "pair_rows", "transpose_pairs"}
    floats = {"rescale_add", "dequantise_rows"}
    tiled = best(kernels.native, "bf16_gemm", kernels.isa) == "amx_bf16"
    latents = floats if tiled else {"widen_rows", "quantize_pairs", "int16_gemm"}
    forms: tuple[tuple[Form, set[str]], ...] = (
        ("absorbed", {"weighted_add"} | latents),
        ("expanded", floats),
    )
    for form, own in forms:
        before = kernels.native.kernel_runs()
        latent_attention.forward(native, request, form)
        after = kernels.native.kernel_runs()
        ran = {kernel for kernel in after if after[kernel] != before[kernel]}
        operations = everywhere | own
        assert ran == {(op, best(kernels.native, op, kernels.isa)) for op in operations}


def test_variable_caps_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRANSFORMERS_ISA", "portable")
    assert _native.isa() == "portable"
    assert _native.isas() == ["portable"]
    layer = random_layer(1, 64, 32)
    assert layer.native().isa == "portable"
    if ("int8_gemm", "avx2") in _native.kernels():
        with pytest.raises(ValueError, match=r"^isa='avx2': this process can use portable$"):
            layer.native(isa="avx2")


def test_variable_that_is_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRANSFORMERS_ISA", "")
    assert _native.isa() == _native.isas()[0]


@pytest.mark.parametrize("kind", ["missing", "unknown"])
def test_variable_that_asks_for_what_is_not_there_is_an_error(kind: str) -> None:
    wanted = missing_isa() if kind == "missing" else "avx9"
    done = subprocess.run(
        [sys.executable, "-c", "from ktransformers import _native; _native.isa()"],
        env={**os.environ, "KTRANSFORMERS_ISA": wanted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"ValueError: KTRANSFORMERS_ISA={wanted}: {usable_sentence()}"


def test_argument_that_asks_for_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"^isa='avx9': {usable_sentence()}$"):
        random_layer(1, 64, 32).native(isa="avx9")


@pytest.mark.parametrize(
    ("format", "kernels"),
    [
        (weight, name)
        for weight in ("int8", "int4-32", "bf16")
        for name in variants(f"{weight.partition('-')[0]}_peak")
        if not name.startswith("amx") or "emulated" not in name  # two minutes, and no speed to tell
    ],
    indirect=["kernels"],
)
def test_benchmark_names_the_instruction(format: str, kernels: Variant) -> None:
    rate, instruction = kernels.native.bench_peak(format, 1, 0.001, isa=kernels.isa)
    assert rate > 0
    expected = {
        ("int8", "avx2"): "vpmaddubsw",
        ("int8", "avx_vnni"): "vpdpbusd ymm",
        ("int8", "avx512_vnni"): "vpdpbusd zmm",
        ("bf16", "avx2"): "vfmadd231ps ymm",
        ("bf16", "avx512_bf16"): "vdpbf16ps zmm",
        ("int8", "amx_int8"): "tdpbssd",
        ("bf16", "amx_bf16"): "tdpbf16ps",
        ("int4-32", "avx2"): "vpmaddubsw + vpaddw",
        **{("int4-32", isa): "dp" for isa in ("avx_vnni", "avx512_vnni", "amx_int8")},
    }
    assert expected.get((format, kernels.isa), "C++ multiply") in instruction


@pytest.mark.parametrize("isa", sorted(ISAS - {"portable"}))
def test_isa_objects_hold_no_function_that_the_linker_could_merge(isa: str, tmp_path: Path) -> None:
    """At -O0, where nothing is inlined, `nm` must show no weak symbol."""
    load_build("emulated")  # configures the build: its compile commands are the shipped ones
    nm = tool("nm")
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    kernels = [
        command
        for command in commands
        if f"kt_{isa}.dir" in command["command"] and command["file"].endswith(f"/{isa}.cpp")
    ]
    folders = {Path(command["file"]).parent for command in kernels}
    assert folders == {path.parent for path in (ROOT / "csrc").glob(f"*/{isa}.cpp")} != set()
    for command in kernels:
        arguments = shlex.split(command["command"])
        output = tmp_path / "kernel.o"
        arguments[arguments.index("-o") + 1] = str(output)
        arguments = [a for a in arguments if not re.fullmatch(r"-O\d|-DNDEBUG", a)] + ["-O0"]
        subprocess.run(arguments, cwd=command["directory"], check=True)
        symbols = subprocess.run([nm, output], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.search(r" [WVuwv] ", line)]
        assert weak == [], command["file"]


def disassembly() -> list[str]:
    done = subprocess.run(
        [tool("objdump"), "-d", "--no-show-raw-insn", _native.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def innermost_loops(lines: list[str]) -> list[list[str]]:
    """Return the instructions between each short backward jump and its target."""
    at = {}
    loops: list[tuple[int, int]] = []
    for i, line in enumerate(lines):
        found = re.match(r"\s+([0-9a-f]+):\s+(?:(j\w+)\s+([0-9a-f]+))?", line)
        if not found:
            continue
        at[int(found[1], 16)] = i
        if found[2] and int(found[3], 16) in at:
            loops.append((at[int(found[3], 16)], i))
    inner = [
        (start, end)
        for start, end in loops
        if end - start < 100 and not any(start <= s and e < end for s, e in loops)
    ]
    return [lines[start:end] for start, end in inner]


@pytest.mark.parametrize(
    ("instruction", "per_loop", "register"),
    [
        ("vpdpbusd", 24, "zmm"),  # int8
        ("vpdpbusd", 48, "zmm"),  # int4
        ("vpdpbusd", 12, "ymm"),  # int8
        ("vpdpbusd", 20, "ymm"),  # int4
        ("vdpbf16ps", 24, "zmm"),
        ("vpmaddubsw", 8, "ymm"),  # int8
        ("vpmaddubsw", 16, "ymm"),  # int4
        ("vfmadd231ps|vfmadd132ps|vfmadd213ps", 20, "ymm"),  # bf16
    ],
)
def test_accumulators_of_the_largest_tile_stay_in_registers(
    instruction: str, per_loop: int, register: str
) -> None:
    """GCC 12 keeps them in memory for trifles: 45 % of the peak instead of 88 %."""
    if ("int8_gemm", "avx512_vnni") not in _native.kernels():
        pytest.skip("this build has no x86-64 kernels")
    loops = [
        body
        for body in innermost_loops(disassembly())
        if sum(bool(re.search(f"({instruction}) .*{register}", line)) for line in body) == per_loop
    ]
    assert loops
    for body in loops:
        stores = [line for line in body if re.search(rf"vmov\w+\s+%{register}\d+,.*\(", line)]
        assert stores == []


@pytest.mark.parametrize("instruction", ["tdpbssd", "tdpbf16ps", "tileloadd", "ldtilecfg"])
def test_module_contains_amx_instructions(instruction: str) -> None:
    if ("int8_gemm", "amx_int8") not in _native.kernels():
        pytest.skip("the compiler of this build knows no AMX")
    assert any(instruction in line for line in disassembly())


def test_module_exports_nothing_but_its_init() -> None:
    done = subprocess.run(
        [tool("nm"), "-D", "--defined-only", _native.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    exported = [line.split()[-1] for line in done.stdout.splitlines()]
    assert exported == ["PyInit__native"]


def test_no_source_asks_for_the_machine_it_is_built_on() -> None:
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("the C++ sources are not here")
    assert "march=native" not in (ROOT / "CMakeLists.txt").read_text()
