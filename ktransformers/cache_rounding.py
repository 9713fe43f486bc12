"""Latents of a cache in fewer bits: each token's on a scale of its own, its largest magnitude.

int8 counts in steps of that over 127. fp8 is e4m3, with 4 significant bits and 448 as the largest
value, which the scale makes of the largest magnitude: a value is off by a 16th of itself at most,
or, where it is 2^-15 of the largest or less, by 2^-10 steps of the scale. A scale per token, not
per page, so that a page may fill up token by token and nothing is ever rounded twice.
"""

from __future__ import annotations

import torch

from ktransformers import _native
from ktransformers.gpu_options import interpreting

ROW_MULTIPLE = 64  # quantize_rows pads its rows to so many
FP8_CAPABILITY = (8, 9)  # Ada and Hopper: instructions that convert e4m3


def check_format(format: str, device: torch.device) -> None:
    """Raise ValueError where latents of a format can't lie on a device."""
    if format == "int8" and device.type != "cpu":
        raise ValueError(f"int8 latents are for the CPU: on {device} take fp8, bf16 or fp32")
    if format != "fp8":
        return
    if device.type == "cpu" and not interpreting():
        raise ValueError("fp8 latents are for GPUs: on the CPU take int8, bf16 or fp32")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ValueError(
            f"fp8 latents need a GPU of compute capability 8.9 or later, and {device} is a "
            f"{torch.cuda.get_device_name(device)}: take bf16"
        )


def quantised(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row symmetrically to int8 or fp8, [*, C]; return also the scales, fp32 [*]."""
    if dtype == torch.int8:
        return _int8(rows)
    wide = rows.float()
    scale = wide.abs().amax(dim=-1) / torch.finfo(dtype).max
    return (wide / scale.where(scale > 0, 1)[:, None]).to(dtype), scale


def _int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m, C = rows.shape
    q = torch.empty(m, -(-C // ROW_MULTIPLE) * ROW_MULTIPLE, dtype=torch.int8)
    scale, total = torch.empty(m), torch.empty(m, dtype=torch.int32)
    if rows.dtype == torch.float16:
        rows = rows.float()
    _native.quantize_rows(rows.contiguous(), q, scale, total)
    return q[:, :C], scale
