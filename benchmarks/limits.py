"""What this machine could do, measured in the same rounds as what is compared with it.

A call is bound by memory (the bytes that it must read, over the streaming read bandwidth) or by
instructions (its multiplications and additions, over the instruction peak): its share of the limit
is the larger of the two times over its own. Machines drift, so each call's limits are measured
right before and right after it; noise only ever lowers a limit, so the better of the two counts.
"""

from __future__ import annotations

import math
import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ktransformers import _native

LIMIT_SECONDS = 0.08  # of each measurement of a limit
CALL_SECONDS = 0.25  # of calls per round, at least one
WARM_TOKENS = 64  # the first round, which is not counted, leaves larger calls out


@dataclass(frozen=True, slots=True)
class Meter:
    """Measures the limits of one weight format on one instruction set."""

    buffer: torch.Tensor  # uint8, several times larger than the last-level cache
    weight_format: str
    threads: int
    isa: str | None

    def bandwidth(self) -> float:
        """Return bytes per second."""
        return _native.bench_read_bandwidth(self.buffer, self.threads, LIMIT_SECONDS)

    def peak(self, seconds: float = LIMIT_SECONDS) -> float:
        """Return operations per second."""
        return _native.bench_peak(self.weight_format, self.threads, seconds, isa=self.isa)[0]

    def instruction(self) -> str:
        """Name the instructions of the peak."""
        return _native.bench_peak(self.weight_format, 1, 0.01, isa=self.isa)[1]


@dataclass(frozen=True, slots=True)
class Work:
    """A call with some tokens: what it must read and compute, and how it is done.

    `seconds` returns what single calls took, for at least the time that it is given.
    """

    isa: str
    tokens: int
    nbytes: float
    operations: float
    seconds: Callable[[float], list[float]]
    meter: Meter


@dataclass(frozen=True, slots=True)
class Measured:
    """One work over all rounds: seconds of each call, and one figure a round of the others."""

    work: Work
    seconds: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)

    def rate(self, amount: float) -> float:
        """Return how much of `amount` a second the median call does."""
        return amount / statistics.median(self.seconds)

    def bandwidth_shares(self) -> list[float]:
        """Return the bandwidth bound's share of each round's median call."""
        pairs = zip(self.bandwidths, self.medians, strict=True)
        return [self.work.nbytes / bandwidth / seconds for bandwidth, seconds in pairs]

    def peak_shares(self) -> list[float]:
        """Return the instruction bound's share of each round's median call."""
        pairs = zip(self.peaks, self.medians, strict=True)
        return [self.work.operations / peak / seconds for peak, seconds in pairs]

    def shares(self) -> list[float]:
        """Return the share of the limit, the larger of both, in each round."""
        return [max(both) for both in zip(self.bandwidth_shares(), self.peak_shares(), strict=True)]


def huge_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor in huge pages, as operators keep packed weights."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


def timed_calls(call: Callable[[int], object]) -> Callable[[float], list[float]]:
    """Turn a call, which is told its number, into what times it as `Work` asks."""

    def seconds(at_least: float) -> list[float]:
        times: list[float] = []
        while not times or sum(times) < at_least:
            start = time.perf_counter()
            call(len(times))
            times.append(time.perf_counter() - start)
        return times

    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles around it: (lower, median, upper)."""
    if len(values) < 2:
        return (values[0],) * 3
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def measure(works: Sequence[Work], rounds: int) -> list[Measured]:
    """Do all works in every round, each between two measurements of its limits."""
    results = [Measured(work) for work in works]
    warm = max(WARM_TOKENS, min(work.tokens for work in works))
    for number in range(rounds + 1):
        for result in results:
            work, meter = result.work, result.work.meter
            if number == 0:
                if work.tokens <= warm:
                    work.seconds(CALL_SECONDS)
                continue
            before = meter.bandwidth(), meter.peak()
            seconds = work.seconds(CALL_SECONDS)
            result.bandwidths.append(max(before[0], meter.bandwidth()))
            result.peaks.append(max(before[1], meter.peak()))
            result.medians.append(statistics.median(seconds))
            result.seconds.extend(seconds)
    return results
