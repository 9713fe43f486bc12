"""Tiny models of DeepSeek's structures, and a reference of what their experts must compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def v3_config(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**{**COMMON, "num_nextn_predict_layers": 0, **changes})


def v2_config(**changes: Any) -> DeepseekV2Config:
    own = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.0}
    return DeepseekV2Config(**{**COMMON, **own, **changes})


def random_model(
    config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Make a model whose weights are large enough for its experts to matter."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.normal_(0, 1.5 / tensor.shape[-1] ** 0.5)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    nn.Module.to(model, dtype).eval()  # transformers' own is wrapped in a wrong type
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    return model


class ReferenceExperts(nn.Module):
    """Experts in fp32 from *dequantised* weights, with activations as kernels see them.

    Written to be obvious; the formulas are those of `csrc/quantize/quantize.h`, or with bf16
    weights a rounding to bf16.
    """

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weight: str):
        super().__init__()
        self.seen = rounded if weight == "bf16" else quantised
        self.gate, self.up, self.down = gate, up, down  # dequantised: [E, F, D], same, [E, D, F]
        self.num_experts = gate.shape[0]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros(hidden_states.shape, dtype=torch.float32)
        x = self.seen(hidden_states.float())
        for token in range(x.shape[0]):
            for slot in range(top_k_index.shape[1]):
                expert = int(top_k_index[token, slot])
                if expert == self.num_experts:
                    continue
                gate, up = self.gate[expert] @ x[token], self.up[expert] @ x[token]
                hidden = self.seen((nn.functional.silu(gate) * up)[None])[0]
                out[token] += float(top_k_weights[token, slot]) * (self.down[expert] @ hidden)
        return out.to(hidden_states.dtype)


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Round each row to int8 and back: symmetric, scale = amax / 127."""
    amax = x.abs().amax(dim=-1, keepdim=True)
    return (x * (127 / amax.clamp_min(2.0**-100))).round() * (amax / 127)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Round to bf16 and back."""
    return x.bfloat16().float()
