"""optimize_and_load: every way in, every tensor in its place, every fault named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.load import LoadError, build_on_meta
from ktransformers.packing import pack
from ktransformers.rules import RuleError
from tiny_models import random_model, v2_config, v3_config

EXPERTS: list[dict[str, Any]] = [
    {
        "match": {"name": r"\.mlp\.experts$"},
        "replace": {"class": "ktransformers.operators.experts.CpuExperts"},
    }
]
HEAD: list[dict[str, Any]] = [
    {
        "match": {"name": "^lm_head$"},
        "replace": {"class": "ktransformers.operators.linear.CpuLinear"},
    }
]
NOTHING: list[dict[str, Any]] = [{"match": {"name": "^lm_head$"}, "replace": {"class": "default"}}]
IDS = torch.arange(24).reshape(2, 12)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unclaimed_modules_load_as_from_pretrained_loads_them(
    dtype: torch.dtype, config: PreTrainedConfig, save: Callable[..., Path]
) -> None:
    folder = save(random_model(config, dtype=dtype), max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()
    ours = optimize_and_load(folder, NOTHING)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert ours.dtype == plain.dtype == dtype
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
        assert ours.state_dict()[name].dtype == tensor.dtype, name
    for name, buffer in plain.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name
    assert torch.equal(logits(ours), logits(plain))


def test_every_way_in_gives_the_same_model(
    config: PreTrainedConfig, save: Callable[..., Path], tmp_path: Path
) -> None:
    original = random_model(config)
    folder = save(original)
    want = logits(optimize_and_load(folder, EXPERTS))
    rule_file = tmp_path / "rules.yaml"
    rule_file.write_text(json.dumps({"rules": EXPERTS}))
    as_config: dict[str, Any] = {"rules": EXPERTS, "dtype": torch.float32}
    ways = {
        "path as text": optimize_and_load(str(folder), EXPERTS),
        "rule file": optimize_and_load(folder, rule_file),
        "config and folder": optimize_and_load(config, **as_config, checkpoint=folder),
        "config and module": optimize_and_load(
            config, **as_config, checkpoint=random_model(config)
        ),
        "meta module": optimize_and_load(
            build_on_meta(config, torch.float32), EXPERTS, checkpoint=folder
        ),
        "loaded module": optimize_and_load(original, EXPERTS),
    }
    assert {
        name: torch.equal(logits(model), want) for name, model in ways.items()
    } == dict.fromkeys(ways, True)


def test_a_loaded_model_is_changed_in_place_and_gives_up_its_experts(save: Any) -> None:
    model = random_model(v3_config())
    assert optimize_and_load(model, EXPERTS) is model
    assert not any("gate_up_proj" in name for name, _ in model.named_parameters())


def test_a_given_config_is_left_as_it_was(save: Callable[..., Path]) -> None:
    config = v3_config()
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    before = config.to_dict()
    optimize_and_load(config, EXPERTS, checkpoint=save(random_model(v3_config())))
    assert config.to_dict() == before


def test_dtype_is_the_configs_unless_another_is_asked_for(save: Callable[..., Path]) -> None:
    folder = save(random_model(v3_config(), dtype=torch.bfloat16))
    assert optimize_and_load(folder, EXPERTS).dtype == torch.bfloat16
    model = optimize_and_load(folder, EXPERTS, dtype=torch.float32)
    assert model.dtype == torch.float32
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32


def test_selection_bias_stays_fp32_in_a_bf16_model(save: Callable[..., Path]) -> None:
    folder = save(random_model(v3_config(), dtype=torch.bfloat16))
    model = optimize_and_load(folder, EXPERTS)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_tied_embeddings_are_one_tensor(save: Callable[..., Path]) -> None:
    folder = save(random_model(v3_config(tie_word_embeddings=True)))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = optimize_and_load(folder, EXPERTS)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_operator_reads_a_tied_head_under_the_name_of_the_embeddings(
    save: Callable[..., Path],
) -> None:
    original = random_model(v3_config(tie_word_embeddings=True))
    folder = save(original)
    model = optimize_and_load(folder, HEAD)
    want, got = logits(original), logits(model)
    assert float((got - want).norm() / want.norm()) < 0.02  # of int8
    assert dict(model.lm_head.named_parameters()) == {}
    pack(folder, HEAD)
    cached = optimize_and_load(folder, HEAD)
    assert cached.ktransformers_report.cache is not None
    assert torch.equal(logits(cached), got)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_multi_token_prediction_layers_are_left_unread(save: Callable[..., Path]) -> None:
    folder = save(random_model(v3_config()))
    want = logits(optimize_and_load(folder, EXPERTS))

    def add_mtp(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(4, 4)
        tensors["model.layers.61.enorm.weight"] = torch.ones(4)  # the official V3's

    rewrite(folder, add_mtp)
    config = v3_config(num_nextn_predict_layers=1, dtype=torch.float32)
    assert torch.equal(logits(optimize_and_load(config, EXPERTS, checkpoint=folder)), want)


def test_fused_expert_files_load_like_those_of_one_tensor_per_expert(
    config: PreTrainedConfig, save: Callable[..., Path]
) -> None:
    model = random_model(config)
    folder = save(model)
    want = logits(optimize_and_load(folder, EXPERTS))

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors.update(model.state_dict())

    rewrite(folder, fuse)
    assert torch.equal(logits(optimize_and_load(folder, EXPERTS)), want)
    plain = optimize_and_load(folder, NOTHING)
    assert torch.equal(logits(plain), logits(model))


def as_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return FP8 values, their 128 x 128 block scales, and what both mean in fp32."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.rand(rows, columns) / 100 + 1e-3
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    spread = spread[: weight.shape[0], : weight.shape[1]]
    values = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scales, values.float() * spread


def test_fp8_checkpoints_load_as_what_they_mean_and_wake_no_quantiser(
    save: Callable[..., Path],
) -> None:
    model = random_model(v3_config(hidden_size=192, moe_intermediate_size=160))
    wide, narrow = save(model, "wide"), save(model, "narrow")
    meant: dict[str, torch.Tensor] = {}

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale_inv"], meant[name] = as_fp8(tensors[name])

    rewrite(narrow, quantise)
    rewrite(wide, lambda tensors: tensors.update(meant))
    settings = json.loads((narrow / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (narrow / "config.json").write_text(json.dumps(settings))
    for rules in (EXPERTS, NOTHING):
        ours = optimize_and_load(narrow, rules)
        assert torch.equal(logits(ours), logits(optimize_and_load(wide, rules)))
        assert not any("FP8" in type(module).__name__ for module in ours.modules())


def test_missing_unused_and_misshapen_tensors_are_listed_at_once_and_nothing_is_touched(
    save: Callable[..., Path],
) -> None:
    folder = save(random_model(v3_config()))

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.down_proj.weight"]
        del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
        tensors["model.layers.1.mlp.extra.weight"] = torch.ones(3)
        tensors["model.norm.weight"] = torch.ones(63)

    rewrite(folder, damage)
    model = build_on_meta(v3_config())
    before = str(model)
    with pytest.raises(LoadError) as caught:
        optimize_and_load(model, EXPERTS, checkpoint=folder)
    text = str(caught.value)
    file = folder / "model.safetensors"
    assert f"{file}: no tensor model.layers.0.mlp.down_proj.weight" in text
    assert (
        f"{file}: no tensor model.layers.1.mlp.experts.5.up_proj.weight\n  nearest: model." in text
    )
    assert f"{file}: model.layers.1.mlp.extra.weight: no module takes it" in text
    assert f"{file}: model.norm.weight: shape [63], expected [64]" in text
    assert str(model) == before


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.down_proj.weight",  # an operator's
        "model.layers.1.self_attn.o_proj.weight",  # transformers'
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_the_model_unusable(
    name: str, value: float, save: Callable[..., Path]
) -> None:
    folder = save(random_model(v3_config()))

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][1, 2] = value

    rewrite(folder, poison)
    model = build_on_meta(v3_config(), torch.float32)
    with pytest.raises(ValueError) as caught:
        optimize_and_load(model, EXPERTS, checkpoint=folder)
    assert str(folder / "model.safetensors") in str(caught.value)
    assert name in str(caught.value)
    with pytest.raises(RuntimeError, match="this model is unusable, because loading it failed"):
        model(IDS)


def test_experts_of_the_wrong_shape_are_all_named_and_nothing_is_touched(
    save: Callable[..., Path],
) -> None:
    folder = save(random_model(v3_config()))
    names = [f"model.layers.2.mlp.experts.{expert}.gate_proj.weight" for expert in (0, 5)]
    rewrite(folder, lambda t: t.update({name: torch.ones(31, 64) for name in names}))
    model = build_on_meta(v3_config(), torch.float32)
    before = str(model)
    with pytest.raises(LoadError) as caught:
        optimize_and_load(model, EXPERTS, checkpoint=folder)
    for name in names:
        assert f"{name}: shape [31, 64], expected [32, 64]" in str(caught.value)
    assert str(model) == before


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "big"), ("num_hidden_layers", None), ("hidden_act", "nope")]
)
def test_a_config_that_makes_no_model_is_named(
    key: str, value: object, save: Callable[..., Path]
) -> None:
    folder = save(random_model(v3_config()))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, key: value}))
    with pytest.raises(ValueError, match=r"config\.json: transformers can make no model of it"):
        optimize_and_load(folder, EXPERTS)


def test_an_interrupted_load_leaves_the_model_unusable(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktransformers.operators.experts import CpuExperts

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CpuExperts, "load_weights", interrupt)
    model = build_on_meta(v3_config(), torch.float32)
    with pytest.raises(KeyboardInterrupt):
        optimize_and_load(model, EXPERTS, checkpoint=save(random_model(v3_config())))
    with pytest.raises(RuntimeError, match="loading it failed: KeyboardInterrupt"):
        model(IDS)


@pytest.mark.parametrize(
    ("model", "kwargs", "error"),
    [
        (v3_config(), {}, "a config holds no weights: pass checkpoint="),
        (build_on_meta(v3_config()), {}, "parameters are on the meta device, such as model."),
        (random_model(v3_config()), {"dtype": torch.bfloat16}, "the model is torch.float32"),
        (nn.Linear(2, 2), {}, "Linear is no PreTrainedModel: it has no config"),
        (v3_config(), {"dtype": "float32"}, "dtype 'float32': expected a torch.dtype"),
        (random_model(v3_config()), {"checkpoint": "."}, "the model has weights of its own"),
    ],
    ids=["config", "meta", "dtype", "module", "dtype name", "two sources"],
)
def test_a_model_that_cannot_be_loaded_is_refused(model: Any, kwargs: Any, error: str) -> None:
    with pytest.raises((LoadError, TypeError), match=error):
        optimize_and_load(model, EXPERTS, **kwargs)


def test_weights_are_not_looked_for_before_the_rules_are_right(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object) -> None:
        raise AssertionError("weights were opened")

    monkeypatch.setattr("ktransformers.load.open_checkpoint", fetch)
    wrong = [{"match": {"name": "nowhere"}, "replace": {"class": "default"}}]
    with pytest.raises(RuleError, match="matches no module"):
        optimize_and_load(save(random_model(v3_config())), wrong)


def test_a_model_hooked_by_accelerate_is_refused() -> None:
    model = random_model(v3_config())
    model.lm_head._hf_hook = object()
    with pytest.raises(LoadError, match="accelerate has hooked this model"):
        optimize_and_load(model, EXPERTS)


def test_the_report_says_what_was_replaced_and_what_it_holds(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(random_model(v3_config(), dtype=torch.bfloat16))
    with caplog.at_level(logging.INFO, logger="ktransformers"):
        model: Any = optimize_and_load(folder, EXPERTS)
    report = model.ktransformers_report
    line = "model.layers.{1-2}.mlp.experts: DeepseekV3Experts -> CpuExperts"
    assert len(report.replacements) == 1
    assert line in report.replacements[0]
    assert any(line in message for message in caplog.messages)
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert report.bytes_by_device == {"cpu": sum(held.values())}
    assert report.experts_per_token == 4
    assert "experts per token, measured: 4.00" in str(report)


def test_the_folders_generation_config_is_kept(save: Callable[..., Path]) -> None:
    model = random_model(v2_config())
    model.generation_config.max_new_tokens = 7
    loaded = optimize_and_load(save(model), EXPERTS)
    assert loaded.generation_config.max_new_tokens == 7
