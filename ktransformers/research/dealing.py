"""Which device gets what of a model: ranges of layers to GPUs, and experts to what is left of them.

Layers go to GPUs in order, a range to each, so that activations cross a border once a token. Where
the GPUs have no room for all layers, the embedding stays with the CPU (a token reads one row), and
then the first layers do, whole. What is left of a GPU holds the routed experts of its range's first
layers, and some of the next one's, if a token uses one of them on average; borders are where GPUs
hold the most experts, and where that leaves a choice, the ranges are as equal as can be. No more
GPUs are used than it takes to hold everything.

Nothing here looks at a model: costs, in bytes, come from `research.machine_plan`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Bytes of one decoder layer's weights."""

    on_gpu: int  # without routed experts
    experts_on_gpu: int  # 0: it has none
    experts_on_cpu: int  # beside the GPU
    on_cpu: int  # of the whole layer, where the CPU computes it


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Bytes of a model at a context."""

    layers: tuple[LayerCost, ...]
    embedding: int
    head: int  # with the last norm
    cache: int  # of one layer
    activations: int  # of a GPU
    activations_with_experts: int  # of a GPU that has routed experts
    num_experts: int  # of a layer that has some
    top_k: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What one GPU has."""

    layers: range
    experts: tuple[int, ...] = ()  # those of the layers whose routed experts it holds, too
    some: tuple[int, int] | None = None  # one of the layers, and how many of its experts it holds
    gpu: int = 0  # its number


@dataclass(frozen=True, slots=True)
class Deal:
    """What each device of a machine has of a model."""

    cpu_layers: int  # the first so many are the CPU's, whole
    embedding_on_gpu: bool
    stages: tuple[Stage, ...]  # of the GPUs that have any, in order; the last one has the head

    @property
    def resident(self) -> tuple[int, ...]:
        """Return all layers whose routed experts a GPU holds, all of them."""
        return tuple(layer for stage in self.stages for layer in stage.experts)

    @property
    def partly_resident(self) -> dict[int, int]:
        """Return the layers of which a GPU holds some experts, and how many."""
        return dict(stage.some for stage in self.stages if stage.some is not None)


def deal(cost: ModelCost, rooms: Sequence[int]) -> Deal | None:
    """Deal a model to GPUs with room for so many bytes each; None where the last layer finds none.

    Raises nothing: whether the CPU has room for the rest, `cpu_bytes` lets one see.
    """
    count = len(cost.layers)
    starts = [(True, 0), *((False, first) for first in range(count))]
    for embedding, first in starts:
        stages = _Dealer(cost, rooms, first, embedding).stages()
        if stages is not None:
            return Deal(first, embedding, stages)
    return None


def cpu_bytes(cost: ModelCost, dealt: Deal) -> int:
    """Return the bytes of weights and cache that a deal leaves to the CPU."""
    whole = sum(layer.on_cpu + cost.cache for layer in cost.layers[: dealt.cpu_layers])
    resident, partly = set(dealt.resident), dealt.partly_resident
    experts = sum(
        layer.experts_on_cpu * (cost.num_experts - partly.get(index, 0)) // cost.num_experts
        for index, layer in enumerate(cost.layers)
        if index >= dealt.cpu_layers and index not in resident
    )
    return whole + experts + (0 if dealt.embedding_on_gpu else cost.embedding)


_Best = tuple[int, int, tuple[Stage, ...]]  # experts held, minus unevenness, stages


class _Dealer:
    """Finds the best stages for the layers from `first` on."""

    def __init__(self, cost: ModelCost, rooms: Sequence[int], first: int, embedding: bool):
        self.cost, self.rooms, self.first, self.embedding = cost, rooms, first, embedding
        self.count = len(cost.layers)
        sizes = (layer.on_gpu + cost.cache for layer in cost.layers)
        self.until = list(accumulate(sizes, initial=0))  # bytes of all layers before one
        with_experts = sum(layer.experts_on_gpu > 0 for layer in cost.layers[first:])
        self.all_experts = with_experts * cost.num_experts

    def stages(self) -> tuple[Stage, ...] | None:
        """Return what each GPU gets, of the fewest that hold everything, or of the best so many."""
        found: list[_Best] = []
        for gpus in range(1, len(self.rooms) + 1):
            best = self._best(gpus)
            if best is not None:
                found.append(best)
                if best[0] == self.all_experts:
                    break
        return max(found, key=lambda best: best[0])[2] if found else None

    def _best(self, gpus: int) -> _Best | None:
        """Return the best deal to so many GPUs, whichever they are, in their order."""
        stage_of = functools.cache(self._stage)

        @functools.cache
        def from_on(gpu: int, begin: int, gpus: int) -> _Best | None:
            """Deal the layers from `begin` on to so many of this GPU and those after it."""
            if begin == self.count:
                return (0, 0, ()) if gpus == 0 else None
            if not 0 < gpus <= len(self.rooms) - gpu:
                return None
            best: _Best | None = None
            for end in range(begin + 1, self.count + 1):
                stage = stage_of(gpu, begin, end)
                if stage is None:
                    break  # nor has it room for more
                rest = from_on(gpu + 1, end, gpus - 1)
                if rest is not None:
                    held, even = self._held(stage) + rest[0], rest[1] - (end - begin) ** 2
                    if best is None or (held, even) > best[:2]:
                        best = held, even, (stage, *rest[2])
            without = from_on(gpu + 1, begin, gpus)
            return without if without and (best is None or without[:2] > best[:2]) else best

        return from_on(0, self.first, gpus)

    def _stage(self, gpu: int, begin: int, end: int) -> Stage | None:
        """Return what a GPU has with these layers; None where it has no room for them."""
        cost, layers = self.cost, range(begin, end)
        used = self.until[layers.stop] - self.until[layers.start]
        if layers.start == self.first and self.embedding:
            used += cost.embedding
        if end == self.count:
            used += cost.head
        if used + cost.activations > self.rooms[gpu]:
            return None
        left = self.rooms[gpu] - used - cost.activations_with_experts
        whole: list[int] = []
        for layer in layers:
            need = cost.layers[layer].experts_on_gpu
            if need > max(left, 0):
                some = cost.num_experts * max(left, 0) // need
                enough = some * cost.top_k >= cost.num_experts
                return Stage(layers, tuple(whole), (layer, some) if enough else None, gpu)
            if need:
                left -= need
                whole.append(layer)
        return Stage(layers, tuple(whole), gpu=gpu)

    def _held(self, stage: Stage) -> int:
        some = 0 if stage.some is None else stage.some[1]
        return len(stage.experts) * self.cost.num_experts + some
