"""Every target of the project so far: measured now, beside its bound, with the command.

Run: python benchmarks/targets.py       Exits 1 where a target does not hold, 2 where one has no
figure. Each command is run once and ends in one line of JSON, from which its targets are read.
Rows are in target_rows.py. A peer that is not installed is shown with its last figure, as stale; a
figure that this machine cannot have is absent with the reason, and no error.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from target_rows import SECONDS, TARGETS, Absent, Figures, Target

ROOT = Path(__file__).parents[1]
# What `make bench` does not keep.
KEEPING = tuple(
    f"benchmarks/{name}.py"
    for name in ("linear", "peers", "packing", "end_to_end", "model_limits", "model_memory")
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


def judge(target: Target, figures: Figures) -> tuple[int, str, str]:
    """Return the exit code that a target asks for, what was measured, and the verdict."""
    try:
        if figures.get("status") == "absent":
            if not figures["cannot"]:
                return 2, f"absent: {figures['reason']}", "ERROR"
            raise Absent(figures["reason"])
        value = target.figure(figures)
    except KeyError:
        return 2, "absent", "ERROR"
    except Absent as reason:
        return 0, f"absent: {reason}", "-"
    holds = target.holds(value)
    if figures.get("status") == "stale":
        measured = f"{value:.4g}, stale ({figures['date'][:10]}: {figures['reason']})"
        return 0, measured, "then yes" if holds else "then NO"
    measured = f"{value:.4g}"
    if "stands_in" in figures:
        measured += f", {figures['stands_in']} stands in"
    return (0, measured, "yes") if holds else (1, measured, "NO")


def main(save: bool = False) -> int:
    """Measure, print a table, and return the exit code."""
    console = Console(width=150)
    commands = list(dict.fromkeys(target.command for target in TARGETS))
    figures = {}
    with console.status("measuring") as status:
        for command in commands:
            status.update(f"measuring: python {command}")
            keep = " --save" if save and command.startswith(KEEPING) else ""
            figures[command] = run(command + keep)
    table = Table("target", "measured", "bound", "holds", "command")
    outcome = 0
    for target in TARGETS:
        code, measured, verdict = judge(target, figures[target.command])
        outcome = max(outcome, code)
        table.add_row(target.promise, measured, target.bound(), verdict, target.command)
    console.print(table)
    peaks = {f["weight"]: f["instruction"] for f in figures.values() if "instruction" in f}
    for weight, instruction in peaks.items():
        console.print(f"the peak beside {weight} is that of {instruction}")
    return outcome


def command(
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure every promise of the project, and say whether it holds."""
    raise typer.Exit(main(save))


if __name__ == "__main__":
    typer.run(command)
