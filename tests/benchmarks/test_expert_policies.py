"""The command that compares which experts a GPU should hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import expert_policies
from ktransformers.expert_profile import uses_of_layer

pytestmark = pytest.mark.skipif(
    not (expert_policies.FOLDER / "model.safetensors").is_file(),
    reason="examples/tiny-deepseek-v3/model.safetensors is not here (an sdist leaves it out)",
)


def test_policies_are_compared_and_a_profile_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "profile.json", expert_policies.FOLDER
    expert_policies.main(folder, tokens=96, window=48, profile=path, save=False)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["steps"], found["layers"], found["experts"]) == (96, 3, 32)
    few, many = ({k: v for k, v in found.items() if f" {n} slots" in k} for n in (4, 24))
    assert len(few) == len(many) == 5
    assert all(0 < a < b < 1 for a, b in zip(few.values(), many.values(), strict=True))
    assert sum(uses_of_layer(path, 3, 32)) == 96 * 8
