"""How much memory a whole model takes while it is loaded, and while it reads a prompt of 8K tokens.

The bound of both is what importing takes, the packed weights, the cache and 300 MB. The model is
that of end_to_end.py, under the shipped rule file for int8.

Run: python benchmarks/model_memory.py --help   The last line is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated

import typer

from results import Report, emit
from whole_model import LAYERS, model_folder, random_ids, vocab_size

SPARE = 300e6
TOKENS = 8192
RULES = "deepseek-v2-cpu-int8"

# In a process of its own, so that nothing else counts. Peaks are reset between the two phases.
MEASURE = r"""
import json, sys
from ktransformers.cache import LatentCache
from ktransformers.load import optimize_and_load
from ktransformers.operators import decoder_layer, linear
from ktransformers.prefill import prefill

def memory(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024

def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

folder, rules, ids = sys.argv[1], sys.argv[2], json.load(sys.stdin)
imported = memory("VmRSS")
forget_peak()
model = optimize_and_load(folder, rules)
loading = memory("VmHWM")
loaded = memory("VmRSS")
forget_peak()
cache = LatentCache.for_model(model, len(ids))
prefill(model, [ids], cache)
print(json.dumps({
    "imported": imported,
    "loading": loading,
    "loaded": loaded,
    "reading": memory("VmHWM"),
    "weights": model.ktransformers_report.bytes_by_device["cpu"],
    "cache": cache.nbytes,
}))
"""


def shares(found: dict[str, float]) -> Report:
    """Return both peaks over their bounds, where there is no cache yet and where there is one."""
    bound = found["imported"] + found["weights"] + SPARE
    return {
        "loading_share_of_bound": found["loading"] / bound,
        "reading_share_of_bound": found["reading"] / (bound + found["cache"]),
    }


def main(
    layers: Annotated[int, typer.Option(min=2, help="Layers of the model.")] = LAYERS,
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure the memory of a whole model; the last line is one JSON object."""
    folder = model_folder(layers)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), RULES],
        input=json.dumps(random_ids(TOKENS, vocab_size(folder))),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    for name, nbytes in found.items():
        print(f"{name}: {nbytes / 1e6:,.0f} MB")
    emit("model-memory", {"layers": layers} | found | shares(found), save=save)


if __name__ == "__main__":
    typer.run(main)
