"""Which experts of a layer lie in a GPU's slots: least recently used, decided on the device.

A step is one call of the layer, whatever its number of tokens. An expert that it uses and that is
in no slot may be uploaded, so that the next step finds it: at most so many in a step, the most
recently used first, each into the slot whose expert was used longest ago, and never in place of
one that this step uses. Of experts whose last step is the same the lower number counts as used
later. `ktransformers.research.expert_policies.Lru` is the same, written to be obvious.

All of it is operations of fixed shapes on the device, and changes tensors in place: a CUDA graph
may hold it, and no value is handed to Python.

Shape suffixes: T tokens, K experts per token, E experts, S slots, U uploads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from typing_extensions import Self

LIMITS = torch.iinfo(torch.int64)


@dataclass(frozen=True, slots=True)
class ExpertSlots:
    """The slots and the past of a layer; all int64, on the device."""

    experts: torch.Tensor  # [S], in each slot
    slot_of: torch.Tensor  # [E + 1], of each expert; S means none, which is all that E ever has
    last_use: torch.Tensor  # [E], the step; below zero: before the first
    steps: torch.Tensor  # [], so far

    @classmethod
    def holding(cls, experts: Sequence[int], num_experts: int, device: torch.device) -> Self:
        """Begin with these experts in slots, as if used in this order, the first one last."""
        S, E = len(experts), num_experts
        held = torch.tensor(experts)
        slot_of, last_use = torch.full((E + 1,), S), torch.full((E,), -S - 1)
        slot_of[held] = torch.arange(S)
        last_use[held] = -1 - torch.arange(S)
        tensors = (held, slot_of, last_use, torch.zeros((), dtype=torch.int64))
        return cls(*(tensor.to(device) for tensor in tensors))

    def step(self, top_k_index: torch.Tensor, uploads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the experts of a step, and decide which to upload for the next one.

        Args:
            top_k_index: [T, K], integers; E means "skip this slot".
            uploads: at most.

        Returns experts, [U], and the slots that each now has, [U]; E means that there is none.
        """
        (E,), (S,) = self.last_use.shape, self.experts.shape
        numbers = torch.arange(E + 1, device=self.experts.device)
        chosen = torch.zeros(E + 1, dtype=torch.bool, device=numbers.device)
        used = chosen.scatter(0, top_k_index.flatten().long(), True)[:E]
        rank = self.last_use * E - numbers[:E]  # no two alike, higher where the use was later
        missing = used & (self.slot_of[:E] == S)
        uploads = min(uploads, S)
        latest, experts = rank.masked_fill(~missing, LIMITS.min).topk(uploads)
        oldest = rank[self.experts].masked_fill(used[self.experts], LIMITS.max)
        earliest, slots = oldest.topk(uploads, largest=False)
        none = (latest == LIMITS.min) | (earliest == LIMITS.max)
        experts, leaving = experts.masked_fill(none, E), self.experts[slots]
        # What is written at E is what it has.
        self.slot_of.scatter_(0, leaving.masked_fill(none, E), S)
        self.slot_of.scatter_(0, experts, slots.masked_fill(none, S))
        self.experts.scatter_(0, slots, leaving.where(none, experts))
        self.steps.add_(1)
        self.last_use.copy_(self.steps.where(used, self.last_use))
        return experts, slots
