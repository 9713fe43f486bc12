"""Unread tensors that transformers takes in place of safetensors slices.

`transformers.core_model_loading.convert_and_load_state_dict_in_model` renames and fuses what a
state dict holds, and reads each value by `tensor[...]` in a thread of its own pool. Given these,
it loads modules from any checkpoint without opening a file or waking a quantiser.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import EllipsisType

import torch

from ktransformers.base import Checkpoint
from ktransformers.checkpoint.checks import check_finite
from ktransformers.checkpoint.messages import listed

Index = EllipsisType | slice | int | tuple[EllipsisType | slice | int, ...]


class LazyTensor:
    """One tensor of a checkpoint, read anew each time that it is indexed."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        """Name a tensor of `checkpoint`."""
        self._checkpoint = checkpoint
        self._name = name

    def get_shape(self) -> list[int]:
        """Return the shape, as safetensors' slices do."""
        return list(self._checkpoint.infos()[self._name].shape)

    def __getitem__(self, index: Index) -> torch.Tensor:
        """Read the tensor and index it; raises ValueError where it holds NaN or Inf."""
        tensor = self._checkpoint.read(self._name)
        check_finite(self._checkpoint, self._name, tensor)
        return tensor[index]


def lazy_state_dict(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, LazyTensor]:
    """Return a state dict of unread tensors, by canonical name.

    Raises ValueError listing the names that the checkpoint lacks.
    """
    names = list(names)
    infos = checkpoint.infos()
    missing = [name for name in names if name not in infos]
    if missing:
        raise ValueError(f"no such tensors in the checkpoint: {listed(missing, 20)}")
    return {name: LazyTensor(checkpoint, name) for name in names}
