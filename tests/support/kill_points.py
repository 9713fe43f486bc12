"""Kill the packer at seeded moments, look at what is left, resume, and compare the bytes.

    python kill_points.py MODEL FOLDER SEEDS    prints one JSON object per seed

A process that has planned the model forks for every run, so that a hundred cost seconds. What dies
is a child whose file-system calls are counted: at the n-th it kills itself, before the call, after
it, or, where it writes, half-way.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ktransformers import packing
from ktransformers.checkpoint.packed import INDEX, read_index
from ktransformers.checkpoint.packed_writer import damage
from ktransformers.rules import load_rules

CALLS = ("open", "mkdir", "write", "fsync", "replace", "unlink")
MOMENTS = ("before", "half-way", "after")
RULES = [
    {
        "match": {"name": r"\.mlp\.experts$"},
        "replace": {
            "class": "ktransformers.operators.experts.CpuExperts",
            "kwargs": {"threads": 1},
        },
    }
]


def in_child(run: Callable[[], None]) -> int:
    """Run in a forked process; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        finally:  # never back into the caller, which is the parent's
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def count_calls(on_call: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """Let `on_call(name, function, arguments)` stand in for this process's file-system calls."""
    for name in CALLS:
        function = getattr(os, name)

        def counted(
            *args: Any, name: str = name, function: Callable[..., Any] = function, **kwargs: Any
        ) -> Any:
            return on_call(name, lambda *given: function(*given, **kwargs), args)

        setattr(os, name, counted)


def die_at(point: int, moment: str, note: Callable[[str], None]) -> None:
    """Kill this process at its call number `point`; tell `note` which that was."""
    left = point

    def on_call(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        nonlocal left
        left -= 1
        if left:
            return function(*args)
        note(name)
        if moment == "half-way" and name == "write":
            function(args[0], args[1][: len(args[1]) // 2])
        elif moment == "after":
            function(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    count_calls(on_call)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def what_is_wrong(folder: Path, reference: dict[str, bytes]) -> str | None:
    """Say what of a killed run's folder looks whole and is not."""
    if not folder.exists():
        return None
    for name, data in contents(folder).items():
        if name.endswith(".safetensors") and data != reference[name]:
            return f"{name} is torn"
    if (folder / INDEX).exists():
        index = read_index(folder)
        for name, checksum in index.checksums.items():
            if damage(folder, index.entries[name], checksum, lambda _: None):
                return f"{name} is in the index, and damaged"
    return None


def main(model: Path, folder: Path, seeds: int) -> None:
    source, checkpoint, operators = packing._open(model, load_rules(RULES), None)

    def pack(out: Path) -> None:
        packing.pack_operators(out, source, checkpoint, operators)

    report, tell = os.pipe()

    def pack_and_count() -> None:
        calls = 0

        def on_call(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            nonlocal calls
            calls += 1
            return function(*args)

        count_calls(on_call)
        pack(folder / "reference")
        os.write(tell, str(calls).encode())

    assert in_child(pack_and_count) == 0
    total = int(os.read(report, 20))
    reference = contents(folder / "reference")

    write = os.write  # the one that is not counted

    def note(call: str) -> None:
        write(tell, call.ljust(20).encode())

    for seed in range(seeds):
        chosen = random.Random(seed)
        out = folder / str(seed)
        kills = []
        for _ in range(chosen.randint(1, 2)):  # the resumed run may be killed, too
            point, moment = chosen.randint(1, total), chosen.choice(MOMENTS)

            def run(point: int = point, moment: str = moment, out: Path = out) -> None:
                die_at(point, moment, note)
                pack(out)

            killed = in_child(run) == signal.SIGKILL
            call = os.read(report, 20).decode().strip() if killed else None
            kills.append({"call": call, "moment": moment, "wrong": what_is_wrong(out, reference)})
        resumed = in_child(functools.partial(pack, out))
        same = resumed == 0 and contents(out) == reference
        sys.stdout.write(json.dumps({"seed": seed, "kills": kills, "same": same}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
