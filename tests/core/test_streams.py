"""The CPU that stands in for a GPU's stream: its graphs, and what they keep."""

from __future__ import annotations

import ctypes
import enum
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktransformers.cuda_stream import CudaStream
from ktransformers.streams import CpuStream, recorded_graph, stream_of, use

CPU = torch.device("cpu")
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@dataclass
class Callbacks:
    """A pair of C functions that run Python, as no engine's do."""

    on_submit: Callable[[], None]
    on_sync: Callable[[], None]

    def __post_init__(self) -> None:
        self.kept = [CALLBACK(lambda _: self.on_submit()), CALLBACK(lambda _: self.on_sync())]
        self.submit, self.sync = (
            ctypes.cast(callback, ctypes.c_void_p).value or 0 for callback in self.kept
        )
        self.arguments = 0


def test_replay_computes_with_the_inputs_of_now() -> None:
    x, total = torch.ones(3), torch.zeros(3)

    def step() -> torch.Tensor:
        doubled = (x * 2).view(1, 3)[:, 1:]  # a view of what is computed again
        total.add_(x)  # in place
        return torch.cat([doubled, x[None]], dim=1)

    with CpuStream().capture() as graph:
        out = step()
    for value in (5.0, -1.0):
        x.fill_(value)
        total.zero_()
        graph.replay()
        assert out.tolist() == [[2 * value] * 2 + [value] * 3]
        assert total.tolist() == [value] * 3


def test_reading_a_value_while_a_graph_is_recorded_is_refused() -> None:
    x = torch.arange(4)
    for read in (lambda: x[1].item(), lambda: x.nonzero(), lambda: bool(x.sum() > 3)):
        with (
            pytest.raises(RuntimeError, match="hands a device's value to Python while a graph is"),
            CpuStream().capture(),
        ):
            read()
    assert x[1].item() == 1


@pytest.mark.parametrize("by_flag", [False, True])
def test_events_of_a_replay_are_those_of_the_first_run(by_flag: bool) -> None:
    events: list[str] = []
    stream = CpuStream(events.append, by_flag=by_flag)
    done = torch.zeros(1, dtype=torch.int32) if by_flag else None

    def work() -> None:
        events.append("works")
        if done is not None:
            done.numpy()[0] = 1

    function = Callbacks(work, lambda: events.append("waits"))
    x = torch.ones(2)
    with stream.capture() as graph:
        host = stream.copy_in(x)
        stream.submit(function)
        out = stream.copy_out(host)
        stream.join(function, done)
    waits = [] if by_flag else ["waits"]
    order = ["copy in", "submit", "works", "copy out", *waits, "join"]
    assert events == order
    x.fill_(3)
    graph.replay()
    assert events == order * 2
    assert out.tolist() == [3, 3]


def test_streams_wait_for_one_another_in_a_replay_as_in_the_first_run() -> None:
    events: list[str] = []
    first, second = CpuStream(lambda e: events.append(f"first {e}")), CpuStream(events.append)
    with first.capture() as graph:
        event = first.record()
        second.wait(event)
        first.wait(second.record())
    event.synchronize()
    assert events == ["first record", "wait", "record", "first wait"]
    graph.replay()
    assert events == ["first record", "wait", "record", "first wait"] * 2


def test_a_graph_of_several_streams_begins_and_ends_in_the_first() -> None:
    events: list[str] = []
    first, *others = (CpuStream(lambda e, n=n: events.append(f"{n} {e}")) for n in range(3))  # type: ignore[misc]  # which n
    with first.capture(*others):
        events.append("recorded")
    begin = ["0 record", "1 wait", "0 record", "2 wait"]
    assert events == [*begin, "recorded", "1 record", "0 wait", "2 record", "0 wait"]


@pytest.mark.parametrize("ordered", [True, False])
def test_replays_show_whether_streams_wait_for_what_they_read(ordered: bool) -> None:
    """They take turns in another way each time: without an event, some replay is wrong."""
    first, second = CpuStream(), CpuStream()
    x = torch.ones(1)
    with first.capture(second) as graph:
        y = x + 1
        if ordered:
            second.wait(first.record())
        with use(second, graph):
            z = y * 10
        if ordered:
            first.wait(second.record())
        out = z + x
    right = []
    for value in (2.0, 3.0, 4.0):
        x.fill_(value)
        graph.replay()
        right.append(out.item() == (value + 1) * 10 + value)
    assert all(right) == ordered


def test_a_recording_that_fails_in_one_stream_ends_in_all() -> None:
    events: list[str] = []
    first, second = CpuStream(events.append), CpuStream()
    with pytest.raises(ZeroDivisionError), first.capture(second):
        1 / 0  # noqa: B018
    assert events == ["record", "wait"]
    assert recorded_graph() is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_graph_of_two_gpus_replays_with_the_inputs_of_now() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    first, second = (CudaStream(torch.device("cuda", n)) for n in range(2))
    x = torch.ones(1 << 20, device=first.device)

    def step() -> torch.Tensor:
        there = (x * 2).to(second.device)
        for _ in range(8):
            there = there + 1
        return there.to(first.device) + x

    step()
    with first.capture(second) as graph:
        out = step()
    for value in (2.0, 3.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(out, torch.full_like(x, 3 * value + 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_stream_of_a_gpu_waits_for_another() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    gpu = torch.device("cuda:0")
    stream, side = CudaStream(gpu), torch.cuda.Stream(gpu)
    x = torch.ones(1 << 24, device=gpu)
    for _ in range(20):
        x = x * 1.0625
    event = stream.record()
    with torch.cuda.stream(side):
        CudaStream(gpu).wait(event)
        y = x + 1
        done = CudaStream(gpu).record()
    done.synchronize()
    assert torch.equal(y, x + 1)


def test_copies_are_contiguous_and_of_the_moment() -> None:
    x = torch.arange(6.0).view(2, 3).t()
    host = CpuStream().copy_in(x)
    assert host.is_contiguous()
    x.zero_()
    assert host.tolist() == [[0, 3], [1, 4], [2, 5]]
    out = CpuStream().copy_out(host)
    host.zero_()
    assert out.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_replay_asks_every_check_and_raises_the_first_error() -> None:
    asked = []

    def check(number: int, message: str | None) -> Callable[[], None]:
        def run() -> None:
            asked.append(number)
            if message is not None:
                raise ValueError(message)

        return run

    with CpuStream().capture() as graph:
        for number, message in enumerate([None, "first", None, "second"]):
            graph.own(check(number, message))
    with pytest.raises(ValueError, match=r"^first$"):
        graph.replay()
    assert sorted(asked) == [0, 1, 2, 3]


def test_what_a_graph_refers_to_lives_as_long_as_the_graph() -> None:
    class Thing:
        def check(self) -> None:
            pass

    thing, x = Thing(), torch.ones(2)
    with CpuStream().capture() as graph:
        graph.own(thing.check)
        y = x + 1
    held: list[Any] = [weakref.ref(thing), weakref.ref(x), weakref.ref(y)]
    del thing, x, y
    gc.collect()
    assert [reference() is None for reference in held] == [False] * 3
    del graph
    gc.collect()
    assert [reference() is None for reference in held] == [True] * 3


def test_a_stream_is_used_on_its_thread_for_its_device_and_a_while() -> None:
    stream = CpuStream()
    with use(stream):
        assert stream_of(CPU) is stream
        assert recorded_graph() is None
        with stream.capture() as graph:
            assert recorded_graph() is graph
        assert recorded_graph() is None
    assert stream_of(CPU) is not stream


def test_recording_that_fails_leaves_no_graph_behind() -> None:
    with pytest.raises(ZeroDivisionError), CpuStream().capture():
        1 / 0  # noqa: B018
    assert recorded_graph() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_streams_load_no_cuda_bindings() -> None:
    assert "ktransformers.streams" in sys.modules
    assert "cuda.bindings" not in sys.modules


def test_cuda_bindings_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", missing)
    with pytest.raises(ImportError) as caught:
        CudaStream(torch.device("cuda:0"))
    assert str(caught.value) == (
        "calls to the host in a stream of cuda:0 need cuda-bindings: pip install "
        "'ktransformers[gpu]'"
    )


class Runtime:
    """Stands in for cuda.bindings.runtime where memory of the host is registered."""

    __version__ = "13.5.0"
    cudaHostRegisterPortable, cudaHostRegisterReadOnly = 1, 8
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrHostRegisterReadOnlySupported=113)

    def __init__(self, *, read_only: int, refuses: bool = False):
        self.read_only, self.refuses = read_only, refuses
        self.calls: list[tuple[Any, ...]] = []

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, int]:
        assert (attribute, device) == (113, 1)
        return Error.success, self.read_only

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> tuple[Any]:
        self.calls.append(("register", address, nbytes, flags))
        return (Error.memory if self.refuses else Error.success,)

    def cudaHostUnregister(self, address: int) -> tuple[Any]:
        self.calls.append(("unregister", address))
        return (Error.success,)


class Error(enum.IntEnum):
    """As cuda.bindings has them."""

    success = 0
    memory = 2


def test_cuda_bindings_whose_graphs_call_the_host_once_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime(read_only=0)
    runtime.__version__ = "13.4.4"
    with pytest.raises(ImportError) as caught:
        cuda_stream(monkeypatch, runtime)
    assert str(caught.value) == (
        "calls to the host in a stream of cuda:1 need cuda-bindings 13.5 or later, not 13.4.4: pip "
        "install --upgrade 'ktransformers[gpu]'"
    )


def cuda_stream(monkeypatch: pytest.MonkeyPatch, runtime: Any, stream: Any = None) -> CudaStream:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", runtime)
    monkeypatch.setitem(sys.modules, "cuda.bindings", runtime)
    monkeypatch.setitem(sys.modules, "cuda", runtime)
    return CudaStream(torch.device("cuda:1"), stream)


@pytest.mark.parametrize("read_only", [0, 1])
def test_memory_of_the_host_is_registered_as_long_as_it_lives(
    monkeypatch: pytest.MonkeyPatch, read_only: int
) -> None:
    runtime = Runtime(read_only=read_only)
    stream = cuda_stream(monkeypatch, runtime)
    stream.pin(torch.empty(0))  # there is nothing to register
    host = torch.zeros(100, dtype=torch.int32)
    address, flags = host.data_ptr(), 9 if read_only else 1
    stream.pin(host)
    assert runtime.calls == [("register", address, 400, flags)]
    del host
    gc.collect()
    assert runtime.calls[1:] == [("unregister", address)]


def test_memory_that_can_t_be_locked_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = cuda_stream(monkeypatch, Runtime(read_only=0, refuses=True))
    with pytest.raises(RuntimeError) as caught:
        stream.pin(torch.zeros(100, dtype=torch.int32))
    assert str(caught.value) == (
        "cuda:1: memory: 400 bytes of the host's memory can't be locked for the GPU to read"
    )


def test_events_of_a_stream_beside_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    def record() -> str:
        calls.append(("record", None))
        return "event"

    side = SimpleNamespace(
        record_event=record, wait_event=lambda event: calls.append(("wait", event))
    )
    stream = cuda_stream(monkeypatch, Runtime(read_only=0), side)

    @contextmanager
    def current(stream: Any) -> Iterator[None]:
        calls.append(("begin", stream))
        yield
        calls.append(("end", stream))

    monkeypatch.setattr(torch.cuda, "stream", current)
    out = torch.zeros(3)
    stream.fill(out, torch.ones(3))
    stream.wait(stream.record())
    assert out.tolist() == [1, 1, 1]
    assert calls == [("begin", side), ("end", side), ("record", None), ("wait", "event")]
