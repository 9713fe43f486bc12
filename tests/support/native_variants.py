"""The native module as shipped, and builds of it that only tests use.

`emulated` has AVX-512 and AVX-VNNI emulated in plain C++ (tests/emulation) and runs the shipped AMX
code on an emulated AMX; `emulated_swapped` has a fault in that AMX, `mutant` in its matrix
products. All come from CMake, on demand, in build/tests.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ktransformers import _native

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "tests"
EMULATED = ("avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Variant:
    """A module and the instruction set to ask it for."""

    native: Any
    isa: str


def variants(operation: str) -> list[str]:
    """Name the kernels of an operation, as shipped and emulated."""
    isas = [isa for op, isa in _native.kernels() if op == operation]
    return isas + [f"{isa}-emulated" for isa in isas if isa in EMULATED]


def gemm_of(format: str) -> str:
    """Name the matrix product of a weight format."""
    return f"{format.partition('-')[0]}_gemm"


def format_variants(*formats: str) -> list[tuple[str, str]]:
    """Pair each format with the kernels of its matrix product."""
    return [(weight, name) for weight in formats for name in variants(gemm_of(weight))]


def tool(name: str) -> str:
    """Find a program beside this Python or on the path, or skip the test that needs it."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@functools.cache
def load_build(variant: str) -> Any:
    """Build and import one of these."""
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("the C++ sources are not here")
    if ("int8_gemm", "avx512_vnni") not in _native.kernels():
        pytest.skip("this build has no x86-64 kernels")
    cmake, compiler = tool("cmake"), os.environ.get("CXX") or "c++"
    tool(compiler)
    BUILD.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment["PATH"]) else []
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one builds
        if (BUILD / "CMakeCache.txt").exists():
            generator = []
        options = ["-DKT_TESTS=ON", f"-DPython_EXECUTABLE={sys.executable}"]
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(BUILD), *generator, *options],
            [cmake, "--build", str(BUILD), "--target", f"native_{variant}"],
        ):
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (BUILD / "tests" / "emulation" / f"kt_{variant}").glob("_native*.so")
    spec = importlib.util.spec_from_file_location(f"kt_{variant}._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variant(name: str) -> Variant:
    """Return the named variant, or skip the test where this machine has not got it."""
    isa, _, emulated = name.partition("-")
    if emulated:
        return Variant(load_build("emulated"), isa)
    if isa not in _native.isas():
        pytest.skip(f"this process has no {isa}")
    return Variant(_native, isa)
