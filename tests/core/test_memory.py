"""Memory while loading, in processes of their own: the peak on a model of 1 GB, and too little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loading import large_config, measure
from make_model import write_model


def test_peak_memory_is_the_packed_weights_and_a_tenth_and_200_mb(tmp_path: Path) -> None:
    written = write_model(tmp_path, large_config())
    assert written > 1e9
    result = measure(tmp_path)
    assert result["weights"] < 0.55 * written
    assert result["grown"] < 1.1 * result["weights"] + 200e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm, Linux's")
def test_no_memory_for_packed_weights_leaves_the_process_able_to_load_again() -> None:
    support = Path(__file__).parents[1] / "support"
    script = f"""
import os, resource, sys
sys.path.insert(0, {str(support)!r})
import torch
from tiny_models import random_model, v3_config
from ktransformers import optimize_and_load
from ktransformers.load import build_on_meta

config = v3_config(
    num_hidden_layers=2, hidden_size=1024, moe_intermediate_size=512, n_routed_experts=64
)
experts = {{"class": "ktransformers.operators.experts.CpuExperts"}}
rules = [{{"match": {{"name": r"\\.mlp\\.experts$"}}, "replace": experts}}]
weights, ids = random_model(config, dtype=torch.bfloat16), torch.tensor([[1, 2, 3]])
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})  # few threads, whose stacks count too
optimize_and_load(v3_config(), rules, checkpoint=random_model(v3_config()))  # torch's own start

model = build_on_meta(config, torch.bfloat16)
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), hard))
try:
    optimize_and_load(model, rules, checkpoint=weights)
except MemoryError as error:
    print(str(error).partition(" bytes")[0])
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
try:
    model(ids)
except RuntimeError as error:
    print(str(error).partition(",")[0])
model = build_on_meta(config, torch.bfloat16)
print(bool(optimize_and_load(model, rules, checkpoint=weights)(ids).logits.isfinite().all()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "CpuExperts at model.layers.1.mlp.experts: no memory for 101,187,584\n"
        "this model is unusable\nTrue\n"
    )
