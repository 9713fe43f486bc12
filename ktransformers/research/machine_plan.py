"""A rule file for a machine and a model, made from what operators say they need.

Three plans on the meta device (everything but routed experts on one GPU; these, too; all on the
CPU), explained, give the bytes of every layer wherever it may go. `dealing` deals by them,
`rule_writer` writes it down, and the file is planned again: what its head predicts is what
`device_memory` says of that plan.
"""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ktransformers.inject import Plan, plan
from ktransformers.research.dealing import Deal, LayerCost, ModelCost, Stage, cpu_bytes, deal
from ktransformers.research.device_memory import (
    CPU_SHARE,
    FIXED,
    GB,
    Machine,
    Need,
    activation_bytes,
    cache_bytes,
    predict,
)
from ktransformers.research.explain import Costs, costs_by_module
from ktransformers.research.rule_writer import FAMILIES, Style, write_head, write_rules
from ktransformers.rules import RuleError, load_rules

GROUP_SIZES = (128, 64, 32)  # the smallest weights first
MOST_GPUS = 16
MOST_CORES = 1024  # threads of the native pool
SHORT_CONTEXT = 4096  # tokens: tried where a longer one finds no room


@dataclass(frozen=True, slots=True)
class Planned:
    """Rules for a machine, verified, and what they need."""

    machine: Machine
    deal: Deal
    style: Style
    needs: Mapping[str, Need]  # by device

    def file(self, title: str, model: str, options: Sequence[str] = ()) -> str:
        """Return the rule file: a comment that says all of this, and the rules.

        Args:
            title: of the model, for people.
            model: as the command that makes this file names it.
            options: of that command, beside the machine's.
        """
        machine = self.machine
        command = ["ktransformers plan", shlex.quote(model)]
        command += [f"--gpu {size:g}" for size in machine.gpus]
        command.append(f"--memory {machine.memory:g}")
        if self.needs["cpu"].total:
            command.append(f"--weight {self.style.weight}")
        made_by = " ".join((*command, *options))
        head = write_head(title, machine, self.deal, self.style, self.needs, made_by)
        return head + write_rules(self.deal, self.style)


def check_request(model: PreTrainedModel, machine: Machine) -> list[str]:
    """Return a sentence for everything that no plan can be made for."""
    wrong = [
        f"--gpu {size:g}: expected a GPU's memory in GB, such as 24"
        for size in machine.gpus
        if not 0 < size < math.inf
    ]
    if not machine.gpus:
        wrong.append(
            "no GPU: torch finds none here; say what the machine has, such as --gpu 24, or take a "
            "rule file for the CPU alone: `ktransformers rules`"
        )
    if len(machine.gpus) > MOST_GPUS:
        wrong.append(f"--gpu is given {len(machine.gpus)} times: expected {MOST_GPUS} at most")
    if not 0 < machine.memory < math.inf:
        wrong.append(f"--memory {machine.memory:g}: expected the memory in GB, such as 512")
    if machine.cores is not None and not 1 <= machine.cores <= MOST_CORES:
        wrong.append(f"--cores {machine.cores}: expected a number from 1 to {MOST_CORES:,}")
    limit = context_limit(model)
    if not 1 <= machine.context <= limit:
        wrong.append(
            f"--context {machine.context}: expected 1 to {limit}, the model's context in tokens"
        )
    if model.dtype != torch.bfloat16:
        dtype = str(model.dtype).removeprefix("torch.")
        wrong.append(f"dtype {dtype}: plans are for bfloat16; say --dtype bfloat16")
    kind = model.config.model_type
    if kind not in FAMILIES:
        wrong.append(
            f"model_type {kind}: no rules are known for it (known: {', '.join(FAMILIES)}); "
            "docs/rules.md says how to write them"
        )
    return wrong


def context_limit(model: PreTrainedModel) -> int:
    """Return how many tokens a model was made for."""
    return int(getattr(model.config, "max_position_embeddings", sys.maxsize))


class Planner:
    """Plans one model for any machine; what its parts need is measured once per format."""

    def __init__(self, model: PreTrainedModel):
        """Take a model on the meta device that `check_request` has nothing against."""
        self.model = model
        self.config: Any = model.config
        self.family = FAMILIES[self.config.model_type]
        self.group_size = _group_size(model)
        names = [f"model.layers.{index}.mlp" for index in range(self.config.num_hidden_layers)]
        with_experts = (hasattr(model.get_submodule(name), "experts") for name in names)
        self.has_experts = tuple(index for index, has in enumerate(with_experts) if has)
        self._measured: dict[str, tuple[tuple[LayerCost, ...], int, int]] = {}

    def plan(self, machine: Machine, weight: str) -> Planned:
        """Return rules for a machine with at least one GPU, planned and verified.

        Args:
            machine: what it has.
            weight: of what the CPU computes, int8 or int4.

        Raises ValueError, saying what is missing where and what would help.
        """
        cost = self._cost(machine, weight)
        dealt = _deal(cost, machine)
        if dealt is None:
            raise ValueError(_no_room_for_a_layer(cost, machine))
        needed = cpu_bytes(cost, dealt)
        if needed > machine.room("cpu"):
            raise ValueError(self._memory_is_short(machine, weight, needed))
        style = self._style(weight, machine.cores)
        planned = self._planned(write_rules(dealt, style))
        needs = predict(self.model, planned, machine.context)
        over = [device for device, need in needs.items() if need.total > machine.room(device)]
        assert not over, f"{', '.join(over)}: dealt more than there is room for: {needs}"
        return Planned(machine, dealt, style, needs)

    def _style(self, weight: str, threads: int | None = None) -> Style:
        return Style(
            self.family,
            weight,
            self.group_size,
            threads,
            self.has_experts,
            self.config.n_routed_experts,
        )

    def _planned(self, rules: str) -> Plan:
        """Plan a rule file's text. Raises ValueError with what operators refuse."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rules.yaml")
            path.write_text(rules)
            try:
                return plan(self.model, load_rules(path), dtype=self.model.dtype)
            except RuleError as error:
                raise ValueError(str(error).replace(f"{path}:", "the plan's line ")) from error

    def _cost(self, machine: Machine, weight: str) -> ModelCost:
        if weight not in self._measured:
            self._measured[weight] = self._measure(weight)
        return ModelCost(
            *self._measured[weight],
            cache_bytes(self.config, machine.context),
            activation_bytes(self.model, machine.context, with_experts=False),
            activation_bytes(self.model, machine.context, with_experts=True),
            self.config.n_routed_experts,
            self.config.num_experts_per_tok,
        )

    def _measure(self, weight: str) -> tuple[tuple[LayerCost, ...], int, int]:
        """Return what each layer, the embedding, and norm and head need."""
        count, style = self.config.num_hidden_layers, self._style(weight)

        def costs(dealt: Deal) -> dict[str, Costs]:
            return costs_by_module(self.model, self._planned(write_rules(dealt, style)))

        every = range(count)
        split = costs(Deal(0, True, (Stage(every),)))
        held = costs(Deal(0, True, (Stage(every, self.has_experts),)))
        # The last layer is never the CPU's: whoever has a GPU has at least that one there.
        whole = costs(Deal(count - 1, False, (Stage(every[-1:]),))) if count > 1 else {}
        layers = []
        for index in every:
            name = f"model.layers.{index}"
            on_gpu = _bytes(split[name], "cuda:0")
            with_experts = _bytes(held[name], "cuda:0")
            alone = _bytes(whole.get(name, {}), "cpu")
            layers.append(
                LayerCost(on_gpu, with_experts - on_gpu, _bytes(split[name], "cpu"), alone)
            )
        head = sum(_bytes(split[name], "cuda:0") for name in ("model.norm", "lm_head"))
        return tuple(layers), _bytes(split["model.embed_tokens"], "cuda:0"), head

    def _memory_is_short(self, machine: Machine, weight: str, needed: int) -> str:
        """Say how much is missing, and what would do, each of which was tried."""

        def enough(weight: str, **changes: Any) -> bool:
            changed = replace(machine, **changes)
            cost = self._cost(changed, weight)
            dealt = _deal(cost, changed)
            return dealt is not None and cpu_bytes(cost, dealt) <= changed.room("cpu")

        helps = [f"--memory {math.ceil(needed / CPU_SHARE / GB)}"]
        if weight == "int8" and enough("int4"):
            helps.append("--weight int4")
        largest = max(machine.gpus)
        for more in range(1, MOST_GPUS - len(machine.gpus) + 1):
            if enough(weight, gpus=(*machine.gpus, *[largest] * more)):
                helps.append(f"{more} more --gpu {largest:g}")
                break
        if machine.context > SHORT_CONTEXT and enough(weight, context=SHORT_CONTEXT):
            helps.append(f"--context {SHORT_CONTEXT}")
        room = machine.room("cpu")
        return (
            f"memory: {_missing(needed - room)} GB are missing: weights that no GPU has room for "
            f"take {needed / GB:,.1f} GB in {weight}, and of {machine.memory:g} GB "
            f"{room / GB:,.1f} may be used; what would do: {', or '.join(helps)}"
        )


def _deal(cost: ModelCost, machine: Machine) -> Deal | None:
    return deal(cost, [int(size * GB) - FIXED for size in machine.gpus])


def _bytes(costs: Costs, device: str) -> int:
    return costs[device].weight_bytes if device in costs else 0


def _group_size(model: PreTrainedModel) -> int:
    """Return the largest size of groups that divides the inputs of all that goes to GPUs."""
    config: Any = model.config
    inputs = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    inputs |= {config.hidden_size, config.moe_intermediate_size}
    for size in GROUP_SIZES:
        if not any(count % size for count in inputs):
            return size
    odd = [str(count) for count in sorted(inputs) if count % GROUP_SIZES[-1]]
    raise ValueError(
        f"projections of {', '.join(odd)} inputs: weights in four bits on a GPU need multiples of "
        f"{GROUP_SIZES[-1]}"
    )


def _missing(nbytes: float) -> str:
    """Return GB, rounded up: so many more would do."""
    return f"{math.ceil(nbytes / GB * 10) / 10:,.1f}"


def _no_room_for_a_layer(cost: ModelCost, machine: Machine) -> str:
    """Say what the least that a GPU can be given needs: the last layer, and the head."""
    last = cost.layers[-1].on_gpu + cost.cache + cost.head
    need = Need(last - cost.cache, cost.cache, cost.activations, FIXED)
    largest = max(machine.gpus)
    return (
        f"GPU: {_missing(need.total - largest * GB)} GB are missing: one layer and the head take "
        f"{need.total / GB:.1f} GB ({need}), and the largest GPU has {largest:g}; take a larger "
        f"one, or less than --context {machine.context}, or a rule file for the CPU alone: "
        "`ktransformers rules`"
    )
