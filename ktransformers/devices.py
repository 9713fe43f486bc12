"""Modules that rules keep (`class: default`) on a device: `kwargs: {device: 'cuda:0'}`.

What a rule keeps on a device stands there with all that is beneath it, but for what inner rules
keep elsewhere; operators place their own weights. Tensors that reach such a module are moved to it,
and nothing is moved back: what comes next moves it where it needs it. So layers on several GPUs
need no more than a rule for each range of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ktransformers.base import Operator
from ktransformers.gpu_options import named_device


def kept_device(kwargs: Mapping[str, Any]) -> torch.device | None:
    """Return the device that a rule keeps modules on, if it names one.

    Raises ValueError where that is neither the CPU nor a GPU.
    """
    if "device" not in kwargs:
        return None
    found = named_device(kwargs["device"])
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{kwargs['device']!r} is no device: expected cpu, or a GPU such as cuda:0"
        )
    return found


def keep_on(model: nn.Module, places: Mapping[str, torch.device]) -> None:
    """Move modules by name, and let them move what reaches them."""
    moved: _Moved = {}
    devices: dict[str, torch.device | None] = {}  # by module, outer before inner
    for name, module in model.named_modules():
        device = places.get(name, devices.get(name.rpartition(".")[0]))
        devices[name] = device
        if device is not None and not isinstance(module, Operator):
            _move(module, device, moved)
        if name in places:
            module.register_forward_pre_hook(Bring(places[name]), with_kwargs=True)


# By tensor and device: the tensor, which must live lest another get its id, and its copy there.
_Moved = dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]]


def _move(module: nn.Module, device: torch.device, moved: _Moved) -> None:
    """Move what a module itself holds; what modules share they share on each device."""

    def there(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == device:
            return tensor
        return moved.setdefault((id(tensor), device), (tensor, tensor.detach().to(device)))[1]

    for name, parameter in module.named_parameters(recurse=False):
        copy = there(parameter)
        if copy is not parameter:
            module._parameters[name] = nn.Parameter(copy, parameter.requires_grad)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = there(buffer)


class Bring:
    """A hook that moves what reaches a module."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments, all their tensors on the device."""
        return tree_map(self._moved, args), tree_map(self._moved, kwargs)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device != self.device:
            # To the CPU it would be there before what it holds.
            return value.to(self.device, non_blocking=self.device.type != "cpu")
        return value
