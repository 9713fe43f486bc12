"""What rules make of a model, known before any weight is read: its tree, and what it will need.

Layers and experts that are equal (class, shapes, rule, kwargs) and follow each other are one row.
A module that no rule took, and beneath which no rule took anything, is one row as well, or none
if it has no weights.

Costs are those of the weights: FLOPs of products with them (two per multiply and add) and their
bytes. Attention over the context, norms and activations are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby

import torch
from torch import nn
from transformers import PreTrainedModel

from ktransformers.base import Operator
from ktransformers.inject import Plan, Replacement


@dataclass(frozen=True, slots=True)
class Cost:
    """What weights need."""

    weight_bytes: int = 0
    flops_per_token: int = 0
    bytes_read_per_token: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.flops_per_token + other.flops_per_token,
            self.bytes_read_per_token + other.bytes_read_per_token,
        )


Costs = Mapping[str, Cost]  # by device


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the tree: one module, or several that are equal."""

    depth: int
    label: str  # such as experts, layers.1-60
    module_class: str
    replacement: Replacement | None  # of the first of them
    count: int  # how many are equal
    weight_bytes: int  # of one of them, with everything beneath


@dataclass(frozen=True, slots=True)
class Explanation:
    """A model under a plan."""

    rows: tuple[Row, ...]
    costs: Costs  # under the plan
    plain_costs: Costs  # of the model as HuggingFace makes it


def explain(model: PreTrainedModel, planned: Plan) -> Explanation:
    """Describe what `planned` makes of `model`, which may well be on the meta device."""
    replacements = {item.name: item for item in planned.replacements}
    plain = _Tree(model, {}).node("", model)
    node = _Tree(model, replacements).node("", model)
    rows = (Row(0, "", node.module_class, None, 1, node.weight_bytes), *_rows(node, 0))
    return Explanation(rows, node.costs, plain.costs)


def costs_by_module(model: PreTrainedModel, planned: Plan) -> dict[str, Costs]:
    """Return what each module needs under the plan, with everything beneath it, by dotted name.

    What an operator does itself has no name here.
    """
    replacements = {item.name: item for item in planned.replacements}
    return dict(_named_costs("", _Tree(model, replacements).node("", model)))


def _named_costs(name: str, node: _Node) -> Iterator[tuple[str, Costs]]:
    yield name, node.costs
    for child, below in node.children:
        yield from _named_costs(f"{name}.{child}" if name else child, below)


@dataclass(frozen=True, slots=True)
class _Node:
    """A module with what is beneath it; equal nodes look the same."""

    module_class: str
    shapes: tuple[tuple[str, torch.Size], ...]
    look: str  # what its rule makes of it
    children: tuple[tuple[str, _Node], ...]
    replacement: Replacement | None = field(compare=False)
    costs: Costs = field(compare=False)
    touched: bool = field(compare=False)  # by a rule, here or beneath

    @property
    def weight_bytes(self) -> int:
        return sum(cost.weight_bytes for cost in self.costs.values())


class _Tree:
    """Builds nodes; knows which tensors were counted, since tied ones are there once."""

    def __init__(self, model: PreTrainedModel, replacements: Mapping[str, Replacement]):
        self.config = model.config
        self.replacements = replacements
        self.counted: set[int] = set()

    def node(self, name: str, module: nn.Module, device: str = "cpu") -> _Node:
        """Describe a module that stands on a device; on the meta device that means where it will.

        What a rule keeps on a device is there with all beneath it.
        """
        replacement = self.replacements.get(name)
        operator = None if replacement is None else replacement.operator
        if replacement is not None and "device" in replacement.kwargs and operator is None:
            device = str(replacement.site.device)
        children = tuple(
            (child, self.node(f"{name}.{child}" if name else child, below, device))
            for child, below in module.named_children()
            if operator is None or _is_kept(operator, child)
        )
        costs = dict(self._own_costs(module, operator, device))
        if name.endswith(".experts"):
            costs = {device: self._reduced(cost, name) for device, cost in costs.items()}
        for device, cost in chain.from_iterable(below.costs.items() for _, below in children):
            costs[device] = costs.get(device, Cost()) + cost
        look = "" if replacement is None else _look(replacement)
        return _Node(
            type(module).__name__,
            tuple((key, p.shape) for key, p in module.named_parameters(recurse=False)),
            look,
            children,
            replacement,
            costs,
            replacement is not None or any(below.touched for _, below in children),
        )

    def _reduced(self, cost: Cost, name: str) -> Cost:
        """Return what experts need behind a router that chooses fewer than the config says."""
        router = self.replacements.get(f"{name.rpartition('.')[0]}.gate")
        operator = None if router is None else router.operator
        top_k = None if operator is None else operator.experts_per_token()
        if top_k is None:
            return cost
        share = top_k / self.config.num_experts_per_tok
        flops = int(cost.flops_per_token * share)
        read = int(cost.bytes_read_per_token * share)
        return Cost(cost.weight_bytes, flops, read)

    def _own_costs(self, module: nn.Module, operator: Operator | None, device: str) -> Costs:
        """Return what a module needs without its children, or an operator and what it consumes."""
        if operator is not None:
            costs: dict[str, Cost] = {}
            for need in operator.footprints():
                cost = Cost(need.weight_bytes, need.flops_per_token, need.bytes_read_per_token)
                on = str(need.device)
                costs[on] = costs.get(on, Cost()) + cost
            return costs
        total = Cost()
        for tensor in chain(module.parameters(recurse=False), _persistent_buffers(module)):
            total += self._tensor_cost(module, tensor)
        return {device: total} if total != Cost() else {}

    def _tensor_cost(self, module: nn.Module, tensor: torch.Tensor) -> Cost:
        weight_bytes = 0 if id(tensor) in self.counted else tensor.nbytes
        self.counted.add(id(tensor))
        if isinstance(module, nn.Embedding):
            return Cost(weight_bytes, 0, tensor.nbytes // tensor.shape[0])
        share = 1.0
        if tensor.ndim == 3:  # fused experts, [E, outputs, inputs], of which a token gets top_k
            share = min(1.0, self.config.num_experts_per_tok / tensor.shape[0])
        flops = 2 * tensor.numel() if tensor.ndim > 1 else 0
        return Cost(weight_bytes, int(flops * share), int(tensor.nbytes * share))


def _is_kept(operator: Operator, child: str) -> bool:
    return operator.consumes is not None and child not in operator.consumes


def _persistent_buffers(module: nn.Module) -> Iterator[torch.Tensor]:
    buffers = dict(module.named_buffers(recurse=False))
    kept = module.state_dict(keep_vars=True).keys() if buffers else ()
    return (buffer for name, buffer in buffers.items() if name in kept)


def _look(replacement: Replacement) -> str:
    operator_class = replacement.operator_class
    name = "default" if operator_class is None else operator_class.__qualname__
    return f"{replacement.rule.where} {name} {dict(replacement.kwargs)}"


def _rows(node: _Node, depth: int) -> Iterator[Row]:
    """Yield what is beneath a node; a list has no row of its own."""
    for name, child in node.children:
        if child.module_class == "ModuleList":
            yield from _folded(name, child, depth + 1)
        else:
            yield from _row(name, [child], depth + 1)


def _folded(name: str, modules: _Node, depth: int) -> Iterator[Row]:
    for _, run in groupby(enumerate(modules.children), key=lambda item: item[1][1]):
        equal = list(run)
        first, last = equal[0][0], equal[-1][0]
        label = f"{name}.{first}" if first == last else f"{name}.{first}-{last}"
        yield from _row(label, [child for _, (_, child) in equal], depth)


def _row(label: str, equal: list[_Node], depth: int) -> Iterator[Row]:
    node = equal[0]
    if not node.touched and node.weight_bytes == 0:
        return
    yield Row(depth, label, node.module_class, node.replacement, len(equal), node.weight_bytes)
    if node.touched:
        yield from _rows(node, depth)
