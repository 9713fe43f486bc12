"""What operators on a GPU are asked: which one, and whether it is here.

A plan may be for another machine. So a device is understood when an operator is built, where
`from_module` passes errors on, and looked for (`check_gpu`) when a model is to be loaded.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

LEAST_CAPABILITY = (8, 0)  # Ampere: asynchronous copies, and tensor cores that take bf16


def interpreting() -> bool:
    """Tell whether Triton's kernels are interpreted, on the CPU too: a way to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def named_device(device: object) -> torch.device | None:
    """Return the device that a string names, a GPU with its index; None for anything else."""
    try:
        found = torch.device(device) if isinstance(device, str) else None
    except RuntimeError:  # torch's, of a device that it does not know
        return None
    if found is not None and found.type == "cuda":
        return torch.device("cuda", found.index or 0)
    return found


def gpu_device(device: object) -> torch.device:
    """Return the GPU that a rule names, such as `cuda:0`; the CPU only where Triton interprets.

    Raises ValueError for anything else.
    """
    found = named_device(device)
    if found is not None and found.type == "cuda":
        return found
    if found is not None and found.type == "cpu" and interpreting():
        return found
    raise ValueError(
        f"device {device!r} is not a GPU: expected such as cuda:0 (cpu is for tests, which set "
        "TRITON_INTERPRET=1)"
    )


def check_gpu(device: torch.device) -> None:
    """Raise ValueError, in a sentence, where this machine cannot run kernels on the device."""
    if find_spec("triton") is None:
        raise ValueError("needs Triton, which is not installed: pip install 'ktransformers[gpu]'")
    check_present(device)
    if device.type == "cpu":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        raise ValueError(
            f"needs a GPU of compute capability 8.0 or later, but {device} is a "
            f"{torch.cuda.get_device_name(device)} with {'.'.join(map(str, capability))}"
        )


def check_present(device: torch.device) -> None:
    """Raise ValueError, in a sentence, where this machine has no such GPU."""
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"needs a GPU, {device}, and torch {torch.__version__} finds none here")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"needs {device}, but the last GPU here is cuda:{count - 1}")


def within_reach(device: torch.device) -> torch.device:
    """Return the device, or the CPU where there is no GPU: packing needs none."""
    return device if torch.cuda.is_available() else torch.device("cpu")


def triton_on(device: torch.device) -> str:
    """Say what computes on a device that has passed `check_gpu`, for a report."""
    import triton  # optional, and by now in use

    if interpreting():
        return f"Triton {triton.__version__}'s interpreter on {device}: for tests, and slow"
    return f"Triton {triton.__version__} on {device}, {torch.cuda.get_device_name(device)}"
