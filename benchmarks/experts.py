"""The experts of one MoE layer, in any weight format, measured against this machine's own limits.

A call is bound by memory (the weights that its tokens' experts have, over the streaming read
bandwidth) or by instructions (its multiplications and additions, over the instruction peak): its
share is the larger of the two times over its own. Limits are measured in the same rounds as what
is compared with them, because machines drift.
Decode calls take other experts each time, so that weights come from memory and not from a cache.
The result is checked first, against a reference in float64 with a derived bound.

Run: python benchmarks/experts.py --help        The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import typer
from torch import nn
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

from experts_reference import DequantisedExperts, experts_reference
from ktransformers import _native
from ktransformers.base import Site
from ktransformers.checkpoint import open_checkpoint
from ktransformers.operators.experts import CpuExperts

LIMIT_SECONDS = 0.1  # of each measurement of a limit: before and after what is compared with it
CALL_SECONDS = 0.25  # of calls per round and token count, at least one
OVERHEAD_CALLS = 2000


@dataclass(frozen=True, slots=True)
class Sizes:
    """One layer: D, F, E and K of the model; fewer experts than the model has, where they fit."""

    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int


MODELS = {
    "v2-lite": Sizes(2048, 1408, 64, 6),
    "v3": Sizes(7168, 2048, 48, 8),  # of 256: 2 GB
}


@dataclass(frozen=True, slots=True)
class Layer:
    """Packed tensors, and the native layer that reads them."""

    sizes: Sizes
    weight_format: str
    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor
    native: _native.Experts


def random_layer(sizes: Sizes, weight_format: str, threads: int, isa: str | None) -> Layer:
    """Pack a few experts of normal weights and repeat their bytes: packing all would take minutes.

    Copies are experts of their own in memory, which is all that speed depends on.
    """
    D, F, E = sizes.hidden_size, sizes.moe_intermediate_size, sizes.num_experts
    distinct = min(E, 2 * sizes.top_k)
    scale_dtype = torch.bfloat16 if weight_format.startswith("int4") else torch.float32

    def empty(n: int, k: int, matrices: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = _native.packed_bytes(n, k, weight_format)
        scales = _native.scale_count(n, k, weight_format)
        packed = torch.empty(E, matrices, size, dtype=torch.uint8)
        return packed, torch.empty(E, matrices, scales, dtype=scale_dtype)

    gate_up, gate_up_scale = empty(F, D, 2)
    down, down_scale = empty(D, F, 1)
    for e in range(distinct):
        for half in range(2):
            weight = torch.randn(F, D, dtype=torch.bfloat16) / D**0.5
            _native.pack(weight, gate_up[e, half], gate_up_scale[e, half], weight_format)
        weight = torch.randn(D, F, dtype=torch.bfloat16) / F**0.5
        _native.pack(weight, down[e, 0], down_scale[e, 0], weight_format)
    for tensor in (gate_up, gate_up_scale, down, down_scale):
        for e in range(distinct, E):
            tensor[e] = tensor[e % distinct]
    tensors = (gate_up.flatten(1), gate_up_scale, down[:, 0], down_scale[:, 0])
    native = _native.Experts(
        *tensors,
        format=weight_format,
        hidden_size=D,
        moe_intermediate_size=F,
        threads=threads,
        isa=isa,
    )
    return Layer(sizes, weight_format, *tensors, native)


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


def check(layer: Layer) -> float:
    """Compare two tokens with the reference; return the largest share of the bound in use."""
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
    layer.native.forward(x, index, weights, out)
    expected, bound = experts_reference(experts, x, index, weights)
    share = float(((out.double() - expected).abs() / bound).max())
    if not share <= 1:
        raise SystemExit(f"wrong result: {share:.3g} times the error bound")
    return share


def routing(sizes: Sizes, tokens: int) -> torch.Tensor:
    """Draw different experts for each token; a single token walks through all of them."""
    return torch.stack([torch.randperm(sizes.num_experts)[: sizes.top_k] for _ in range(tokens)])


def decode_routing(sizes: Sizes) -> list[torch.Tensor]:
    """Return one token's experts for call after call, none repeated before all had their turn."""
    order = torch.randperm(sizes.num_experts)
    calls = sizes.num_experts // sizes.top_k
    return list(order[: calls * sizes.top_k].reshape(calls, 1, sizes.top_k))


def seconds_per_call(call: Callable[[int], None], at_least: float) -> list[float]:
    """Time single calls until `at_least` seconds have passed."""
    times: list[float] = []
    while not times or sum(times) < at_least:
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles around it: (lower, median, upper)."""
    if len(values) < 2:
        return (values[0],) * 3
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


@dataclass(frozen=True, slots=True)
class Measured:
    """Calls with one number of tokens, over all rounds."""

    tokens: int
    seconds: list[float]  # per call
    shares: list[float]  # of the limit, per round: the round's bound over its median call


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine could do, one figure per round."""

    bandwidths: list[float]  # bytes per second
    peaks: list[float]  # operations per second


def measure(
    layer: Layer, token_counts: list[int], rounds: int, threads: int, isa: str | None
) -> tuple[list[Measured], Limits]:
    """Return what was measured per token count, and the limits beside it."""
    D, K = layer.sizes.hidden_size, layer.sizes.top_k
    results = [Measured(tokens, [], []) for tokens in token_counts]
    buffer = layer.gate_up.reshape(-1)
    limits = Limits([], [])

    def bandwidth() -> float:
        return _native.bench_read_bandwidth(buffer, threads, LIMIT_SECONDS)

    def peak() -> float:
        return _native.bench_peak(layer.weight_format, threads, LIMIT_SECONDS, isa=isa)[0]

    for number in range(rounds + 1):
        for result in results:
            tokens = result.tokens
            x = torch.randn(tokens, D, dtype=torch.bfloat16)
            out = torch.empty_like(x)
            weights = torch.rand(tokens, K)
            calls = [routing(layer.sizes, tokens)] if tokens > 1 else decode_routing(layer.sizes)

            def call(
                i: int,
                x: torch.Tensor = x,
                calls: list[torch.Tensor] = calls,
                weights: torch.Tensor = weights,
                out: torch.Tensor = out,
            ) -> None:
                layer.native.forward(x, calls[i % len(calls)], weights, out)

            before = bandwidth(), peak()
            seconds = seconds_per_call(call, CALL_SECONDS)
            # Noise only ever lowers a limit.
            best_bandwidth, best_peak = max(before[0], bandwidth()), max(before[1], peak())
            if number == 0:  # warms up
                continue
            limits.bandwidths.append(best_bandwidth)
            limits.peaks.append(best_peak)
            experts = layer.sizes.top_k if tokens == 1 else len(calls[0].unique())
            bound = max(
                weight_bytes(layer) * experts / best_bandwidth,
                operations(layer.sizes, tokens) / best_peak,
            )
            result.seconds.extend(seconds)
            result.shares.append(bound / statistics.median(seconds))
    return results, limits


def weight_bytes(layer: Layer) -> int:
    """Count the bytes of weights and scales that one expert has."""
    tensors = (layer.gate_up, layer.gate_up_scale, layer.down, layer.down_scale)
    return sum(tensor[0].nbytes for tensor in tensors)


def operations(sizes: Sizes, tokens: int) -> int:
    """Count multiplications and additions of the three products."""
    return tokens * sizes.top_k * 3 * 2 * sizes.hidden_size * sizes.moe_intermediate_size


def overhead_us(threads: int) -> float:
    """Return what the optimised module's call costs over the bare kernel call, at one token.

    On a layer with V2-Lite's hidden_size and top_k but narrow experts: the overhead does not
    depend on their width, and drowns in the noise of a call that reads 50 MB.
    """
    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=2048, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=6
    )
    model = nn.Module()
    model.experts = DeepseekV2Experts(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    site = Site("experts", 0, config, torch.bfloat16, torch.device("cpu"), "benchmark")
    module = CpuExperts.from_module(model.experts, site, threads=threads)
    module.load_weights(open_checkpoint(model))
    bare = _native.Experts(
        module.gate_up_packed,
        module.gate_up_scale,
        module.down_packed,
        module.down_scale,
        format="int8",
        hidden_size=2048,
        moe_intermediate_size=32,
        threads=threads,
    )
    x = torch.randn(1, 2048, dtype=torch.bfloat16)
    index = torch.arange(6).reshape(1, 6)
    weights = torch.rand(1, 6)
    out = torch.empty_like(x)
    whole, kernel = [], []
    with torch.inference_mode():
        for _ in range(OVERHEAD_CALLS):
            start = time.perf_counter()
            module(x, index, weights)
            middle = time.perf_counter()
            bare.forward(x, index, weights, out)
            whole.append(middle - start)
            kernel.append(time.perf_counter() - middle)
    return (statistics.median(whole) - statistics.median(kernel)) * 1e6


def main(
    model: Annotated[Literal["v2-lite", "v3"], typer.Option(help="Whose layer sizes.")] = "v2-lite",
    weight: Annotated[str, typer.Option(help="int8, int4-32, int4-64, int4-128 or bf16.")] = "int8",
    threads: Annotated[int | None, typer.Option(help="Default: all this process may use.")] = None,
    tokens: Annotated[str, typer.Option(help="Token counts; decode is 1.")] = "1,16,64,256,1024",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements.")] = 7,
    isa: Annotated[str | None, typer.Option(help="A lower instruction set than the best.")] = None,
) -> None:
    """Measure the experts of one MoE layer; the last line is one JSON object."""
    threads = threads or _native.default_threads()
    token_counts = [int(count) for count in tokens.split(",")]
    torch.manual_seed(0)
    sizes = MODELS[model]
    layer = random_layer(sizes, weight, threads, isa)
    bound_share = check(layer)
    _, instruction = _native.bench_peak(weight, 1, 0.01, isa=isa)
    print(f"{model} {weight}: {sizes}, {threads} threads, {layer.native.isa}")
    print(f"result checked: {bound_share:.2f} of the error bound")
    results, limits = measure(layer, token_counts, rounds, threads, isa)

    report: dict[str, float | str | int] = {
        "model": model,
        "weight": weight,
        "isa": layer.native.isa,
        "threads": threads,
        "instruction": instruction,
    }
    for name, key, values, unit in (
        ("read bandwidth", "read_gb_s", limits.bandwidths, "GB/s"),
        (f"peak of {instruction}", "peak_gops", limits.peaks, "GOPS"),
    ):
        lower, median, upper = (value / 1e9 for value in quartiles(values))
        print(f"{name}: {median:.1f} {unit} ({lower:.1f} to {upper:.1f})")
        report[key] = median
    print(
        f"{'tokens':>6} {'ms (quartiles)':>26} {'tok/s':>8} {'GB/s':>6} {'GOPS':>6}  of the limit"
    )
    for result in results:
        lower, median, upper = quartiles(result.seconds)
        share_lower, share, share_upper = quartiles(result.shares)
        gops = operations(sizes, result.tokens) / median / 1e9
        gb_s = weight_bytes(layer) * sizes.top_k / median / 1e9
        spread = f"{lower * 1e3:.2f} to {upper * 1e3:.2f}"
        rate = f"{gb_s:.1f}" if result.tokens == 1 else ""
        print(
            f"{result.tokens:6} {median * 1e3:9.2f} {spread:>18} {result.tokens / median:7.0f} "
            f"{rate:>5} {gops:5.0f}  {share:.0%} ({share_lower:.0%} to {share_upper:.0%})"
        )
        label = "decode" if result.tokens == 1 else f"prefill_{result.tokens}"
        report[f"{label}_ms"] = median * 1e3
        report[f"{label}_tok_s"] = result.tokens / median
        report[f"{label}_gops"] = gops
        if result.tokens == 1:
            report["decode_gb_s"] = gb_s
            report["decode_share"] = share
        else:
            report[f"{label}_share"] = share
            if result.tokens == 1024:
                report["prefill_share"] = share
    overhead = overhead_us(threads)
    print(f"module over bare kernel call, one token: {overhead:.1f} us")
    report["overhead_us"] = overhead
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}))


if __name__ == "__main__":
    typer.run(main)
