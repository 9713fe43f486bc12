"""Every target of the project so far: measured now, beside its bound, with the command.

Run: python benchmarks/targets.py       Exits 1 where a target does not hold, 2 where one has no
figure. Each command is run once and ends in one line of JSON, from which its targets are read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TINY_FOLDER = ROOT / "examples" / "tiny-deepseek-v3"
EXPERTS = "benchmarks/experts.py"
PLAN = "benchmarks/plan.py"
LOADING = "benchmarks/loading.py"
DEMO = "examples/demo.py"
TINY = "examples/tiny-deepseek-v3/train.py evaluate"
SECONDS = "seconds the command took"  # a figure that this file measures itself

Figures = Mapping[str, Any]  # the last line of a command


@dataclass(frozen=True, slots=True)
class Target:
    """A promise: a figure of a command is at least, or at most, `bound`."""

    promise: str
    command: str
    figure: Callable[[Figures], float]
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Tell whether the promise is kept."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    def bound(self) -> str:
        """Write the bound."""
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


def _one_expert_over_eight(figures: Figures) -> float:
    by_experts = figures["perplexity_by_experts"]
    return float(by_experts["1"] / by_experts["8"])


def _tiny_mib(_: Figures) -> float:
    files = (path for path in TINY_FOLDER.iterdir() if path.is_file())
    return sum(path.stat().st_size for path in files) / 2**20


TARGETS = (
    Target("demo, once installed, s", DEMO, itemgetter(SECONDS), at_most=60),
    Target("plan V3 at its real size, s", PLAN, itemgetter("plan_s"), at_most=3),
    Target("plan V3, peak memory, GB", PLAN, itemgetter("peak_gb"), at_most=1),
    Target(
        "loading, peak over (packed + 10 % + 200 MB)",
        LOADING,
        itemgetter("peak_share_of_bound"),
        at_most=1,
    ),
    Target("decode, share of read bandwidth", EXPERTS, itemgetter("decode_share"), at_least=0.60),
    Target(
        "prefill 1,024, share of int8 peak", EXPERTS, itemgetter("prefill_share"), at_least=0.40
    ),
    Target("module over bare kernel call, us", EXPERTS, itemgetter("overhead_us"), at_most=30),
    Target("tiny: perplexity with 1 expert over 8", TINY, _one_expert_over_eight, at_least=1.10),
    Target(
        "tiny: share of the least used expert",
        TINY,
        lambda figures: float(min(figures["expert_share_min"])),
        at_least=1e-5,
    ),
    Target("tiny: size, MiB", TINY, _tiny_mib, at_most=16),
)


def run(command: str) -> Figures:
    """Run a command and return the figures in its last line; none where it failed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    figures: dict[str, Any] = {SECONDS: time.perf_counter() - start}
    if done.returncode:
        sys.stderr.write(f"{command} failed:\n{done.stderr}\n")
        return {}
    lines = done.stdout.strip().splitlines()
    if lines and lines[-1].startswith("{"):
        figures.update(json.loads(lines[-1]))
    return figures


def main() -> int:
    """Measure, print a table, and return the exit code."""
    console = Console(width=120)
    commands = list(dict.fromkeys(target.command for target in TARGETS))
    with console.status("measuring") as status:
        figures = {}
        for command in commands:
            status.update(f"measuring: python {command}")
            figures[command] = run(command)
    table = Table("target", "measured", "bound", "holds", "command")
    outcome = 0
    for target in TARGETS:
        try:
            value = target.figure(figures[target.command])
        except KeyError:
            outcome = 2
            table.add_row(target.promise, "absent", target.bound(), "ERROR", target.command)
            continue
        holds = target.holds(value)
        outcome = outcome if holds else max(outcome, 1)
        verdict = "yes" if holds else "NO"
        table.add_row(target.promise, f"{value:.4g}", target.bound(), verdict, target.command)
    console.print(table)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
