"""A whole model against this machine's own limits, and what of decode is not a kernel.

Prefill is bound by instructions: the multiplications and additions of its matrices over the int8
peak, plus those of attention over the bf16 peak. Decode is bound by memory: the bytes that it must
read, over the streaming read bandwidth. Only what is needed counts: of the last layer and the head,
a prompt needs the keys of all its tokens and everything else for the last alone. Limits are
measured right before and after each call, and noise only ever lowers them: the better one counts.

The model is that of end_to_end.py, under the shipped rule file of a weight format. Decode after a
long prompt is compared with decode after a short one.

Run: python benchmarks/model_limits.py --help   The last line is one JSON object.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from attention import COLD_BYTES, Case
from attention_reference import Form
from end_to_end import Ours
from ktransformers import _native
from ktransformers.base import Operator
from ktransformers.cache import LatentCache
from ktransformers.cache_pages import PAGE_TOKENS
from ktransformers.research.device_memory import cache_bytes
from limits import Meter, quartiles
from results import Report, emit, markdown
from whole_model import LAYERS, model_folder, random_ids

SHORT = 128  # tokens of context
NEW = 32  # tokens of each sample of decode
FORMS: tuple[Form, ...] = ("absorbed", "expanded")
HEADER = ("", "tok/s (quartiles)", "share of the limit (quartiles)")
UNTIMED = ("bench_", "pack", "unpack")  # native functions that no forward calls


def matrix_operations(config: Any, tokens: int) -> int:
    """Count those of all matrices but kv_b_proj's for a prompt, router and head included."""
    c = config
    D: int = c.hidden_size
    H, rank = c.num_attention_heads, c.q_lora_rank
    width = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    q = D * rank + rank * width if rank else D * width
    kv_a = D * (c.kv_lora_rank + c.qk_rope_head_dim)
    o = H * c.v_head_dim * D
    dense = 3 * D * c.intermediate_size
    experts = c.num_experts_per_tok + c.n_shared_experts
    moe = D * c.n_routed_experts + 3 * D * c.moe_intermediate_size * experts
    total: int = D * c.vocab_size
    for layer in range(c.num_hidden_layers):
        rest = q + o + (dense if layer < c.first_k_dense_replace else moe)
        is_last = layer == c.num_hidden_layers - 1
        total += tokens * kv_a + (1 if is_last else tokens) * rest
    return 2 * total


def attention_operations(config: Any, tokens: int) -> int:
    """Count those of attention for a prompt, in the form that needs fewer."""
    heads: int = config.num_attention_heads
    layers: int = config.num_hidden_layers

    def least(case: Case) -> int:
        return min(case.operations(heads, form) for form in FORMS)

    return (layers - 1) * least(Case(tokens, 0)) + least(Case(1, tokens))


def decode_bytes(model: PreTrainedModel, context: int) -> int:
    """Count what a token must read: weights of all operators, and the cache."""
    weights = sum(
        module.footprint().bytes_read_per_token
        for module in model.modules()
        if isinstance(module, Operator)
    )
    layers: int = model.config.num_hidden_layers
    page = cache_bytes(model.config, PAGE_TOKENS, LatentCache.for_model(model, 1).format)
    return weights + layers * context * page // PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do in a second, and what measures it."""

    matrices: Meter
    attention: Meter

    @classmethod
    def of(cls, weight: str, threads: int) -> Limits:
        """Measure for a weight format; attention computes in bf16."""
        buffer = torch.zeros(COLD_BYTES, dtype=torch.uint8)
        kind = "int4-128" if weight == "int4" else weight
        return cls(*(Meter(buffer, name, threads, None) for name in (kind, "bf16")))

    def now(self) -> tuple[float, float, float]:
        """Return bytes, and operations of matrices and of attention."""
        return self.matrices.bandwidth(), self.matrices.peak(), self.attention.peak()


@dataclass(frozen=True, slots=True)
class Samples:
    """Tokens per second and share of the limit, one of each a round."""

    speeds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def add(self, tokens: float, seconds: float, bound: float) -> None:
        """Add a round."""
        self.speeds.append(tokens / seconds)
        self.shares.append(bound / seconds)

    def cells(self, name: str) -> list[str]:
        """Write it under `HEADER`."""
        speed, share = quartiles(self.speeds), quartiles(self.shares)
        return [
            name,
            f"{speed[1]:.4g} ({speed[0]:.4g} to {speed[2]:.4g})",
            f"{share[1]:.0%} ({share[0]:.0%} to {share[2]:.0%})",
        ]


def measure(ours: Ours, lengths: list[int], limits: Limits, rounds: int) -> dict[str, Samples]:
    """Read prompts of these lengths, and decode after a short one and the longest."""
    config = ours.model.config
    contexts = (SHORT, max(lengths))
    names = [f"prefill_{n}" for n in lengths] + [f"decode_{n}" for n in contexts]
    samples = {name: Samples() for name in names}
    ours.timed(random_ids(SHORT, config.vocab_size), NEW)  # warms up
    for _ in range(rounds):
        for length in sorted({SHORT, *lengths}):
            decodes = length in contexts
            before = limits.now()
            timing = ours.timed(random_ids(length, config.vocab_size), NEW if decodes else 1)
            bandwidth, peak, bf16_peak = map(max, before, limits.now())
            if length in lengths:
                bound = matrix_operations(config, length) / peak
                bound += attention_operations(config, length) / bf16_peak
                samples[f"prefill_{length}"].add(length, timing.prefill_s, bound)
            if decodes:
                bound = (NEW - 1) * decode_bytes(ours.model, length + NEW // 2) / bandwidth
                samples[f"decode_{length}"].add(NEW - 1, timing.decode_s, bound)
    return samples


Call = tuple[str, float, float]  # what was called, and from when to when


@contextmanager
def native_calls() -> Iterator[list[Call]]:
    """Note every call of native code; no model may be called from two threads meanwhile."""
    calls: list[Call] = []
    original: list[tuple[Any, str, Any]] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                calls.append((name, start, time.perf_counter()))

        return call

    def wrap(owner: Any, prefix: str) -> None:
        for name, function in list(vars(owner).items()):
            if name.startswith(("_", *UNTIMED)) or not callable(function):
                continue
            if isinstance(function, type):
                wrap(function, f"{name}.")
            else:
                original.append((owner, name, function))
                setattr(owner, name, timed(prefix + name, function))

    wrap(_native, "")
    try:
        yield calls
    finally:
        for owner, name, function in original:
            setattr(owner, name, function)


def overhead(ours: Ours) -> tuple[float, dict[str, float]]:
    """Return the share of decode outside of native code, and what is inside: ms per token."""
    with native_calls() as calls:
        timing = ours.timed(random_ids(SHORT, ours.model.config.vocab_size), NEW)
    # The last token comes right after the last call.
    begin = calls[-1][2] - timing.decode_s
    spent: Counter[str] = Counter()
    for name, start, end in calls:
        if start >= begin:
            spent[name] += end - start  # type: ignore[assignment]  # counts seconds
    share = 1 - sum(spent.values()) / timing.decode_s
    return share, {name: 1e3 * seconds / (NEW - 1) for name, seconds in spent.most_common()}


def main(
    weight: Annotated[str, typer.Option(help="Our rule file's format: int8 or int4.")] = "int8",
    layers: Annotated[int, typer.Option(min=2, help="Layers of the model.")] = LAYERS,
    prefill: Annotated[str, typer.Option(help="Tokens of prompts.")] = "512,4096,8192",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements.")] = 3,
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure a whole model against the machine; the last line is one JSON object."""
    threads = _native.default_threads()
    lengths = [int(count) for count in prefill.split(",")]
    ours = Ours(model_folder(layers), f"deepseek-v2-cpu-{weight}", threads)
    limits = Limits.of(weight, threads)
    samples = measure(ours, lengths, limits, rounds)
    profiles = [overhead(ours) for _ in range(rounds)]
    shares = quartiles([share for share, _ in profiles])
    print(f"{layers} layers, {weight}, {threads} threads, {_native.isa()}")
    print(markdown(HEADER, (found.cells(name) for name, found in samples.items())))
    print(f"decode outside of native code: {shares[1]:.1%} ({shares[0]:.1%} to {shares[2]:.1%})")
    for name, milliseconds in profiles[0][1].items():
        print(f"  {name}: {milliseconds:.3f} ms a token")
    report: Report = {"weight": weight, "layers": layers, "threads": threads}
    for name, found in samples.items():
        report[f"{name}_tok_s"] = statistics.median(found.speeds)
        report[f"{name}_share"] = statistics.median(found.shares)
    long, short = (report[f"decode_{n}_tok_s"] for n in (max(lengths), SHORT))
    report |= {"long_over_short": long / short, "overhead_share": shares[1]}
    emit(f"model-limits-{weight}", report, save=save)


if __name__ == "__main__":
    typer.run(main)
