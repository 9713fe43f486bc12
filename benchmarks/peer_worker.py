"""The process that a peer runs in: it makes one layer, then measures when it is told to.

Reads lines `TOKENS SECONDS` and answers each with the seconds of its calls, as JSON; the first
line that it writes says that it is ready, or why it can't be. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, TextIO

import torch
import typer

from limits import timed_calls
from moe_layer import CHECKED, MODELS, Calls, Sizes, random_weights, relative_error
from peer_layer import CannotRun, PeerLayer, Variant, load_peer


def own_output() -> TextIO:
    """Keep stdout to ourselves: libraries that print get stderr instead."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", buffering=1)


def ready_layer(name: str, sizes: Sizes, weight: str, variant: Variant) -> tuple[PeerLayer, float]:
    """Make the layer and check its output. Raises CannotRun, also for a wrong result."""
    peer = load_peer(name)
    experts = [random_weights(sizes) for _ in range(CHECKED)]
    layer = peer.make_layer(sizes, experts, variant)

    def run(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return layer.prepare(x, weights)(index)

    error = relative_error(experts, run)
    if not error <= peer.MAX_ERROR[weight.partition("-")[0]]:
        raise CannotRun(f"{name}, {variant}: wrong result, {error:.3g} off fp32")
    return layer, error


def main(
    name: str,
    model: Annotated[str, typer.Option()],
    weight: Annotated[str, typer.Option()],
    experts: Annotated[int, typer.Option()],
    format: Annotated[str, typer.Option()],
    threads: Annotated[int, typer.Option()],
    repack: Annotated[bool, typer.Option()] = False,
) -> None:
    """Serve measurements on stdin and stdout."""
    answers = own_output()
    torch.manual_seed(0)
    full = MODELS[model]
    sizes = Sizes(full.hidden_size, full.moe_intermediate_size, experts, full.top_k)
    with torch.inference_mode():
        try:
            layer, error = ready_layer(name, sizes, weight, Variant(format, threads, repack))
        except CannotRun as reason:
            print(json.dumps({"cannot": str(reason)}), file=answers)
            return
        print(json.dumps({"ready": True, "relative_error": error}), file=answers)
        prepared: dict[int, object] = {}
        for line in sys.stdin:
            tokens, seconds = int(line.split()[0]), float(line.split()[1])
            if tokens not in prepared:
                prepared[tokens] = prepare(layer, Calls.draw(sizes, tokens))
            timed = prepared[tokens]
            assert callable(timed)
            print(json.dumps(timed(seconds)), file=answers)


def prepare(layer: PeerLayer, calls: Calls) -> object:
    """Return what times calls with these inputs."""
    call = layer.prepare(calls.x, calls.weights)
    return timed_calls(lambda i: call(calls.indices[i % len(calls.indices)]))


if __name__ == "__main__":
    typer.run(main)
