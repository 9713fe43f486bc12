"""Layers in parts and in chunks: what they refuse, and the memory that they keep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ktransformers import _native
from packed_layer import pack

D, F = 96, 160


def linear(packed: Any, scale: Any, **options: Any) -> _native.Linear:
    return _native.Linear(
        packed, scale, format="int8", in_features=D, out_features=F, **{"threads": 1, **options}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numa": "both"}, "numa='both': expected interleave, shard or replicate"),
        ({"nodes": [1, 1]}, "nodes: 1 is there twice"),
        ({"nodes": list(range(65))}, "nodes: 65, expected at most 64"),
        ({"nodes": [4, 5, 6]}, "packed: in 2 parts, expected 3"),
        ({"nodes": [4]}, "packed: in 2 parts, expected 1"),
        ({"scale": torch.ones(F)}, "scale: in 1 parts, expected 2"),
        ({"numa": "replicate"}, "packed[0]: expected shape [20480], got [8192]"),
        ({"chunk_tokens": 0}, "chunk_tokens=0: expected 1 to 1048576"),
        ({"chunk_tokens": (1 << 20) + 1}, "chunk_tokens=1048577: expected 1 to 1048576"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    packed, scale = pack(torch.randn(F, D))
    size = packed.numel() // F
    halves = {
        "packed": [packed[: 64 * size], packed[64 * size :]],
        "scale": [scale[:64], scale[64:]],
        "numa": "shard",
        "nodes": [4, 5],
    }
    assert linear(**halves).chunk_tokens == 1024
    with pytest.raises(ValueError) as caught:
        linear(**{**halves, **change})
    assert str(caught.value) == message


SCRATCH = f"""
import sys
import numpy as np
sys.path.insert(0, {str(Path(_native.__file__).parent)!r})
import _native
E, D, F, T = 3, 64, 128, 1500
random = np.random.default_rng(0)
weights = [random.integers(0, 127, (E, size * D * F), dtype=np.uint8) for size in (2, 1)]
scales = [np.full((E, 2, F), 1e-3, np.float32), np.full((E, D), 1e-3, np.float32)]
x = random.standard_normal((T, D), dtype=np.float32)
index = random.integers(0, E, (T, TOP_K))
top_k_weights = np.ones((T, TOP_K), np.float32)

def bytes_after(chunk_tokens, kind):
    out = np.empty_like(x)
    options = dict(format='int8', threads=1, chunk_tokens=chunk_tokens)
    if kind == 'experts':
        layer = _native.Experts(
            weights[0], scales[0], weights[1], scales[1],
            hidden_size=D, moe_intermediate_size=F, **options,
        )
        layer.forward(x, index, top_k_weights, out)
    else:
        layer = _native.Linear(
            weights[1][0][:D * D], scales[1][0], in_features=D, out_features=D, **options
        )
        layer.forward(x, out)
    return _native.scratch_bytes()
"""


def scratch(script: str, top_k: int = 4) -> list[int]:
    """Run a script in a process that has computed nothing yet; return the numbers it prints."""
    done = subprocess.run(
        [sys.executable, "-c", SCRATCH.replace("TOP_K", str(top_k)) + script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


def test_chunk_size_bounds_the_scratch_of_experts() -> None:
    # Per routed row: h in fp32, then in int8 with a scale and a sum; token and weight.
    # Per token: the same of x, and 64 columns of the sum. Per worker: two tiles of 64 x 64.
    def expected(tokens: int, rows: int) -> int:
        return rows * (4 * 128 + 128 + 8 + 8) + tokens * (64 + 8 + 4 * 64) + 2 * 4 * 64 * 64

    sizes = scratch("print(*(bytes_after(c, 'experts') for c in (16, 200, 1024, 2000)))")
    for size, tokens in zip(sizes, (16, 200, 1024, 1500), strict=True):
        assert 0 <= size - expected(tokens, 4 * tokens) < 4096  # blocks, and what vectors keep
    assert scratch("print(bytes_after(None, 'experts'))") == [sizes[2]]


def test_many_experts_per_token_make_smaller_chunks() -> None:
    eight = scratch("print(bytes_after(100, 'experts'))", top_k=8)[0]
    eighty = scratch("print(bytes_after(100, 'experts'))", top_k=80)[0]
    assert eighty < eight


def test_chunk_size_bounds_the_scratch_of_a_projection() -> None:
    sizes = scratch("print(*(bytes_after(c, 'linear') for c in (16, 200, 1024, 2000)))")
    assert sizes == [tokens * (64 + 8) + 4 * 64 * 64 for tokens in (16, 200, 1024, 1500)]


def test_nothing_is_kept_before_anything_was_computed() -> None:
    assert scratch("print(_native.scratch_bytes())") == [0]
