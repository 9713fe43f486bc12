"""Dense projections, as CpuLinear computes them, measured against this machine's own limits.

A projection has copies enough that each call finds its weights in memory and not in a cache. What a
share of the limit is says limits.py. The result is checked first, as tests do. With int8 weights
oneDNN's product (peer_onednn.py) is measured in the same rounds, if asked for.

Run: python benchmarks/linear.py --help         The last line is one JSON object.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from experts_reference import prepared, product_bound
from ktransformers import _native
from ktransformers.cpu_options import scale_dtype
from limits import Meter, Work, huge_pages, measure, timed_calls
from moe_layer import dequantised
from peer_onednn import Product, quantised
from results import HEADER, Report, Row, emit, limits_of, markdown, summary

COPIES_BYTES = 256 << 20  # several times a last-level cache
CHECKED_OUTPUTS = 256
ONEDNN = "onednn"  # in place of an instruction set

# Inputs and outputs.
SHAPES = {
    "7168x4096": (7168, 4096),  # as other libraries are often measured
    "v3-q_b_proj": (1536, 24576),
    "v3-o_proj": (16384, 7168),
    "v3-shared-gate_up": (7168, 2048),
    "v2-lite-q_proj": (2048, 3072),
    "v2-lite-o_proj": (2048, 2048),
    "v2-lite-shared-down": (2816, 2048),
}


@dataclass(frozen=True, slots=True)
class Projection:
    """Packed copies `[copies, bytes]` and `[copies, scales]` of one matrix."""

    in_features: int
    out_features: int
    weight_format: str
    packed: torch.Tensor
    scale: torch.Tensor
    original: torch.Tensor
    build: Any  # the native module that packed it: the one installed, or another build

    def native(self, copy: int, threads: int, isa: str | None = None) -> _native.Linear:
        """Return the native layer that reads one copy."""
        layer: _native.Linear = self.build.Linear(
            self.packed[copy],
            self.scale[copy],
            format=self.weight_format,
            in_features=self.in_features,
            out_features=self.out_features,
            threads=threads,
            isa=isa,
        )
        return layer

    def nbytes(self) -> int:
        """Count the bytes of weights and scales of one copy."""
        return self.packed[0].nbytes + self.scale[0].nbytes


def random_projection(
    in_features: int, out_features: int, weight_format: str, build: Any = _native
) -> Projection:
    """Pack a matrix of normal weights, and copy it."""
    size = build.packed_bytes(out_features, in_features, weight_format)
    scales = build.scale_count(out_features, in_features, weight_format)
    copies = -(-COPIES_BYTES // size)
    packed = huge_pages(copies, size, dtype=torch.uint8)
    scale = torch.empty(copies, scales, dtype=scale_dtype(weight_format))
    weight = torch.randn(out_features, in_features, dtype=torch.bfloat16) / in_features**0.5
    build.pack(weight, packed[0], scale[0], weight_format)
    packed[1:], scale[1:] = packed[0], scale[0]
    return Projection(in_features, out_features, weight_format, packed, scale, weight, build)


def check(projection: Projection, threads: int) -> float:
    """Compare two rows with the reference; return the largest share of the bound in use.

    Exits where the result is wrong.
    """
    x = torch.randn(2, projection.in_features)
    out = torch.empty(2, projection.out_features)
    projection.native(0, threads).forward(x, out)
    name = projection.weight_format
    sizes = (projection.out_features, projection.in_features)
    weight = dequantised(projection.packed[:1], projection.scale[:1], *sizes, name)[0]
    seen, weight = prepared(x, name), weight[:CHECKED_OUTPUTS]
    difference = (out[:, :CHECKED_OUTPUTS].double() - seen @ weight.T).abs()
    share = float((difference / product_bound(seen, weight, name)).max())
    if not share <= 1:
        raise SystemExit(f"wrong result: {share:.3g} times the error bound")
    return share


def works_of(
    projection: Projection, tokens: list[int], threads: int, isa: str | None, *, onednn: bool
) -> list[Work]:
    """List what is measured."""
    layers = [projection.native(copy, threads, isa) for copy in range(len(projection.packed))]
    meter = Meter(projection.packed.reshape(-1), projection.weight_format, threads, isa)
    packed = [Product.of(projection.original) for _ in layers] if onednn else []
    works, theirs = [], []
    for count in tokens:
        x = torch.randn(count, projection.in_features, dtype=torch.bfloat16)
        out = torch.empty(count, projection.out_features, dtype=torch.bfloat16)

        def call(i: int, x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            layers[i % len(layers)].forward(x, out)

        def their_call(i: int, x: torch.Tensor = x) -> None:
            packed[i % len(packed)](*quantised(x.float())).to(x.dtype)

        size = 2 * count * projection.in_features * projection.out_features
        nbytes = projection.nbytes()
        works.append(Work(layers[0].isa, count, nbytes, size, timed_calls(call), meter))
        if onednn:
            theirs.append(Work(ONEDNN, count, nbytes, size, timed_calls(their_call), meter))
    # In turns, from the smallest number of tokens on.
    return [work for pair in zip(works, theirs, strict=True) for work in pair] if onednn else works


def over_onednn(rows: list[Row]) -> Report:
    """Return how many times faster than oneDNN ours is: at each token count, and the least."""
    medians = {(row.isa == ONEDNN, row.tokens): row.ms[1] for row in rows}
    tokens = [row.tokens for row in rows if row.isa == ONEDNN]
    ratios = {str(count): medians[True, count] / medians[False, count] for count in tokens}
    return {"over_onednn": ratios, "least_over_onednn": min(ratios.values())} if ratios else {}


def main(
    shape: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}; or all.")] = "all",
    weight: Annotated[str, typer.Option(help="int8, int4-32, int4-64, int4-128 or bf16.")] = "int8",
    threads: Annotated[int | None, typer.Option(help="Default: all this process may use.")] = None,
    tokens: Annotated[str, typer.Option(help="Token counts; decode is 1.")] = "1,4,16,64,256,1024",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements.")] = 3,
    isa: Annotated[str | None, typer.Option(help="A lower instruction set than the best.")] = None,
    onednn: Annotated[bool, typer.Option(help="Measure oneDNN's int8 product, too.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure dense projections; the last line is one JSON object."""
    threads = threads or _native.default_threads()
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    if onednn and weight != "int8":
        raise SystemExit(f"--onednn has int8 products alone, not {weight}")
    counts = [int(count) for count in tokens.split(",")]
    report: Report = {"weight": weight, "threads": threads}
    for name in SHAPES if shape == "all" else shape.split(","):
        in_features, out_features = SHAPES[name]
        projection = random_projection(in_features, out_features, weight)
        print(f"\n{name}, {weight}: {in_features} -> {out_features}, {threads} threads")
        print(f"result checked: {check(projection, threads):.2f} of the error bound")
        works = works_of(projection, counts, threads, isa, onednn=onednn)
        results = measure(works, rounds)
        rows = [Row.of(result) for result in results]
        figures = limits_of(results) | summary(rows) | over_onednn(rows)
        print(markdown(HEADER, (row.cells() for row in rows)))
        report[name] = figures | {"rows": [asdict(row) for row in rows]}
    emit(f"linear-{ONEDNN}-{weight}" if onednn else f"linear-{weight}", report, save=save)


if __name__ == "__main__":
    typer.run(main)
