"""Experts from pinned memory of the host into a GPU's slots, the device knowing which.

A copy engine must be told addresses by the host, which does not know them: a kernel reads the
host's memory instead, over the bus, 16 bytes a thread. So an upload is part of a CUDA graph whose
replays each bring other experts.

Shape suffixes: E experts, S slots, U uploads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktransformers.operators.kernels.launch import launched, on_device_of

BLOCK = 1024  # words of a program: a thread has four loads in flight


@triton.jit
def expert_upload_kernel(host, slots, experts, targets, EXPERTS, WORDS, BLOCK: tl.constexpr):
    """Copy WORDS words of experts[u] in `host` to targets[u] in `slots`; EXPERTS copies nothing."""
    u = tl.program_id(1)
    expert = tl.load(experts + u)
    if expert >= EXPERTS:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(host + expert * WORDS + at, mask=at < WORDS)
    tl.store(slots + tl.load(targets + u) * WORDS + at, value, mask=at < WORDS)


def expert_upload(
    host: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, targets: torch.Tensor
) -> None:
    """Copy experts of `host` into `slots`.

    Args:
        host: [E, ...], contiguous, in memory that the device of `slots` can read: pinned.
        slots: [S, ...], contiguous, of the same shape and dtype otherwise.
        experts: [U] int64, on that device; E copies nothing.
        targets: [U] int64, the slot of each, no two alike.

    Raises ValueError where shapes or dtypes differ.
    """
    if (host.shape[1:], host.dtype) != (slots.shape[1:], slots.dtype):
        raise ValueError(
            f"slots of {slots.dtype} {list(slots.shape[1:])}, expected {host.dtype} "
            f"{list(host.shape[1:])}, as the host has"
        )
    source, into = words(host), words(slots)
    count = source.shape[1]
    grid = (triton.cdiv(count, BLOCK), len(experts))
    with on_device_of(expert_upload_kernel, slots):
        launched(expert_upload_kernel)[grid](
            source, into, experts, targets, len(host), count, BLOCK=BLOCK
        )


def words(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor, [N, ...], as [N, integers], the widest that divide each of its N."""
    flat = tensor.view(len(tensor), -1)
    nbytes = flat.shape[1] * flat.element_size()
    kinds = (torch.int64, torch.int32, torch.int16, torch.uint8)
    return flat.view(next(kind for kind in kinds if nbytes % kind.itemsize == 0))
