"""The shipped rule files for GPUs, made again: `python tests/support/shipped_files.py` writes them.

Real sizes, as the models' own configs have them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV2Config, DeepseekV3Config, PreTrainedConfig

from ktransformers.cli.plan import CONTEXT
from ktransformers.load import build_on_meta
from ktransformers.research.device_memory import CPU_SHARE, GB, Machine
from ktransformers.research.machine_plan import Planned, Planner

FOLDER = Path(__file__).parents[2] / "ktransformers" / "optimize_rules"
# Of these tokens each: with twice as many, 12 GB have no room for V2's embeddings.
GPUS = {(12,): 8192, (24,): 16384, (24, 24): 16384, (24, 24, 24, 24): 16384}
WEIGHTS = ("int8", "int4")
SIZES = (32, 64, 64, 96, 128, 192, 256, 384, 512, 768)  # GB of memory that machines have

V2: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
}
V2_LITE: dict[str, Any] = {
    **V2,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}

# Five layers of about V2-Lite's sizes: experts of a layer are 0.29 GB in int4, 0.55 GB in int8.
SMALL: dict[str, Any] = {
    "vocab_size": 102400,  # 0.42 GB of embeddings
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "max_position_embeddings": 4096,
    "rope_parameters": None,
}


@dataclass(frozen=True, slots=True)
class Shipped:
    """A model that files come for."""

    title: str
    hub_id: str
    config: PreTrainedConfig


MODELS = {
    "deepseek-v2-lite": Shipped(
        "DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite", DeepseekV2Config(**V2_LITE)
    ),
    "deepseek-v2": Shipped(
        "DeepSeek-V2 and V2.5", "deepseek-ai/DeepSeek-V2", DeepseekV2Config(**V2)
    ),
    "deepseek-v3": Shipped(
        "DeepSeek-V3, V3.1 and R1",
        "deepseek-ai/DeepSeek-V3",
        DeepseekV3Config(max_position_embeddings=163840),
    ),
}


def shipped_files(model: str) -> Iterator[tuple[str, Planned]]:
    """Yield the name and the plan of each file of a model.

    A model that GPUs hold all of needs one file: larger machines would get the same.
    """
    about = MODELS[model]
    planner = Planner(build_on_meta(about.config, torch.bfloat16))
    for gpus, context in GPUS.items():
        for weight in WEIGHTS:
            planned = planner.plan(Machine(gpus, SIZES[-1], context), weight)
            needed = planned.needs["cpu"].total
            memory = next(size for size in SIZES if needed <= CPU_SHARE * size * GB)
            planned = replace(planned, machine=replace(planned.machine, memory=memory))
            name = f"{model}-{len(gpus)}x{gpus[0]}gb"
            yield (f"{name}-cpu-{weight}" if needed else name), planned
            if not needed:
                return


def text(model: str, planned: Planned) -> str:
    about, context = MODELS[model], planned.machine.context
    options = [] if context == CONTEXT else [f"--context {context}"]
    return planned.file(about.title, about.hub_id, options)


if __name__ == "__main__":
    for model in MODELS:
        for name, planned in shipped_files(model):
            (FOLDER / f"{name}.yaml").write_text(text(model, planned))
            sys.stdout.write(f"{name}\n")
