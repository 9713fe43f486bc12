"""What plays another engine: numpy and the standalone handle, here or in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

# Another engine: numpy, and nothing else.
PREPARE = """
import os, signal, sys
import numpy as np
from ktransformers.engine import load_experts
E, D, F, T, K = 8, 96, 64, 9, 3
random = np.random.default_rng(0)

def make(E=E, F=F, D=D, **options):
    shapes = (E, F, D), (E, F, D), (E, D, F)
    weights = [random.standard_normal(shape, dtype=np.float32) / 8 for shape in shapes]
    return load_experts(*weights, **{"threads": 2, **options})

def draw(T=T, D=D, E=E, K=K):
    x = random.standard_normal((T, D), dtype=np.float32)
    index = random.integers(0, E + 1, (T, K))
    return x, index, random.random((T, K), dtype=np.float32), np.full_like(x, np.nan)

def computed(handle, x, index, weights, out):
    expected = np.empty_like(x)
    handle.layer.forward(x, index, weights, expected)
    return out.tobytes() == expected.tobytes()
"""
scope: dict[str, Any] = {}
exec(PREPARE, scope)  # the same here and in processes of their own
E, D, F, T, K = (int(scope[name]) for name in "EDFTK")
random, make, draw, computed = (scope[name] for name in ("random", "make", "draw", "computed"))


def start(script: str) -> subprocess.Popen[str]:
    """Start a script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str) -> str:
    """Run a script in a process of its own and return its output."""
    with start(script) as process:
        out, error = process.communicate(timeout=60)
    assert error == ""
    assert process.returncode == 0
    return out
