"""ReducedTopK against a model that was configured for fewer experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ktransformers import optimize_and_load
from ktransformers.load import LoadError
from ktransformers.operators.router import ReducedTopK
from ktransformers.report import count_experts
from ktransformers.rules import RuleError
from tiny_models import random_model, v3_config

IDS = torch.arange(40).reshape(2, 20) % 90


def rules(top_k: Any, class_path: str = "ktransformers.operators.router.ReducedTopK") -> Any:
    return [
        {
            "match": {"name": r"\.mlp\.gate$"},
            "replace": {"class": class_path, "kwargs": {"top_k": top_k}},
        }
    ]


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_reduced_model_equals_one_configured_for_fewer_experts(
    top_k: int, config: PreTrainedConfig, save: Callable[..., Path]
) -> None:
    folder = save(random_model(config))
    reduced: Any = optimize_and_load(folder, rules(top_k), dtype=torch.float32)
    config = copy.deepcopy(config)
    config.num_experts_per_tok = top_k
    expected = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(reduced(IDS).logits, expected(IDS).logits)
    assert reduced.ktransformers_report.experts_per_token == top_k


def test_top_k_per_layer_gives_each_layer_its_number(save: Callable[..., Path]) -> None:
    folder = save(random_model(v3_config()))
    model: Any = optimize_and_load(folder, rules({"0-1": 2, "2": 3}), dtype=torch.float32)
    with count_experts(model) as counter, torch.no_grad():
        model(IDS)
    assert counter.by_layer == {"model.layers.1.mlp.experts": 2, "model.layers.2.mlp.experts": 3}
    assert model.ktransformers_report.experts_per_token == 2.5


def test_router_logits_are_still_recorded(save: Callable[..., Path]) -> None:
    folder = save(random_model(v3_config()))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reduced = optimize_and_load(folder, rules(2), dtype=torch.float32)
    with torch.no_grad():
        got = reduced(IDS, output_router_logits=True).router_logits
        want = plain(IDS, output_router_logits=True).router_logits
    assert len(got) == len(want) == 2
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize(
    ("top_k", "reason"),
    [
        (0, "top_k 0 is not an integer from 1 to 4"),
        (5, "top_k 5 is not an integer from 1 to 4"),
        (True, "top_k True is not an integer from 1 to 4"),
        ({"1": 2}, "top_k gives no number for layer 2: {'1': 2}"),
        ({"0-2": 2, "70-80": 1}, "top_k names layers 70-80, but the model has 3"),
        ({"1-2": 2, "2": 3}, r"top_k gives several numbers, [2, 3], for layer 2: "),
    ],
)
def test_a_top_k_that_cannot_be_is_refused(top_k: Any, reason: str) -> None:
    model = random_model(v3_config())
    with pytest.raises(RuleError) as caught:
        optimize_and_load(model, rules(top_k))
    assert reason in str(caught.value)


def test_a_reduction_of_something_else_than_a_router_is_refused() -> None:
    bad = rules(2)
    bad[0]["match"]["name"] = "lm_head"
    with pytest.raises(RuleError, match="Linear is no router: it has no integer top_k"):
        optimize_and_load(random_model(v3_config()), bad)


class ForgetfulTopK(ReducedTopK):
    """Promises a reduction and routes as before."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.router.top_k = 4  # type: ignore[assignment]
        return super().forward(hidden_states)


def test_a_reduction_that_is_not_live_is_an_error_and_leaves_the_model_unusable() -> None:
    model = random_model(v3_config())
    with pytest.raises(LoadError) as caught:
        optimize_and_load(model, rules(2, f"{__name__}.ForgetfulTopK"))
    assert (
        "ForgetfulTopK at model.layers.1.mlp.gate: a reduction to 2 experts per token is not "
        "live: experts got 4" in str(caught.value)
    )
    with pytest.raises(RuntimeError, match=r"unusable, because loading it failed: .*not live"):
        model(IDS)


def test_planning_leaves_the_original_router_as_it_was() -> None:
    model = random_model(v3_config())
    router = model.model.layers[1].mlp.gate
    weight = router.weight
    ReducedTopK.from_module(router, site_of(model), top_k=1)
    assert router.top_k == 4
    assert router.weight is weight


def site_of(model: Any) -> Any:
    from ktransformers.base import Site

    name = "model.layers.1.mlp.gate"
    return Site(name, 1, model.config, torch.float32, torch.device("cpu"), "here")
