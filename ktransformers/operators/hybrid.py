"""Routed experts on the CPU beside a GPU that is busy meanwhile.

Takes the place of a whole MoE module (`mlp`) of DeepSeek-V2 or V3 and does what it does, in another
order: the router's choice goes to the host, the experts start there, and while they compute the
device does the shared experts, and those routed ones that live on it; then all are added. What
computes are the module's children, which stay and may be claimed: a rule must put experts on the
CPU there, all of them (`CpuExperts`) or some (`ResidentExperts`). On the CPU alone it works too,
and gives the same bits as without.

**Deferral** (Chen et al., KTransformers, SOSP 2025). With `deferred_experts: d`, in decode, the
layer waits for its K - d heaviest experts only. The other d go on through the next layer's
attention and are added to what that layer's MoE adds to the residual stream:

    y_l = shared_l(x_l) + awaited_l(x_l) + deferred_{l-1}(x_{l-1})

so that the CPU is never idle, for a model that is not quite the same: `benchmarks/deferral.py`
measures the difference. Prefill defers nothing, nor does a layer that no `HybridMoE` follows; and
experts that live on the device are added at once, also those among the d lightest.

Shape suffixes: B sequences, T new tokens, D hidden_size, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from typing_extensions import Self

from ktransformers.base import Checkpoint, Footprint, Operator, Site
from ktransformers.host_experts import ExpertsCall, HostExperts
from ktransformers.phase import is_decode
from ktransformers.streams import stream_of

KNOWN = (v2.DeepseekV2Moe.forward, v3.DeepseekV3MoE.forward)  # what is done alike here


class _Deferred(threading.local):
    """What a layer leaves to the next one, on each thread."""

    call: ExpertsCall | None = None


class HybridMoE(Operator):
    """Compute routed experts on the CPU and shared experts on the device, at the same time."""

    consumes = ()
    host_children: ClassVar[tuple[str, ...]] = ("experts",)

    def __init__(self, module: nn.Module, site: Site, deferred_experts: int):
        super().__init__()
        self.site = site
        self.deferred_experts = deferred_experts
        self.gate: nn.Module = module.gate  # type: ignore[assignment]  # to mypy Tensor | Module
        self.experts: nn.Module = module.experts  # type: ignore[assignment]
        self.shared_experts: nn.Module = module.shared_experts  # type: ignore[assignment]
        self._arriving = _Deferred()
        self._leaving: _Deferred | None = None  # the next layer's
        self._record: Callable[[int, torch.Tensor], None] | None = None

    @classmethod
    def from_module(cls, module: nn.Module, site: Site, *, deferred_experts: int = 0) -> Self:
        """Build the operator for an MoE module of DeepSeek-V2 or V3.

        Args:
            deferred_experts: of each token, how many are added one layer later, in decode.

        Raises ValueError for another module, and where deferral leaves no expert to be awaited.
        """
        if type(module).forward not in KNOWN:
            raise ValueError(
                "takes the place of a DeepseekV2Moe or DeepseekV3MoE, not of "
                f"{type(module).__name__}"
            )
        if type(deferred_experts) is not int or deferred_experts < 0:
            raise ValueError(f"deferred_experts {deferred_experts!r} is not a number of 0 or more")
        return cls(module, site, deferred_experts)

    def connect(self, operators: Mapping[str, Operator]) -> None:
        """Find the experts, and the layer that deferred ones are left to."""
        name, deferred = self.site.name, self.deferred_experts
        experts = operators.get(f"{name}.experts")
        if not isinstance(experts, HostExperts):
            found = type(experts or self.experts).__name__
            raise ValueError(
                f"its experts are a {found}, expected an operator on the CPU: add a rule for them, "
                "such as to ktransformers.operators.experts.CpuExperts"
            )
        router = operators.get(f"{name}.gate")
        reduced = None if router is None else router.experts_per_token()
        top_k = reduced or self.site.config.num_experts_per_tok
        if deferred >= top_k:
            raise ValueError(
                f"deferred_experts {deferred} leaves none to be awaited: a token gets {top_k}"
            )
        for other in operators.values():
            if isinstance(other, HybridMoE) and _follows(other.site, self.site) and deferred:
                self._leaving = other._arriving

    def footprint(self) -> Footprint:
        """Say that the children need all that is needed."""
        return Footprint(self.site.device, 0, 0, 0)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name none: they are the children's."""
        return {}

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read none."""

    def check_machine(self) -> None:
        """Refuse a GPU whose stream can't call the CPU, for want of cuda-bindings."""
        try:
            stream_of(self.site.device)
        except ImportError as error:
            raise ValueError(str(error)) from error

    def watch_routing(self, record: Callable[[int, torch.Tensor], None] | None) -> None:
        """Report the router's choice: the module of the experts is not called."""
        self._record = record

    def graph_obstacle(self) -> str | None:
        """Name whoever watches the routing: a replay tells nobody."""
        return None if self._record is None else "its routing is watched"

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what the MoE adds to the residual stream, [B, T, D], in the input's dtype.

        Raises ValueError for what the experts find wrong, RuntimeError where their weights are not
        loaded or a gradient is asked for.
        """
        experts: HostExperts = self.experts  # type: ignore[assignment]  # as `connect` has found
        x = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(hidden_states)
        experts.check_no_gradient(hidden_states, weights)
        if self._record is not None:
            self._record(experts.num_experts, index)
        defers = self._leaving is not None and is_decode(hidden_states.shape[1])
        awaited = index.shape[1] - (self.deferred_experts if defers else 0)
        parts = _heaviest_first(index, weights, awaited) if defers else [(index, weights)]

        (now, *later), resident = experts.start(x, parts)
        shared = self.shared_experts(hidden_states)
        out: torch.Tensor = now.join()
        if resident is not None:
            out = out + resident
        out = out.view_as(hidden_states) + shared
        arrived, self._arriving.call = self._arriving.call, None
        if arrived is not None:
            out = out + arrived.join(stream_of(x.device)).view_as(hidden_states)
        if self._leaving is not None:  # what a forward that failed has left there goes
            self._leaving.call = later[0] if later else None
        return out

    def extra_repr(self) -> str:
        """Show the number where the module tree is printed."""
        return f"deferred_experts={self.deferred_experts}"


def _follows(site: Site, before: Site) -> bool:
    return None not in (site.layer, before.layer) and site.layer == before.layer + 1  # type: ignore[operator]  # it looks


def _heaviest_first(
    index: torch.Tensor, weights: torch.Tensor, count: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut each token's experts in two: the `count` heaviest, and the others."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    index, weights = index.gather(-1, order), weights.gather(-1, order)
    return [(index[:, :count], weights[:, :count]), (index[:, count:], weights[:, count:])]
