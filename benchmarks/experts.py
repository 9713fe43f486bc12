"""The experts of one MoE layer, in any weight format, measured against this machine's own limits.

The result is checked first, against a reference in float64 with a derived bound. What is measured,
and what a share of the limit is, says limits.py; the layer is in moe_layer.py.

Run: python benchmarks/experts.py --help        The last line is one JSON object.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Annotated, Literal

import torch
import typer
from torch import nn
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

from ktransformers import _native
from ktransformers.base import Site
from ktransformers.checkpoint import open_checkpoint
from ktransformers.operators.experts import CpuExperts
from limits import Meter, Work, measure
from moe_layer import (
    MODELS,
    Calls,
    Layer,
    check,
    fitting,
    operations,
    random_layer,
    relative_error,
)
from results import HEADER, Report, Row, emit, limits_of, markdown, summary

OVERHEAD_CALLS = 2000
MAX_CALL_SECONDS = 5.0  # beside the best, an instruction set's longer calls are left out


def works_of(layer: Layer, tokens: list[int], threads: int, isas: list[str]) -> list[Work]:
    """List what is measured: all of the first instruction set, what others do in little time."""
    works = []
    calls = {count: Calls.draw(layer.sizes, count) for count in tokens}
    for isa in isas:
        native = layer.native(threads, isa)
        meter = Meter(layer.gate_up.reshape(-1), layer.weight_format, threads, isa)
        peak = meter.peak(0.2)
        for count in tokens:
            work = operations(layer.sizes, count)
            if isa != isas[0] and work / peak > MAX_CALL_SECONDS:
                print(f"{isa}, {count} tokens: left out, a call takes {work / peak:.0f} s or more")
                continue
            nbytes = layer.expert_bytes() * calls[count].experts()
            timed = calls[count].timed(native)
            works.append(Work(native.isa, count, nbytes, work, timed, meter))
    return works


def formats_error(layer: Layer, threads: int) -> float:
    """Return the relative error of the layer's output against bf16 weights in fp32."""
    native = layer.native(threads, None)

    def run(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape)
        native.forward(x.float(), index, weights, out)
        return out

    return relative_error(layer.originals, run)


def overhead_us(threads: int) -> float:
    """Return what the optimised module's call costs over the bare kernel call, at one token.

    On a layer with V2-Lite's hidden_size and top_k but narrow experts: the overhead does not
    depend on their width, and drowns in the noise of a call that reads 50 MB.
    """
    config = DeepseekV2Config(
        hidden_size=2048, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=6
    )
    model = nn.Module()
    model.experts = DeepseekV2Experts(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    site = Site("experts", 0, config, torch.bfloat16, torch.device("cpu"), "benchmark")
    module = CpuExperts.from_module(model.experts, site, threads=threads)
    module.load_weights(open_checkpoint(model))
    bare = _native.Experts(
        module.gate_up_packed,
        module.gate_up_scale,
        module.down_packed,
        module.down_scale,
        format="int8",
        hidden_size=2048,
        moe_intermediate_size=32,
        threads=threads,
    )
    x = torch.randn(1, 2048, dtype=torch.bfloat16)
    index = torch.arange(6).reshape(1, 6)
    weights = torch.rand(1, 6)
    out = torch.empty_like(x)
    whole, kernel = [], []
    with torch.inference_mode():
        for _ in range(OVERHEAD_CALLS):
            start = time.perf_counter()
            module(x, index, weights)
            middle = time.perf_counter()
            bare.forward(x, index, weights, out)
            whole.append(middle - start)
            kernel.append(time.perf_counter() - middle)
    return (statistics.median(whole) - statistics.median(kernel)) * 1e6


def main(
    model: Annotated[Literal["v2-lite", "v3"], typer.Option(help="Whose layer sizes.")] = "v2-lite",
    weight: Annotated[str, typer.Option(help="int8, int4-32, int4-64, int4-128 or bf16.")] = "int8",
    threads: Annotated[int | None, typer.Option(help="Default: all this process may use.")] = None,
    tokens: Annotated[str, typer.Option(help="Token counts; decode is 1.")] = "1,4,16,64,256,1024",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements.")] = 5,
    isa: Annotated[str, typer.Option(help="An instruction set, best, or all that run.")] = "best",
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure the experts of one MoE layer; the last line is one JSON object."""
    threads = threads or _native.default_threads()
    torch.manual_seed(0)
    sizes = fitting(MODELS[model], weight)
    layer = random_layer(sizes, weight)
    best = layer.native(threads, None if isa in ("best", "all") else isa).isa
    isas = [best] if isa != "all" else [best, *(i for i in _native.isas() if runs(weight, i, best))]
    bound_share = max(check(layer, layer.native(threads, name)) for name in isas)
    error = formats_error(layer, threads)
    print(f"{model} {weight}: {sizes}, {threads} threads")
    print(f"result checked: {bound_share:.2f} of the error bound; {error:.2%} off bf16 weights")
    counts = [int(count) for count in tokens.split(",")]
    results = measure(works_of(layer, counts, threads, isas), rounds)
    rows = [Row.of(result) for result in results]
    report: Report = {"model": model, "weight": weight, "threads": threads, "isa": best}
    report |= {"num_experts": sizes.num_experts, "relative_error": error}
    report |= limits_of(results)
    print(markdown(HEADER, (row.cells() for row in rows)))
    report |= summary(rows) | {"overhead_us": overhead_us(threads)}
    print(f"module over bare kernel call, one token: {report['overhead_us']:.1f} us")
    report["rows"] = [asdict(row) for row in rows]
    emit(f"experts-{model}-{weight}", report, save=save)


def runs(weight_format: str, isa: str, best: str) -> bool:
    """Tell whether an instruction set other than the best has a product for the format."""
    return isa != best and (f"{weight_format.partition('-')[0]}_gemm", isa) in _native.kernels()


if __name__ == "__main__":
    typer.run(main)
