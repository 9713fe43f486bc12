"""Streams: work on a device in order, calls to the host within it, recorded once and run often.

A `CudaStream` is torch's current stream of a GPU. Its calls to the host are plain C functions that
the driver runs in the stream's order (`cudaLaunchHostFunc`), so that a CUDA graph holds them like
any kernel. A `CpuStream` stands in for it where tensors are on the CPU: what is handed to it runs
at once, in the same order, and its graphs are lists of the very operations that torch ran, on the
same memory. What a CUDA graph can't hold, a read of a device's value by Python, its recorder
refuses, so that code which passes here is fit for a capture there.

How the host's results are waited for, and why, is in `docs/adr/0012`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class HostFunction(Protocol):
    """Two C functions, `void (*)(void*)`, which take no GIL, call no CUDA and throw nothing."""

    @property
    def submit(self) -> int:
        """The address of the one that hands work in and waits for nothing."""

    @property
    def sync(self) -> int:
        """The address of the one that waits for that work."""

    @property
    def arguments(self) -> int:
        """What both are called with."""


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Wait, here, until the stream has come to it."""


class Graph(ABC):
    """Work that was recorded once, and everything that it refers to."""

    def __init__(self) -> None:
        self._checks: list[Callable[[], None]] = []

    def own(self, check: Callable[[], None]) -> None:
        """Keep what `check` refers to for as long as the graph, and call it after each replay."""
        self._checks.append(check)

    def replay(self) -> None:
        """Do the work again and wait for it.

        Raises the first error of the host's part once the whole of it has ended; what came after
        that error has computed with garbage, and its own errors say nothing.
        """
        self.launch()
        # Asks all, since an error that stayed would be the next replay's, and from the last on,
        # since what is raised last is what comes out.
        with ExitStack() as stack:
            for check in self._checks:
                stack.callback(check)

    @abstractmethod
    def launch(self) -> None:
        """Do the work again and wait for it, whatever becomes of it."""


class Stream(ABC):
    """Work on a device, in order."""

    device: torch.device
    by_flag: bool
    """Whether the host's work is waited for at a word in memory, instead of in a host function."""

    @abstractmethod
    def host_empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the host that the device can reach, uninitialised."""

    def copy_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to memory of the host, contiguous, once the stream is there."""
        host = self.host_empty(tensor.shape, tensor.dtype)
        host.copy_(tensor, non_blocking=True)
        return host

    def copy_out(self, host: torch.Tensor) -> torch.Tensor:
        """Copy memory of the host to the device, once the stream is there."""
        out = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        return out.copy_(host, non_blocking=True)

    @abstractmethod
    def beside(self) -> Stream:
        """Return another stream of the device, whose work runs at the same time."""

    @abstractmethod
    def pin(self, host: torch.Tensor) -> None:
        """Let the device read memory of the host, which stays where it is, at full speed."""

    def fill(self, out: torch.Tensor, host: torch.Tensor) -> None:
        """Copy memory of the host to that of the device, once the stream is there."""
        out.copy_(host, non_blocking=True)

    @abstractmethod
    def submit(self, function: HostFunction) -> None:
        """Call `function.submit` once the stream is there."""

    @abstractmethod
    def join(self, function: HostFunction, done: torch.Tensor | None) -> None:
        """Let what comes later in the stream wait for the work, at the word `done` if `by_flag`."""

    def job_times(self) -> torch.Tensor | None:
        """Return where the next work on the host shall note its times, int64 [2], if anywhere.

        When it began and when it ended, in ns of `time.monotonic_ns()`: for who draws a trace.
        """
        return None

    @abstractmethod
    def record(self) -> Event:
        """Return the point that work has been handed in up to."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Let what comes later wait for a point in another stream."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait, here, for all work so far."""

    @contextmanager
    def capture(self, *others: Stream) -> Iterator[Graph]:
        """Record the work of a `with` block on this thread, that of other devices' streams too.

        Inputs, and what the block wrote, are read and written again in place by each replay.
        """
        with self._recording(others) as graph:
            for other in others:
                other.wait(self.record())
            try:
                yield graph
            finally:  # after an error too: a recording ends where all of its streams are together
                for other in others:
                    self.wait(other.record())

    @abstractmethod
    def _recording(self, others: Sequence[Stream]) -> AbstractContextManager[Graph]:
        """Record what a `with` block hands to this stream, and to what waits for it."""


class _Here(threading.local):
    """What this thread works on."""

    stream: Stream | None = None
    graph: Graph | None = None


_here = _Here()


def stream_of(device: torch.device) -> Stream:
    """Return the stream that work on a device belongs to."""
    if _here.stream is not None and _here.stream.device == device:
        return _here.stream
    return CpuStream() if device.type == "cpu" else _cuda_stream(device)


def recorded_graph() -> Graph | None:
    """Return the graph that this thread is recording, if it is."""
    return _here.graph


@contextmanager
def use(stream: Stream, graph: Graph | None = None) -> Iterator[None]:
    """Let work of this thread on the stream's device belong to it."""
    before = _here.stream, _here.graph
    _here.stream, _here.graph = stream, graph
    try:
        yield
    finally:
        _here.stream, _here.graph = before


# The CPU as a device


class CpuStream(Stream):
    """Runs everything at once, in the order in which it comes."""

    def __init__(self, note: Callable[[str], None] | None = None, *, by_flag: bool = False):
        """Tell `note` what is done, when it is; `by_flag` as several GPUs would have it."""
        self.device = torch.device("cpu")
        self.by_flag = by_flag
        self._note = note

    def host_empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """See `Stream`."""
        return torch.empty(shape, dtype=dtype)

    def copy_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Stream`."""
        self.note("copy in")
        return super().copy_in(tensor)

    def copy_out(self, host: torch.Tensor) -> torch.Tensor:
        """See `Stream`."""
        self.note("copy out")
        return super().copy_out(host)

    def beside(self) -> Stream:
        """See `Stream`; its events are noted here."""
        return CpuStream(self._note)

    def pin(self, host: torch.Tensor) -> None:
        """Return: all memory is within reach."""

    def fill(self, out: torch.Tensor, host: torch.Tensor) -> None:
        """See `Stream`."""
        self.note("fill")
        super().fill(out, host)

    def submit(self, function: HostFunction) -> None:
        """See `Stream`."""
        self.note("submit")
        self.do(partial(_call, function.submit, function.arguments))

    def join(self, function: HostFunction, done: torch.Tensor | None) -> None:
        """See `Stream`."""
        if done is None:
            self.do(partial(_call, function.sync, function.arguments))
        else:
            self.do(partial(_wait_for_one, done.data_ptr()))
        self.note("join")

    def record(self) -> Event:
        """See `Stream`."""
        self.note("record")
        event = _CpuEvent()
        self.do(_Reach(event))
        return event

    def wait(self, event: Event) -> None:
        """See `Stream`."""
        assert isinstance(event, _CpuEvent)
        self.do(_Wait(event))
        self.note("wait")

    def synchronize(self) -> None:
        """Return: nothing is ever left to wait for."""

    @contextmanager
    def _recording(self, others: Sequence[Stream]) -> Iterator[Graph]:
        """The work runs while it is recorded, too."""
        graph = _CpuGraph()
        with torch.no_grad(), use(self, graph), _Recorder(graph):
            yield graph

    def note(self, event: str) -> None:
        """Tell of something, now and in each replay of what is being recorded."""
        if self._note is not None:
            self.do(partial(self._note, event))

    def do(self, step: Callable[[], None]) -> None:
        """Do what is no operation of torch, now and in each replay of what is being recorded."""
        with _disable_current_modes():
            step()
        if isinstance(_here.graph, _CpuGraph):
            _here.graph.add(self, step)


class _CpuEvent:
    is_reached = False

    def synchronize(self) -> None:
        """Return: the stream was there when it was made."""


@dataclass(frozen=True, slots=True)
class _Reach:
    """A step: the stream has come to an event."""

    event: _CpuEvent

    def __call__(self) -> None:
        self.event.is_reached = True


@dataclass(frozen=True, slots=True)
class _Wait:
    """A step that may be taken once another stream has come to an event."""

    event: _CpuEvent

    def __call__(self) -> None:
        assert self.event.is_reached


def _call(address: int, arguments: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(arguments)


def _wait_for_one(address: int) -> None:
    word = ctypes.c_uint32.from_address(address)
    while word.value != 1:
        os.sched_yield()


class _CpuGraph(Graph):
    """The steps of each stream, in order.

    Streams that wait for nothing may take turns in any way: replays let the one that came first go
    as far as it can, or the one that came last, by turns. So what no event orders does not pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[Stream, list[Callable[[], None]]] = {}
        self._last_first = False

    def add(self, stream: Stream, step: Callable[[], None]) -> None:
        self.steps.setdefault(stream, []).append(step)

    @torch.no_grad()
    def launch(self) -> None:
        left = [deque(steps) for steps in self.steps.values()]
        if self._last_first:
            left.reverse()
        self._last_first = not self._last_first
        for step in chain(*left):
            if isinstance(step, _Reach):
                step.event.is_reached = False
        while any(left):
            next(steps for steps in left if steps and _may_run(steps[0])).popleft()()


def _may_run(step: Callable[[], None]) -> bool:
    return not isinstance(step, _Wait) or step.event.is_reached


class _Recorder(TorchDispatchMode):
    """Adds every operation of torch to a graph."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
    )

    def __init__(self, graph: _CpuGraph):
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.READS:
            raise RuntimeError(
                f"{func} hands a device's value to Python while a graph is recorded: the graph "
                "would go on with the value of now"
            )
        out = func(*args, **(kwargs or {}))
        again = partial(_again, func, args, kwargs or {}, tree_leaves(out))
        self.graph.add(stream_of(torch.device("cpu")), again)
        return out


def _again(func: Any, args: Any, kwargs: dict[str, Any], outputs: list[Any]) -> None:
    """Run an operation on what its arguments hold now, into its first outputs' memory."""
    for old, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
        # A view, or what was written in place, is there already.
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


@lru_cache
def _cuda_stream(device: torch.device) -> Stream:
    from ktransformers.cuda_stream import CudaStream  # which knows this module

    return CudaStream(device)
