"""Experts' weights that stream from the host to a device, some loading while others are computed.

A layer's packed weights are cut into pieces of whole experts, as few as two buffers on the device
have room for. One buffer is read while a stream of its own fills the other:

    copies   | piece 0 | piece 1 | piece 2 | ...
    compute            | piece 0 | piece 1 | ...

A buffer is filled with the next piece but one as soon as what read it has ended, across layers,
too; a computation begins once its piece is there. No other order is kept. So the slower of the two
sides never waits for the other, but for a chunk's first piece, whose copy nothing hides; and for
what the rest of a layer (attention) can't hide in two buffers that hold less than a layer.

Whether to stream a chunk at all is decided by what it costs (`prefill_cost`), with rates that are
measured once. The last decoder layer is not loaded ahead: prefill computes it for one position.

Who computes is not said here, nor with which kernel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal, TypeVar

import torch

from ktransformers.base import Site
from ktransformers.host_experts import HostExperts
from ktransformers.machine_rates import measured_rates
from ktransformers.prefill_cost import ModelSizes, Rates, hiding_tokens, streaming_pays
from ktransformers.streams import Stream, stream_of

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes, of a tensor in a buffer
Mode = Literal["auto", "never", "always"]
P = TypeVar("P")


class TwoBuffers(Generic[P]):
    """Two buffers of a device: which piece is in which, and who waits for whom."""

    def __init__(self, copy: Callable[[Stream, P, int], None]):
        """Take a function that copies a piece to buffer 0 or 1 in a stream."""
        self._copy = copy
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._copies: Any = None  # the stream beside it
        self._held: list[P | None] = [None, None]
        self._filled: list[Any] = [None, None]  # events
        self._read: list[Any] = [None, None]

    def begin(self, stream: Stream, pieces: Sequence[P]) -> None:
        """Let the copies of the first two pieces begin that a stream will read."""
        with self._lock:
            self._hold(stream, pieces[:2])

    @contextmanager
    def reading(self, stream: Stream, pieces: Sequence[P]) -> Iterator[int]:
        """Let work of a stream read the first of some pieces, in the buffer that is returned.

        Args:
            stream: waits until the piece is there; what is handed in until the context ends may
                read it.
            pieces: this one, which is copied now if others have taken its buffer since, and up to
                two that will be read after it.
        """
        with self._lock:
            self._hold(stream, pieces[:2])
            at = self._held.index(pieces[0])
            stream.wait(self._filled[at])
            try:
                yield at
            finally:
                self._read[at] = stream.record()
            self._hold(stream, pieces[1:3])

    def synchronize(self) -> None:
        """Wait, here, for copies on their way."""
        if self._copies is not None:
            self._copies.synchronize()

    def _hold(self, stream: Stream, pieces: Sequence[P]) -> None:
        """Copy those of one or two pieces that are not there over what is none of them."""
        if stream is not self._stream:
            self._stream, self._copies = stream, stream.beside()
        for piece in pieces:
            if piece in self._held:
                continue
            at = 0 if self._held[0] not in pieces else 1
            if self._read[at] is None:
                self._read[at] = stream.record()  # the memory may be what work before has left
            self._held[at] = None
            for event in (self._read[at], self._filled[at]):
                if event is not None:  # the second may be of another thread's stream
                    self._copies.wait(event)
            self._copy(self._copies, piece, at)
            self._filled[at] = self._copies.record()
            self._held[at] = piece


class Piece:
    """Some experts of a layer that lie together, and where the host has their weights."""

    def __init__(self, layer: HostExperts, experts: range):
        self.experts = experts
        self._layer = layer
        self._matrices = layer.packed_matrices()
        self.sizes = {
            name: of.nbytes // len(layer.weights.modules) * len(experts)
            for name, of in self._matrices.items()
        }

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return where in a buffer the tensors lie, flat, in their dtypes."""
        views, begin = {}, 0
        for name, size in self.sizes.items():
            views[name] = buffer[begin : begin + size].view(self._matrices[name].dtype)
            begin += -(-size // ALIGNMENT) * ALIGNMENT
        return views

    def fill(self, stream: Stream, buffer: torch.Tensor) -> None:
        """Copy the weights to a buffer of the device in a stream."""
        for name, out in self.views(buffer).items():
            flat = out.view(torch.uint8)
            for begin, host in self._host_ranges(name):
                stream.fill(flat[begin : begin + len(host)], host)

    def _host_ranges(self, tensor: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the host's memory, flat uint8, and which byte of the piece's tensor is its first.

        That is one range, or where nodes have slices of every matrix one for each of those.
        """
        layer, of = self._layer, self._matrices[tensor]
        if of.nbytes == 0:
            return
        count = len(layer.weights.modules)
        each, size = of.matrices // count, of.nbytes // of.matrices
        begin, end = self.experts.start * each, self.experts.stop * each
        names = layer.buffer_names(tensor)
        for name, part in zip(names, of.plan(layer.placement), strict=True):
            if part.outputs == 0:
                continue
            flat = layer.get_buffer(name).view(-1).view(torch.uint8)
            rows = flat.view(of.matrices, -1)[begin:end]
            if rows.shape[1] == size:  # all of it: of several copies one will do
                yield 0, rows.reshape(-1)
                return
            first = part.first_output * (size // of.outputs)
            for number, row in enumerate(rows):
                yield number * size + first, row


def cut(layer: HostExperts, nbytes: int) -> list[Piece]:
    """Cut a layer into equal pieces that a buffer of so many bytes holds.

    Raises ValueError where it holds no expert.
    """
    E = len(layer.weights.modules)
    most = nbytes // buffer_bytes(layer, 1)
    if most == 0:
        raise ValueError(
            f"half of {2 * nbytes:,} bytes holds no expert, which has {buffer_bytes(layer, 1):,}"
        )
    size = -(-E // -(-E // min(most, E)))
    return [Piece(layer, range(begin, min(begin + size, E))) for begin in range(0, E, size)]


def buffer_bytes(layer: HostExperts, experts: int) -> int:
    """Return the bytes that so many experts take in a buffer."""
    sizes = Piece(layer, range(experts)).sizes.values()
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class Buffers:
    """The two buffers of a device, which its layers share; allocated when they are first needed."""

    def __init__(self) -> None:
        self.nbytes = 0  # of one: what the largest piece takes
        self.two: TwoBuffers[Piece] = TwoBuffers(self._copy)
        self._memory: list[torch.Tensor] = []

    def __del__(self) -> None:
        self.two.synchronize()  # after an error copies may be on their way to what is freed here

    def reserve(self, layer: HostExperts, pieces: Sequence[Piece]) -> None:
        """Make them large enough for the pieces of a layer, before they are first used."""
        assert not self._memory
        self.nbytes = max(self.nbytes, buffer_bytes(layer, len(pieces[0].experts)))

    def _copy(self, stream: Stream, piece: Piece, at: int) -> None:
        if not self._memory:
            self._memory = [
                torch.empty(self.nbytes, dtype=torch.uint8, device=stream.device) for _ in range(2)
            ]
        piece.fill(stream, self._memory[at])

    def read(self, piece: Piece, at: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a piece in a buffer."""
        return piece.views(self._memory[at])


class StreamedLayer:
    """Streams the weights of one layer, after those of the layer before."""

    def __init__(self, site: Site, mode: Mode, memory: int):
        """Plan it for a layer at a site; `memory` is that of both buffers, in bytes."""
        self._site, self._mode, self._memory = site, mode, memory
        self._layers: list[StreamedLayer] = [self]  # of the device, in order
        self._own = _Shared()  # of the first of them all make use
        self._pieces: list[Piece] = []  # none where the layer stays on the CPU

    def refusal(self, experts: HostExperts) -> str | None:
        """Say what of a layer's experts can't be streamed."""
        found, E = len(experts.weights.modules), experts.num_experts
        if found != E:
            return f"the host has {found} of {E} experts, and all of them are streamed"
        if experts.weights.format == "bf16" and self._site.dtype != torch.bfloat16:
            return f"weights in bf16 meet bfloat16 activations, not {self._site.dtype}"
        return None

    def connect(self, experts: HostExperts, others: Iterable[StreamedLayer]) -> None:
        """Take the layer's experts, and find the layers that share the device.

        Raises ValueError where they can't be streamed, if they are always to be, and where half of
        the memory holds no expert.
        """
        on_device = (each for each in others if each._site.device == self._site.device)
        self._layers = sorted(on_device, key=lambda each: each._site.layer or 0)
        reason = self.refusal(experts)
        if reason is not None:
            if self._mode == "always":
                raise ValueError(f"stream_prefill always: {reason}")
            return
        self._experts, self._pieces = experts, cut(experts, self._memory // 2)
        self._shared.buffers.reserve(experts, self._pieces)
        nbytes = sum(of.nbytes for of in experts.packed_matrices().values())
        sizes = ModelSizes.deepseek(self._site.config, expert_bytes=nbytes // experts.num_experts)
        self._sizes = sizes.layer

    @property
    def _shared(self) -> _Shared:
        return self._layers[0]._own

    def device_bytes(self) -> int:
        """Return the bytes of the buffers, with the first layer that uses them."""
        return 2 * self._own.buffers.nbytes

    def chosen(self, tokens: int) -> bool:
        """Tell whether so many tokens of prefill are computed on the device."""
        if self._mode == "always" or not self._pieces:
            return bool(self._pieces)
        pays = streaming_pays(self._rates(), self._sizes, tokens, len(self._pieces))
        return pays and self._can_be_read()

    def _can_be_read(self) -> bool:
        """Tell whether the device can read the weights; where it can't, the CPU computes on."""
        try:
            self._pin(stream_of(self._site.device))
        except RuntimeError as error:
            logger.warning("%s: prefill is not streamed: %s", self._site.name, error)
            self._pieces = []
        return bool(self._pieces)

    def _pin(self, stream: Stream) -> None:
        for name in self._experts.packed_matrices():
            for buffer in self._experts.buffer_names(name):
                stream.pin(self._experts.get_buffer(buffer))

    def chunk_tokens(self) -> int | None:
        """Return the shortest chunk that computes as long as its weights are copied."""
        return hiding_tokens(self._rates(), self._sizes) if self._pieces else None

    def _rates(self) -> Rates:
        if self._shared.rates is None:
            self._shared.rates = measured_rates(stream_of(self._site.device), self._experts)
        return self._shared.rates

    def call(
        self,
        stream: Stream,
        tokens: int,
        add: Callable[[range, Mapping[str, torch.Tensor]], None],
        result: Callable[[], torch.Tensor],
    ) -> StreamedCall:
        """Let the copies begin for so many tokens; see `StreamedCall`."""
        self._pin(stream)
        shared, ahead = self._shared, self._ahead(tokens)
        return StreamedCall(stream, shared.buffers, self._pieces, ahead, add, result)

    def _ahead(self, tokens: int) -> list[Piece]:
        """Return the first two pieces that come after this layer's."""
        pieces: list[Piece] = []
        for layer in self._layers[self._layers.index(self) + 1 :]:
            is_last = layer._site.layer == self._site.config.num_hidden_layers - 1
            if is_last or len(pieces) >= 2 or not layer.chosen(tokens):
                break
            pieces += layer._pieces
        return pieces[:2]


class _Shared:
    """What the layers of a device share."""

    def __init__(self) -> None:
        self.buffers = Buffers()
        self.rates: Rates | None = None


class StreamedCall:
    """A layer's routed experts on the device, from weights that stream there."""

    def __init__(
        self,
        stream: Stream,
        buffers: Buffers,
        pieces: Sequence[Piece],
        ahead: Sequence[Piece],
        add: Callable[[range, Mapping[str, torch.Tensor]], None],
        result: Callable[[], torch.Tensor],
    ):
        """Let the first copies begin.

        Args:
            stream: computes.
            buffers: of the stream's device.
            pieces: of the layer.
            ahead: the two that come after them, as far as is known.
            add: computes with the weights of some experts.
            result: returns the sum.
        """
        self._stream, self._buffers, self._add, self._result = stream, buffers, add, result
        self._count, self._pieces = len(pieces), [*pieces, *ahead]
        buffers.two.begin(stream, self._pieces)

    def join(self) -> torch.Tensor:
        """Compute; return the result."""
        for number in range(self._count):
            pieces = self._pieces[number : number + 3]
            with self._buffers.two.reading(self._stream, pieces) as at:
                self._add(pieces[0].experts, self._buffers.read(pieces[0], at))
        return self._result()
