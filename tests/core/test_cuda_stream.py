"""What a CudaStream asks of torch and cuda-bindings, in which order, where neither has a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktransformers.cuda_stream import CudaStream
from ktransformers.streams import recorded_graph

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class PretendedCuda:
    """Notes what would be done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        self.current = {device: self.stream_of(device, "default") for device in (FIRST, SECOND)}
        self.fails: int = 0
        self.on = FIRST  # the current device
        for name in ("MemPool", "CUDAGraph", "Stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("stream", "use_mem_pool", "device", "graph", "synchronize", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        runtime = SimpleNamespace(
            cudaHostFn_t=lambda address: f"function {address}",
            cudaLaunchHostFunc=self.host_function,
        )
        flags = SimpleNamespace(CU_STREAM_WAIT_VALUE_EQ=SimpleNamespace(value=1))
        driver = SimpleNamespace(CUstreamWaitValue_flags=flags, cuStreamWaitValue32=self.wait_word)
        bindings = SimpleNamespace(__version__="13.5.0")
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)

    def stream_of(self, device: torch.device, name: str) -> Any:
        where = f"{name} of {device}"

        def record_event() -> str:
            self.calls.append(f"{where} records")
            return f"event of {where}"

        return SimpleNamespace(
            device=device,
            cuda_stream=device.index,
            record_event=record_event,
            wait_event=lambda event: self.calls.append(f"{where} waits for {event}"),
            synchronize=lambda: self.calls.append(f"the host waits for {where}"),
        )

    def Stream(self, device: torch.device) -> Any:  # torch's name
        return self.stream_of(device, "side")

    def MemPool(self) -> str:
        return "pool"

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def current_stream(self, device: torch.device) -> Any:
        return self.current[device]

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(f"the host waits for {device}")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current[stream.device] = self.current[stream.device], stream
        try:
            yield
        finally:
            self.current[stream.device] = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.on = self.on, device
        try:
            yield
        finally:
            self.on = before

    @contextmanager
    def use_mem_pool(self, pool: str, device: torch.device) -> Iterator[None]:
        self.calls.append(f"{pool} on {device}")
        try:
            yield
        finally:
            self.calls.append(f"no {pool} on {device}")

    @contextmanager
    def graph(self, _: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        with self.stream(stream):
            self.calls.append(f"{capture_error_mode} capture begins")
            try:
                yield
            finally:
                self.calls.append("capture ends")

    def host_function(self, stream: int, function: str, arguments: int) -> Any:
        assert self.on.index == stream
        self.calls.append(f"stream {stream} calls {function} with {arguments}")
        return (self.result(),)

    def wait_word(self, stream: int, address: int, value: int, flags: int) -> Any:
        assert self.on.index == stream  # the default stream's handle is that of any device
        self.calls.append(f"stream {stream} waits for {value} ({flags})")
        return (self.result(),)

    def result(self) -> Any:
        class Result(int):
            name = "cudaErrorSo"

        return Result(self.fails)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    return PretendedCuda(monkeypatch)


FORK = ["side of cuda:0 records", "side of cuda:1 waits for event of side of cuda:0"]
JOIN = ["side of cuda:1 records", "side of cuda:0 waits for event of side of cuda:1"]
BEGIN = ["the host waits for cuda:1", "pool on cuda:1", "relaxed capture begins", *FORK]
END = [*JOIN, "capture ends", "no pool on cuda:1"]


def test_two_gpus_are_recorded_in_one_capture_and_launched_in_order(cuda: PretendedCuda) -> None:
    first, second = CudaStream(FIRST), CudaStream(SECOND)
    with first.capture(second) as graph:
        assert recorded_graph() is graph
        cuda.calls.append("work")
    assert cuda.calls == [*BEGIN, "work", *END]
    cuda.calls.clear()
    graph.replay()
    assert cuda.calls == [
        "default of cuda:1 records",
        "default of cuda:0 waits for event of default of cuda:1",
        "replay",
        "default of cuda:0 records",
        "default of cuda:1 waits for event of default of cuda:0",
        "the host waits for default of cuda:0",
    ]


def test_a_capture_that_fails_ends_with_both_streams_together(cuda: PretendedCuda) -> None:
    first, second = CudaStream(FIRST), CudaStream(SECOND)
    for _ in range(2):  # and the next may begin
        cuda.calls.clear()
        with pytest.raises(ZeroDivisionError), first.capture(second):
            1 / 0  # noqa: B018
        assert cuda.calls == [*BEGIN, *END]
        assert recorded_graph() is None


def test_ctrl_c_in_a_launch_frees_nothing_before_its_end(cuda: PretendedCuda) -> None:
    stream = CudaStream(FIRST)
    with stream.capture() as graph:
        pass

    def interrupt() -> None:
        raise KeyboardInterrupt

    cuda.current[FIRST].synchronize = interrupt
    with pytest.raises(KeyboardInterrupt):
        graph.replay()
    cuda.calls.clear()
    del graph
    assert cuda.calls == ["the host waits for cuda:0"]


def test_host_functions_and_words_are_those_of_the_device_s_stream(cuda: PretendedCuda) -> None:
    stream = CudaStream(SECOND)
    assert stream.by_flag
    function: Any = SimpleNamespace(submit=10, sync=20, arguments=30)
    stream.submit(function)
    stream.join(function, None)
    stream.join(function, torch.zeros(1, dtype=torch.int32))
    assert cuda.calls == [
        "stream 1 calls function 10 with 30",
        "stream 1 calls function 20 with 30",
        "stream 1 waits for 1 (1)",
    ]
    cuda.fails = 1
    with pytest.raises(RuntimeError, match=r"^cuda:1: cudaErrorSo$"):
        stream.submit(function)
