"""What was replaced, what it holds, and what was measured: the report of a loaded model."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ktransformers import _native
from ktransformers.base import Operator
from ktransformers.inject import Plan, format_replacements
from ktransformers.placement import PlacedOperator
from ktransformers.token_graph import graph_line


@dataclass(frozen=True, slots=True)
class Report:
    """What `optimize_and_load` did; `str()` prints it."""

    replacements: tuple[str, ...]  # a line per rule and kind, folded over equal layers
    bytes_by_device: dict[str, int]  # parameters and buffers, shared ones counted once
    experts_per_token: float | None  # measured in a probe over all MoE layers; None without any
    isa: str  # the CPU kernels that dispatch chose
    cache: str | None = None  # what came from a packed cache, or why nothing did
    numa: tuple[str, ...] = ()  # where packed weights lie, a line for each way
    kernels: tuple[str, ...] = ()  # what computes operators besides the CPU kernels
    decode: str | None = None  # whether a token is one graph; None on the CPU alone

    def __str__(self) -> str:
        devices = ", ".join(f"{d}: {n / 2**20:,.1f} MiB" for d, n in self.bytes_by_device.items())
        lines = [*self.replacements, f"memory of weights: {devices}"]
        lines += [f"NUMA: {line}" for line in self.numa]
        if self.cache is not None:
            lines.append(f"packed cache: {self.cache}")
        lines.append(f"CPU kernels: {self.isa}")
        lines += [f"other kernels: {line}" for line in self.kernels]
        if self.decode is not None:
            lines.append(f"decode: {self.decode}")
        if self.experts_per_token is not None:
            lines.append(f"experts per token, measured: {self.experts_per_token:.2f}")
        return "\n".join(lines)


class ExpertCounter:
    """Counts the routed experts that tokens were really given, over layers."""

    def __init__(self) -> None:
        self.by_layer: dict[str, float] = {}  # name of the module -> mean per token
        self._used: dict[str, int] = defaultdict(int)
        self._tokens: dict[str, int] = defaultdict(int)

    def record(self, name: str, num_experts: int, top_k_index: torch.Tensor) -> None:
        """Count one call: slots whose index is `num_experts` were skipped."""
        self._used[name] += int((top_k_index != num_experts).sum())
        self._tokens[name] += top_k_index.shape[0]
        if self._tokens[name]:
            self.by_layer[name] = self._used[name] / self._tokens[name]

    @property
    def mean(self) -> float | None:
        """Mean over tokens and MoE layers; None where no experts module ran."""
        tokens = sum(self._tokens.values())
        return sum(self._used.values()) / tokens if tokens else None


@contextmanager
def count_experts(model: nn.Module) -> Iterator[ExpertCounter]:
    """Count, while the context lasts, the experts that each token gets in `model`'s forwards."""
    counter = ExpertCounter()
    with watch_experts(model, counter.record):
        yield counter


@contextmanager
def watch_experts(
    model: nn.Module, record: Callable[[str, int, torch.Tensor], None]
) -> Iterator[None]:
    """Call `record(name, num_experts, top_k_index [T, K])` for all routing while the context lasts.

    Looks at what arrives at the modules named `experts`, replaced or not, as transformers calls
    them: `experts(hidden_states[T, D], top_k_index[T, K], top_k_weights[T, K])`; operators that
    do the experts' work in one with the router's report it themselves, under their own name.
    """
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Operator):
            module.watch_routing(partial(record, name))
        takes = inspect.signature(module.forward).parameters
        if name.rpartition(".")[2] == "experts" and "top_k_index" in takes:
            handles.append(_watch(name, module, record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, Operator):
                module.watch_routing(None)


def _watch(name: str, module: nn.Module, record: Callable[[str, int, torch.Tensor], None]) -> Any:
    num_experts = int(module.num_experts)  # type: ignore[arg-type]  # an int on every experts class

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        record(name, num_experts, index)

    return module.register_forward_pre_hook(before_forward, with_kwargs=True)


def bytes_by_device(model: nn.Module) -> dict[str, int]:
    """Add up parameters and buffers per device; tensors that share memory count once."""
    totals: dict[str, int] = defaultdict(int)
    storages = {
        (str(tensor.device), tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in chain(model.parameters(), model.buffers())
    }
    for (device, _), nbytes in storages.items():
        totals[device] += nbytes
    return dict(totals)


def numa_lines(model: nn.Module) -> list[str]:
    """Say how much memory the packed weights of a model take on which nodes, folded."""
    totals: dict[str, int] = defaultdict(int)  # of one copy
    for module in model.modules():
        if not isinstance(module, PlacedOperator):
            continue
        for of in module.packed_matrices().values():
            placement = module.placement
            if of.in_one_part:
                placement = replace(placement, mode="interleave")
            line = str(placement) if module.is_bound else "mapped, bound to no node"
            if module.is_bound and placement.unbound is not None:
                line += f", not bound ({placement.unbound})"
            line += f": {placement.copies} x " if placement.mode == "replicate" else ": "
            totals[line] += of.nbytes
    return [f"{line}{nbytes / 2**20:,.1f} MiB" for line, nbytes in totals.items()]


def _computed_by(model: nn.Module) -> tuple[str, ...]:
    operators = (module for module in model.modules() if isinstance(module, Operator))
    return tuple(dict.fromkeys(filter(None, (each.computed_by() for each in operators))))


def build_report(
    model: PreTrainedModel, plan: Plan, experts_per_token: float | None, cache: str | None = None
) -> Report:
    """Describe a loaded model."""
    return Report(
        replacements=tuple(format_replacements(plan)),
        bytes_by_device=bytes_by_device(model),
        experts_per_token=experts_per_token,
        isa=_native.isa(),
        cache=cache,
        numa=tuple(numa_lines(model)),
        kernels=_computed_by(model),
        decode=graph_line(model),
    )
