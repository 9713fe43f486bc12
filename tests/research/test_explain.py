"""explain: the tree with equal modules folded, and costs that one can count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import Self

from ktransformers.base import Footprint, Operator, Site
from ktransformers.inject import plan
from ktransformers.load import build_on_meta
from ktransformers.research.explain import Cost, Explanation, explain
from ktransformers.rules import load_rules
from tiny_models import v2_config, v3_config

EXPERTS: dict[str, Any] = {
    "match": {"name": r"\.mlp\.experts$"},
    "replace": {"class": "ktransformers.operators.experts.CpuExperts"},
}
# Costs next to nothing, and keeps a child that another rule may take.
MOE: dict[str, Any] = {
    "match": {"name": r"layers\.2\.mlp$"},
    "replace": {"class": f"{__name__}.OtherMoe"},
}


class OtherMoe(Operator):
    consumes = ("gate", "shared_experts")

    @classmethod
    def from_module(cls, module: nn.Module, site: Site) -> Self:
        operator = cls()
        operator.experts = module.experts
        return operator

    def footprint(self) -> Footprint:
        return Footprint(torch.device("cuda:0"), 3, 2, 1)


def explained(model: PreTrainedModel, *rules: dict[str, Any]) -> Explanation:
    return explain(model, plan(model, load_rules(list(rules))))


def labels(explanation: Explanation) -> list[str]:
    return ["  " * row.depth + row.label for row in explanation.rows]


@pytest.fixture
def model() -> PreTrainedModel:
    return build_on_meta(v3_config(), torch.bfloat16)


def test_equal_layers_are_one_row_and_untouched_modules_too(model: PreTrainedModel) -> None:
    assert labels(explained(model, EXPERTS)) == [
        "",
        "  model",
        "    embed_tokens",
        "    layers.0",
        "    layers.1-2",
        "      self_attn",
        "      mlp",
        "        experts",
        "        gate",
        "        shared_experts",
        "      input_layernorm",
        "      post_attention_layernorm",
        "    norm",
        "  lm_head",
    ]


def test_all_layers_are_one_row_where_no_rule_tells_them_apart(model: PreTrainedModel) -> None:
    rule = {"match": {"name": "^lm_head$"}, "replace": {"class": "default"}}
    explanation = explained(model, rule)
    assert labels(explanation) == [
        "",
        "  model",
        "  lm_head",
    ]
    assert [row.replacement is not None for row in explanation.rows] == [False, False, True]


def test_layers_under_different_rules_are_not_folded(model: PreTrainedModel) -> None:
    other = {**EXPERTS, "match": {"name": r"layers\.1\.mlp\.experts$"}}
    rows = labels(explained(model, other, EXPERTS))
    assert "    layers.1" in rows
    assert "    layers.2" in rows


def test_a_child_that_its_operator_keeps_is_shown_beneath_it(model: PreTrainedModel) -> None:
    rows = labels(explained(model, MOE, EXPERTS))
    at = rows.index("    layers.2")
    assert rows[at : at + 4] == [
        "    layers.2",
        "      self_attn",
        "      mlp",
        "        experts",
    ]


def test_costs_are_added_up_by_device(model: PreTrainedModel) -> None:
    assert explained(model, MOE).costs["cuda:0"] == Cost(3, 2, 1)


@pytest.mark.parametrize("config", [v2_config(), v3_config()])
def test_a_plain_model_costs_its_weights(config: Any) -> None:
    model = build_on_meta(config, torch.bfloat16)
    rule = {"match": {"name": "^lm_head$"}, "replace": {"class": "default"}}
    explanation = explained(model, rule)
    assert explanation.costs == explanation.plain_costs
    total = active = products = 0
    for name, tensor in model.state_dict().items():
        total += tensor.nbytes
        share = 4 / 8 if ".experts." in name else 1
        if "embed_tokens" in name:
            active += 64 * 2  # a row of bf16
        else:
            active += int(tensor.nbytes * share)
            products += int(tensor.numel() * share) if tensor.ndim > 1 else 0
    assert explanation.costs == {"cpu": Cost(total, 2 * products, active)}


def test_tied_weights_are_held_once_and_read_twice() -> None:
    untied = explained_plain(v3_config())
    tied = explained_plain(v3_config(tie_word_embeddings=True))
    assert untied.weight_bytes - tied.weight_bytes == 96 * 64 * 2
    assert untied.bytes_read_per_token == tied.bytes_read_per_token


def explained_plain(config: Any) -> Cost:
    model = build_on_meta(config, torch.bfloat16)
    return explained(model, EXPERTS).plain_costs["cpu"]


def test_an_operator_costs_what_it_says(model: PreTrainedModel) -> None:
    explanation = explained(model, EXPERTS)
    [experts] = [row for row in explanation.rows if row.label == "experts"]
    assert experts.replacement is not None
    assert experts.replacement.operator is not None
    need = experts.replacement.operator.footprint()
    assert experts.weight_bytes == need.weight_bytes
    plain = 8 * 3 * 64 * 32 * 2  # bytes of a layer's experts, of which there are two
    saved = explanation.plain_costs["cpu"].weight_bytes - explanation.costs["cpu"].weight_bytes
    assert saved == 2 * (plain - need.weight_bytes)
