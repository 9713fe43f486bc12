"""Every promise of the project, as data: what targets.py measures and holds to its bound.

A row names the command whose last line, one JSON object, has its figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

TINY_FOLDER = Path(__file__).parents[1] / "examples" / "tiny-deepseek-v3"
PLAN = "benchmarks/plan.py"
LOADING = "benchmarks/loading.py"
PACKING = "benchmarks/packing.py"
DECODE = "benchmarks/decode.py"
MODEL_MEMORY = "benchmarks/model_memory.py"
DEMO = "examples/demo.py"
TINY = "examples/tiny-deepseek-v3/train.py evaluate"
SECONDS = "seconds the command took"  # a figure that targets.py measures itself

Figures = Mapping[str, Any]  # the last line of a command


class Absent(Exception):
    """A figure that this machine cannot have, with the reason."""


@dataclass(frozen=True, slots=True)
class Target:
    """A promise: a figure of a command is at least, or at most, `bound`."""

    promise: str
    command: str
    figure: Callable[[Figures], float]  # raises KeyError where there is none, or Absent
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Tell whether the promise is kept."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    def bound(self) -> str:
        """Write the bound."""
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


def experts(model: str, weight: str) -> str:
    """Return the command that measures the experts of a layer."""
    return f"benchmarks/experts.py --model {model} --weight {weight} --rounds 3"


def peer(name: str, model: str, weight: str, tokens: str) -> str:
    """Return the command that measures them beside another engine's."""
    rounds = 2 if model == "v3" else 3  # a call may take seconds
    command = f"benchmarks/peers.py {name} --model {model} --weight {weight} --tokens {tokens}"
    return f"{command} --rounds {rounds}"


def _one_expert_over_eight(figures: Figures) -> float:
    by_experts = figures["perplexity_by_experts"]
    return float(by_experts["1"] / by_experts["8"])


def _tiny_mib(_: Figures) -> float:
    files = (path for path in TINY_FOLDER.iterdir() if path.is_file())
    return sum(path.stat().st_size for path in files) / 2**20


def _with_amx(figures: Figures) -> float:
    if not figures["isa"].startswith("amx"):
        raise Absent(f"this machine has no AMX ({figures['isa']})")
    return float(figures["prefill_1024_share"])


# Issue 2.
FRAMEWORK = (
    Target("demo, once installed, s", DEMO, itemgetter(SECONDS), at_most=60),
    Target("plan V3 at its real size, s", PLAN, itemgetter("plan_s"), at_most=3),
    Target("plan V3, peak memory, GB", PLAN, itemgetter("peak_gb"), at_most=1),
    Target(
        "loading, peak over (packed + 10 % + 200 MB)",
        LOADING,
        itemgetter("peak_share_of_bound"),
        at_most=1,
    ),
    Target(
        "module over bare kernel call, us",
        experts("v2-lite", "int8"),
        itemgetter("overhead_us"),
        at_most=30,
    ),
    Target("tiny: perplexity with 1 expert over 8", TINY, _one_expert_over_eight, at_least=1.10),
    Target(
        "tiny: share of the least used expert",
        TINY,
        lambda figures: float(min(figures["expert_share_min"])),
        at_least=1e-5,
    ),
    Target("tiny: size, MiB", TINY, _tiny_mib, at_most=16),
)

# Issue 3: shares of the limits measured in the same rounds.
SHARES = {  # figure: what it is, and its bound for int8, int4-128 and bf16
    "decode_share": ("decode, share of read bandwidth", 0.90, 0.80, 0.90),
    "prefill_1024_share": ("prefill 1,024, share of peak", 0.75, 0.65, 0.75),
    "middle_share": ("4 to 64 tokens, share of limit", 0.85, 0.75, 0.85),
    "limit_256_share": ("256 tokens, share of limit", 0.70, 0.60, 0.70),
}
WEIGHTS = ("int8", "int4-128", "bf16")
MODELS = ("v2-lite", "v3")

# How many times faster than a peer: for each weight, decode and prefill; and prefill's tokens for
# each model. kt-kernel's slowest kernels take minutes for more.
PEER_RATIOS = {
    "kt-kernel": {"int8": (2.2, 3.5), "int4-128": (2.0, 3.5), "bf16": (2.0, 2.3)},
    "llama.cpp": {"int8": (1.05, 8.0), "int4-128": (1.1, 1.7), "bf16": (1.0, 4.0)},
}
PEER_PREFILL = {
    "kt-kernel": {"v2-lite": 256, "v3": 64},
    "llama.cpp": {"v2-lite": 512, "v3": 512},
}


def _kernel_targets() -> Iterator[Target]:
    for model in MODELS:
        for number, weight in enumerate(WEIGHTS):
            command = experts(model, weight)
            for key, (what, *bounds) in SHARES.items():
                promise = f"{model} {weight}: {what}"
                yield Target(promise, command, itemgetter(key), at_least=bounds[number])
            if weight != "int4-128":
                promise = f"{model} {weight}: prefill 1,024, share of AMX tile peak"
                yield Target(promise, command, _with_amx, at_least=0.50)


def _peer_targets() -> Iterator[Target]:
    for name, ratios in PEER_RATIOS.items():
        for model in MODELS:
            tokens = PEER_PREFILL[name][model]
            for weight, (decode, prefill) in ratios.items():
                command = peer(name, model, weight, f"1,{tokens}")
                title = f"{model} {weight} over {name}"
                yield Target(f"{title}: decode", command, itemgetter("ratio_1"), at_least=decode)
                figure = itemgetter(f"ratio_{tokens}")
                yield Target(f"{title}: prefill {tokens}", command, figure, at_least=prefill)
    for model in MODELS:
        command = peer("onednn", model, "int8", "1,4,16,64,256,1024")
        promise = f"{model} int8 over oneDNN: least of all token counts"
        yield Target(promise, command, itemgetter("slowest_ratio"), at_least=1)


LINEAR_SHAPES = ("7168x4096", "v3-o_proj")
LINEAR = f"benchmarks/linear.py --shape {','.join(LINEAR_SHAPES)} --onednn"


def _linear_targets() -> Iterator[Target]:
    for shape in LINEAR_SHAPES:

        def figure(figures: Figures, shape: str = shape) -> float:
            return float(figures[shape]["least_over_onednn"])

        promise = f"linear {shape} int8 over oneDNN: least of all token counts"
        yield Target(promise, LINEAR, figure, at_least=1)


PACKED = (
    Target("packing int8, GB/s of bf16", PACKING, itemgetter("int8_gb_s"), at_least=3),
    Target("packing int4-128, GB/s of bf16", PACKING, itemgetter("int4-128_gb_s"), at_least=0.5),
    Target("opening a mapped cache of 10 GB, s", PACKING, itemgetter("open_s"), at_most=1),
)

# Issue 4: a whole model beside other engines, by what they are asked and how many times faster.
END_TO_END: dict[tuple[str, str], dict[str, float]] = {
    ("ik_llama.cpp", "int8"): {
        "prefill_512_over_best": 1.6,
        "prefill_1024_over_best": 1.6,
        "decode_over_best": 1.15,
    },
    ("llama.cpp", "int8"): {
        "prefill_512_over_best": 6,
        "prefill_1024_over_best": 6,
        "decode_over_best": 1.15,
    },
    ("transformers", "int8"): {
        "prefill_512_over_best": 2.3,
        "prefill_1024_over_best": 2.3,
        "decode_over_best": 3.5,
    },
    ("ik_llama.cpp", "int4"): {
        "prefill_512_over_best": 1.6,
        "prefill_1024_over_best": 1.6,
        "decode_over_Q4_0": 1,
        "decode_over_Q4_K_M": 1.15,
    },
    ("llama.cpp", "int4"): {
        "prefill_512_over_best": 3.5,
        "prefill_1024_over_best": 3.5,
        "decode_over_Q4_0": 1,
        "decode_over_Q4_K_M": 1.15,
    },
}


def end_to_end(name: str, weight: str) -> str:
    """Return the command that measures a whole model beside another engine."""
    rounds = 2 if name == "transformers" else 3  # seconds a call
    return f"benchmarks/end_to_end.py {name} --weight {weight} --rounds {rounds}"


def model_limits(weight: str, prefill: str) -> str:
    """Return the command that measures a whole model against the machine's limits."""
    return f"benchmarks/model_limits.py --weight {weight} --prefill {prefill}"


def _whole_model_targets() -> Iterator[Target]:
    for (name, weight), bounds in END_TO_END.items():
        for key, bound in bounds.items():
            figure, _, over = key.partition("_over_")
            than = name if over == "best" else f"{name} {over}"
            promise = f"whole model, {weight} over {than}: {figure.replace('_', ' ')}"
            yield Target(promise, end_to_end(name, weight), itemgetter(key), at_least=bound)
    int8 = model_limits("int8", "512,4096,8192")
    for tokens in (512, 4096, 8192):
        promise = f"whole model, int8: prefill {tokens:,}, share of limit"
        yield Target(promise, int8, itemgetter(f"prefill_{tokens}_share"), at_least=0.55)
    promise = "whole model, int8: decode, share of read bandwidth"
    yield Target(promise, int8, itemgetter("decode_128_share"), at_least=0.85)
    for weight, command, bound in (
        ("int8", int8, 0.85),
        ("int4", model_limits("int4", "8192"), 0.70),
    ):
        promise = f"whole model, {weight}: decode at 8,192 tokens over that at 128"
        yield Target(promise, command, itemgetter("long_over_short"), at_least=bound)
        promise = f"whole model, {weight}: share of decode outside of kernels"
        yield Target(promise, command, itemgetter("overhead_share"), at_most=0.05)
    for phase, doing in (("loading", "loading"), ("reading", "a prompt of 8K tokens")):
        promise = f"whole model, int8: memory of {doing}, peak over the bound"
        yield Target(promise, MODEL_MEMORY, itemgetter(f"{phase}_share_of_bound"), at_most=1)


DECODING = (
    Target(
        "tiny: decode on one core, tok/s",
        DECODE,
        itemgetter("tiny-cpu-int8_tok_s"),
        at_least=400,
    ),
)

TARGETS = (
    *FRAMEWORK,
    *_kernel_targets(),
    *_peer_targets(),
    *_linear_targets(),
    *PACKED,
    *DECODING,
    *_whole_model_targets(),
)
