"""Streams with clocks in the place of work: what a schedule costs, without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ktransformers.streamed_experts import Buffers, StreamedCall
from ktransformers.streams import CpuStream, Stream


@dataclass(frozen=True, slots=True)
class Span:
    """A piece that is copied to a buffer, or read in it."""

    what: str  # copy or read
    piece: Any
    buffer: int
    begin: float
    end: float


class ClockedStream(CpuStream):
    """Does nothing but say when it would be done; its events are points of time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def beside(self) -> Stream:
        """See `Stream`."""
        return ClockedStream()

    def record(self) -> Any:
        """See `Stream`."""
        return self.now

    def wait(self, event: Any) -> None:
        """See `Stream`."""
        self.now = max(self.now, event)

    def spend(self, seconds: float) -> tuple[float, float]:
        """Be busy for so long; return when that began and when it ends."""
        begin, self.now = self.now, self.now + seconds
        return begin, self.now


@dataclass(frozen=True, slots=True, eq=False)
class TimedPiece:
    """A piece that takes so long to copy, and to compute with."""

    copy: float
    compute: float
    experts: range = range(1)


class ClockedBuffers(Buffers):
    """Buffers without memory, which tell what happens in them."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Span] = []
        self.at = 0  # what is read

    def _copy(self, stream: Any, piece: Any, at: int) -> None:
        self.spans.append(Span("copy", piece, at, *stream.spend(piece.copy)))

    def read(self, piece: Any, at: int) -> dict[str, torch.Tensor]:
        """See `Buffers`."""
        self.at = at
        return {}


def run_chunk(
    layers: Sequence[Sequence[Any]], rest: float, buffers: ClockedBuffers, stream: ClockedStream
) -> float:
    """Compute a chunk with all layers streamed, through the schedule that devices run.

    Return the seconds; `rest` is what a layer needs before its experts.
    """
    begun = stream.now
    for number, pieces in enumerate(layers):
        stream.spend(rest)
        ahead = [piece for later in layers[number + 1 :] for piece in later][:2]
        waiting = list(pieces)

        def add(_: range, __: Mapping[str, torch.Tensor], waiting: list[Any] = waiting) -> None:
            piece = waiting.pop(0)
            buffers.spans.append(Span("read", piece, buffers.at, *stream.spend(piece.compute)))

        StreamedCall(stream, buffers, pieces, ahead, add, _nothing).join()
        assert not waiting
    return stream.now - begun


def _nothing() -> torch.Tensor:
    return torch.empty(0)
