"""A checkpoint that serves a tied tensor under both of its names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ktransformers.base import Checkpoint, TensorInfo


class TiedCheckpoint:
    """Another checkpoint's tensors, and those of `same_as` (name -> name) that it leaves out."""

    def __init__(self, checkpoint: Checkpoint, same_as: Mapping[str, str]) -> None:
        """Wrap `checkpoint`."""
        self._checkpoint = checkpoint
        infos = dict(checkpoint.infos())
        self._same_as = {
            name: other for name, other in same_as.items() if name not in infos and other in infos
        }
        self._infos = infos | {name: infos[other] for name, other in self._same_as.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by canonical name, tied ones by both."""
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor by either name."""
        return self._checkpoint.read(self._same_as.get(name, name))
