"""How fast weights are quantised and packed, and how soon a mapped cache of 10 GB is open.

Packing is measured as `ktransformers pack` does it, one matrix a thread, from bf16 in memory. The
cache is that of V2-Lite's routed experts, of which 19 layers are 10 GB; its files are sparse, so
that it takes neither disk nor time to write, and are checked and mapped like any other's.

Run: python benchmarks/packing.py       The last line is one JSON object.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import DeepseekV2Config

from ktransformers import _native
from ktransformers.base import PackedOperator
from ktransformers.checkpoint.packed import INDEX, Entry, Index, check_file, read_index
from ktransformers.cpu_options import scale_dtype
from ktransformers.inject import plan
from ktransformers.load import build_on_meta
from ktransformers.packed import UsedCache, packed_operators
from ktransformers.rules import load_rules
from limits import quartiles
from results import Report, emit, markdown

SHAPE = (2048, 7168)  # gate_proj of a V3 expert
MATRICES = 8  # 235 MB: more than a cache holds
FORMATS = ("int8", "int4-128", "int4-32", "bf16")
LAYERS = 20  # the first is dense


def packing_rates(weight_format: str, threads: int, rounds: int) -> list[float]:
    """Return the bytes of bf16 input packed per second, one figure a round."""
    n, k = SHAPE
    weights = torch.randn(MATRICES, n, k, dtype=torch.bfloat16)
    packed = torch.zeros(
        MATRICES, _native.packed_bytes(n, k, weight_format), dtype=torch.uint8
    )  # zeros: pages are there
    scales = _native.scale_count(n, k, weight_format)
    scale = torch.zeros(MATRICES, scales, dtype=scale_dtype(weight_format))

    def pack(matrix: int) -> None:
        _native.pack(weights[matrix], packed[matrix], scale[matrix], weight_format)

    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds + 1):
            start = time.perf_counter()
            list(pool.map(pack, range(MATRICES)))
            if number:  # the first warms up
                rates.append(weights.nbytes / (time.perf_counter() - start))
    return rates


def lite_operators() -> dict[str, PackedOperator]:
    """Return the operators of V2-Lite's first layers, without weights."""
    config = DeepseekV2Config(
        hidden_size=2048,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=1,
        q_lora_rank=None,
        vocab_size=1024,
    )
    return packed_operators(plan(build_on_meta(config), load_rules("deepseek-v2-cpu-int8")))


def write_sparse_cache(folder: Path) -> int:
    """Write a cache of zeros that takes no disk; return its bytes."""
    entries = {name: Entry.of(name, operator) for name, operator in lite_operators().items()}
    for entry in entries.values():
        with (folder / entry.file_name).open("wb") as file:
            file.write(entry.header())
            file.truncate(entry.file_bytes())
    index = Index("sparse", {}, entries, dict.fromkeys(entries, 0))
    (folder / INDEX).write_bytes(index.to_json())
    return sum(entry.file_bytes() for entry in entries.values())


def opening_seconds(folder: Path, operators: dict[str, PackedOperator]) -> float:
    """Read the index, check every file, map all tensors and give them to the operators."""
    start = time.perf_counter()
    index = read_index(folder)
    for name, operator in operators.items():
        other = index.entries[name].difference(Entry.of(name, operator))
        if other is not None:
            raise SystemExit(f"{name}: {other}")
        check_file(folder, index.entries[name])
    UsedCache(folder, dict.fromkeys(operators, "map"), operators, index.entries).fill()
    return time.perf_counter() - start


def main(
    threads: Annotated[int | None, typer.Option(help="Default: all this process may use.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements.")] = 5,
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure packing, and opening a packed cache; the last line is one JSON object."""
    threads = threads or _native.default_threads()
    torch.manual_seed(0)
    report: Report = {"threads": threads}
    rows = []
    for weight in FORMATS:
        lower, median, upper = (
            value / 1e9 for value in quartiles(packing_rates(weight, threads, rounds))
        )
        rows.append([weight, f"{median:.2f} ({lower:.2f} to {upper:.2f})"])
        report[f"{weight}_gb_s"] = median
    print(f"{threads} threads, matrices of {SHAPE[0]} x {SHAPE[1]}")
    print(markdown(("packed", "GB/s of bf16 (quartiles)"), rows))
    with tempfile.TemporaryDirectory() as name:
        nbytes = write_sparse_cache(Path(name))
        seconds = [opening_seconds(Path(name), lite_operators()) for _ in range(rounds)]
    lower, median, upper = quartiles(seconds)
    print(f"opening {nbytes / 1e9:.2f} GB: {median:.3f} s ({lower:.3f} to {upper:.3f})")
    emit("packing", report | {"cache_gb": nbytes / 1e9, "open_s": median}, save=save)


if __name__ == "__main__":
    typer.run(main)
