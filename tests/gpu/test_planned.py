"""Shipped rule files for GPUs on a tiny model, with the CPU as every GPU."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.prefill import prefill
from tiny_models import random_model, v3_config

IDS = torch.tensor([[1, 30, 47]])


def loaded(rules: str, *overrides: str) -> PreTrainedModel:
    plain = random_model(v3_config(num_hidden_layers=6), dtype=torch.bfloat16)
    return optimize_and_load(plain, rules, overrides=["threads=1", *overrides])


def on_gpus(rules: str, *overrides: str) -> PreTrainedModel:
    return loaded(rules, "group_size=32", *overrides)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return those of a prompt's last token, [1, V]."""
    return prefill(model, IDS, LatentCache.for_model(model, 16))


def test_ranges_of_layers_on_two_gpus_change_no_bit() -> None:
    two = on_gpus(
        "deepseek-v3-2x24gb-cpu-int8",
        *("gpu0=cpu", "layers0=0-2", "experts0=1", "some0=2", "resident0=4"),
        *("gpu1=cpu", "layers1=3-5", "experts1=3", "some1=4", "resident1=4"),
    )
    one = on_gpus(
        "deepseek-v3-1x24gb-cpu-int8",
        *("gpu=cpu", "experts='1,3'", "some='2,4'", "resident=4"),
    )
    experts = [type(layer.mlp.experts).__name__ for layer in two.model.layers[1:]]
    assert experts == [
        "Int4Experts",
        "ResidentExperts",
        "Int4Experts",
        "ResidentExperts",
        "CpuExperts",
    ]
    assert torch.equal(logits(two), logits(one))


def test_whole_layers_on_the_cpu_hand_over_to_the_gpu() -> None:
    split = on_gpus("deepseek-v3-1x12gb-cpu-int8", "gpu=cpu", "cpu_layers=0-3", "layers=4-5")
    assert logits(split).isfinite().all()
    with torch.no_grad():
        states, whole = (
            model(IDS, output_hidden_states=True).hidden_states
            for model in (split, loaded("deepseek-v3-cpu-int8"))
        )
    assert torch.equal(states[4], whole[4])  # what reaches the GPU's layer
    assert not torch.equal(states[5], whole[5])
