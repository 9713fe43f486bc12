"""Weights that stream to a device: the schedule against clocks, and what the buffers hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from clocked_stream import ClockedBuffers, ClockedStream, Span, TimedPiece, run_chunk
from ktransformers.base import Site
from ktransformers.numa import Placement
from ktransformers.prefill_cost import (
    ModelSizes,
    Rates,
    copy_seconds,
    expert_seconds,
    rest_seconds,
    streamed_seconds,
)
from ktransformers.streamed_experts import TwoBuffers, buffer_bytes, cut
from ktransformers.streams import CpuStream
from pretended_machine import pretend
from pretended_operators import PretendedExperts
from routing_trace import TOKENS, TRACE

BUNDLED = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v3"
BLOCK = 64  # slots of an expert that are computed together


def alike(layers: int, pieces: int, copy: float, compute: float) -> list[list[TimedPiece]]:
    """Return layers that take so long in all, in equal pieces."""
    return [
        [TimedPiece(copy / pieces, compute / pieces) for _ in range(pieces)] for _ in range(layers)
    ]


def simulated(layers: Any, rest: float) -> tuple[float, list[Span]]:
    buffers = ClockedBuffers()
    seconds = run_chunk(layers, rest, buffers, ClockedStream())
    copied = [span.piece for span in buffers.spans if span.what == "copy"]
    assert copied == [piece for layer in layers for piece in layer]  # each once, in order
    check_nothing_is_overwritten(buffers.spans)
    return seconds, buffers.spans


def check_nothing_is_overwritten(spans: list[Span]) -> None:
    """Assert that a buffer is read after its copy has ended, and copied to after its reads have."""
    for at in (0, 1):
        mine = sorted((s for s in spans if s.buffer == at), key=lambda span: span.begin)
        for before, after in pairwise(mine):
            assert after.begin >= before.end
            if after.what == "read":
                assert after.piece is before.piece


# The schedule


@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("copy", "rest", "experts"),
    [(1, 0.1, 0.05), (1, 0.6, 0.1), (1, 0.5, 0.7), (1, 2, 0.1), (1, 0.1, 2), (0.5, 0.5, 0.5)],
)
def test_layers_take_as_long_as_the_cost_model_says(
    copy: float, rest: float, experts: float, pieces: int
) -> None:
    ten, _ = simulated(alike(10, pieces, copy, experts), rest)
    thirty, _ = simulated(alike(30, pieces, copy, experts), rest)
    want = streamed_seconds(copy, rest, experts, pieces)
    assert (thirty - ten) / 20 == pytest.approx(want)


def test_copies_are_hidden_but_for_the_first_where_computing_takes_longer() -> None:
    seconds, spans = simulated(alike(20, 1, 1.0, 0.8), rest=0.4)
    busy = 20 * (0.8 + 0.4)
    assert seconds - busy == pytest.approx(1.0)  # exposed: one layer's copy
    assert (spans[0].begin, spans[0].end) == pytest.approx((0.4, 1.4))


def test_computing_is_hidden_where_copies_take_longer() -> None:
    seconds, spans = simulated(alike(20, 1, 1.0, 0.2), rest=0.3)
    copies = [span for span in spans if span.what == "copy"]
    assert all(a.end == pytest.approx(b.begin) for a, b in pairwise(copies))
    assert seconds == pytest.approx(0.3 + 20 * 1.0 + 0.2)  # before the first, and after the last


def test_next_copy_waits_for_the_buffer_and_for_nothing_else() -> None:
    # Layer 2's copy needs the buffer of layer 0, whose experts take long.
    layers = [[TimedPiece(1, 5)], [TimedPiece(1, 1)], [TimedPiece(1, 1)]]
    _, spans = simulated(layers, rest=0)
    begins = [span.begin for span in spans if span.what == "copy"]
    ends = [span.end for span in spans if span.what == "read"]
    assert begins == [0, 1, ends[0]]


def test_next_chunk_begins_to_copy_beside_the_last_layer_of_this_one() -> None:
    stream, buffers = ClockedStream(), ClockedBuffers()
    layers = alike(4, 1, 1.0, 2.0)
    chunks = [run_chunk(layers, 0, buffers, stream) for _ in range(2)]
    check_nothing_is_overwritten(buffers.spans)
    assert chunks == pytest.approx([1.0 + 4 * 2.0, 4 * 2.0])


# The schedule, for the routing of a trained model


def timed(sizes: ModelSizes, rates: Rates, pieces: int, longer: int) -> list[list[TimedPiece]]:
    """Return pieces that take what the cost model says, for a text so many times as long.

    The layers of all windows stand for those of one deeper model.
    """
    layer, layers = sizes.layer, []
    for counts in TRACE:
        of_layer = []
        for piece in range(pieces):
            experts = range(piece * len(counts) // pieces, (piece + 1) * len(counts) // pieces)
            blocks = sum(-(-counts[expert] * longer // BLOCK) for expert in experts)
            compute = blocks * BLOCK * layer.expert_operations / rates.gpu_operations
            copy = len(experts) * layer.expert_bytes / rates.host_to_device
            of_layer.append(TimedPiece(copy, compute, experts))
        layers.append(of_layer)
    return layers


@pytest.mark.parametrize("pieces", [1, 2, 8])
@pytest.mark.parametrize("share", [0.5, 2.0], ids=["copies longer", "computing longer"])
def test_recorded_routing_costs_what_the_model_predicts(share: float, pieces: int) -> None:
    longer = 64
    tokens, layers = TOKENS * longer, len(TRACE)
    config = AutoConfig.from_pretrained(BUNDLED)
    D, F = config.hidden_size, config.moe_intermediate_size
    sizes = ModelSizes.deepseek(config, expert_bytes=3 * D * F)
    rates = Rates(1e9, 1e12, 1e12, 1e11, 1e10)
    rest = rest_seconds(rates, sizes.layer, tokens)
    experts = expert_seconds(rates, sizes.layer, tokens)
    # The link at which computing takes `share` of a layer's copy.
    link = share * sizes.layer.layer_bytes / (rest + experts)
    rates = replace(rates, host_to_device=link)
    copy = copy_seconds(rates, sizes.layer)
    assert rest + experts == pytest.approx(share * copy)

    seconds, spans = simulated(timed(sizes, rates, pieces, longer), rest)
    per_layer = streamed_seconds(copy, rest, experts, pieces)
    predicted = (layers - 1) * per_layer + copy + rest + experts
    # Blocks that are not full, and experts that get more than their part: pieces are uneven.
    assert 0.9 * predicted <= seconds <= 1.1 * predicted
    computed = sum(span.end - span.begin for span in spans if span.what == "read")
    exposed = seconds - computed - layers * rest
    if share == 2.0 and pieces <= 2:
        assert exposed <= copy * 1.0001  # the first layer's alone
    if share == 0.5 and pieces <= 2:
        assert seconds <= layers * copy + rest + experts * 1.2  # copies back to back


# Buffers


def test_what_another_thread_has_overwritten_is_copied_again() -> None:
    copied: list[tuple[str, int]] = []
    two = TwoBuffers[str](lambda stream, piece, at: copied.append((piece, at)))
    mine, other = CpuStream(), CpuStream()
    two.begin(mine, ["a", "b"])
    with two.reading(other, ["x", "y"]):
        pass
    with two.reading(mine, ["a", "b"]) as at:
        assert copied[-2:] == [("a", at), ("b", 1 - at)]
    count = len(copied)
    with two.reading(mine, ["b"]):  # is there still
        assert len(copied) == count


def test_copy_that_fails_leaves_nothing_behind_that_looks_filled() -> None:
    failing = [True]

    def copy(stream: Any, piece: str, at: int) -> None:
        if failing[0]:
            raise RuntimeError("no copy")

    two = TwoBuffers[str](copy)
    with pytest.raises(RuntimeError, match="no copy"):
        two.begin(CpuStream(), ["a"])
    failing[0] = False
    with two.reading(CpuStream(), ["a"]) as at:
        assert at == 0


def filled(tmp_path: Path, mode: str, format: str) -> tuple[PretendedExperts, dict[str, Any]]:
    """Return experts on a machine of two nodes, and their packed bytes as one tensor each."""
    config = SimpleNamespace(pretended_machine=pretend(tmp_path, {0: (0, 1), 1: (2, 3)}))
    site = Site("layer", None, config, torch.bfloat16, torch.device("cpu"), "test")
    experts = PretendedExperts(
        site,
        num_experts=5,
        hidden_size=100,  # 4 panels of 32 outputs, and 1: less than one for each node
        width=20,
        weight_format=format,
        threads=1,
        placement=Placement(mode, ()),
    )
    generator, whole, memory = torch.Generator().manual_seed(0), {}, experts.placed_memory()
    for name, placed in memory.items():
        count = placed.of.matrices
        values = torch.randn(count, placed.of.nbytes // placed.of.dtype.itemsize // count,
                             generator=generator).to(placed.of.dtype)  # fmt: skip
        for number, row in enumerate(values):
            with placed.matrix(number) as flat:
                flat.copy_(row)
        whole[name] = values.view(5, -1)
    experts.use_placed(memory)
    return experts, whole


@pytest.mark.parametrize("mode", ["interleave", "shard", "replicate"])
@pytest.mark.parametrize("format", ["int8", "int4-64", "bf16"])
def test_pieces_hold_whole_experts_wherever_the_host_has_them(
    mode: str, format: str, tmp_path: Path
) -> None:
    experts, whole = filled(tmp_path, mode, format)
    pieces = cut(experts, buffer_bytes(experts, 2))
    assert [piece.experts for piece in pieces] == [range(2), range(2, 4), range(4, 5)]
    for piece in pieces:
        buffer = torch.full((buffer_bytes(experts, 2),), 99, dtype=torch.uint8)
        piece.fill(CpuStream(), buffer)
        views = piece.views(buffer)
        assert views.keys() == whole.keys()
        for name, view in views.items():
            want = whole[name][piece.experts.start : piece.experts.stop].flatten()
            assert view.dtype == want.dtype
            assert torch.equal(view.view(torch.uint8), want.view(torch.uint8))


def test_pieces_are_equal_and_as_few_as_fit(tmp_path: Path) -> None:
    experts, _ = filled(tmp_path, "interleave", "int8")
    one = buffer_bytes(experts, 1)
    for room, sizes in ((9, [5]), (5, [5]), (4, [3, 2]), (3, [3, 2]), (1, [1] * 5)):
        assert [len(piece.experts) for piece in cut(experts, room * one)] == sizes
    with pytest.raises(
        ValueError, match=rf"^half of {2 * (one - 1):,} bytes holds no expert, which"
    ):
        cut(experts, one - 1)
