"""What GPUs and CPU do during a token of decode, drawn: a lane for each, in one picture.

A token is one graph (`TokenGraph`). CUDA events in it say when each GPU came to a layer, handed
experts to the CPU, began to wait for them and went on; the engine's queue notes when the CPU began
and ended each layer's experts. Of some tokens the one of median time is drawn.

Without a GPU the stand-in runs, with torch's operations on the CPU in the GPU's lane: that shows
that this works, and nothing else. The picture says so.

Run: python benchmarks/token_trace.py --help      The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if not torch.cuda.is_available():  # before Triton is imported, which torch does for transformers
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.cuda_stream import CudaStream
from ktransformers.prefill import prefill
from ktransformers.stack import DecoderStack
from ktransformers.streams import CpuStream, Graph, HostFunction, Stream, recorded_graph, use
from ktransformers.token_graph import TokenGraph, graph_obstacle, places_of
from results import Report, emit

FOLDER = Path(__file__).parents[1] / "examples" / "tiny-deepseek-v3"
OPERATORS = "ktransformers.operators"
WIDTH, LANE, LEFT, TOP = 1600, 60, 90, 50  # of the picture
COLOURS = {"layer": "#4878d0", "beside": "#6acc64", "waits": "#e4e4e4", "experts": "#ee854a"}


@dataclass(frozen=True, slots=True)
class Part:
    """What a device does for a while."""

    lane: str
    kind: str  # of COLOURS
    label: str
    begin: float  # us from the token's begin on
    end: float


class Traced(Stream):
    """A stream whose graph notes when it comes to where; mixed into those of both kinds."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.layer = 0
        self.kinds: list[tuple[str, str]] = []  # of what comes after each mark, and its label
        self.jobs: list[tuple[str, torch.Tensor]] = []

    def mark(self, kind: str, label: str) -> None:
        """Note, in each replay of what is recorded here, that something begins."""
        if recorded_graph() is not None:
            self.kinds.append((kind, label))
            self.note_time()

    def note_time(self) -> None:
        """Let replays note the time."""
        raise NotImplementedError

    def times(self) -> list[float]:
        """Return those of the last replay, in ns of `time.monotonic_ns()`."""
        raise NotImplementedError

    def begin(self) -> None:
        """Be told that a replay comes next."""

    @contextmanager
    def _recording(self, others: Sequence[Stream]) -> Iterator[Graph]:
        """Mark the whole of it."""
        with super()._recording(others) as graph:  # type: ignore[safe-super]  # as below
            self.mark("layer", "embedding")
            yield graph
            self.mark("end", "")

    def submit(self, function: HostFunction) -> None:
        """See `Stream`."""
        super().submit(function)  # type: ignore[safe-super]  # of what this is mixed into
        self.mark("beside", f"beside the experts of layer {self.layer}")

    def join(self, function: HostFunction, done: torch.Tensor | None) -> None:
        """See `Stream`."""
        self.mark("waits", f"waits in layer {self.layer}")
        super().join(function, done)  # type: ignore[safe-super]  # likewise
        self.mark("layer", f"layer {self.layer}")

    def job_times(self) -> torch.Tensor:
        """See `Stream`."""
        times = torch.zeros(2, dtype=torch.int64)
        if recorded_graph() is not None:
            self.jobs.append((f"experts of layer {self.layer}", times))
        return times


class TracedCpu(Traced, CpuStream):
    """The stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self._times: list[list[int]] = []

    def note_time(self) -> None:
        """See `Traced`."""
        slot = [0]
        self._times.append(slot)
        self.do(partial(_set_now, slot))

    def times(self) -> list[float]:
        """See `Traced`."""
        return [slot[0] for slot in self._times]


def _set_now(slot: list[int]) -> None:
    slot[0] = time.monotonic_ns()


class TracedCuda(Traced, CudaStream):
    """A GPU's."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._events: list[Any] = []
        self._base: tuple[int, Any] = (0, None)

    def note_time(self) -> None:
        """See `Traced`."""
        event: Any = torch.cuda.Event(enable_timing=True, external=True)  # a node of the graph
        event.record(torch.cuda.current_stream(self.device))
        self._events.append(event)

    def begin(self) -> None:
        """Let both clocks meet, up to some us."""
        base: Any = torch.cuda.Event(enable_timing=True)
        base.record(torch.cuda.current_stream(self.device))
        base.synchronize()
        self._base = time.monotonic_ns(), base

    def times(self) -> list[float]:
        """See `Traced`."""
        now, base = self._base
        return [now + 1e6 * base.elapsed_time(event) for event in self._events]


class LayerMarks:
    """Marks layers in the streams of their devices: a stack's check, called before each."""

    def __init__(self, model: PreTrainedModel, streams: dict[torch.device, Traced]):
        layers: Any = model.base_model.layers
        self.streams = [streams[next(layer.parameters()).device] for layer in layers]
        self.next = 0

    def __call__(self) -> None:
        """Mark the next layer of what is recorded."""
        if recorded_graph() is None:
            self.next = 0
            return
        stream = self.streams[self.next]
        stream.layer = self.next
        stream.mark("layer", f"layer {self.next}")
        self.next += 1


def rules(device: torch.device, deferred: int) -> list[dict[str, Any]]:
    """Return those of a DeepSeek-V3 with its routed experts on the CPU, and the rest on a GPU."""
    place = {"device": str(device)}
    kept = r"^model\.(embed_tokens|layers\.\d+|norm|rotary_emb)$|^lm_head$"
    hybrid = {"deferred_experts": deferred}
    taken: list[tuple[dict[str, str], str, dict[str, Any]]] = [
        ({"name": kept}, "default", place),
        ({"name": r"\.self_attn$"}, f"{OPERATORS}.gpu_attention.GpuMlaAttention", place),
        ({"class": "DeepseekV3MoE"}, f"{OPERATORS}.hybrid.HybridMoE", hybrid),
        ({"name": r"\.mlp\.experts$"}, f"{OPERATORS}.experts.CpuExperts", {}),
    ]
    return [
        {"match": match, "replace": {"class": path, "kwargs": kwargs}}
        for match, path, kwargs in taken
    ]


def parts_of(streams: list[Traced]) -> list[Part]:
    """Return what the last replay did, from its begin on."""
    times = [stream.times() for stream in streams]
    start, end = times[0][0], times[0][-1]

    def since(ns: float) -> float:
        return (ns - start) / 1e3

    parts = []
    for stream, at in zip(streams, times, strict=True):
        until = [*at[1:], end]
        for (kind, label), a, b in zip(stream.kinds, at, until, strict=True):
            if kind != "end":
                parts.append(Part(str(stream.device), kind, label, since(a), since(b)))
        for label, (a, b) in ((label, job.tolist()) for label, job in stream.jobs):
            parts.append(Part("experts", "experts", label, since(a), since(b)))
    return parts


def trace(model: PreTrainedModel, tokens: int) -> tuple[list[Part], float]:
    """Return the parts of the token of median time, and that time in us."""
    devices = list(places_of(model))
    kind = TracedCpu if devices[0].type == "cpu" else TracedCuda
    streams: dict[torch.device, Traced] = {
        device: TracedCpu() if kind is TracedCpu else TracedCuda(device) for device in devices
    }
    first, *others = streams.values()
    found = []
    with ExitStack() as stack, torch.no_grad():
        for stream in streams.values():
            stack.enter_context(use(stream))
        cache = LatentCache.for_model(model, tokens + 8)
        token = prefill(model, torch.arange(4)[None], cache).argmax(-1, keepdim=True)
        marked = DecoderStack(model, LayerMarks(model, streams))
        graph = TokenGraph(marked, cache, devices[0], others)
        for _ in range(tokens):
            for stream in streams.values():
                stream.begin()
            token = graph(token).argmax(-1, keepdim=True)
            found.append(parts_of([first, *others]))
    found = found[1:]  # the first was recorded just before
    lengths = [max(part.end for part in parts if part.lane != "experts") for parts in found]
    median = statistics.median_low(lengths)
    return found[lengths.index(median)], median


def picture(parts: list[Part], title: str) -> str:
    """Draw a lane for each device, as SVG."""
    lanes = list(dict.fromkeys(part.lane for part in parts if part.lane != "experts"))
    lanes.append("experts")
    end = max(part.end for part in parts)
    scale = (WIDTH - LEFT - 20) / end
    height = TOP + LANE * len(lanes) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="25" font-size="16">{escape(title)}</text>',
    ]
    for row, lane in enumerate(lanes):
        y = TOP + row * LANE
        name = "CPU" if lane == "experts" else lane
        lines.append(f'<text x="10" y="{y + LANE / 2}">{name}</text>')
        for part in parts:
            if part.lane == lane:
                x, width = LEFT + part.begin * scale, max(0.5, (part.end - part.begin) * scale)
                lines.append(
                    f'<rect x="{x:.1f}" y="{y + 5}" width="{width:.1f}" height="{LANE - 10}" '
                    f'fill="{COLOURS[part.kind]}" stroke="white" stroke-width="0.3">'
                    f"<title>{part.label}: {part.end - part.begin:.1f} us</title></rect>"
                )
    y = TOP + LANE * len(lanes) + 20
    texts = ("attention and the rest", "beside the CPU", "waits for it", "routed experts")
    for column, (colour, text) in enumerate(zip(COLOURS.values(), texts, strict=True)):
        x = LEFT + 220 * column
        lines.append(f'<rect x="{x}" y="{y - 11}" width="13" height="13" fill="{colour}"/>')
        lines.append(f'<text x="{x + 20}" y="{y}">{text}</text>')
    lines.append(f'<text x="{WIDTH - 160}" y="{y}">{end:,.0f} us in all</text></svg>')
    return "\n".join(lines) + "\n"


def main(
    folder: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="A DeepSeek-V3, or any with --rules."),
    ] = FOLDER,
    rule_file: Annotated[str | None, typer.Option("--rules", help="A rule file.")] = None,
    deferred: Annotated[int, typer.Option(min=0, help="Experts to defer, without --rules.")] = 0,
    tokens: Annotated[int, typer.Option(min=2, help="How many to decode.")] = 20,
    out: Annotated[Path, typer.Option(help="Where .svg and .json go, by name.")] = Path("trace"),
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Draw it; the last line is one JSON object."""
    stands_in = not torch.cuda.is_available()
    device = torch.device("cpu" if stands_in else "cuda:0")
    wanted = rules(device, deferred) if rule_file is None else rule_file
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out {out}: there is no folder {out.parent}")
    try:
        model = optimize_and_load(folder, wanted)
    except ValueError as error:  # of the rules, or of the folder
        raise typer.BadParameter(str(error)) from error
    obstacle = graph_obstacle(model)
    if obstacle is not None:
        raise typer.BadParameter(f"a token of this model is no graph: {obstacle}")
    parts, token_us = trace(model, tokens)
    busy = sum(part.end - part.begin for part in parts if part.kind == "experts")
    waits = sum(part.end - part.begin for part in parts if part.kind == "waits")
    where = "the CPU that stands in for a GPU" if stands_in else torch.cuda.get_device_name(0)
    title = f"A token of {folder.name} on {where}: the CPU's experts are busy {busy / token_us:.0%}"
    if stands_in:
        title += " (this says nothing about a GPU)"
    out.with_suffix(".svg").write_text(picture(parts, title))
    lanes = {"stands_in": stands_in, "parts": [asdict(part) for part in parts]}
    out.with_suffix(".json").write_text(json.dumps(lanes, indent=1) + "\n")
    print(title)
    report: Report = {
        "model": folder.name,
        "stands_in": stands_in,
        "deferred": deferred,
        "token_us": token_us,
        "cpu_busy_share": busy / token_us,
        "gpu_waits_share": waits / token_us,
    }
    emit("token_trace", report, save=save)


if __name__ == "__main__":
    typer.run(main)
