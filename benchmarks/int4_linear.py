"""Dense projections in four bits on a GPU, as Int4Linear computes them, beside torch in bf16.

Each call takes the next of so many copies that the L2 holds none of it. All calls of a turn over
the copies are one CUDA graph, so that no launch from Python is measured. Ours, torch's and a copy
of memory, whose bandwidth is the measure of what the memory gives, take turns. The result is
checked first, as tests do.

Run: python benchmarks/int4_linear.py --help         The last line is one JSON object.
Exits with 2 where there is no GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

from ktransformers.operators.kernels.int4_weight import Int4Format, Int4Weight, quantise

COPIES_BYTES = 256 << 20  # an H100's L2 is 50 MB
COPIED = 1 << 30  # bytes, for the bandwidth
# Inputs and outputs: a square, and DeepSeek-V3's.
SHAPES = {
    "8192x8192": (8192, 8192),
    "v3-kv_a_proj": (7168, 576),
    "v3-q_b_proj": (1536, 24576),
    "v3-o_proj": (16384, 7168),
    "v3-gate_up": (7168, 18432),
    "v3-down": (18432, 7168),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one shape takes at one number of tokens: medians over rounds."""

    shape: str
    tokens: int
    us: float
    torch_us: float
    over_torch: float  # how many times faster
    of_copy_bandwidth: float  # the weight's bytes a second, as a share


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Capture calls, one after the other, as a graph; each has run before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(run: Callable[[], object]) -> float:
    """Time what `run` starts on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def copies_of(weight: Int4Weight) -> list[Int4Weight]:
    """Return copies enough for no cache to hold them."""
    count = -(-COPIES_BYTES // weight.packed.nbytes)
    names = weight.tensors()
    return [
        Int4Weight.of(
            weight.format, weight.in_features, {name: each.clone() for name, each in names.items()}
        )
        for _ in range(count)
    ]


def check(weight: Int4Weight, tokens: Sequence[int]) -> None:
    """Compare with the reference; exits where the result is wrong."""
    from ktransformers.operators.kernels.int4_linear import int4_linear, int4_linear_reference

    torch.backends.cuda.matmul.allow_tf32 = False
    for count in tokens:
        x = torch.randn(count, weight.in_features, device="cuda", dtype=torch.bfloat16)
        found, expected = int4_linear(x, weight).float(), int4_linear_reference(x, weight).float()
        # Both round to bf16 once; sums in fp32 differ by far less.
        if not (found - expected).abs().max() <= 2.0**-7 * expected.abs().max():
            raise SystemExit(f"wrong result with {count} tokens")


def measure(shape: str, tokens: Sequence[int], format: Int4Format, rounds: int) -> list[Row]:
    """Measure one projection."""
    from ktransformers.operators.kernels.int4_linear import int4_linear

    K, N = SHAPES[shape]
    matrix = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) / K**0.5
    weights = copies_of(quantise(matrix, format))
    plain = [matrix.clone() for _ in range(-(-COPIES_BYTES // matrix.nbytes))]
    check(weights[0], tokens)
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    nbytes = sum(tensor.nbytes for tensor in weights[0].tensors().values())
    rows = []
    for count in tokens:
        x = torch.randn(count, K, device="cuda", dtype=torch.bfloat16)
        ours = graph_of([lambda x=x, w=w: int4_linear(x, w) for w in weights])  # type: ignore[misc]
        theirs = graph_of(
            [lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in plain]  # type: ignore[misc]
        )
        runs = (ours.replay, theirs.replay, lambda: target.copy_(source))
        for run in runs:
            run()
        taken = [[microseconds(run) for run in runs] for _ in range(rounds)]
        us, torch_us, copy_us = map(statistics.median, zip(*taken, strict=True))
        us, torch_us = us / len(weights), torch_us / len(plain)
        share = nbytes / us / (2 * COPIED / copy_us)
        rows.append(Row(shape, count, us, torch_us, torch_us / us, share))
    return rows


def main(
    shapes: Annotated[str, typer.Option(help="which, with commas")] = ",".join(SHAPES),
    tokens: Annotated[str, typer.Option(help="numbers of them")] = "1,4,8,16,64,256,1024,4096",
    group_size: Annotated[int, typer.Option(help="32, 64, 128 or -1")] = 128,
    asymmetric: Annotated[bool, typer.Option(help="with zero points")] = False,
    rounds: Annotated[int, typer.Option(help="of which the median counts")] = 15,
) -> None:
    """Measure projections in four bits on a GPU."""
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU, and torch finds none here", file=sys.stderr)
        raise typer.Exit(2)
    counts = list(map(int, tokens.split(",")))
    weight_format = Int4Format(group_size, not asymmetric)
    rows = []
    print("| shape | tokens | us | torch bf16 us | over torch | of copy bandwidth |")
    print("|---|---|---|---|---|---|")
    for shape in shapes.split(","):
        for row in measure(shape, counts, weight_format, rounds):
            print(
                f"| {row.shape} | {row.tokens} | {row.us:.1f} | {row.torch_us:.1f} | "
                f"{row.over_torch:.2f} | {row.of_copy_bandwidth:.0%} |"
            )
            rows.append(row)
    device = torch.cuda.get_device_name()
    done = {"device": device, "format": str(weight_format), "rows": [asdict(row) for row in rows]}
    print(json.dumps(done))


if __name__ == "__main__":
    typer.run(main)
