"""transformers' own experts in bf16, in the implementation that it uses by default, grouped_mm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

from moe_layer import Sizes, Weights
from peer_layer import Call, PeerLayer, Variant

MAX_ERROR = {"bf16": 0.02}


def variants(weight_format: str, threads: int) -> list[Variant]:
    """List the one way, for bf16."""
    return [Variant("bf16", threads)] if weight_format == "bf16" else []


def make_layer(sizes: Sizes, experts: list[Weights], variant: Variant) -> PeerLayer:
    """Fill transformers' module."""
    torch.set_num_threads(variant.threads)
    config = DeepseekV2Config(
        hidden_size=sizes.hidden_size,
        moe_intermediate_size=sizes.moe_intermediate_size,
        n_routed_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = DeepseekV2Experts(config)
    module = nn.Module.to_empty(module.to(torch.bfloat16), device="cpu").requires_grad_(False)
    for e in range(sizes.num_experts):
        weights = experts[e % len(experts)]
        module.gate_up_proj[e] = torch.cat([weights.gate, weights.up])
        module.down_proj[e] = weights.down
    return GroupedExperts(module)


@dataclass(frozen=True, slots=True)
class GroupedExperts:
    """The module."""

    module: nn.Module

    def prepare(self, x: torch.Tensor, weights: torch.Tensor) -> Call:
        """Return the module's forward."""
        routed = weights.to(x.dtype)

        def call(index: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.module(x, index, routed)
            return y

        return call
