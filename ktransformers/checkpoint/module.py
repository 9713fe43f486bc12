"""An already loaded module as a source of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ktransformers.base import TensorInfo
from ktransformers.checkpoint.messages import listed


class ModuleSource:
    """Parameters and persistent buffers of a module, which it keeps alive."""

    def __init__(self, module: nn.Module) -> None:
        """Take the tensors that `module` has now.

        Raises ValueError where some are on the meta device, and thus have no values.
        """
        label = f"loaded {type(module).__name__}"
        self._tensors: dict[str, torch.Tensor] = {
            name: value
            for name, value in module.state_dict().items()
            if isinstance(value, torch.Tensor)  # not a module's extra state
        }
        on_meta = [name for name, tensor in self._tensors.items() if tensor.is_meta]
        if on_meta:
            raise ValueError(
                f"{label}: {listed(on_meta)}: on the meta device, without values; load the module "
                "first, or name a checkpoint"
            )
        self._infos = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype, label, tensor.nbytes)
            for name, tensor in self._tensors.items()
        }

    def stored(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by the module's name for it."""
        return self._infos

    def read_range(self, name: str, start: int, count: int) -> torch.Tensor:
        """Copy `count` elements from `start` on, in row-major order, to the CPU, 1-D."""
        flat = self._tensors[name].reshape(-1)
        return flat[start : start + count].to("cpu", copy=True)
