"""The synthetic model maker: what it writes loads under rules and generates."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open
from transformers import AutoTokenizer
from typer.testing import CliRunner

import make_model
from ktransformers import optimize_and_load
from ktransformers.checkpoint import open_checkpoint
from make_model import quantise_fp8, real_config, write_model

TINY: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 160,
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
RULES = [
    {
        "match": {"name": r"\.mlp\.experts$"},
        "replace": {"class": "ktransformers.operators.experts.CpuExperts"},
    }
]


@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("model", ["v2-lite", "v3"])
def test_a_model_loads_under_rules_and_generates(
    model: str, q_lora_rank: int | None, format: Any, tmp_path: Path
) -> None:
    write_model(tmp_path, real_config(model, 3, q_lora_rank=q_lora_rank, **TINY), format)
    loaded = optimize_and_load(tmp_path, RULES)
    prompt = torch.tensor([[5, 6, 7]])
    generated = loaded.generate(prompt, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert generated.shape == (1, 7)
    hidden = loaded.get_submodule("model")(torch.arange(3, 19)[None]).last_hidden_state
    assert 0.5 < float(hidden.float().std()) < 2


def test_a_model_is_written_in_shards_that_the_index_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_model, "SHARD_BYTES", 200_000)
    total = write_model(tmp_path, real_config("v3", 2, q_lora_rank=24, **TINY), "fp8")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    infos = open_checkpoint(tmp_path).infos()
    assert {Path(info.file) for info in infos.values()} == set(files)
    stored = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            stored += sum(tensors.get_tensor(name).nbytes for name in names)
    assert stored == total


def test_fp8_has_a_scale_for_each_block_and_its_largest_weight_is_the_formats() -> None:
    values = torch.randn(200, 300)
    values[150, 290] = 9.0
    weight, scale = quantise_fp8(values)
    assert scale.shape == (2, 3)
    assert float(weight.float()[150, 290]) == 448
    real = weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    # Three bits of mantissa round by at most 2^-4; below 2^-6 steps are 2^-9 of the scale.
    assert torch.all((real - values).abs() <= values.abs() / 16 + float(scale.max()) * 2**-10)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(ValueError, match=r"GB, but 0\.0 GB are free; take fewer layers"):
        write_model(tmp_path / "model", real_config("v3", 2, **TINY))
    assert not list((tmp_path / "model").iterdir())


def test_the_command_writes_a_folder_with_the_bundled_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_model, "V2_LITE", make_model.V2_LITE | TINY)
    app = typer.Typer()
    app.command()(make_model.main)
    folder = tmp_path / "model"
    arguments = [str(folder), "--layers", "2", "--experts", "4", "--q-lora-rank", "16"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    config = optimize_and_load(folder, RULES).config
    assert (config.n_routed_experts, config.q_lora_rank, config.num_hidden_layers) == (4, 16, 2)
    assert len(AutoTokenizer.from_pretrained(folder)) <= config.vocab_size
    again = CliRunner().invoke(app, arguments)
    assert str(again.exception) == f"{folder} exists: name another, or remove it"


def test_experts_that_make_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="12 experts: v3 routes by 8 groups of 2 or more"):
        real_config("v3", 2, n_routed_experts=12)
