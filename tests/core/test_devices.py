"""Modules on a device: they move, and what reaches them. `meta` stands in for a second device."""

from __future__ import annotations

import copy
import importlib.resources
import re
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.devices import keep_on
from ktransformers.inject import plan
from ktransformers.load import build_on_meta
from ktransformers.research.explain import explain
from ktransformers.rules import RuleError, load_rules, shipped_rules
from tiny_models import random_model, v3_config

META, CPU = torch.device("meta"), torch.device("cpu")
EXPERTS = {
    "match": {"name": r"\.mlp\.experts$"},
    "replace": {"class": "ktransformers.operators.experts.CpuExperts", "kwargs": {"threads": 1}},
}
IDS = torch.arange(6)[None]


def kept(name: str, device: str) -> dict[str, Any]:
    return {"match": {"name": name}, "replace": {"class": "default", "kwargs": {"device": device}}}


def devices(model: PreTrainedModel, prefix: str) -> set[torch.device]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {tensor.device for name, tensor in tensors if name.startswith(prefix)}


def test_a_module_moves_with_all_beneath_it_and_what_reaches_it() -> None:
    model = random_model(v3_config(), dtype=torch.bfloat16)
    keep_on(model, {"model.layers.1": META})
    assert devices(model, "model.layers.1.") == {META}
    assert devices(model, "model.layers.0.") == devices(model, "model.layers.2.") == {CPU}
    x = torch.randn(1, 6, 64, dtype=torch.bfloat16)
    angles = model.model.rotary_emb(x, IDS)
    assert model.model.layers[0](x, position_embeddings=angles).device == CPU
    assert model.model.layers[1](x, position_embeddings=angles).device == META


def test_layers_on_several_devices_hand_over_at_the_border() -> None:
    model = random_model(v3_config(), dtype=torch.bfloat16)
    last = model.config.num_hidden_layers - 1
    keep_on(model, {f"model.layers.{last}": META, "model.norm": META, "lm_head": META})
    with torch.no_grad():
        assert model(IDS).logits.device == META


def test_inner_rules_and_operators_stay_where_they_are() -> None:
    model = optimize_and_load(random_model(v3_config()), [EXPERTS])
    keep_on(model, {"model.layers.1": META, "model.layers.1.mlp.gate": CPU})
    assert devices(model, "model.layers.1.self_attn.") == {META}
    assert devices(model, "model.layers.1.mlp.gate.") == {CPU}
    assert devices(model, "model.layers.1.mlp.experts.") == {CPU}


def test_rules_that_keep_modules_on_the_cpu_change_no_bit() -> None:
    plain = random_model(v3_config())
    rules = [kept(r"^model\.layers\.\d+$", "cpu"), EXPERTS]
    with torch.no_grad():
        want = optimize_and_load(copy.deepcopy(plain), [EXPERTS])(IDS).logits
        assert torch.equal(optimize_and_load(plain, rules)(IDS).logits, want)


def test_a_plan_knows_where_everything_stands() -> None:
    model = build_on_meta(v3_config())
    rules = load_rules(
        [
            kept(r"^model\.layers\.0$", "cuda"),
            kept(r"^model\.layers\.\d+$", "cuda:1"),
            {"match": {"class": "DeepseekV3MoE"}, "replace": {"class": HYBRID}},
            EXPERTS,
        ]
    )
    planned = plan(model, rules)
    layers = [torch.device("cuda", min(layer, 1)) for layer in range(3)]
    assert planned.kept_on() == {f"model.layers.{n}": device for n, device in enumerate(layers)}
    stand = {item.name: item.site.device for item in planned.replacements}
    assert stand["model.layers.1.mlp"] == stand["model.layers.2.mlp.experts"] == layers[1]
    costs = explain(model, planned).costs
    assert list(costs) == ["cpu", "cuda:0", "cuda:1"]
    assert sum(cost.weight_bytes for cost in costs.values()) > costs["cuda:1"].weight_bytes > 0


HYBRID = "ktransformers.operators.hybrid.HybridMoE"


def test_an_operator_of_the_cpu_on_a_gpu_is_an_error_of_the_rules() -> None:
    linear = {
        "match": {"name": r"\.o_proj$"},
        "replace": {"class": "ktransformers.operators.linear.CpuLinear"},
    }
    with pytest.raises(
        RuleError, match=r"CpuLinear at .*: computes on the CPU, but stands on cuda:0"
    ):
        plan(
            build_on_meta(v3_config()), load_rules([kept(r"^model\.layers\.0$", "cuda:0"), linear])
        )


@pytest.mark.parametrize("device", ["meta", "gpu", 3, ""])
def test_what_is_no_device_is_refused(device: Any) -> None:
    with pytest.raises(
        RuleError, match=rf"{device!r} is no device: expected cpu, or a GPU such as"
    ):
        plan(build_on_meta(v3_config()), load_rules([kept(r"^lm_head$", device)]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_here_is_refused_before_anything_is_loaded() -> None:
    model = random_model(v3_config())
    with pytest.raises(
        RuleError, match=r"default at model\.layers\.0 \(and 2 more\): needs a GPU, cuda:0"
    ):
        optimize_and_load(model, [kept(r"^model\.layers\.\d+$", "cuda:0")])
    assert devices(model, "") == {CPU}


V2_LITE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
}
SIZES = {
    "deepseek-v3-gpu-cpu-int8": DeepseekV3Config(),
    "deepseek-v2-gpu-cpu-int8": DeepseekV2Config(**V2_LITE),
}


@pytest.mark.parametrize("name", [name for name in shipped_rules() if "gpu" in name])
def test_a_shipped_file_for_a_gpu_fits_the_machine_in_its_header(name: str) -> None:
    folder = importlib.resources.files("ktransformers").joinpath("optimize_rules")
    text = folder.joinpath(f"{name}.yaml").read_text()
    machine = re.search(r"one GPU of (\d+) GB and (\d+) GB of memory", " ".join(text.split("#")))
    assert machine is not None
    gpu, memory = (int(number) * 1e9 for number in machine.groups())
    model = build_on_meta(SIZES[name], torch.bfloat16)
    costs = explain(model, plan(model, load_rules(name), dtype=torch.bfloat16)).costs
    assert set(costs) == {"cuda:0", "cpu"}
    latents = 576 * 2 * model.config.num_hidden_layers * 16_384  # tokens of context
    assert costs["cuda:0"].weight_bytes + latents < 0.9 * gpu
    assert costs["cpu"].weight_bytes < 0.9 * memory
