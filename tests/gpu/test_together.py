"""The operators of a machine with one GPU in one model, and the CPU's beside them."""

from __future__ import annotations

from typing import Any

import torch

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.prefill import prefill
from tiny_models import random_model, v3_config

OPERATORS = "ktransformers.operators"
IDS = torch.arange(12).reshape(1, 12)
SMALL = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
PROJECTIONS = r"(shared_experts|layers\.0\.mlp|self_attn)\.(gate|up|down|q_a|q_b|o)_proj$"


def rules(device: torch.device, *more: dict[str, Any]) -> list[dict[str, Any]]:
    placed = {"device": str(device)}
    taken = {
        r"\.self_attn$": ("gpu_attention.GpuMlaAttention", placed),
        PROJECTIONS: ("linear.Int4Linear", {**placed, "group_size": 32}),
        r"\.mlp\.experts$": ("experts.CpuExperts", {"threads": 1}),
    }
    own = [
        {"match": {"name": name}, "replace": {"class": f"{OPERATORS}.{path}", "kwargs": kwargs}}
        for name, (path, kwargs) in taken.items()
    ]
    return [*own, *more]


def logits(rules: list[dict[str, Any]]) -> torch.Tensor:
    """Return those of a prompt's last token and of two tokens of decode, [3, V]."""
    config = v3_config(**SMALL)
    model = optimize_and_load(random_model(config, dtype=torch.bfloat16), rules)
    cache = LatentCache.for_model(model, 16)
    rows = [prefill(model, IDS, cache)]
    for _ in range(2):
        rows.append(prefill(model, rows[-1].argmax(-1, keepdim=True), cache))
    return torch.cat(rows)


def test_experts_beside_the_gpu_change_no_bit(device: torch.device) -> None:
    hybrid = {
        "match": {"class": "DeepseekV3MoE"},
        "replace": {"class": f"{OPERATORS}.hybrid.HybridMoE"},
    }
    one_after_the_other = logits(rules(device))
    assert torch.equal(logits(rules(device, hybrid)), one_after_the_other)
    assert one_after_the_other.isfinite().all()
    assert one_after_the_other.argmax(-1).unique().numel() > 1  # it says something
