"""Peak memory while loading, in a process of its own, on a model of more than 1 GB."""

from __future__ import annotations

from pathlib import Path

from loading import large_config, measure
from make_model import write_model


def test_peak_memory_is_the_packed_weights_and_a_tenth_and_200_mb(tmp_path: Path) -> None:
    written = write_model(tmp_path, large_config())
    assert written > 1e9
    result = measure(tmp_path)
    assert result["weights"] < 0.55 * written
    assert result["grown"] < 1.1 * result["weights"] + 200e6
