"""Checks of what a checkpoint returns, for operators that read weights."""

from __future__ import annotations

import torch

from ktransformers.base import Checkpoint
from ktransformers.checkpoint.messages import missing_tensor


def read_checked(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read a tensor that must have `shape`, in the dtype that `infos()` tells.

    Raises ValueError, before anything is read, where the tensor is missing (with the nearest
    names) or of another shape; and as `Checkpoint.read` does.
    """
    infos = checkpoint.infos()
    if name not in infos:
        raise ValueError(missing_tensor(name, infos))
    info = infos[name]
    if info.shape != shape:
        raise ValueError(
            f"{info.file}: {name}: shape {list(info.shape)}, expected {list(shape)}; config and "
            "weights are of different models"
        )
    return checkpoint.read(name)


def check_finite(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError, naming the file, where what `read(name)` gave holds NaN or Inf.

    One pass without a temporary; integers pass.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    least, greatest = torch.aminmax(tensor)  # a NaN anywhere makes both NaN
    if torch.isfinite(least) and torch.isfinite(greatest):
        return
    bad = ~torch.isfinite(tensor)
    first = [int(index) for index in bad.nonzero()[0]]
    raise ValueError(
        f"{checkpoint.infos()[name].file}: {name}: {int(bad.sum()):,} of {tensor.numel():,} values "
        f"are NaN or Inf, the first at {first}; the file is damaged: download or convert it again"
    )
