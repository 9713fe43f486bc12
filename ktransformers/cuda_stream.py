"""Streams of NVIDIA GPUs, and CUDA graphs of what is handed to them."""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch

from ktransformers.streams import Event, Graph, HostFunction, Stream, use

LEAST_BINDINGS = (13, 5)  # of cuda-bindings


class CudaStream(Stream):
    """Torch's current stream of a GPU, or another one."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None):
        """Import cuda-bindings, which nothing else needs. Raises ImportError without it."""
        self._stream = stream
        try:
            self._runtime: Any = importlib.import_module("cuda.bindings.runtime")
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
            version: str = importlib.import_module("cuda.bindings").__version__
        except ImportError as error:
            raise ImportError(
                f"calls to the host in a stream of {device} need cuda-bindings: "
                "pip install 'ktransformers[gpu]'"
            ) from error
        # Older ones call the host through a function of their own, which takes the GIL, and whose
        # memory the first replay of a graph frees (cuda-python, issue 790).
        if tuple(map(int, version.split(".")[:2])) < LEAST_BINDINGS:
            raise ImportError(
                f"calls to the host in a stream of {device} need cuda-bindings 13.5 or later, not "
                f"{version}: pip install --upgrade 'ktransformers[gpu]'"
            )
        self.device = device
        self._one_at_a_time = threading.Lock()
        # Of several GPUs one may not wait in a host function: it could hold up another's.
        self.by_flag = torch.cuda.device_count() > 1

    def host_empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """See `Stream`; the memory is pinned."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def beside(self) -> Stream:
        """See `Stream`."""
        return CudaStream(self.device, torch.cuda.Stream(self.device))

    def pin(self, host: torch.Tensor) -> None:
        """See `Stream`: its pages are locked until the tensor goes. Raises RuntimeError."""
        if host.nbytes == 0 or host.is_pinned():
            return
        flags, address = self._runtime.cudaHostRegisterPortable, host.data_ptr()
        # Pages of a mapped file would be copied, were they pinned to be written.
        known = self._runtime.cudaDeviceAttr.cudaDevAttrHostRegisterReadOnlySupported
        error, read_only = self._runtime.cudaDeviceGetAttribute(known, self.device.index or 0)
        self._check((error,))
        if read_only:
            flags |= self._runtime.cudaHostRegisterReadOnly
        try:
            self._check(self._runtime.cudaHostRegister(address, host.nbytes, flags))
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}: {host.nbytes:,} bytes of the host's memory can't be locked for the GPU "
                "to read"
            ) from error
        weakref.finalize(host, self._runtime.cudaHostUnregister, address).atexit = False

    def fill(self, out: torch.Tensor, host: torch.Tensor) -> None:
        """See `Stream`."""
        with torch.cuda.stream(self._current()):
            super().fill(out, host)

    def submit(self, function: HostFunction) -> None:
        """See `Stream`."""
        self._launch(function.submit, function.arguments)

    def join(self, function: HostFunction, done: torch.Tensor | None) -> None:
        """See `Stream`."""
        if done is None:
            self._launch(function.sync, function.arguments)
            return
        equal = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ.value
        # The default stream has no handle but the current device's. Pinned memory has one address
        # for host and device.
        with torch.cuda.device(self.device):
            result = self._driver.cuStreamWaitValue32(self._handle(), done.data_ptr(), 1, equal)
        self._check(result)

    def record(self) -> Event:
        """See `Stream`."""
        return self._current().record_event()  # type: ignore[no-any-return]  # torch leaves it untyped

    def wait(self, event: Event) -> None:
        """See `Stream`; the event is one of another `CudaStream`."""
        self._current().wait_event(event)  # type: ignore[arg-type]  # its own

    def synchronize(self) -> None:
        """See `Stream`."""
        self._current().synchronize()

    @contextmanager
    def _recording(self, others: Sequence[Stream]) -> Iterator[Graph]:
        """Nothing runs while it is recorded."""
        graph = _CudaGraph(self, others)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._one_at_a_time)
            for other in others:
                assert isinstance(other, CudaStream)
                torch.cuda.synchronize(other.device)
                stack.enter_context(torch.cuda.stream(other._recorded))
                # Torch keeps memory for a graph on the graph's own device alone.
                graph.pools.append(torch.cuda.MemPool())
                stack.enter_context(torch.cuda.use_mem_pool(graph.pools[-1], other.device))
            stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(use(self, graph))
            # Relaxed: buffers of the host may be allocated while it is recorded.
            recording = partial(torch.cuda.graph, capture_error_mode="relaxed")
            stack.enter_context(recording(graph.graph, stream=self._recorded))
            yield graph

    @cached_property
    def _recorded(self) -> torch.cuda.Stream:
        """The stream to record in: the default one can't be, and each gets buffers of cuBLAS."""
        return torch.cuda.Stream(self.device)

    def _launch(self, address: int, arguments: int) -> None:
        function = self._runtime.cudaHostFn_t(address)
        with torch.cuda.device(self.device):
            result = self._runtime.cudaLaunchHostFunc(self._handle(), function, arguments)
        self._check(result)

    def _current(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self.device)

    def _handle(self) -> int:
        return int(self._current().cuda_stream)

    def _check(self, result: tuple[Any]) -> None:
        if int(result[0]) != 0:
            raise RuntimeError(f"{self.device}: {result[0].name}")


class _CudaGraph(Graph):
    _in_flight = False

    def __init__(self, stream: Stream, others: Sequence[Stream]) -> None:
        super().__init__()
        self.stream, self.others = stream, others
        self.graph = torch.cuda.CUDAGraph()
        self.pools: list[torch.cuda.MemPool] = []  # of the others

    def launch(self) -> None:
        for other in self.others:  # what it reads there may be on its way
            self.stream.wait(other.record())
        self._in_flight = True
        self.graph.replay()
        for other in self.others:
            other.wait(self.stream.record())
        self.stream.synchronize()
        self._in_flight = False

    def __del__(self) -> None:
        # After Ctrl-C: it would call what is freed with it.
        if self._in_flight:
            torch.cuda.synchronize(self.stream.device)
