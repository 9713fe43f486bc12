"""What operators on the CPU are asked: weight format, threads, scratch, and where they stand.

Each function raises ValueError with the reason, for `from_module` to pass on.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

from ktransformers import _native

if TYPE_CHECKING:
    import torch

    from ktransformers.base import Site

MAX_THREADS = 1024  # of the native pool
MAX_CHUNK_TOKENS = 1 << 20  # of native layers
GROUP_SIZES = (32, 64, 128)
CACHE_FORMATS = ("bf16", "fp32", "int8")


def thread_count(threads: object) -> int:
    """Return how many threads to compute with; `auto` means every physical core it may run on."""
    if threads == "auto":
        return _cores(affinity())
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads {threads!r} is not 'auto' or a number from 1 to {MAX_THREADS}")
    return threads


def affinity() -> frozenset[int] | None:
    """Return the processors that this process may run on, where the system tells."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


@lru_cache(maxsize=1)
def _cores(affinity: frozenset[int] | None) -> int:
    # Asked once per operator, and it reads some files per processor; only another mask, which is
    # the argument for, changes the answer.
    del affinity
    return _native.default_threads()


def chunk_size(chunk_tokens: object) -> int | None:
    """Return how many tokens to compute at a time; None leaves it to the native layers."""
    if chunk_tokens is None:
        return None
    if type(chunk_tokens) is not int or not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS:
        raise ValueError(f"chunk_tokens {chunk_tokens!r} is not a number from 1 to 1,048,576")
    return chunk_tokens


def check_site(site: Site) -> None:
    """Refuse another device than the CPU, and activations that kernels do not take."""
    check_device(site)
    check_dtype(site)


def check_device(site: Site) -> None:
    """Refuse another device than the CPU."""
    if site.device.type != "cpu":
        raise ValueError(f"computes on the CPU, but stands on {site.device}")


def check_dtype(site: Site) -> None:
    """Refuse activations that kernels do not take."""
    import torch  # engine.py works without it

    if site.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"takes bfloat16 or float32 activations, not {site.dtype}")


def check_cache_format(cache_format: object) -> None:
    """Refuse what latents are not kept in on the CPU; None leaves it open."""
    if cache_format is not None and cache_format not in CACHE_FORMATS:
        expected = ", ".join(CACHE_FORMATS)
        raise ValueError(f"cache_format {cache_format!r} is not supported (expected {expected})")


def scale_dtype(name: str) -> torch.dtype:
    """Return the dtype of a native format's scales."""
    import torch  # engine.py works without it

    return torch.bfloat16 if name.startswith("int4") else torch.float32


def weight_format(weight: str, group_size: int | None, kwarg: str = "group_size") -> str:
    """Return the native name of a format; `kwarg` is what a rule calls the size."""
    if weight not in ("int8", "int4", "bf16"):
        raise ValueError(f"weight {weight!r} is not supported (expected int8, int4, bf16)")
    if weight != "int4":
        if group_size is not None:
            raise ValueError(f"{kwarg} {group_size!r} is for weight int4, not {weight}")
        return weight
    size = 128 if group_size is None else group_size
    if type(size) is not int or size not in GROUP_SIZES:
        raise ValueError(f"{kwarg} {size!r} is not supported (expected 32, 64, 128)")
    return f"int4-{size}"
