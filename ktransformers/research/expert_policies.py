"""Which experts a GPU should hold: recorded routing, replayed against policies.

A trace is what a model's layers chose for tokens that follow each other, [steps, layers, K], as
decode of one sequence would: the layer's number of experts means "no expert". What a policy is
worth is the share of uses that it serves from the GPU. `ResidentExperts` has these policies; `Lru`
here is its decisions, written to be obvious.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ktransformers.claims import LAYER
from ktransformers.expert_profile import most_used
from ktransformers.report import watch_experts

UPLOADS = (1, 2, None)  # a step, at most, that are compared; None: as many as there are slots


@dataclass(frozen=True, slots=True)
class Trace:
    """What the layers of a model chose."""

    layers: tuple[int, ...]  # their numbers
    num_experts: int  # of each
    chosen: torch.Tensor  # [steps, layers, K]

    def split(self, steps: int) -> tuple[Trace, Trace]:
        """Cut it in two, the first of so many steps."""
        first, second = self.chosen[:steps], self.chosen[steps:]
        return (
            Trace(self.layers, self.num_experts, first),
            Trace(self.layers, self.num_experts, second),
        )

    def uses(self) -> dict[int, list[int]]:
        """Count the uses of each expert, by layer."""
        counts = [
            torch.bincount(self.chosen[:, at].flatten(), minlength=self.num_experts + 1)
            for at in range(len(self.layers))
        ]
        return {
            layer: of[: self.num_experts].tolist()
            for layer, of in zip(self.layers, counts, strict=True)
        }

    def steps_of(self, at: int) -> Iterator[list[int]]:
        """Yield what each step used of the layer at a place."""
        for chosen in self.chosen[:, at].tolist():
            yield [expert for expert in chosen if expert != self.num_experts]


@torch.no_grad()
def record_trace(model: PreTrainedModel, token_ids: torch.Tensor, *, window: int) -> Trace:
    """Record the routing of a text, [N], read in windows of so many tokens, each a step.

    Raises ValueError where no layer has experts, or they have different numbers of them.
    """
    chosen: dict[int, list[torch.Tensor]] = {}
    counts: set[int] = set()

    def record(name: str, num_experts: int, top_k_index: torch.Tensor) -> None:
        found = LAYER.search(name)
        if found is None:
            raise ValueError(f"{name}: experts in no layer")
        counts.add(num_experts)
        chosen.setdefault(int(found[1]), []).append(top_k_index.long().cpu())

    with watch_experts(model, record):
        for piece in token_ids.split(window):
            model(input_ids=piece[None].to(model.device), use_cache=False)
    if len(counts) != 1:
        raise ValueError(f"layers with {sorted(counts)} experts: expected one number of them")
    layers = tuple(sorted(chosen))
    stacked = torch.stack([torch.cat(chosen[layer]) for layer in layers], dim=1)
    return Trace(layers, counts.pop(), stacked)


class Lru:
    """The slots of one layer, which hold the experts that were used last."""

    def __init__(self, resident: Sequence[int], num_experts: int, uploads: int | None):
        """Begin with these experts, as if used in this order, the first one last."""
        self.resident = set(resident)
        others = [expert for expert in range(num_experts) if expert not in self.resident]
        self.latest_first = [*resident, *others]
        self.uploads = len(resident) if uploads is None else uploads

    def step(self, used: Sequence[int]) -> int:
        """Return how many of the uses the slots served; then upload what was missed."""
        hits = sum(expert in self.resident for expert in used)
        missed = [e for e in self.latest_first if e in used and e not in self.resident]
        unused = [e for e in self.latest_first if e not in used and e in self.resident]
        for incoming, leaving in zip(missed[: self.uploads], reversed(unused), strict=False):
            self.resident = self.resident - {leaving} | {incoming}
        now = sorted(set(used))
        self.latest_first = now + [e for e in self.latest_first if e not in now]
        return hits


def static_hits(trace: Trace, resident: Mapping[int, Sequence[int]]) -> float:
    """Return the share of uses that experts which stay serve, given those of each layer."""
    hits = total = 0
    for layer, uses in trace.uses().items():
        hits += sum(uses[expert] for expert in resident[layer])
        total += sum(uses)
    return hits / total


def lru_hits(trace: Trace, resident: Mapping[int, Sequence[int]], uploads: int | None) -> float:
    """Return the share of uses that slots serve, which begin with these experts of each layer."""
    hits = total = 0
    for at, layer in enumerate(trace.layers):
        slots = Lru(resident[layer], trace.num_experts, uploads)
        for used in trace.steps_of(at):
            hits += slots.step(used)
            total += len(used)
    return hits / total


def compare(before: Trace, trace: Trace, slots: int) -> dict[str, float]:
    """Return the share of uses that each policy serves with so many slots a layer.

    Args:
        before: where the profile is from.
        trace: what is served.
        slots: of each layer.
    """
    first = {layer: list(range(slots)) for layer in trace.layers}
    profiled = {layer: most_used(uses, slots) for layer, uses in before.uses().items()}
    shares = {
        "static, the first": static_hits(trace, first),
        "static, by profile": static_hits(trace, profiled),
    }
    for uploads in UPLOADS:
        name = "lru, any uploads" if uploads is None else f"lru, {uploads} a step"
        shares[name] = lru_hits(trace, profiled, uploads)
    return shares
