"""What a benchmark says: a Markdown table, one line of JSON, and a file to keep.

Files are `results/<machine>/<name>.json`, one per benchmark, and hold machine, commit and date
beside the figures: the history is git's.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ktransformers import _native
from limits import Measured, quartiles

FOLDER = Path(__file__).parent / "results"
HEADER = (
    "isa",
    "tokens",
    "ms (quartiles)",
    "tok/s",
    "GB/s",
    "of bandwidth",
    "GOPS",
    "of peak",
    "of the limit (quartiles)",
)

Report = dict[str, Any]


def machine() -> dict[str, str | int | float]:
    """Describe this machine, as far as speed depends on it."""
    cpu_info, memory = Path("/proc/cpuinfo").read_text(), Path("/proc/meminfo").read_text()
    family = re.search(r"^cpu family\s*: (\d+)\nmodel\s*: (\d+)", cpu_info, re.MULTILINE)
    name = re.search(r"^model name\s*: (.*)", cpu_info, re.MULTILINE)
    total = re.search(r"MemTotal:\s*(\d+)", memory)
    kind = f" {family[1]}/{family[2]}" if family else ""
    return {
        "cpu": (name[1] if name else "unknown") + kind,
        "isa": _native.isa(),
        "cores": _native.default_threads(),
        "memory_gb": round(int(total[1]) / 1e6, 1) if total else 0,
    }


def machine_folder() -> str:
    """Name this machine as a folder, without what differs between two of a kind."""
    described = machine()
    words = f"{described['cpu']} {described['isa']} {described['cores']} cores".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def commit() -> str:
    """Return the commit, marked where files differ from it, or "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=FOLDER.parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def stamped(report: Mapping[str, Any]) -> Report:
    """Add machine, commit and date, and round what is measured to four digits."""
    stamp = {
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    rounded = {key: _rounded(value) for key, value in report.items()}
    return {**rounded, **stamp}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def last(name: str) -> Report | None:
    """Return what was kept under a name: of this machine if there is any, else the newest."""
    kept = [(path, json.loads(path.read_text())) for path in FOLDER.glob(f"*/{name}.json")]
    own = machine_folder()
    kept.sort(key=lambda item: (item[0].parent.name == own, item[1]["date"]))
    return kept[-1][1] if kept else None


def emit(name: str, report: Mapping[str, Any], *, save: bool) -> None:
    """Print the report as one line of JSON, and keep it if asked."""
    line = stamped({"name": name, **report})
    if save:
        path = FOLDER / machine_folder() / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


def emit_absent(name: str, report: Mapping[str, Any], reason: str, *, cannot: bool) -> None:
    """Print why a peer was not measured, and its last figures as stale where there are any."""
    print(reason)
    stale = last(name)
    if stale:
        print(f"last figures: of {stale['date']}, commit {stale['commit']}, {stale['machine']}")
        print(json.dumps(stale | {"status": "stale", "reason": reason}))
    else:
        absent = {"status": "absent", "reason": reason, "cannot": cannot}
        emit(name, {**report, **absent}, save=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One work, as it is reported."""

    isa: str
    tokens: int
    ms: tuple[float, float, float]
    tok_s: float
    gb_s: float
    bandwidth_share: float
    gops: float
    peak_share: float
    share: tuple[float, float, float]

    @classmethod
    def of(cls, result: Measured) -> Row:
        """Sum up all rounds: medians, and quartiles of time and share."""
        work = result.work
        lower, median, upper = quartiles(result.seconds)
        return cls(
            isa=work.isa,
            tokens=work.tokens,
            ms=(lower * 1e3, median * 1e3, upper * 1e3),
            tok_s=result.rate(work.tokens),
            gb_s=result.rate(work.nbytes) / 1e9,
            bandwidth_share=quartiles(result.bandwidth_shares())[1],
            gops=result.rate(work.operations) / 1e9,
            peak_share=quartiles(result.peak_shares())[1],
            share=quartiles(result.shares()),
        )

    def cells(self) -> list[str]:
        """Write it under `HEADER`."""
        ms, share = self.ms, self.share
        return [
            self.isa,
            str(self.tokens),
            f"{ms[1]:.3g} ({ms[0]:.3g} to {ms[2]:.3g})",
            f"{self.tok_s:.0f}",
            f"{self.gb_s:.1f}",
            f"{self.bandwidth_share:.0%}",
            f"{self.gops:.0f}",
            f"{self.peak_share:.0%}",
            f"{share[1]:.0%} ({share[0]:.0%} to {share[2]:.0%})",
        ]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table, aligned to be read as it is."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * (width - 1) + ":" for width in widths]
    lines.insert(1, rule)
    padded = [map(str.rjust, line, widths) for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def summary(rows: Sequence[Row]) -> Report:
    """Name the figures of the best instruction set that targets ask for.

    `decode_share` is of the bandwidth, `prefill_<tokens>_share` of the peak; `middle_share` is the
    worst of 4 to 64 tokens, of the limit.
    """
    report: Report = {}
    best = [row for row in rows if row.isa == rows[0].isa]
    for row in best:
        if row.tokens == 1:
            report["decode_share"] = row.bandwidth_share
        elif row.tokens > 64:
            report[f"prefill_{row.tokens}_share"] = row.peak_share
            report[f"limit_{row.tokens}_share"] = row.share[1]
    middle = [row.share[1] for row in best if 4 <= row.tokens <= 64]
    if middle:
        report["middle_share"] = min(middle)
    return report


def limits_of(results: Sequence[Measured]) -> Report:
    """Sum up the limits of the best instruction set over all rounds."""
    best = [result for result in results if result.work.isa == results[0].work.isa]
    bandwidths = quartiles([value / 1e9 for result in best for value in result.bandwidths])
    peaks = quartiles([value / 1e9 for result in best for value in result.peaks])
    instruction = best[0].work.meter.instruction()
    print(f"read bandwidth: {bandwidths[1]:.1f} GB/s ({bandwidths[0]:.1f} to {bandwidths[2]:.1f})")
    print(f"peak of {instruction}: {peaks[1]:.1f} GOPS ({peaks[0]:.1f} to {peaks[2]:.1f})")
    return {"instruction": instruction, "read_gb_s": bandwidths, "peak_gops": peaks}
