"""Modules on a device: they move, and what reaches them. `meta` stands in for a second device."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.devices import Bring, keep_on
from ktransformers.inject import plan
from ktransformers.load import build_on_meta
from ktransformers.research.explain import explain
from ktransformers.rules import RuleError, load_rules
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


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, and notes how it is moved."""

    moves: ClassVar[list[tuple[torch.device, bool]]] = []
    device = torch.device("cuda:0")

    def to(self, device: torch.device, *, non_blocking: bool) -> torch.Tensor:  # type: ignore[override]  # as it is called
        self.moves.append((device, non_blocking))
        return self


def test_what_reaches_the_cpu_is_waited_for() -> None:
    """A copy to the CPU that is not would be read before it is there."""
    OnGpu.moves.clear()
    value = torch.zeros(1).as_subclass(OnGpu)
    for device in ("cpu", "cuda:1"):
        Bring(torch.device(device))(torch.nn.Identity(), (value,), {})
    assert OnGpu.moves == [(torch.device("cpu"), False), (torch.device("cuda:1"), True)]


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
    with pytest.raises(RuleError) as caught:
        optimize_and_load(
            model, [kept(r"^lm_head$", "cuda:0"), kept(r"^model\.layers\.\d+$", "cuda:0")]
        )
    (sentence,) = str(caught.value).splitlines()
    assert "default at model.layers.0 (and 3 more, of 2 rules): needs a GPU, cuda:0" in sentence
