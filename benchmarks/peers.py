"""One MoE layer, ours and another engine's, interleaved in the same rounds.

Each way to run the peer (threads, repacked weights) has a process of its own beside ours, one after
another, and the fastest counts. Where the peer is not installed its last figures are shown as
stale; `make peers` installs it.

Run: python benchmarks/peers.py --help          The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import torch
import typer

from ktransformers import _native
from limits import CALL_SECONDS, WARM_TOKENS, quartiles
from moe_layer import MODELS, Calls, Sizes, fitting, random_layer
from peer_layer import FOLDER, PEERS, CannotRun, Variant, load_peer, why_absent
from results import Report, emit, emit_absent, markdown

WORKER = Path(__file__).with_name("peer_worker.py")
MAX_SECONDS = 20.0  # of a peer's calls with one token count, after which it has no more rounds
SETTLE_STEP_S, SETTLE_STEPS = 0.03, 50  # a tick of the CPU clock is 0.01 s
HEADER = ("tokens", "ours, ms", "theirs, ms", "of theirs", "ours is faster (quartiles)", "as")


@dataclass(frozen=True, slots=True)
class Compared:
    """Both with some tokens: medians in seconds, and how many times faster ours is, per round."""

    tokens: int
    variant: Variant
    ours: float
    theirs: float
    ratios: list[float]

    def cells(self) -> list[str]:
        """Write it under `HEADER`."""
        lower, median, upper = quartiles(self.ratios)
        return [
            str(self.tokens),
            f"{self.ours * 1e3:.3g}",
            f"{self.theirs * 1e3:.3g}",
            f"{self.ours / self.theirs:.0%}",
            f"{median:.2f} ({lower:.2f} to {upper:.2f})",
            str(self.variant),
        ]


def cpu_seconds(pid: int) -> float:
    """Return what a process of ours has used of all cores so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Worker:
    """A peer's process, which answers a line with a line of JSON."""

    def __init__(self, process: subprocess.Popen[str], talk: IO[str]):
        self.process = process
        self.talk = talk  # what it and its libraries print
        self.ready: Report = self._answer()

    def ask(self, line: str) -> Any:
        """Return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self._settle()
        return answer

    def seconds(self, tokens: int, at_least: float) -> list[float]:
        """Let it measure calls now."""
        times: list[float] = self.ask(f"{tokens} {at_least}")
        return times

    def _settle(self) -> None:
        """Wait until its threads rest: some spin for a tenth of a second after their last call."""
        before = -1.0
        for _ in range(SETTLE_STEPS):
            used = cpu_seconds(self.process.pid)
            if used == before:
                return
            before = used
            time.sleep(SETTLE_STEP_S)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.talk.seek(0)
            said = "".join(self.talk.readlines()[-3:]).strip()
            raise CannotRun(f"its process ended with {self.process.returncode}: {said}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "cannot" in answer:
            raise CannotRun(answer["cannot"])
        return answer


@contextmanager
def worker(name: str, model: str, weight: str, sizes: Sizes, variant: Variant) -> Iterator[Worker]:
    """Start the process of a layer in a peer, and end it. Raises CannotRun."""
    command = [str(WORKER), name, "--model", model, "--weight", weight]
    command += ["--experts", str(sizes.num_experts), "--format", variant.format]
    command += ["--threads", str(variant.threads), "--repack" if variant.repack else "--no-repack"]
    with started(command, variant.threads) as process:
        yield process


@contextmanager
def started(command: Sequence[str], threads: int) -> Iterator[Worker]:
    """Start a script as a peer's process, and end it. Raises CannotRun."""
    # What kt-kernel and llama.cpp bring is seen by that process alone.
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": str(threads)}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as talk,
        subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=pipe,
            stdout=pipe,
            stderr=talk,
            text=True,
        ) as process,
    ):
        try:
            yield Worker(process, talk)
        finally:
            process.kill()


def compare(
    ours: _native.Experts, sizes: Sizes, tokens: Sequence[int], rounds: int, peer: Worker,
    variant: Variant,
) -> list[Compared]:  # fmt: skip
    """Measure both in every round, for every token count."""
    calls = {count: Calls.draw(sizes, count).timed(ours) for count in tokens}
    own: dict[int, list[float]] = {count: [] for count in tokens}
    theirs: dict[int, list[float]] = {count: [] for count in tokens}
    for number in range(rounds + 1):
        for count in tokens:
            if number == 0 and count > max(WARM_TOKENS, min(tokens)):
                continue
            if sum(theirs[count]) > MAX_SECONDS:
                continue
            pair = calls[count](CALL_SECONDS), peer.seconds(count, CALL_SECONDS)
            if number:
                own[count].append(statistics.median(pair[0]))
                theirs[count].append(statistics.median(pair[1]))
    return [
        Compared(
            tokens=count,
            variant=variant,
            ours=statistics.median(own[count]),
            theirs=statistics.median(theirs[count]),
            ratios=[b / a for a, b in zip(own[count], theirs[count], strict=True)],
        )
        for count in tokens
    ]


def measured(name: str, model: str, weight: str, tokens: list[int], rounds: int) -> Report:
    """Compare with each variant and keep the fastest for each token count. Raises CannotRun."""
    threads = _native.default_threads()
    variants = load_peer(name).variants(weight, threads)
    if not variants:
        raise CannotRun(f"{name} has no counterpart of {weight}")
    sizes = fitting(MODELS[model], weight, copies=2)
    torch.manual_seed(0)
    ours = random_layer(sizes, weight).native(threads, None)
    fastest: dict[int, Compared] = {}
    errors = {}
    for variant in variants:
        with worker(name, model, weight, sizes, variant) as peer:
            errors[str(variant)] = peer.ready["relative_error"]
            for found in compare(ours, sizes, tokens, rounds, peer, variant):
                if found.tokens not in fastest or found.theirs < fastest[found.tokens].theirs:
                    fastest[found.tokens] = found
    print(f"{model} {weight}: {sizes}, {threads} threads, {ours.isa}; against {name}")
    for variant_name, error in errors.items():
        print(f"{name}, {variant_name}: {error:.2%} off fp32")
    print(markdown(HEADER, (fastest[count].cells() for count in tokens)))
    report: Report = {"status": "measured", "num_experts": sizes.num_experts, "errors": errors}
    for count in tokens:
        found = fastest[count]
        report[f"ratio_{count}"] = quartiles(found.ratios)[1]
        report[f"rows_{count}"] = [found.ours * 1e3, found.theirs * 1e3, str(found.variant)]
    return report | {"slowest_ratio": min(report[f"ratio_{count}"] for count in tokens)}


def main(
    peer: Annotated[str, typer.Argument(help=f"One of {', '.join(PEERS)}.")],
    model: Annotated[str, typer.Option(help="v2-lite or v3: whose layer sizes.")] = "v2-lite",
    weight: Annotated[str, typer.Option(help="Our format: int8, int4-128, bf16, ...")] = "int8",
    tokens: Annotated[str, typer.Option(help="Token counts.")] = "1,16,64,512",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements.")] = 3,
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure one MoE layer beside another engine; the last line is one JSON object."""
    name = f"peer-{peer}-{model}-{weight}"
    report: Report = {"peer": peer, "model": model, "weight": weight}
    reason, cannot = why_absent(peer)
    try:
        if reason is None:
            counts = [int(count) for count in tokens.split(",")]
            emit(name, report | measured(peer, model, weight, counts, rounds), save=save)
            return
    except CannotRun as error:
        reason, cannot = str(error), True
    emit_absent(name, report, reason, cannot=cannot)


if __name__ == "__main__":
    typer.run(main)
