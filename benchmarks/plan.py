"""Plan DeepSeek-V3 at its real size on the meta device: seconds and memory, without any weight.

Run: python benchmarks/plan.py          The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

from transformers import DeepseekV3Config

from ktransformers.inject import plan
from ktransformers.load import build_on_meta
from ktransformers.rules import load_rules

REPEATS = 5
LAYERS = 61  # of DeepSeek-V3


def peak_bytes() -> int:
    """Return this process's peak resident memory.

    Not `ru_maxrss`: a process inherits that of the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Measure, check that every layer was taken, and print."""
    start = time.perf_counter()
    model = build_on_meta(DeepseekV3Config())
    build_s = time.perf_counter() - start
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        planned = plan(model, load_rules("deepseek-v3-cpu-int8"))
        seconds.append(time.perf_counter() - start)
    taken = len(planned.replacements)
    if taken != LAYERS + 1:
        raise SystemExit(f"the plan takes {taken} modules, expected {LAYERS} layers and the head")
    result = {
        "plan_s": statistics.median(seconds),
        "plan_s_slowest": max(seconds),
        "build_on_meta_s": build_s,
        "peak_gb": peak_bytes() / 1e9,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
