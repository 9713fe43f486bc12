"""What the documents show must run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command_line import call
from ktransformers import optimize_and_load
from ktransformers.rules import shipped_rules
from tiny_models import random_model, v3_config

ROOT = Path(__file__).parents[2]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_operator_of_contributing_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., Path]
) -> None:
    (source,) = blocks("CONTRIBUTING.md", "python")
    (tmp_path / "my_operators.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    folder = save(random_model(v3_config(), dtype=torch.bfloat16))
    rule = {
        "match": {"class": "torch.nn.Linear", "name": r"o_proj$"},
        "replace": {"class": "my_operators.Fp32Linear"},
        "expect": 3,
    }
    model = optimize_and_load(folder, [rule])
    try:
        assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float32
        with torch.no_grad():
            assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    finally:
        del sys.modules["my_operators"]


def test_the_python_of_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    swaps, engine = blocks("README.md", "python")
    exec(compile(swaps, "README.md", "exec"), {})  # what the page tells people to run
    assert "DeepseekV3DecoderLayer -> CpuDecoderLayer" in capsys.readouterr().out
    names: dict[str, Any] = {}
    exec(compile(engine, "README.md", "exec"), names)
    expected = np.empty_like(names["out"])
    arguments = [names[n] for n in ("hidden_states", "top_k_index", "top_k_weights")]
    names["experts"].layer.forward(*arguments, expected)
    assert np.array_equal(names["out"], expected)


def test_the_commands_of_the_page_on_plans_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks("docs/plan.md", "sh")
    for command in commands.splitlines():
        outcome = call(*command.split()[1:])
        assert outcome.code == 0, outcome
        assert "Int4Linear" in outcome.out or "rules.yaml: written" in outcome.out


def test_the_files_of_the_page_on_plans_come_with_the_package() -> None:
    text = (ROOT / "docs" / "plan.md").read_text()
    machines = re.findall(r"`(\dx\d\dgb)`", text)
    names = [f"deepseek-v{v}-{machine}-cpu-int8" for v in (2, 3) for machine in machines]
    assert len(names) == 8
    assert {*names, "deepseek-v2-lite-1x12gb"} <= set(shipped_rules())


def test_the_rules_of_the_readme_reduce_experts_where_they_say(
    tmp_path: Path, save: Callable[..., Path]
) -> None:
    (source,) = blocks("README.md", "yaml")
    (tmp_path / "rules.yaml").write_text(source)
    config = v3_config(num_experts_per_tok=8, n_routed_experts=16)
    model: Any = optimize_and_load(save(random_model(config)), tmp_path / "rules.yaml")
    assert model.ktransformers_report.experts_per_token == 7  # 8 in layer 1, 6 in layer 2


def holds(name: str) -> bool:
    """Tell whether a file is there, or a folder with something in it, as a clone would have."""
    path = ROOT / name
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"])
def test_files_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text)
    assert not [name for name in named if not holds(name) and not holds(f"ktransformers/{name}")]
