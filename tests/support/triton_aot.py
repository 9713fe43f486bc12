"""Triton kernels compiled ahead of time, for GPUs that are not here, and what came of it.

A kernel that Triton's interpreter runs in this process cannot be compiled in it: `compile_all`
does that in a process of its own, without TRITON_INTERPRET, which has one for each processor.
There `compile_for` compiles one. Triton keeps the results by the hash of source and options, here
in build/, which `make clean` removes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parents[2] / "build" / "triton"
ALIGNED = ":16"  # after a type: a pointer or integer that 16 divides


@dataclass(frozen=True, slots=True)
class Job:
    """A kernel and what to compile it for; see `compile_for`."""

    kernel: str  # "package.module:name"
    signature: Mapping[str, str]
    target: str
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class Resources:
    """What a program of the compiled kernel takes."""

    registers: int  # per thread
    spills: int  # bytes of local memory per thread, or registers on AMD
    shared: int  # bytes


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled kernel."""

    ptx: str  # or AMD's assembly
    resources: Resources

    def count(self, pattern: str) -> int:
        """Count the matches of a regex in the text."""
        return len(re.findall(pattern, self.ptx))


def compile_all(jobs: Sequence[Job]) -> list[Compiled]:
    """Compile in a process of its own. Raises CalledProcessError, whose stderr is shown."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(KEPT))
    result = subprocess.run(
        [sys.executable, __file__],
        input=pickle.dumps(jobs),
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
    )
    return pickle.loads(result.stdout)  # type: ignore[no-any-return]  # what `_main` wrote


def compile_for(
    jit_fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile a `@triton.jit` function for a GPU.

    Args:
        signature: a type for each parameter that is no constexpr, such as `*fp16:16` or `i32`.
        constexprs: values of the others; None also for an optional pointer.
        target: `sm_80`, or on AMD `gfx942`.
    """
    # Heavy, and needed in a process of its own alone.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in jit_fn.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(types.values())
        if kind.endswith(ALIGNED)
    }
    source = ASTSource(
        fn=jit_fn,
        signature={name: kind.removesuffix(ALIGNED) for name, kind in types.items()},
        constexprs=dict(constexprs),
        attrs=attributes,
    )
    on_nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if on_nvidia else GPUTarget("hip", target, 64)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=gpu, options=options)
    shared = compiled.metadata.shared
    if on_nvidia:
        return Compiled(compiled.asm["ptx"], _nvidia(compiled.asm["cubin"], shared))
    return Compiled(compiled.asm["amdgcn"], _amd(compiled.asm["amdgcn"], shared))


def _nvidia(cubin: bytes, shared: int) -> Resources:
    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0], "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], shared)


def _amd(text: str, shared: int) -> Resources:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
    return Resources(int(found["vgpr_count"]), int(found["vgpr_spill_count"]), shared)


def _compile(job: Job) -> Compiled:
    module, _, name = job.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    how = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    return compile_for(kernel, job.signature, job.constexprs, job.target, **how)


def _main() -> None:
    jobs: Sequence[Job] = pickle.loads(sys.stdin.buffer.read())
    for job in jobs:  # imported once, before processes part
        importlib.import_module(job.kernel.partition(":")[0])
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        compiled = pool.map(_compile, jobs, chunksize=1)
    sys.stdout.buffer.write(pickle.dumps(compiled))


if __name__ == "__main__":
    # What is pickled belongs to the module of this name, which this file is to others.
    from triton_aot import _main as main

    main()
