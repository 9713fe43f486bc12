"""Decode of latent attention on a GPU, as a share of the copy bandwidth measured in the same run.

A call reads every cached latent once, and little else: 1,152 bytes of a token in bf16, 644 in fp8.
Calls are recorded in a CUDA graph and walk through so many caches that the L2 holds none. The copy
of a large tensor, which reads and writes, is measured in the same rounds. The result is checked
first, against the reference in fp32.

Run: python benchmarks/gpu_attention.py --help      The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import typer

from ktransformers.cache import DTYPES, SCALED, LatentPages
from ktransformers.cache_pages import PAGE_TOKENS

C, R = 512, 64  # of DeepSeek-V2, V2-Lite and V3
HEADS = {"v2-lite": 16, "v3": 128}
SEQUENCES = (1, 4, 16, 64)
CONTEXTS = (1 << 10, 4 << 10, 32 << 10)
COLD_BYTES = 256 << 20  # of caches that calls walk through: more than an L2
COPY_BYTES = 1 << 30
USER_ERROR = 2

Kernel = Callable[[LatentPages], torch.Tensor]


def random_pages(sequences: int, length: int, format: str) -> LatentPages:
    """Draw a cache whose pages lie in any order."""
    kinds, count = DTYPES[format], sequences * (length // PAGE_TOKENS)
    latent = torch.randn(count, PAGE_TOKENS, C, device="cuda").to(kinds[0])
    rope = torch.randn(count, PAGE_TOKENS, R, device="cuda").to(kinds[1])
    scale = torch.ones(count, PAGE_TOKENS, device="cuda") if format in SCALED else None
    table = torch.randperm(count, device="cuda").int().view(sequences, -1)
    lengths = torch.full((sequences,), length, dtype=torch.int32, device="cuda")
    return LatentPages(latent, scale, rope, table, lengths)


def nbytes(pages: LatentPages) -> int:
    """Count the bytes that a call reads of a cache."""
    tensors = (pages.latent, pages.rope, pages.scale)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def microseconds(replay: Callable[[], object], calls: int, rounds: int) -> float:
    """Return the median time of a call, of so many that a replay makes."""
    times: list[float] = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / calls)
    return statistics.median(times)


def check(kernel: Kernel, reference: Kernel, pages: LatentPages) -> None:
    """Raise ValueError where a result is wrong: each is a sum of values rounded to bf16."""
    got, want = kernel(pages).float(), reference(pages)
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= 2.0**-6:
        raise ValueError(f"the result is wrong: off by {error:.1%} of the largest value")


def measure(heads: int, sequences: int, length: int, format: str, rounds: int) -> dict[str, Any]:
    """Measure a case; returns its row."""
    # Bring Triton, which a machine without a GPU may not have.
    from ktransformers.operators.kernels.mla_decode import mla_decode, mla_decode_reference

    first = random_pages(sequences, length, format)
    caches = [first]
    while sum(map(nbytes, caches)) < COLD_BYTES:
        caches.append(random_pages(sequences, length, format))
    q_latent, q_rope = (
        torch.randn(sequences, heads, width, device="cuda", dtype=torch.bfloat16)
        for width in (C, R)
    )
    scaling = (C + R) ** -0.5

    def kernel(pages: LatentPages) -> torch.Tensor:
        return mla_decode(q_latent, q_rope, pages, scaling=scaling)

    check(
        kernel, lambda pages: mla_decode_reference(q_latent, q_rope, pages, scaling=scaling), first
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pages in caches:
            kernel(pages)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    graph.replay()
    time = microseconds(graph.replay, len(caches), rounds)
    copy = microseconds(lambda: target.copy_(source), 1, rounds)
    rate, limit = nbytes(first) / time / 1e3, 2 * COPY_BYTES / copy / 1e3
    return {
        "heads": heads,
        "sequences": sequences,
        "context": length,
        "microseconds": round(time, 1),
        "gb_per_s": round(rate),
        "copy_gb_per_s": round(limit),
        "share": round(rate / limit, 3),
    }


def main(
    model: Annotated[str, typer.Option(help="v2-lite (16 heads) or v3 (128).")] = "v3",
    format: Annotated[Literal["bf16", "fp8"], typer.Option(help="Of the cache.")] = "bf16",
    rounds: Annotated[int, typer.Option(help="Of each measurement.")] = 20,
) -> None:
    """Measure decode at 1 to 64 sequences and contexts of 1K to 32K."""
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        raise typer.Exit(USER_ERROR)
    rows = [
        measure(HEADS[model], sequences, length, format, rounds)
        for sequences in SEQUENCES
        for length in CONTEXTS
    ]
    print("| sequences | context | us | GB/s | copy GB/s | share |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(f"{value:,}" for value in list(row.values())[1:]) + " |")
    device = torch.cuda.get_device_name()
    print(json.dumps({"device": device, "model": model, "format": format, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
