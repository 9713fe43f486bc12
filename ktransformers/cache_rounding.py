"""Latents of a cache in fewer bits, on scales of each token's own: by its largest magnitudes.

int8 counts in steps of 127ths of the largest of 128 neighbours, as wide as the tiles of DeepSeek's
own fp8 caches, so that an outlier costs its group alone. fp8 is e4m3, with 4 significant bits and
448 as the largest value, which the scale makes of a token's largest magnitude: a value is off by a
16th of itself at most, or, where it is 2^-15 of the largest or less, by 2^-10 steps of the scale.
Tokens share no scale, so that a page may fill up token by token and nothing is rounded twice.

Shape suffixes: m tokens, C kv_lora_rank, G groups.
"""

from __future__ import annotations

import torch

from ktransformers import _native
from ktransformers.gpu_options import interpreting

GROUP = 128  # int8 latents that share a scale: latent_group in csrc/mla/mla.h
FP8_CAPABILITY = (8, 9)  # Ada and Hopper: instructions that convert e4m3


def check_format(format: str, device: torch.device) -> None:
    """Raise ValueError where latents of a format can't lie on a device."""
    if format == "int8" and device.type != "cpu":
        raise ValueError(
            f"int8 latents are for the CPU: on {device} take fp8, bf16 or fp32 (cache_format of "
            "the rules, or --cache-format)"
        )
    if format != "fp8":
        return
    if device.type == "cpu" and not interpreting():
        raise ValueError(
            "fp8 latents are for GPUs: on the CPU take int8, bf16 or fp32 (cache_format of the "
            "rules, or --cache-format)"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ValueError(
            f"fp8 latents need a GPU of compute capability 8.9 or later, and {device} is a "
            f"{torch.cuda.get_device_name(device)}: take bf16"
        )


def quantised(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows [m, C] symmetrically to int8 or fp8.

    Returns also the scales, fp32 [m, G] of int8, the last group of C values the rest; [m] of fp8.
    """
    if dtype == torch.int8:
        return _int8(rows)
    wide = rows.float()
    scale = wide.abs().amax(dim=-1) / torch.finfo(dtype).max
    return (wide / scale.where(scale > 0, 1)[:, None]).to(dtype), scale


def dequantised(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return in fp32, [m, C], what `quantised` has rounded."""
    if rows.dtype == torch.int8:
        each = scale.repeat_interleave(GROUP, dim=1)[:, : rows.shape[1]]
    else:
        each = scale[:, None]
    return rows.float() * each


def scale_shape(format: str, C: int) -> tuple[int, ...]:
    """Return the shape of a token's scales in a format that has some."""
    return (-(-C // GROUP),) if format == "int8" else ()


def _int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m, C = rows.shape
    (G,) = scale_shape("int8", C)
    # Zeros change no group's largest magnitude.
    groups = torch.nn.functional.pad(rows.contiguous(), (0, -C % GROUP)).view(-1, GROUP)
    q = torch.empty(groups.shape, dtype=torch.int8)
    count = len(groups)
    scale = torch.empty(count, dtype=torch.float32)
    total = torch.empty(count, dtype=torch.int32)
    if rows.dtype == torch.float16:
        groups = groups.float()
    _native.quantize_rows(groups, q, scale, total)
    return q.view(m, G * GROUP)[:, :C], scale.view(m, G)
