"""Load a model of 1.1 GB into int8 experts: how much memory that takes at its peak, and how long.

Run: python benchmarks/loading.py       The last line is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config, PreTrainedConfig

from make_model import write_model

# In a process of its own, so that nothing else counts.
LOAD = r"""
import json, sys, time
from ktransformers.load import optimize_and_load
from ktransformers.operators import experts
def peak():  # not ru_maxrss: a process inherits that of the one that started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
rules = [{"match": {"name": r"\.mlp\.experts$"},
          "replace": {"class": "ktransformers.operators.experts.CpuExperts"}}]
imported, start = peak(), time.perf_counter()
model = optimize_and_load(sys.argv[1], rules)
seconds = time.perf_counter() - start
print(json.dumps({"grown": peak() - imported, "seconds": seconds,
                  "weights": model.ktransformers_report.bytes_by_device["cpu"]}))
"""


def large_config() -> PreTrainedConfig:
    """Return the config of a V3 of 1.1 GB in bf16, nearly all of it routed experts."""
    sizes: dict[str, Any] = dict(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=1024,
        moe_intermediate_size=704,
        n_routed_experts=64,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        num_nextn_predict_layers=0,
    )
    return DeepseekV3Config(**sizes)


def measure(folder: Path) -> dict[str, float]:
    """Load the model in `folder`; return bytes and seconds.

    `grown` is the peak over what importing takes, `weights` what the loaded model holds.
    """
    command = [sys.executable, "-c", LOAD, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Write the model, load it, and print."""
    with tempfile.TemporaryDirectory() as name:
        written = write_model(Path(name), large_config())
        result = measure(Path(name))
    bound = 1.1 * result["weights"] + 200e6
    more = {"written": written, "bound": bound, "peak_share_of_bound": result["grown"] / bound}
    print(json.dumps({**result, **more}))


if __name__ == "__main__":
    main()
