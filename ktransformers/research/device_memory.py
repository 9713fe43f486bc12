"""How much memory each device needs under a plan: weights, and all that a context takes besides.

    GPU:  weights + latent cache + activations + FIXED
    CPU:  weights + latent cache, in at most CPU_SHARE of the memory

Weights are what `explain` says. The cache holds a context of tokens for every layer, and lies where
the layer's attention stands. Activations are those of the largest chunk of a prompt that `prefill`
computes at once, T tokens (`activation_bytes`).

GB are 10^9 bytes, of what is needed and of what there is. A card that is sold with 24 GB has 24
GiB, of which the driver shows some 23.6: typing 24 leaves 1.7 GB to whoever else uses it.

Shape suffixes: T tokens, D hidden_size, H heads, C kv_lora_rank, K top_k, F
moe_intermediate_size, I intermediate_size.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ktransformers.cache import DTYPES, SCALED
from ktransformers.cache_pages import PAGE_TOKENS
from ktransformers.cache_rounding import scale_shape
from ktransformers.inject import Plan, Replacement
from ktransformers.prefill import chunk_tokens
from ktransformers.research.explain import explain

GB = 10**9
# Bytes of a GPU that no tensor of ours gets: CUDA's context and its libraries' workspaces (some
# 0.5 GB), kernels' code, graphs, and what the allocator can't fill.
FIXED = GB
CPU_SHARE = 0.9  # of the memory; the rest is for the system, activations and buffers


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan is for."""

    gpus: tuple[float, ...]  # GB of each
    memory: float  # GB
    context: int  # tokens that the cache has room for
    cores: int | None = None  # None: as many as there are, wherever it runs

    def gpus_named(self) -> str:
        """Return the GPUs as people say them."""
        sizes = sorted(set(self.gpus), reverse=True)
        cards = " + ".join(f"{self.gpus.count(size)} x {size:g}" for size in sizes)
        return f"{cards} GB of GPU"

    def room(self, device: str) -> float:
        """Return how many bytes may be used of `cpu` or of a GPU such as `cuda:0`."""
        if device == "cpu":
            return CPU_SHARE * self.memory * GB
        index = int(device.removeprefix("cuda:"))
        return self.gpus[index] * GB if index < len(self.gpus) else 0


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one device."""

    weights: int
    cache: int = 0
    activations: int = 0  # none for the CPU: they are in what CPU_SHARE leaves
    fixed: int = 0

    @property
    def total(self) -> int:
        """Return all of it."""
        return self.weights + self.cache + self.activations + self.fixed

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "latent cache": self.cache,
            "activations": self.activations,
            "driver and kernels": self.fixed,
        }
        return ", ".join(f"{nbytes / GB:.1f} {name}" for name, nbytes in parts.items() if nbytes)


def predict(model: PreTrainedModel, planned: Plan, context: int) -> dict[str, Need]:
    """Return what each device needs for contexts of so many tokens, `cpu` first."""
    places = _Places(planned)
    costs = explain(model, planned).costs
    weights = {device: cost.weight_bytes for device, cost in costs.items()}
    caches = dict.fromkeys(weights, 0)
    for layer in range(model.config.num_hidden_layers):
        device, form = places.of_attention(f"{model.base_model_prefix}.layers.{layer}")
        caches[device] = caches.get(device, 0) + cache_bytes(model.config, context, form)
    holders = places.of_experts()
    needs = {"cpu": Need(weights.pop("cpu", 0), caches.pop("cpu", 0))}
    for device in sorted(weights | caches):
        activations = activation_bytes(model, context, with_experts=device in holders)
        needs[device] = Need(weights.get(device, 0), caches.get(device, 0), activations, FIXED)
    return needs


def cache_bytes(config: PreTrainedConfig, context: int, form: str = "bf16") -> int:
    """Return the bytes of one layer's latents, of one sequence, in whole pages."""
    latent, rope = DTYPES[form]
    token: int = config.kv_lora_rank * latent.itemsize + config.qk_rope_head_dim * rope.itemsize
    scales = math.prod(scale_shape(form, config.kv_lora_rank)) if form in SCALED else 0
    token += scales * torch.float32.itemsize
    return -(-context // PAGE_TOKENS) * PAGE_TOKENS * token


def activation_bytes(model: PreTrainedModel, context: int, *, with_experts: bool) -> int:
    """Return the bytes beside the weights that the largest chunk needs on a GPU.

        T * itemsize * (4 D + max(H * (3 head + 2 C + 2 v), 3 I, 3 F shared [+ K (F + 2 D)]))

    The residual stream, its norm, a result and a copy; then either attention, with queries, their
    rotated copy and their parts, queries and outputs in the space of latents, and values twice; or
    a dense MLP; or the shared experts, beside routed ones, which give fp32 for each slot, where the
    GPU has some.
    """
    config: Any = model.config
    D = config.hidden_size
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    attention = config.num_attention_heads * (
        3 * head + 2 * config.kv_lora_rank + 2 * config.v_head_dim
    )
    moe = 3 * config.moe_intermediate_size * (config.n_shared_experts or 0)
    if with_experts:
        moe += config.num_experts_per_tok * (config.moe_intermediate_size + 2 * D)
    tokens = min(context, chunk_tokens(model, sys.maxsize))
    row = 4 * D + max(attention, 3 * config.intermediate_size, moe)
    return int(tokens * model.dtype.itemsize * row)


class _Places:
    """Where a plan's modules stand."""

    def __init__(self, planned: Plan):
        self.items = {item.name: item for item in planned.replacements}

    def of_attention(self, layer: str) -> tuple[str, str]:
        """Return the device of a layer's attention, and the format of its cache."""
        name = f"{layer}.self_attn"
        while name:
            item = self.items.get(name)
            devices = [] if item is None else _devices(item)
            if item is not None and devices:
                form = None if item.operator is None else item.operator.cache_format
                return devices[0], form or "bf16"
            name = name.rpartition(".")[0]
        return "cpu", "bf16"

    def of_experts(self) -> set[str]:
        """Return the devices of routed experts."""
        found = (item for name, item in self.items.items() if name.endswith(".experts"))
        return {device for item in found for device in _devices(item)}


def _devices(item: Replacement) -> list[str]:
    """Return where a replacement stands; nothing where it says nothing about that."""
    if item.operator is not None:
        return [str(need.device) for need in item.operator.footprints()]
    return [str(item.site.device)] if "device" in item.kwargs else []
