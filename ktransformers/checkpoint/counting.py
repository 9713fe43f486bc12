"""A checkpoint that tells how much was read, for progress bars."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from ktransformers.base import Checkpoint, TensorInfo


class CountingCheckpoint:
    """Another checkpoint's tensors; `on_read` is told of the bytes of each read that is done.

    Calls of `on_read` never overlap, whatever thread reads. An exception that it raises ends that
    read.
    """

    def __init__(self, checkpoint: Checkpoint, on_read: Callable[[int], None]) -> None:
        """Wrap `checkpoint`."""
        self._checkpoint = checkpoint
        self._on_read = on_read
        self._lock = threading.Lock()

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by canonical name."""
        return self._checkpoint.infos()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, then report its bytes."""
        tensor = self._checkpoint.read(name)
        with self._lock:
            self._on_read(self._checkpoint.infos()[name].nbytes)
        return tensor
