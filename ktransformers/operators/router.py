"""Fewer experts per token, knowingly.

Takes the place of the router (`mlp.gate`) and lets it choose fewer experts. V3's router selects on
biased scores, weights with unbiased ones and renormalises over what it selected; V2's does not
renormalise. Either way the choice of the expert *groups* does not depend on top_k, so the router
itself, asked for fewer, returns what a model of that top_k would: a narrower index and weight,
[T, K'], which every implementation of experts takes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain

import torch
from torch import nn
from typing_extensions import Self

from ktransformers.base import Checkpoint, Footprint, Operator, Site
from ktransformers.checkpoint import check_finite, read_checked
from ktransformers.rules import top_k_of_layer


class ReducedTopK(Operator):
    """Route each token to its `top_k` best experts instead of the configured number."""

    def __init__(self, router: nn.Module, site: Site, top_k: int):
        super().__init__()
        self.site = site
        self.top_k = top_k
        self.router = router

    @classmethod
    def from_module(cls, module: nn.Module, site: Site, *, top_k: int | Mapping[str, int]) -> Self:
        """Build the operator for a DeepSeek router.

        Args:
            top_k: experts per token, or a mapping from layer ranges to that, such as
                {'1-3': 4, '4-60': 6}.

        Raises ValueError where the layer is given no number, or one that is not from 1 to the
        router's own.
        """
        configured = getattr(module, "top_k", None)
        if type(configured) is not int:
            raise ValueError(f"{type(module).__name__} is no router: it has no integer top_k")
        chosen = top_k
        if isinstance(top_k, Mapping):
            chosen = top_k_of_layer(top_k, site.layer, site.config.num_hidden_layers)
        if type(chosen) is not int or not 1 <= chosen <= configured:
            raise ValueError(f"top_k {chosen!r} is not an integer from 1 to {configured}")
        shared = {id(t): t for t in chain(module.parameters(), module.buffers())}
        router = copy.deepcopy(module, shared)  # a router of its own, over the same tensors
        router.top_k = chosen  # type: ignore[assignment]  # typed as nn.Module's attributes are
        return cls(router, site, chosen)

    def footprint(self) -> Footprint:
        """Say what the router needs: less of experts is felt there, not here."""
        tensors = [*self.router.parameters(), *self.router.buffers()]
        weight_bytes = sum(tensor.nbytes for tensor in tensors)
        flops = 2 * sum(tensor.numel() for tensor in self.router.parameters())
        return Footprint(self.site.device, weight_bytes, flops, weight_bytes)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the router's own tensors."""
        return {
            f"{self.site.name}.{name}": tuple(tensor.shape)
            for name, tensor in self.router.state_dict().items()
        }

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read the router's tensors; the selection bias stays in fp32, as V3 wants it."""
        for name, meta in self.router.state_dict(keep_vars=True).items():
            dtype = torch.float32 if name == "e_score_correction_bias" else meta.dtype
            full_name = f"{self.site.name}.{name}"
            value = read_checked(checkpoint, full_name, tuple(meta.shape))
            check_finite(checkpoint, full_name, value)
            value = value.to(self.site.device, dtype)
            is_parameter = isinstance(meta, nn.Parameter)
            setattr(self.router, name, nn.Parameter(value, False) if is_parameter else value)

    def experts_per_token(self) -> int:
        """Return the number that the probe must find."""
        return self.top_k

    def graph_obstacle(self) -> None:
        """Name none."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (logits [T, E], weights [T, K'], indices [T, K']) as the router does."""
        routed: tuple[torch.Tensor, ...] = self.router(hidden_states)
        return routed

    def extra_repr(self) -> str:
        """Show the number where the module tree is printed."""
        return f"top_k={self.top_k}"
