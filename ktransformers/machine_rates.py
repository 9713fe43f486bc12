"""What this machine reaches: the rates that `prefill_cost` reckons with, measured in a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ktransformers import _native
from ktransformers.host_experts import HostExperts
from ktransformers.prefill_cost import Rates
from ktransformers.streams import Stream

COPIED = 256 << 20  # bytes
READ = 256 << 20  # bytes, of the experts' weights where they are so many
MATRIX = 4096  # rows and columns of a product
REPEATS = 3
# Of what registers alone allow, a layer of experts reaches 58 to 78 % at 1,024 tokens with V3's
# sizes (docs/log.md).
CPU_SHARE = 0.67
# Of torch's product of two matrices, what one grouped by experts is taken to reach: not measured.
GROUPED_SHARE = 0.6


def measured_rates(stream: Stream, experts: HostExperts) -> Rates:
    """Measure what experts reach on the CPU, and products and copies on a stream's device."""
    threads, name = experts.threads, experts.weights.format
    weights = experts.get_buffer(experts.buffer_names(next(iter(experts.packed_matrices())))[0])
    read = weights.view(-1).view(torch.uint8)[:READ]
    if len(read) < READ:
        read = torch.ones(READ, dtype=torch.uint8)
    _native.bench_read_bandwidth(read, threads)  # a mapped file may not be in memory yet
    bandwidth = _native.bench_read_bandwidth(read, threads)
    peak, _ = _native.bench_peak("bf16" if name == "bf16" else "int8", threads)

    host = stream.host_empty(torch.Size([COPIED]), torch.uint8)
    out = torch.empty(COPIED, dtype=torch.uint8, device=stream.device)
    copy = _seconds(stream, lambda: stream.fill(out, host))
    a = torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16, device=stream.device)
    product = _seconds(stream, lambda: torch.mm(a, a))
    gpu = 2 * MATRIX**3 / product
    return Rates(COPIED / copy, GROUPED_SHARE * gpu, gpu, CPU_SHARE * peak, bandwidth)


def _seconds(stream: Stream, work: Callable[[], object]) -> float:
    """Return the least of some times, after a first that does not count."""
    least = float("inf")
    work()
    for _ in range(REPEATS):
        stream.synchronize()
        begin = time.perf_counter()
        work()
        stream.synchronize()
        least = min(least, time.perf_counter() - begin)
    return least
