"""Which weights a decoder layer of DeepSeek-V2 or V3 has, by the names of its native layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from ktransformers.base import Site
from ktransformers.packed_weights import (
    AnyWeights,
    ExpertsWeights,
    LatentWeights,
    LinearWeights,
    PlainWeight,
)


def weights_of_layer(module: nn.Module, site: Site, format: str) -> dict[str, AnyWeights]:
    """Describe the weights of a layer, by the name that the native layer has for each."""
    attention: Any = module.self_attn
    mlp: Any = module.mlp
    place, dtype = f"{site.name}.self_attn", site.dtype

    def linear(name: str) -> LinearWeights:
        N, K = getattr(attention, name).weight.shape
        return LinearWeights(f"{place}.{name}", N, K, format, prefix=f"{name}_")

    def norm(source: str, weight: torch.Tensor) -> PlainWeight:
        name = source.rpartition(".")[2]
        return PlainWeight(f"{source}.weight", tuple(weight.shape), dtype, name)

    def experts(modules: Sequence[str], width: int, prefix: str) -> ExpertsWeights:
        D = site.config.hidden_size
        return ExpertsWeights(
            tuple(f"{site.name}.mlp{m}" for m in modules), D, width, format, prefix
        )

    has_lora = attention.q_lora_rank is not None
    weights: dict[str, AnyWeights] = {
        "q_b": linear("q_b_proj" if has_lora else "q_proj"),
        "kv_a": linear("kv_a_proj_with_mqa"),
        "o": linear("o_proj"),
        "attention": LatentWeights(
            f"{place}.kv_b_proj",
            attention.num_heads,
            attention.kv_lora_rank,
            attention.qk_nope_head_dim,
            attention.v_head_dim,
            format,
        ),
        "latent_norm": norm(f"{place}.kv_a_layernorm", attention.kv_a_layernorm.weight),
        "input_norm": norm(f"{site.name}.input_layernorm", module.input_layernorm.weight),  # type: ignore[arg-type, union-attr]  # a norm's
        "mlp_norm": norm(
            f"{site.name}.post_attention_layernorm",
            module.post_attention_layernorm.weight,  # type: ignore[arg-type, union-attr]  # a norm's
        ),
    }
    if has_lora:
        weights["q_a"] = linear("q_a_proj")
        weights["query_norm"] = norm(f"{place}.q_a_layernorm", attention.q_a_layernorm.weight)
    gate = getattr(mlp, "gate", None)
    if gate is None:
        weights["mlp"] = experts([""], mlp.intermediate_size, "mlp_")
        return weights
    E = gate.weight.shape[0]
    router = f"{site.name}.mlp.gate"
    weights["mlp"] = experts([".shared_experts"], mlp.shared_experts.intermediate_size, "mlp_")
    routed = [f".experts.{expert}" for expert in range(E)]
    weights["experts"] = experts(routed, mlp.experts.intermediate_dim, "experts_")
    weights["router"] = PlainWeight(f"{router}.weight", tuple(gate.weight.shape), dtype, "router")
    if isinstance(gate, v3.DeepseekV3TopkRouter):
        bias = f"{router}.e_score_correction_bias"
        weights["router_bias"] = PlainWeight(bias, (E,), torch.float32, "router_bias")
    return weights
