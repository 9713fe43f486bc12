"""The command that says what expert deferral costs."""

from __future__ import annotations

import json

import pytest

import deferral

pytestmark = pytest.mark.skipif(
    not (deferral.FOLDER / "model.safetensors").is_file(),
    reason="examples/tiny-deepseek-v3/model.safetensors is not here (an sdist leaves it out)",
)


def test_deferral_costs_less_than_leaving_experts_out(capsys: pytest.CaptureFixture[str]) -> None:
    deferral.main(deferral.FOLDER, tokens=257, window=64, weight="int8", save=False)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["deferred_0_kl"] == found["left_out_0_kl"] == 0
    assert found["deferred_0_perplexity"] == found["left_out_0_perplexity"]
    for d in (1, 2):
        assert 0 < found[f"deferred_{d}_kl"] < found[f"left_out_{d}_kl"]
