"""The routed experts of one MoE layer with random weights: what benchmarks of it share.

Sizes are those of DeepSeek-V3 and V2-Lite. Copies of a few packed experts stand for the others:
they are experts of their own in memory, which is all that speed depends on.

Shape letters: D hidden_size, F moe_intermediate_size, E experts, K top_k, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experts_reference import DequantisedExperts, experts_reference
from ktransformers import _native
from ktransformers.cpu_options import scale_dtype
from limits import huge_pages, timed_calls

# Computes a layer: x `[T, D]`, experts `[T, K]` and their weights in, `[T, D]` out.
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SPARE_BYTES = 2e9  # of memory, left to everything else
CHECKED = 2  # experts whose original weights are kept


@dataclass(frozen=True, slots=True)
class Sizes:
    """One layer: D, F, E and K of the model; fewer experts than the model has, where they fit."""

    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int


MODELS = {
    "v2-lite": Sizes(2048, 1408, 64, 6),
    "v3": Sizes(7168, 2048, 64, 8),  # of 256
}


@dataclass(frozen=True, slots=True)
class Weights:
    """An expert's original weights, bf16: gate and up `[F, D]`, down `[D, F]`."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """Packed tensors of all experts, and the original weights of the first `CHECKED`."""

    sizes: Sizes
    weight_format: str
    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor
    originals: list[Weights]
    build: Any  # the native module that packed it: the one installed, or another build

    def native(self, threads: int, isa: str | None) -> _native.Experts:
        """Return a native layer that reads these tensors."""
        layer: _native.Experts = self.build.Experts(
            self.gate_up,
            self.gate_up_scale,
            self.down,
            self.down_scale,
            format=self.weight_format,
            hidden_size=self.sizes.hidden_size,
            moe_intermediate_size=self.sizes.moe_intermediate_size,
            threads=threads,
            isa=isa,
        )
        return layer

    def expert_bytes(self) -> int:
        """Count the bytes of weights and scales that one expert has."""
        tensors = (self.gate_up, self.gate_up_scale, self.down, self.down_scale)
        return sum(tensor[0].nbytes for tensor in tensors)


def expert_bytes(sizes: Sizes, weight_format: str) -> int:
    """Count the bytes of an expert's packed weights, without scales, before it is made."""
    D, F = sizes.hidden_size, sizes.moe_intermediate_size
    gate_up = 2 * _native.packed_bytes(F, D, weight_format)
    return gate_up + _native.packed_bytes(D, F, weight_format)


def fitting(sizes: Sizes, weight_format: str, copies: int = 1) -> Sizes:
    """Return the sizes with as many experts as memory holds `copies` of, at most those given."""
    text = Path("/proc/meminfo").read_text()
    found = re.search(r"MemAvailable:\s*(\d+)", text)
    available = int(found[1]) * 1024 - SPARE_BYTES if found else 0
    each = copies * expert_bytes(sizes, weight_format)
    count = max(2 * sizes.top_k, min(sizes.num_experts, int(available // each)))
    return replace(sizes, num_experts=count)


def random_weights(sizes: Sizes) -> Weights:
    """Draw an expert's weights so that its output is about as large as its input."""
    D, F = sizes.hidden_size, sizes.moe_intermediate_size

    def normal(n: int, k: int) -> torch.Tensor:
        return torch.randn(n, k, dtype=torch.bfloat16).mul_(k**-0.5)

    return Weights(normal(F, D), normal(F, D), normal(D, F))


def random_layer(sizes: Sizes, weight_format: str, build: Any = _native) -> Layer:
    """Pack a few experts of normal weights and repeat their bytes: all would take minutes."""
    D, F, E = sizes.hidden_size, sizes.moe_intermediate_size, sizes.num_experts
    distinct = min(E, 2 * sizes.top_k)

    def empty(n: int, k: int, matrices: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = build.packed_bytes(n, k, weight_format)
        scales = build.scale_count(n, k, weight_format)
        packed = huge_pages(E, matrices, size, dtype=torch.uint8)
        return packed, torch.empty(E, matrices, scales, dtype=scale_dtype(weight_format))

    gate_up, gate_up_scale = empty(F, D, 2)
    down, down_scale = empty(D, F, 1)
    originals = []
    for e in range(distinct):
        weights = random_weights(sizes)
        if e < CHECKED:
            originals.append(weights)
        for half, weight in enumerate((weights.gate, weights.up)):
            build.pack(weight, gate_up[e, half], gate_up_scale[e, half], weight_format)
        build.pack(weights.down, down[e, 0], down_scale[e, 0], weight_format)
    for tensor in (gate_up, gate_up_scale, down, down_scale):
        for e in range(distinct, E):
            tensor[e] = tensor[e % distinct]
    tensors = (gate_up.flatten(1), gate_up_scale, down[:, 0], down_scale[:, 0])
    return Layer(sizes, weight_format, *tensors, originals, build)


def dequantised(
    packed: torch.Tensor, scale: torch.Tensor, n: int, k: int, weight_format: str
) -> torch.Tensor:
    """Return what packed matrices `[*, bytes]` stand for, `[*, n, k]` in float64."""
    dtype = torch.bfloat16 if weight_format == "bf16" else torch.int8
    q = torch.empty(packed.shape[0], n, k, dtype=dtype)
    for source, out in zip(packed, q, strict=True):
        _native.unpack(source.contiguous(), out, weight_format)
    if weight_format == "bf16":
        return q.double()
    if weight_format == "int8":
        return q.double() * scale[:, :n, None].double()
    size = int(weight_format.partition("-")[2])
    by_output = scale.double().reshape(len(scale), n // 16, -1, 16).transpose(2, 3)
    return q.double() * by_output.reshape(len(scale), n, -1).repeat_interleave(size, dim=2)


def check(layer: Layer, native: _native.Experts) -> float:
    """Compare two tokens with the reference; return the largest share of the bound in use.

    Exits where the result is wrong.
    """
    D, F, K = layer.sizes.hidden_size, layer.sizes.moe_intermediate_size, layer.sizes.top_k
    few, name = slice(0, 2 * K), layer.weight_format
    gate, up = layer.gate_up[few].chunk(2, dim=1)
    experts = DequantisedExperts(
        dequantised(gate, layer.gate_up_scale[few, 0], F, D, name),
        dequantised(up, layer.gate_up_scale[few, 1], F, D, name),
        dequantised(layer.down[few], layer.down_scale[few], D, F, name),
        name,
    )
    x = torch.randn(2, D)
    index = torch.arange(2 * K).reshape(2, K)
    weights = torch.rand(2, K)
    out = torch.empty_like(x)
    native.forward(x, index, weights, out)
    expected, bound = experts_reference(experts, x, index, weights)
    share = float(((out.double() - expected).abs() / bound).max())
    if not share <= 1:
        raise SystemExit(f"wrong result: {share:.3g} times the error bound")
    return share


def exact_output(originals: list[Weights], x: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """Return in fp32 what the original weights give, `[T, D]`.

    `x` `[T, D]`; `routed` `[T, CHECKED]` are the weights of the first experts.
    """
    y = torch.zeros(x.shape)
    for e, weights in enumerate(originals):
        gate, up = x.float() @ weights.gate.float().T, x.float() @ weights.up.float().T
        hidden = torch.nn.functional.silu(gate) * up
        y += routed[:, e, None] * (hidden @ weights.down.float().T)
    return y


def relative_error(originals: list[Weights], run: Run) -> float:
    """Return the error of a layer's output against fp32 with the original weights.

    `run` is given 16 tokens `[T, D]` in bf16, and the first experts as index and weights; the
    error is the norm of the difference over that of the exact output.
    """
    x = torch.randn(16, originals[0].gate.shape[1], dtype=torch.bfloat16)
    index = torch.arange(CHECKED).expand(len(x), CHECKED).contiguous()
    routed = torch.rand(len(x), CHECKED)
    exact = exact_output(originals, x, routed)
    return float((run(x, index, routed).float() - exact).norm() / exact.norm())


def routing(sizes: Sizes, tokens: int) -> torch.Tensor:
    """Draw different experts for each token, `[T, K]`."""
    return torch.stack([torch.randperm(sizes.num_experts)[: sizes.top_k] for _ in range(tokens)])


def decode_routing(sizes: Sizes) -> list[torch.Tensor]:
    """Return one token's experts for call after call, none repeated before all had their turn.

    So that weights come from memory and not from a cache.
    """
    order = torch.randperm(sizes.num_experts)
    calls = sizes.num_experts // sizes.top_k
    return list(order[: calls * sizes.top_k].reshape(calls, 1, sizes.top_k))


@dataclass(frozen=True, slots=True)
class Calls:
    """Inputs of calls with some tokens: x `[T, D]` in bf16, and for each call its experts."""

    x: torch.Tensor
    indices: list[torch.Tensor]
    weights: torch.Tensor

    @classmethod
    def draw(cls, sizes: Sizes, tokens: int) -> Calls:
        """Draw them at random."""
        indices = [routing(sizes, tokens)] if tokens > 1 else decode_routing(sizes)
        x = torch.randn(tokens, sizes.hidden_size, dtype=torch.bfloat16)
        return cls(x, indices, torch.rand(tokens, sizes.top_k))

    def experts(self) -> int:
        """Return how many experts one call reads."""
        return len(self.indices[0].unique())

    def timed(self, native: _native.Experts) -> Callable[[float], list[float]]:
        """Time calls of our layer."""
        out = torch.empty_like(self.x)

        def call(i: int) -> None:
            native.forward(self.x, self.indices[i % len(self.indices)], self.weights, out)

        return timed_calls(call)


def operations(sizes: Sizes, tokens: int) -> int:
    """Count multiplications and additions of the three products."""
    return tokens * sizes.top_k * 3 * 2 * sizes.hidden_size * sizes.moe_intermediate_size
