"""What prefill costs with routed experts on the CPU, and with their weights streamed to a GPU.

A chunk of T tokens and a layer of E experts, K a token, each of 3 D F weights, in seconds:

    copy     = E * expert_bytes / host_to_device
    experts  = 6 T K D F / gpu_operations
    rest     = T * what else of the layer the GPU computes / gpu_operations
    streamed = max(copy, rest + experts, rest + (1 - 2 / P) copy + 2 / P experts)
    on_cpu   = rest + max(6 T K D F / cpu_operations, hit(T) * expert_bytes / cpu_bandwidth)
               + activations there and back
    hit(T)   = E (1 - (1 - K / E)^T), the experts that T tokens are expected to reach

P is the number of pieces that a layer's weights come in, each in one of two buffers: the third term
is where the rest of a layer, which needs none of them, is longer than two pieces take to come, so
it only counts with more than two. (`tests/core/test_streamed_experts.py` runs the schedule itself
against this.)

The CPU reads only the experts that tokens reach; streaming moves all of a layer's, since it begins
before the layer's router has chosen, and at the lengths for which it pays nearly all are reached.
Of a chunk's first layer nothing hides the copy. On the CPU the GPU's part of a layer comes on top:
attention needs what the experts before have made.

Rates are what products and copies reach, not what data sheets say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

ACTIVATION = 2  # bytes of an activation that goes to the CPU or comes back


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine reaches, per second."""

    host_to_device: float  # bytes, copied from pinned memory of the host to the GPU
    gpu_operations: float  # of the GPU's products with weights; multiply and add count as two
    gpu_attention: float  # operations of attention, which is in 16 bits whatever the weights are
    cpu_operations: float  # of the experts on the CPU
    cpu_bandwidth: float  # bytes that the CPU reads


@dataclass(frozen=True, slots=True)
class MoeSizes:
    """A layer with routed experts."""

    num_experts: int
    top_k: int
    expert_operations: int  # of one token in one expert
    expert_bytes: int  # packed
    row_bytes: int  # of a token's activations
    rest_operations: int  # of one token in the rest of the layer but attention's own, on the GPU

    @property
    def layer_bytes(self) -> int:
        """Return the bytes of all experts."""
        return self.num_experts * self.expert_bytes


def experts_hit(layer: MoeSizes, tokens: int) -> float:
    """Return how many distinct experts so many tokens are expected to reach."""
    return layer.num_experts * (1 - (1 - layer.top_k / layer.num_experts) ** tokens)


def cpu_seconds(rates: Rates, layer: MoeSizes, tokens: int) -> float:
    """Return the seconds of a layer's routed experts on the CPU, activations' way included."""
    operations = tokens * layer.top_k * layer.expert_operations
    nbytes = experts_hit(layer, tokens) * layer.expert_bytes
    there_and_back = 2 * tokens * layer.row_bytes / rates.host_to_device
    return max(operations / rates.cpu_operations, nbytes / rates.cpu_bandwidth) + there_and_back


def copy_seconds(rates: Rates, layer: MoeSizes) -> float:
    """Return the seconds that a layer's weights take to the GPU."""
    return layer.layer_bytes / rates.host_to_device


def rest_seconds(rates: Rates, layer: MoeSizes, tokens: int) -> float:
    """Return the seconds of the rest of a layer."""
    return tokens * layer.rest_operations / rates.gpu_operations


def expert_seconds(rates: Rates, layer: MoeSizes, tokens: int) -> float:
    """Return the seconds of a layer's routed experts on the GPU, their weights being there."""
    return tokens * layer.top_k * layer.expert_operations / rates.gpu_operations


def streamed_seconds(copy: float, rest: float, experts: float, pieces: int) -> float:
    """Return the seconds of a layer in the midst of others, of these parts."""
    in_time = min(1.0, 2 / pieces)  # the share of the copy that runs during the rest
    return max(copy, rest + experts, rest + (1 - in_time) * copy + in_time * experts)


def streaming_pays(rates: Rates, layer: MoeSizes, tokens: int, pieces: int = 1) -> bool:
    """Tell whether a chunk is faster with its experts' weights streamed to the GPU."""
    copy, rest = copy_seconds(rates, layer), rest_seconds(rates, layer, tokens)
    streamed = streamed_seconds(copy, rest, expert_seconds(rates, layer, tokens), pieces)
    return streamed < rest + cpu_seconds(rates, layer, tokens)


def least_tokens(rates: Rates, layer: MoeSizes) -> int | None:
    """Return the shortest chunk for which streaming pays; None where none of 2^20 tokens does."""
    most = 1 << 20
    if not streaming_pays(rates, layer, most):
        return None
    least = 1
    # The CPU's cost rises from the first token on, that of streaming not before the GPU computes
    # longer than it copies, and then by less than the CPU's: they cross once.
    while least < most:
        middle = (least + most) // 2
        if streaming_pays(rates, layer, middle):
            most = middle
        else:
            least = middle + 1
    return least


def hiding_tokens(rates: Rates, layer: MoeSizes) -> int:
    """Return the shortest chunk that computes as long as its weights are copied.

    Longer ones are no faster by the token.
    """
    one = expert_seconds(rates, layer, 1) + rest_seconds(rates, layer, 1)
    return math.ceil(copy_seconds(rates, layer) / one)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model whose layers with routed experts are alike."""

    layer: MoeSizes
    moe_layers: int
    other_operations: int  # of one token in dense layers, the head left out
    attention_operations: int  # of one token and one token before it, in all layers

    @classmethod
    def deepseek(cls, config: Any, *, expert_bytes: int) -> ModelSizes:
        """Take the sizes out of the config of a DeepSeek-V2 or V3."""
        D, F, H = config.hidden_size, config.moe_intermediate_size, config.num_attention_heads
        layers, dense = config.num_hidden_layers, config.first_k_dense_replace
        query = config.qk_nope_head_dim + config.qk_rope_head_dim
        ranks = config.kv_lora_rank + config.qk_rope_head_dim
        rank = config.q_lora_rank
        queries = rank * (D + H * query) if rank else D * H * query
        heads = H * (config.qk_nope_head_dim + config.v_head_dim)
        attention = queries + D * ranks + config.kv_lora_rank * heads + H * config.v_head_dim * D
        shared = 3 * D * F * (config.n_shared_experts or 0)
        layer = MoeSizes(
            config.n_routed_experts,
            config.num_experts_per_tok,
            6 * D * F,
            expert_bytes,
            ACTIVATION * D,
            2 * (attention + shared),
        )
        return cls(
            layer,
            layers - dense,
            2 * dense * (attention + 3 * D * config.intermediate_size),
            2 * layers * H * (query + config.v_head_dim),
        )


def prefill_seconds(
    rates: Rates, model: ModelSizes, tokens: int, chunk: int, *, pieces: int | None
) -> float:
    """Return the seconds that a prompt takes, in chunks.

    Args:
        pieces: that a layer's weights come in where they are streamed; None: experts on the CPU.
    """
    layer, layers, seconds = model.layer, model.moe_layers, 0.0
    for begin in range(0, tokens, chunk):
        count = min(chunk, tokens - begin)
        pairs = count * begin + count * (count + 1) // 2  # attention is causal
        attention = pairs * model.attention_operations / rates.gpu_attention
        # Attention is reckoned with MoE layers: all but a few are such.
        rest = rest_seconds(rates, layer, count) + attention / layers
        seconds += count * model.other_operations / rates.gpu_operations
        if pieces is None:
            seconds += layers * (rest + cpu_seconds(rates, layer, count))
            continue
        copy, experts = copy_seconds(rates, layer), expert_seconds(rates, layer, count)
        seconds += (layers - 1) * streamed_seconds(copy, rest, experts, pieces)
        seconds += copy + rest + experts
    return seconds


def prefill_rate(
    rates: Rates, model: ModelSizes, tokens: int, chunk: int, *, pieces: int | None
) -> float:
    """Return tokens per second of a prompt; see `prefill_seconds`."""
    return tokens / prefill_seconds(rates, model, tokens, chunk, pieces=pieces)
