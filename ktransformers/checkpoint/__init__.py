"""Tensors by HuggingFace name, read lazily, whatever holds them.

A *source* (`safetensors_files`, `module`) knows tensors as they are stored. `canonical` turns any
source into a `Checkpoint`: one tensor per expert, FP8 scales applied.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ktransformers.base import Checkpoint
from ktransformers.checkpoint.canonical import CanonicalCheckpoint
from ktransformers.checkpoint.checks import check_finite, read_checked
from ktransformers.checkpoint.counting import CountingCheckpoint
from ktransformers.checkpoint.lazy import LazyTensor, lazy_state_dict
from ktransformers.checkpoint.messages import nearest_names
from ktransformers.checkpoint.module import ModuleSource
from ktransformers.checkpoint.safetensors_files import SafetensorsSource, fp8_block, locate
from ktransformers.checkpoint.tied import TiedCheckpoint

__all__ = [
    "CountingCheckpoint",
    "LazyTensor",
    "TiedCheckpoint",
    "check_finite",
    "lazy_state_dict",
    "nearest_names",
    "open_checkpoint",
    "read_checked",
]


def open_checkpoint(source: str | os.PathLike[str] | nn.Module) -> Checkpoint:
    """Open a folder of safetensors files, one such file, or an already loaded module.

    Only headers are read. No file stays open.

    Raises ValueError, listing every error that headers show: files that are missing, damaged or
    of another format, dtypes that are not supported, FP8 weights without matching scales.
    """
    if isinstance(source, nn.Module):
        return CanonicalCheckpoint(ModuleSource(source))
    path = Path(source)
    files = SafetensorsSource(locate(path))
    return CanonicalCheckpoint(files, fp8_block(path if path.is_dir() else path.parent))
