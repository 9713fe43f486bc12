"""The last layer's work for the last position alone, where nobody reads the others.

What a prompt is read for is the logits of its last position; of the others, the last layer has to
cache what attention will want of them, and no more. A plain `forward` computes everything; its
logits are the same up to rounding. Our attention does round otherwise: a single query takes the
absorbed form, where many together may take the expanded one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

FULL_OUTPUTS = ("output_hidden_states", "output_router_logits")


class _Call(threading.local):
    """The call that runs on a thread."""

    last_only = False


_call = _Call()


def only_last_position() -> bool:
    """Return whether the model's call that runs here wants the last position of each sequence.

    For operators in the last layer, which the contexts below can't look into.
    """
    return _call.last_only


@contextmanager
def last_position_only(model: PreTrainedModel) -> Iterator[None]:
    """Spare calls of a model work in the last layer, where the last position's logits are kept.

    Holds for calls on this thread with `logits_to_keep=1` that ask for no outputs of layers; their
    logits are those of a full forward up to attention's rounding. Every other call computes
    everything.
    """
    layers = getattr(model.base_model, "layers", None)
    here = threading.get_ident()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == here:
            full = any(kwargs.get(k) or getattr(model.config, k, False) for k in FULL_OUTPUTS)
            _call.last_only = kwargs.get("logits_to_keep") == 1 and not full

    def after(*_: object) -> None:
        if threading.get_ident() == here:
            _call.last_only = False

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    if isinstance(layers, nn.ModuleList):
        handles += _narrow_mlp(layers[-1])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def last_position_of(layer: nn.Module) -> Iterator[None]:
    """Spare calls on this thread of a model's last layer the work for all but the last position."""
    handles = _narrow_mlp(layer)
    outer, _call.last_only = _call.last_only, True
    try:
        yield
    finally:
        _call.last_only = outer
        for handle in handles:
            handle.remove()


def _narrow_mlp(layer: nn.Module) -> list[Any]:
    """Hook a layer's MLP, if it is a module: it sees the last position, where this thread asks."""
    mlp = getattr(layer, "mlp", None)
    here = threading.get_ident()
    length = 0

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal length
        if not _call.last_only or threading.get_ident() != here:
            return None
        length = args[0].shape[1]
        return (args[0][:, -1:], *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        if not _call.last_only or threading.get_ident() != here or length == 1:
            return None
        return output.expand(-1, length, -1)  # nothing reads the others

    if mlp is None:
        return []
    return [mlp.register_forward_pre_hook(before), mlp.register_forward_hook(after)]
