"""Policies on traces that one can count by hand, traces of a model, and profiles of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ktransformers.expert_profile import most_used, uses_of_layer, write_profile
from ktransformers.research.expert_policies import (
    Lru,
    Trace,
    compare,
    lru_hits,
    record_trace,
    static_hits,
)
from tiny_models import random_model, v3_config


def one_layer(*steps: list[int], num_experts: int = 4) -> Trace:
    return Trace((3,), num_experts, torch.tensor(steps)[:, None])


def test_share_of_experts_that_stay_is_that_of_their_uses() -> None:
    trace = one_layer([0, 1], [0, 2], [0, 4])  # 4: no expert
    assert trace.uses() == {3: [3, 1, 1, 0]}
    assert static_hits(trace, {3: [0]}) == 3 / 5
    assert static_hits(trace, {3: [2, 3]}) == 1 / 5


def test_slots_serve_what_was_used_last() -> None:
    # Slots hold 0 and 1, 0 as the latest. 2 takes 1's slot, and 3 that of 0.
    trace = one_layer([2], [2], [3], [2], [0], num_experts=5)
    assert lru_hits(trace, {3: [0, 1]}, 1) == 2 / 5


def test_uploads_of_a_step_are_bounded_and_the_latest_used_come_first() -> None:
    slots = Lru([0, 1, 2], 8, uploads=1)
    assert slots.step([5, 6]) == 0
    assert slots.resident == {0, 1, 5}  # neither was ever used: the lower number
    assert slots.step([7]) == 0
    assert slots.resident == {0, 5, 7}
    assert slots.step([3, 6]) == 0
    assert slots.resident == {5, 6, 7}  # 6 was used before, 3 never
    every = Lru([0, 1, 2], 8, uploads=None)
    every.step([5, 6, 1])
    assert every.resident == {1, 5, 6}


def test_profile_is_of_another_part_than_what_it_is_tried_on() -> None:
    before, trace = one_layer([0], [0], [1], [2], [2], [0]).split(3)
    shares = compare(before, trace, slots=1)
    assert shares["static, by profile"] == 1 / 3
    assert shares["static, the first"] == 1 / 3
    assert shares["lru, 1 a step"] == shares["lru, any uploads"] == 1 / 3


@pytest.mark.parametrize("hybrid", [False, True])
def test_trace_of_a_model_is_what_its_routers_chose(hybrid: bool) -> None:
    from ktransformers import optimize_and_load

    operators = "ktransformers.operators"
    rules: list[Any] = [
        {
            "match": {"name": r"\.mlp\.experts$"},
            "replace": {"class": f"{operators}.experts.CpuExperts", "kwargs": {"threads": 1}},
        }
    ]
    if hybrid:
        moe = {"class": f"{operators}.hybrid.HybridMoE"}
        rules.append({"match": {"class": "DeepseekV3MoE"}, "replace": moe})
    model: Any = optimize_and_load(random_model(v3_config()), rules)
    chosen: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    for layer, indexes in chosen.items():
        gate = model.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda _, args, out, to=indexes: to.append(out[2]))
    trace = record_trace(model, torch.arange(20) % 90, window=8)
    assert (trace.layers, trace.num_experts, trace.chosen.shape) == ((1, 2), 8, (20, 2, 4))
    for at, layer in enumerate(trace.layers):
        assert torch.equal(trace.chosen[:, at], torch.cat(chosen[layer]))
    assert sum(trace.uses()[1]) == 80


def test_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, 6, {1: [1, 2, 3], 2: [3, 3, 0]})
    assert path.read_text() == '{"tokens": 6, "uses": {"1": [1, 2, 3], "2": [3, 3, 0]}}\n'
    assert uses_of_layer(path, 2, 3) == [3, 3, 0]
    assert most_used([3, 3, 0], 2) == [0, 1]
    assert most_used([1, 2, 3], 2) == [2, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON: "),
        ("[]", "expected {'uses': {layer: [uses of each expert]}}, as benchmarks/expert_policies"),
        ('{"uses": {"3": [1, -1]}}', "expected {'uses': {layer: [uses of each expert]}}"),
        ('{"uses": {"1": [1]}}', "counts uses in layers 1, not in layer 3: it is of another model"),
        ('{"uses": {"3": [1]}}', "layer 3 has 1 experts there and 2 here: it is of another model"),
    ],
)
def test_profile_of_something_else_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        uses_of_layer(path, 3, 2)
    assert str(caught.value).startswith(f"profile {path}: {reason}")


def test_profile_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile .*none\.json: No such file or directory"):
        uses_of_layer(tmp_path / "none.json", 3, 2)
