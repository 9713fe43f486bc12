"""Where a kernel runs: on the GPU of its tensors, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from ktransformers.streams import CpuStream, stream_of


def is_interpreted(kernel: Any) -> bool:
    """Tell whether TRITON_INTERPRET=1 was set when the kernel was imported."""
    return isinstance(kernel, InterpretedFunction)


def takes_ptx(kernel: Any) -> bool:
    """Tell whether a kernel may hold instructions of NVIDIA's."""
    return not is_interpreted(kernel) and torch.version.hip is None


class _Replayable:
    """An interpreted kernel, which the CPU's graphs take for no operation of torch."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            stream = stream_of(torch.device("cpu"))
            assert isinstance(stream, CpuStream)
            stream.do(partial(self.kernel[grid], *args, **kwargs))

        return launch


def launched(kernel: Any) -> Any:
    """Return a kernel to be launched such that graphs replay it."""
    return _Replayable(kernel) if is_interpreted(kernel) else kernel


def check_routing(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> None:
    """Raise ValueError where a router's choice is not of these tokens, [T, D]."""
    if top_k_index.ndim != 2 or len(top_k_index) != len(hidden_states):
        raise ValueError(
            f"top_k_index is {list(top_k_index.shape)}, expected [{len(hidden_states)}, K]"
        )
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"top_k_weights is {list(top_k_weights.shape)}, expected {list(top_k_index.shape)}"
        )


def on_device_of(kernel: Any, tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launch on the GPU of a tensor while the context lasts.

    Raises ValueError where the tensor is on none, and the kernel is not interpreted.
    """
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if not is_interpreted(kernel):
        raise ValueError(
            f"computes on a GPU, but got a tensor on {tensor.device} (Triton's interpreter takes "
            "it, where TRITON_INTERPRET=1 was set from the start)"
        )
    return nullcontext()


def as_multiplied(kernel: Any, x: torch.Tensor) -> torch.Tensor:
    """Return x in fp32 where the interpreter would have to multiply bf16.

    It keeps bf16 as integers, and would multiply those.
    """
    return x.float() if is_interpreted(kernel) and x.dtype == torch.bfloat16 else x
