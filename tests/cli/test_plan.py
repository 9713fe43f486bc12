"""`ktransformers plan`, as its users meet it."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import call
from shipped_files import SMALL
from tiny_models import v2_config, v3_config

MACHINE = ["--gpu", "2", "--memory", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that has a config and nothing else."""
    folder = tmp_path_factory.mktemp("models") / "Small-V3"
    v3_config(**SMALL, dtype="bfloat16").save_pretrained(folder)
    return folder


def test_it_writes_a_file_that_explain_takes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "rules.yaml"
    outcome = call("plan", model, *MACHINE, "--out", out)
    assert outcome.code == 0, outcome
    assert f"{out}: written; look at it with `ktransformers explain {model} --rules" in outcome.out
    assert outcome.out.startswith("Small-V3: 1 x 2 GB of GPU, with 80 % of routed experts in ")
    assert "\n  cuda:0: 2.0 of 2 GB: 0.8 weights, 0.0 latent cache, " in outcome.out
    explained = call("explain", model, "--rules", out)
    assert explained.code == 0, explained
    assert "DeepseekV3Attention -> GpuMlaAttention(device='cuda:0')" in explained.out


def test_without_a_file_to_write_it_shows_what_it_would(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "rules.yaml"
    call("plan", model, *MACHINE, "--out", out)
    assert call("plan", model, *MACHINE).out == out.read_text()


def test_the_command_in_the_head_makes_the_same_file(model: Path) -> None:
    options = ["--context", "100", "--cores", "3", "--dtype", "bfloat16", "--weight", "int4"]
    text = call("plan", model, "--gpu", "1.75", *options, "--memory", "3.5").out
    (made_by,) = [line for line in text.splitlines() if line.startswith("# Made by: ")]
    command = made_by.removeprefix("# Made by: ktransformers ").split()
    assert call(*command).out == text
    assert "threads: 3" in text


def test_int8_is_taken_where_it_fits_and_else_int4(model: Path) -> None:
    for memory, weight in (("2.5", "int8"), ("2.4", "int4")):
        text = call("plan", model, "--gpu", "1.8", "--memory", memory).out
        assert f"kwargs: {{weight: {weight}, threads: '${{threads}}'}}" in text


def test_the_machine_it_runs_on_is_the_one_it_plans_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktransformers.machine.gpu_bytes", lambda: (25_393_692_672, 12_622_168_064))
    monkeypatch.setattr("ktransformers.machine.memory_bytes", lambda: 67_000_000_000)
    text = call("plan", model).out
    assert "ktransformers plan " in text
    assert "--gpu 25.3 --gpu 12.6 --memory 67\n" in text
    assert "# Machine: 1 x 25.3 + 1 x 12.6 GB of GPU and 67 GB of memory, for " in text
    assert "#   cuda:1: not needed\n" in text


def test_a_file_that_is_there_is_kept_unless_force_is_used(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "rules.yaml"
    out.write_text("mine")
    outcome = call("plan", model, *MACHINE, "--out", out)
    assert (outcome.code, outcome.err) == (2, f"{out}: is there already; --force overwrites it\n")
    assert out.read_text() == "mine"
    assert call("plan", model, *MACHINE, "--out", out, "--force").code == 0
    assert out.read_text() != "mine"


def test_what_is_wrong_is_said_in_a_sentence_each(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    outcome = call("plan", tmp_path, "--gpu", "0", "--memory", "-1", "--out", tmp_path)
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        "--gpu 0: expected a GPU's memory in GB, such as 24",
        "--memory -1: expected the memory in GB, such as 512",
        "model_type llama: no rules are known for it (known: deepseek_v2, deepseek_v3); "
        "docs/rules.md says how to write them",
        f"{tmp_path}: is there already; --force overwrites it",
    ]


def test_memory_that_is_short_is_said_of_the_smaller_format(model: Path) -> None:
    outcome = call("plan", model, "--gpu", "1.8", "--memory", "1")
    assert outcome.code == 2
    assert outcome.err.startswith("memory: 0.3 GB are missing: weights that no GPU has room for")
    assert "take 1.1 GB in int4" in outcome.err


def test_models_of_v2_are_planned_too(tmp_path: Path) -> None:
    v2_config(dtype="bfloat16").save_pretrained(tmp_path)
    assert "class: DeepseekV2Attention" in call("plan", tmp_path, *MACHINE).out
