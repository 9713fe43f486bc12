"""The kernels of this tree against those of another commit, in one process, round by round.

The other commit's extension is built in build/compare/ (a few minutes, once per commit). Each build
packs its own weights from the same numbers. A ratio above 1 means that this tree is faster.

Run: python benchmarks/compare.py main          The last line is one JSON object.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from ktransformers import _native
from limits import CALL_SECONDS, quartiles, timed_calls
from linear import random_projection
from moe_layer import MODELS, Calls, fitting, random_layer
from results import Report, emit, markdown

ROOT = Path(__file__).parents[1]
BUILDS = ROOT / "build" / "compare"
HEADER = ("what", "tokens", "before, ms", "now, ms", "faster (quartiles)", "results")
LINEAR = {"v3": (7168, 4096), "v2-lite": (2048, 3072)}  # inputs and outputs


@dataclass(frozen=True, slots=True)
class Pair:
    """The same call in both builds, and what each computes."""

    what: str
    tokens: int
    calls: tuple[Callable[[float], list[float]], Callable[[float], list[float]]]
    outputs: tuple[torch.Tensor, torch.Tensor]

    def difference(self) -> str:
        """Say how the results of the last calls differ, whose inputs are the same."""
        before, now = (output.float() for output in self.outputs)
        if torch.equal(before, now):
            return "same bits"
        return f"{float((before - now).norm() / before.norm()):.1e} apart"


def build_of(reference: str) -> Any:
    """Build another commit's extension, if it has not been, and import it beside this one."""
    commit = run("git", "rev-parse", "--verify", f"{reference}^{{commit}}").strip()
    folder = BUILDS / commit
    if not list(folder.glob("_native*.so")):
        print(f"building {reference} ({commit[:12]})", flush=True)
        source = folder / "source"
        shutil.rmtree(source, ignore_errors=True)
        done = subprocess.run(
            ["git", "archive", commit, "CMakeLists.txt", "csrc"],
            cwd=ROOT, capture_output=True, check=True,
        )  # fmt: skip
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(source, filter="data")
        # The domain keeps its classes apart from those of the installed extension.
        options = ["-DCMAKE_CXX_FLAGS=-DNB_DOMAIN=base", f"-DPython_EXECUTABLE={sys.executable}"]
        tree = folder / "tree"
        run("cmake", "-G", "Ninja", "-S", str(source), "-B", str(tree), *options)
        run("cmake", "--build", str(tree), "--target", "_native")
        (built,) = tree.glob("_native*.so")
        shutil.copy2(built, folder / built.name)
        shutil.rmtree(tree)
    (path,) = folder.glob("_native*.so")
    spec = importlib.util.spec_from_file_location("kt_base._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str) -> str:
    """Run a program of this environment and return what it prints; exit where it fails."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def expert_pairs(base: Any, model: str, weight: str, tokens: list[int]) -> list[Pair]:
    """Pair calls of the experts of one layer."""
    threads = _native.default_threads()
    sizes = fitting(MODELS[model], weight, copies=2)
    layers = []
    for build in (base, _native):
        torch.manual_seed(0)
        layers.append(random_layer(sizes, weight, build).native(threads, None))
    pairs = []
    for count in tokens:
        calls = Calls.draw(sizes, count)
        outputs = torch.empty_like(calls.x), torch.empty_like(calls.x)
        for layer, output in zip(layers, outputs, strict=True):
            layer.forward(calls.x, calls.indices[0], calls.weights, output)
        timed = calls.timed(layers[0]), calls.timed(layers[1])
        pairs.append(Pair(f"experts {model} {weight}", count, timed, outputs))
    return pairs


def linear_pairs(base: Any, model: str, weight: str, tokens: list[int]) -> list[Pair]:
    """Pair calls of a dense projection."""
    threads = _native.default_threads()
    pairs = []
    projections = []
    for build in (base, _native):
        torch.manual_seed(0)
        projections.append(random_projection(*LINEAR[model], weight, build))
    for count in tokens:
        x = torch.randn(count, LINEAR[model][0], dtype=torch.bfloat16)
        timed, outputs = [], []
        for projection in projections:
            layers = [projection.native(copy, threads) for copy in range(len(projection.packed))]
            out = torch.empty(count, LINEAR[model][1], dtype=torch.bfloat16)

            def call(i: int, layers: list[_native.Linear] = layers, out: torch.Tensor = out,
                     x: torch.Tensor = x) -> None:  # fmt: skip
                layers[i % len(layers)].forward(x, out)

            call(0)
            timed.append(timed_calls(call))
            outputs.append(out)
        both = cast("tuple[torch.Tensor, torch.Tensor]", tuple(outputs))
        pairs.append(Pair(f"linear {model} {weight}", count, (timed[0], timed[1]), both))
    return pairs


def measure(pairs: list[Pair], rounds: int) -> Report:
    """Measure both builds in every round, print a table, and return the ratios."""
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in pairs]
    for number in range(rounds + 1):
        for pair, kept in zip(pairs, times, strict=True):
            # Whoever goes first in a round goes second in the next.
            for which in (0, 1) if number % 2 else (1, 0):
                seconds = statistics.median(pair.calls[which](CALL_SECONDS))
                if number:
                    kept[which].append(seconds)
    rows, report = [], {}
    for pair, (before, now) in zip(pairs, times, strict=True):
        lower, ratio, upper = quartiles([a / b for a, b in zip(before, now, strict=True)])
        spread = f"{ratio:.3f} ({lower:.3f} to {upper:.3f})"
        ms = (f"{statistics.median(values) * 1e3:.3g}" for values in (before, now))
        rows.append([pair.what, str(pair.tokens), *ms, spread, pair.difference()])
        report[f"{pair.what} {pair.tokens}"] = [lower, ratio, upper]
    print(markdown(HEADER, rows))
    return report


def main(
    base: Annotated[str, typer.Argument(help="A branch, tag or commit to compare with.")],
    models: Annotated[str, typer.Option(help="Whose layer sizes.")] = "v2-lite,v3",
    weights: Annotated[str, typer.Option(help="Weight formats.")] = "int8,int4-128,bf16",
    tokens: Annotated[str, typer.Option(help="Token counts.")] = "1,4,16,64,256",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements.")] = 5,
) -> None:
    """Compare this tree's kernels with another commit's; the last line is one JSON object."""
    module = build_of(base)
    counts = [int(count) for count in tokens.split(",")]
    report: Report = {}
    for model in models.split(","):
        for weight in weights.split(","):
            for pairs_of in (expert_pairs, linear_pairs):
                report |= measure(pairs_of(module, model, weight, counts), rounds)
    emit("compare", {"base": base, "faster": report}, save=False)


if __name__ == "__main__":
    typer.run(main)
