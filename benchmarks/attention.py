"""Latent attention of one layer, measured against this machine's own limits.

A call is bound by memory (the cached latents, and W_UK and W_UV in the absorbed form, over the
streaming read bandwidth) or by instructions (the multiplications and additions of the form that
needs fewer, over the bf16 peak): its share is the larger of the two times over its own. Limits are
measured in the same rounds as what is compared with them, because machines drift. Decode takes
another layer and another cache each time, so that both come from memory. The result is checked
first, against a reference in float64 with a derived bound.

`--crossover` measures both forms side by side over the number of queries, instead.

Run: python benchmarks/attention.py --help      The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import typer

from attention_reference import Form, MlaWeights, attention_reference
from ktransformers import _native, cache_rounding
from limits import huge_pages
from moe_layer import dequantised

LIMIT_SECONDS = 0.1  # of each measurement of a limit: before and after what is compared with it
CALL_SECONDS = 0.25  # of calls per round and case, at least one
COLD_BYTES = 1 << 28  # of layers, and of caches, that calls walk through: more than a processor's
PAGE_TOKENS = 64
C, R, DN, DV = 512, 64, 128, 128  # of DeepSeek-V2, V2-Lite and V3
CacheFormat = Literal["bf16", "int8"]
Cached = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]  # latent, its scales, rope part
HEADS = {"v2-lite": 16, "v3": 128}
CROSSOVER = (32, 64, 96, 128, 160, 192, 256)


@dataclass(frozen=True, slots=True)
class Case:
    """Queries of one sequence, and the tokens in its cache before them."""

    tokens: int
    before: int

    @property
    def name(self) -> str:
        """Name it in the report."""
        if self.tokens == 1:
            return f"decode_at_{self.before}"
        return f"prefill_{self.tokens}_after_{self.before}"

    @property
    def length(self) -> int:
        """Return the tokens in the cache after it; decode is one of those before."""
        return self.before if self.tokens == 1 else self.before + self.tokens

    def operations(self, heads: int, form: Form) -> int:
        """Count multiplications and additions, of what causality needs."""
        T, L = self.tokens, self.length
        pairs = T * L - T * (T - 1) // 2
        if form == "absorbed":
            return 2 * heads * (pairs * (2 * C + R) + T * C * (DN + DV))
        return 2 * heads * (pairs * (DN + R + DV) + L * C * (DN + DV))

    def cache_bytes(self, cache: CacheFormat) -> int:
        """Count the bytes of what is cached; rope parts are in bf16."""
        return self.length * (
            (C * 2 if cache == "bf16" else C + C // cache_rounding.GROUP * 4) + R * 2
        )


@dataclass(frozen=True, slots=True)
class Layer:
    """The native layer, the tensors it reads, copies of both, and what its caches are in."""

    heads: int
    weight_format: str
    cache: CacheFormat
    tensors: tuple[torch.Tensor, ...]
    native: _native.MlaAttention
    copies: list[_native.MlaAttention]

    def weight_bytes(self) -> int:
        """Count the bytes of W_UK and W_UV."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def least_operations(self, case: Case) -> int:
        """Count those of the form that needs fewer."""
        forms: tuple[Form, ...] = ("absorbed", "expanded")
        return min(case.operations(self.heads, form) for form in forms)


def random_layer(
    heads: int, weight_format: str, cache: CacheFormat, threads: int, isa: str | None
) -> Layer:
    """Pack normal weights, head by head."""
    scale_dtype = torch.bfloat16 if weight_format.startswith("int4") else torch.float32

    def half(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        size, scales = (f(n, k, weight_format) for f in (_native.packed_bytes, _native.scale_count))
        packed = huge_pages(heads, size, dtype=torch.uint8)
        scale = torch.empty(heads, scales, dtype=scale_dtype)
        for h in range(heads):
            weight = torch.randn(n, k, dtype=torch.bfloat16) / C**0.5
            _native.pack(weight, packed[h], scale[h], weight_format)
        return packed, scale

    def attention(tensors: tuple[torch.Tensor, ...]) -> _native.MlaAttention:
        return _native.MlaAttention(
            *tensors,
            format=weight_format,
            num_heads=heads,
            qk_nope_head_dim=DN,
            qk_rope_head_dim=R,
            v_head_dim=DV,
            kv_lora_rank=C,
            scaling=(DN + R) ** -0.5,
            threads=threads,
            isa=isa,
        )

    tensors = (*half(C, DN), *half(DV, C))
    count = COLD_BYTES // sum(tensor.nbytes for tensor in tensors)
    copies = [attention(tuple(tensor.clone() for tensor in tensors)) for _ in range(count)]
    return Layer(heads, weight_format, cache, tensors, attention(tensors), copies)


def random_caches(case: Case, cache: CacheFormat, count: int) -> list[Cached]:
    """Draw what is cached, in pages."""
    shape = (-(-case.length // PAGE_TOKENS), PAGE_TOKENS)

    def draw() -> Cached:
        latent, rope = (torch.randn(*shape, width, dtype=torch.bfloat16) for width in (C, R))
        if cache == "bf16":
            return latent, None, rope
        q, scale = cache_rounding.quantised(latent.flatten(0, 1), torch.int8)
        return q.view(*shape, C), scale.view(*shape, -1), rope

    return [draw() for _ in range(count)]


def caller(layer: Layer, case: Case, form: Form | None) -> Callable[[int], torch.Tensor]:
    """Return what computes the case: with the next layer each time, and where it decodes cache."""
    wanted = COLD_BYTES // case.cache_bytes(layer.cache) if case.tokens == 1 else 1
    caches = random_caches(case, layer.cache, max(1, wanted))
    table = torch.arange(caches[0][0].shape[0], dtype=torch.int32)[None]
    lengths = torch.tensor([case.length], dtype=torch.int32)
    q = torch.randn(1, case.tokens, layer.heads, DN + R, dtype=torch.bfloat16)
    out = torch.empty(1, case.tokens, layer.heads * DV, dtype=torch.bfloat16)

    def call(i: int) -> torch.Tensor:
        latent, scale, rope = caches[i % len(caches)]
        native = layer.copies[i % len(layer.copies)]
        native.forward(q, latent, scale, rope, table, lengths, None, out, form=form)
        return out

    return call


def check(layer: Layer) -> float:
    """Compare both forms with the reference; return the largest share of the bound in use."""
    uk_packed, uk_scale, uv_packed, uv_scale = layer.tensors
    weights = MlaWeights(
        dequantised(uk_packed, uk_scale, C, DN, layer.weight_format),
        dequantised(uv_packed, uv_scale, DV, C, layer.weight_format),
        (DN + R) ** -0.5,
        layer.weight_format,
    )
    case = Case(2, 70)
    ((latent, scale, rope),) = random_caches(case, layer.cache, 1)
    q = torch.randn(1, case.tokens, layer.heads, DN + R)
    out = torch.empty(1, case.tokens, layer.heads * DV)
    table = torch.arange(latent.shape[0], dtype=torch.int32)[None]
    lengths = torch.tensor([case.length], dtype=torch.int32)
    seen = torch.arange(case.length) <= torch.arange(case.before, case.length)[:, None]
    shares = []
    forms: tuple[Form, ...] = ("absorbed", "expanded")
    for form in forms:
        layer.native.forward(q, latent, scale, rope, table, lengths, None, out, form=form)
        cached, positions = (x.flatten(0, 1)[: case.length] for x in (latent, rope))
        if scale is not None:
            cached = cache_rounding.dequantised(cached, scale.flatten(0, 1)[: case.length])
        expected, bound = attention_reference(weights, q[0], cached, positions, seen, form)
        shares.append(float(((out.view(expected.shape) - expected).abs() / bound).max()))
    if not max(shares) <= 1:
        raise SystemExit(f"wrong result: {max(shares):.3g} times the error bound")
    return max(shares)


def seconds_per_call(call: Callable[[int], object]) -> list[float]:
    """Time single calls until CALL_SECONDS have passed."""
    times: list[float] = []
    while not times or sum(times) < CALL_SECONDS:
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return times


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do: bytes and operations per second."""

    bandwidth: float
    peak: float


def limits(buffer: torch.Tensor, threads: int, isa: str | None) -> Limits:
    """Measure them now."""
    return Limits(
        _native.bench_read_bandwidth(buffer, threads, LIMIT_SECONDS),
        _native.bench_peak("bf16", threads, LIMIT_SECONDS, isa=isa)[0],
    )


def measure(
    layer: Layer, cases: Sequence[Case], rounds: int, threads: int, isa: str | None
) -> dict[str, float]:
    """Print a line per case; return milliseconds and shares of the limit, medians over rounds."""
    buffer = torch.zeros(COLD_BYTES, dtype=torch.uint8)
    report: dict[str, float] = {}
    seen: list[Limits] = []
    for case in cases:
        call = caller(layer, case, None)
        times, shares = [], []
        for number in range(rounds + 1):
            before = limits(buffer, threads, isa)
            seconds = statistics.median(seconds_per_call(call))
            after = limits(buffer, threads, isa)
            if number == 0:  # warms up
                continue
            # Noise only ever lowers a limit.
            best = Limits(max(before.bandwidth, after.bandwidth), max(before.peak, after.peak))
            read = case.cache_bytes(layer.cache) + layer.weight_bytes()
            bound = max(read / best.bandwidth, layer.least_operations(case) / best.peak)
            times.append(seconds)
            shares.append(bound / seconds)
            seen.append(best)
        ms, share = statistics.median(times) * 1e3, statistics.median(shares)
        spread = f"{min(shares):.0%} to {max(shares):.0%}"
        print(f"{case.name:28} {ms:9.3f} ms  {share:.0%} of the limit ({spread})")
        report[f"{case.name}_ms"] = ms
        report[f"{case.name}_share"] = share
    report["read_gb_s"] = statistics.median(one.bandwidth for one in seen) / 1e9
    report["peak_gops"] = statistics.median(one.peak for one in seen) / 1e9
    return report


def crossover(layer: Layer, before: int, rounds: int) -> dict[str, float]:
    """Print how long both forms take for more and more queries, measured in turns."""
    report: dict[str, float] = {}
    for tokens in CROSSOVER:
        case = Case(tokens, before)
        calls = [caller(layer, case, form) for form in ("absorbed", "expanded")]
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for call, seconds in zip(calls, times, strict=True):
                seconds.append(min(seconds_per_call(call)))
        absorbed, expanded = (statistics.median(seconds) for seconds in times)
        print(
            f"{tokens:4} queries after {before}: absorbed {absorbed * 1e3:8.2f} ms, expanded "
            f"{expanded * 1e3:8.2f} ms, ratio {absorbed / expanded:.2f}"
        )
        report[f"absorbed_over_expanded_{tokens}_after_{before}"] = absorbed / expanded
    return report


def main(
    model: Annotated[Literal["v2-lite", "v3"], typer.Option(help="Whose heads.")] = "v2-lite",
    weight: Annotated[str, typer.Option(help="int8, int4-32, int4-64, int4-128 or bf16.")] = "int8",
    cache: Annotated[CacheFormat, typer.Option(help="What latents are cached in.")] = "bf16",
    threads: Annotated[int | None, typer.Option(help="Default: all this process may use.")] = None,
    decode: Annotated[str, typer.Option(help="Contexts to decode at.")] = "128,1024,8192",
    prefill: Annotated[str, typer.Option(help="Contexts before 512 new tokens.")] = "0,4096,8192",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements.")] = 5,
    isa: Annotated[str | None, typer.Option(help="A lower instruction set than the best.")] = None,
    crossover_at: Annotated[
        str | None, typer.Option("--crossover", help="Contexts to compare the two forms at.")
    ] = None,
) -> None:
    """Measure latent attention; the last line is one JSON object."""
    threads = threads or _native.default_threads()
    torch.manual_seed(0)
    layer = random_layer(HEADS[model], weight, cache, threads, isa)
    print(f"{model}, {layer.heads} heads, {weight}, cache in {cache}")
    print(f"{threads} threads, {layer.native.isa}")
    print(f"result checked: {check(layer):.2f} of the error bound")
    report: dict[str, float | str | int] = {
        "model": model,
        "weight": weight,
        "cache": cache,
        "isa": layer.native.isa,
        "threads": threads,
    }
    if crossover_at is not None:
        for before in crossover_at.split(","):
            report.update(crossover(layer, int(before), rounds))
    else:
        cases = [Case(1, int(context)) for context in decode.split(",")]
        cases += [Case(512, int(context)) for context in prefill.split(",")]
        report.update(measure(layer, cases, rounds, threads, isa))
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}))


if __name__ == "__main__":
    typer.run(main)
