"""Where a kernel runs: on the GPU of its tensors, or in Triton's interpreter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction


def is_interpreted(kernel: Any) -> bool:
    """Tell whether TRITON_INTERPRET=1 was set when the kernel was imported."""
    return isinstance(kernel, InterpretedFunction)


def takes_ptx(kernel: Any) -> bool:
    """Tell whether a kernel may hold instructions of NVIDIA's."""
    return not is_interpreted(kernel) and torch.version.hip is None


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
