"""A whole model, ours and another engine's, in the same rounds: prefill, and decode.

The model has V2-Lite's layer sizes (see whole_model.py). Ours runs under the shipped rule file of
a weight format, through what people call: `prefill` with a new cache, and `stream`, greedy. Each
way to run the peer has a process of its own beside ours, one after another, and for each figure the
fastest counts. Logits of both are compared with those of transformers in bf16 before anything is
measured.

The first run writes 8.4 GB under build/, 1.2 GB a layer, and as much again while it makes the files
of llama.cpp: 4.5 GB (Q8_0) and 2.4 to 2.7 GB (Q4_0, Q4_K_M). Later runs find them there. Memory: 14
GB beside transformers, 10 GB at most beside the others.

Run: python benchmarks/end_to_end.py --help     The last line is one JSON object.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer, PreTrainedModel

from ktransformers import _native, optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.generation import Timing, stream
from ktransformers.prefill import prefill
from limits import quartiles
from peer_layer import CannotRun, why_absent
from peers import Worker, started
from results import Report, emit, emit_absent, markdown
from whole_model import (
    CHECKED_PROMPTS,
    LAYERS,
    MIN_COSINE,
    MODEL_PEERS,
    REFERENCE,
    Ids,
    ModelVariant,
    bits,
    checked_logits,
    cosine,
    keep_reference,
    load_model_peer,
    model_folder,
    random_ids,
    vocab_size,
)

WORKER = Path(__file__).with_name("model_worker.py")
PREFILL = (512, 1024)
CONTEXT, NEW = 64, 64  # of decode
SPARE = 64  # tokens of a peer's cache beyond those
HEADER = ("figure", "ours, tok/s", "theirs, tok/s", "ours is faster (quartiles)", "theirs as")
# Where ik_llama.cpp can't be had, llama.cpp stands in: how many times faster ik_llama.cpp was on
# a machine that had both (Zen 5, AVX-512, 2 threads, this model), at its best flags.
STAND_IN = "llama.cpp"
IK_OVER_LLAMA = {
    "int8": {"prefill_512": 3.9, "prefill_1024": 3.6, "decode": 1.0},
    "int4": {"prefill_512": 2.2, "prefill_1024": 2.2, "decode": 1.0},
}


class Ours:
    """Our engine under a rule file."""

    def __init__(self, folder: Path, rules: str, threads: int):
        self.model: PreTrainedModel = optimize_and_load(
            folder, rules, overrides=[f"threads={threads}"]
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def prefill(self, ids: Ids) -> torch.Tensor:
        """Read a prompt into a new cache; return the logits of its last position."""
        return prefill(self.model, [ids], LatentCache.for_model(self.model, len(ids)))[0]

    def timed(self, ids: Ids, tokens: int) -> Timing:
        """Generate greedily, to the last token.

        No token ends the answer before, one beyond the vocabulary being named for that: with
        min_new_tokens transformers goes over all logits of each token, which no peer does.
        """
        timing = Timing()
        no_token: int = self.model.config.vocab_size
        options: dict[str, Any] = {
            "do_sample": False, "eos_token_id": no_token, "max_new_tokens": tokens
        }  # fmt: skip
        for _ in stream(self.model, self.tokenizer, torch.tensor([ids]), timing=timing, **options):
            pass
        if timing.new_tokens != tokens:
            raise SystemExit(f"{timing.new_tokens} tokens came, expected {tokens}")
        return timing


@dataclass(frozen=True, slots=True)
class Figure:
    """What is measured: a prompt of so many tokens, or new ones after it."""

    name: str
    tokens: int
    new: int = 0

    def ours(self, engine: Ours, vocabulary: int) -> float:
        """Return our tokens per second now."""
        ids = random_ids(self.tokens, vocabulary)
        if not self.new:
            timing = engine.timed(ids, 1)
            return self.tokens / timing.prefill_s
        return (self.new - 1) / engine.timed(ids, self.new).decode_s

    def theirs(self, peer: Worker) -> float:
        """Return the peer's tokens per second now."""
        if not self.new:
            return self.tokens / float(peer.ask(f"prefill {self.tokens}"))
        return (self.new - 1) / float(peer.ask(f"decode {self.tokens} {self.new}"))


FIGURES = (*(Figure(f"prefill_{n}", n) for n in PREFILL), Figure("decode", CONTEXT, NEW))


@dataclass(frozen=True, slots=True)
class Compared:
    """Tokens per second of both, a pair for each round."""

    figure: str
    variant: ModelVariant
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Return the peer's."""
        return statistics.median(self.theirs)

    def ratios(self) -> tuple[float, float, float]:
        """Return how many times faster ours is: quartiles over rounds."""
        return quartiles([a / b for a, b in zip(self.ours, self.theirs, strict=True)])

    def cells(self) -> list[str]:
        """Write it under `HEADER`."""
        lower, median, upper = self.ratios()
        return [
            self.figure,
            f"{statistics.median(self.ours):.4g}",
            f"{self.speed:.4g}",
            f"{median:.2f} ({lower:.2f} to {upper:.2f})",
            str(self.variant),
        ]


@contextmanager
def peer_model(
    name: str, folder: Path, variant: ModelVariant, figures: Sequence[Figure] = FIGURES
) -> Iterator[Worker]:
    """Start the process of a model in a peer, and end it. Raises CannotRun."""
    most = max(figure.tokens + figure.new for figure in figures) + SPARE
    command = [str(WORKER), name, "--folder", str(folder), "--format", variant.format]
    command += ["--threads", str(variant.threads), "--max-tokens", str(most)]
    command += [f"--{'' if on else 'no-'}{flag}" for flag, on in flags(variant).items()]
    with started(command, variant.threads) as process:
        yield process


def flags(variant: ModelVariant) -> dict[str, bool]:
    """Return what a variant turns on or off."""
    return {"flash": variant.flash, "repack": variant.repack}


def check(folder: Path, who: str, format: str, logits: torch.Tensor) -> float:
    """Return how close logits are to transformers'. Exits where they are too far."""
    found = cosine(folder, logits)
    if not found >= MIN_COSINE[bits(format)]:
        raise SystemExit(f"{who}, {format}: wrong result, cosine {found:.4f} with transformers")
    return found


def make_reference(folder: Path, threads: int) -> None:
    """Let transformers compute the logits that others are compared with, where they are missing."""
    if not (folder / REFERENCE).exists():
        (variant,) = load_model_peer("transformers").variants("bf16", threads)
        with peer_model("transformers", folder, variant) as peer:
            keep_reference(folder, torch.tensor(peer.ask("logits")))


def compare(
    ours: Ours,
    vocabulary: int,
    variant: ModelVariant,
    peer: Worker,
    figures: Sequence[Figure],
    rounds: int,
) -> list[Compared]:
    """Measure both in every round, after one that does not count."""
    results = [Compared(figure.name, variant) for figure in figures]
    for number in range(rounds + 1):
        for figure, result in zip(figures, results, strict=True):
            pair = figure.ours(ours, vocabulary), figure.theirs(peer)
            if number:
                result.ours.append(pair[0])
                result.theirs.append(pair[1])
    return results


def fastest(results: Sequence[Compared]) -> Compared:
    """Return the one whose peer is the fastest."""
    return max(results, key=lambda result: result.speed)


def measured(
    name: str, weight: str, layers: int, rounds: int, figures: Sequence[Figure] = FIGURES
) -> Report:
    """Compare with each variant of a peer. Raises CannotRun."""
    threads = _native.default_threads()
    variants = load_model_peer(name).variants(weight, threads)
    folder = model_folder(layers)
    vocabulary = vocab_size(folder)
    make_reference(folder, threads)
    ours = Ours(folder, f"deepseek-v2-cpu-{weight}", threads)
    cosines = {"ours": check(folder, "ours", weight, checked_logits(ours.prefill, vocabulary))}
    results: list[Compared] = []
    for variant in variants:
        with peer_model(name, folder, variant, figures) as peer:
            logits = torch.tensor(peer.ask("logits"))
            cosines[str(variant)] = check(folder, name, variant.format, logits)
            results += compare(ours, vocabulary, variant, peer, figures, rounds)
    print(f"{layers} layers, {weight}, {threads} threads, {_native.isa()}; against {name}")
    for who, found in cosines.items():
        print(f"{who}: cosine {found:.4f} with transformers, {len(CHECKED_PROMPTS)} prompts")
    print(markdown(HEADER, (result.cells() for result in results)))
    return {"status": "measured", "threads": threads, "cosines": cosines} | ratios(results)


def ratios(results: Sequence[Compared]) -> Report:
    """Return how many times faster ours is: `<figure>_over_<format>` and `<figure>_over_best`.

    Of the ways to run a format, and of all formats, the one that makes the peer fastest counts.
    """
    report: Report = {}
    for figure in dict.fromkeys(result.figure for result in results):
        of_figure = [result for result in results if result.figure == figure]
        best = fastest(of_figure)
        report[f"{figure}_over_best"] = best.ratios()[1]
        report[f"{figure}_tok_s"] = statistics.median(best.ours)
        for name in sorted({result.variant.format for result in of_figure}):
            found = fastest([result for result in of_figure if result.variant.format == name])
            report[f"{figure}_over_{name}"] = found.ratios()[1]
            report[f"{figure}_of_{name}"] = [found.speed, str(found.variant)]
    return report


def stand_in(report: Report, weight: str) -> Report:
    """Turn ratios over llama.cpp into such over ik_llama.cpp, by what is known of the two."""
    turned = dict(report)
    for figure, factor in IK_OVER_LLAMA[weight].items():
        best = report[f"{figure}_over_best"] / factor
        for key in report:
            # Prefill is known of llama.cpp's best format alone.
            if key.startswith(f"{figure}_over_"):
                turned[key] = report[key] if factor == 1 else best
    return turned | {"stands_in": STAND_IN}


def report_of(
    peer: str, weight: str, layers: int, rounds: int, figures: Sequence[Figure] = FIGURES
) -> Report:
    """Measure beside a peer, or what stands in for it. Raises CannotRun."""
    reason, cannot = why_absent(peer)
    if reason is None:
        return measured(peer, weight, layers, rounds, figures)
    is_known = {figure.name for figure in figures} <= IK_OVER_LLAMA[weight].keys()
    if peer == "ik_llama.cpp" and cannot and is_known and why_absent(STAND_IN)[0] is None:
        print(f"{reason}; {STAND_IN} stands in for it")
        return stand_in(measured(STAND_IN, weight, layers, rounds, figures), weight)
    raise Missing(reason, cannot)


class Missing(Exception):
    """A peer that is not there: the reason, and whether it can't be."""


def main(
    peer: Annotated[str, typer.Argument(help=f"One of {', '.join(MODEL_PEERS)}.")],
    weight: Annotated[str, typer.Option(help="Our rule file's format: int8 or int4.")] = "int8",
    layers: Annotated[int, typer.Option(min=2, help="Layers of the model.")] = LAYERS,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements.")] = 3,
    after: Annotated[
        int | None,
        typer.Option(min=1, help="Measure only decode after so many tokens: each takes a prefill."),
    ] = None,
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure a whole model beside another engine; the last line is one JSON object."""
    figures = FIGURES if after is None else (Figure(f"decode_at_{after}", after, NEW),)
    name = f"end-to-end-{peer}-{weight}" + ("" if after is None else f"-after-{after}")
    report: Report = {"peer": peer, "weight": weight, "layers": layers}
    try:
        emit(name, report | report_of(peer, weight, layers, rounds, figures), save=save)
        return
    except CannotRun as error:
        reason, cannot = str(error), True
    except Missing as error:
        reason, cannot = error.args
    emit_absent(name, report, reason, cannot=cannot)


if __name__ == "__main__":
    typer.run(main)
