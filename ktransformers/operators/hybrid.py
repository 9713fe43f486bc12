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

**Streaming.** In prefill the device may compute the routed experts as well, from weights that are
copied to it meanwhile (`streamed_experts`), where that is faster: w8a16 in place of w8a8, say, so
that results are those of the same weights with activations that nobody rounds to int8.

Shape suffixes: B sequences, T new tokens, D hidden_size, K experts per token.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from typing_extensions import Self

from ktransformers.base import Checkpoint, Footprint, Operator, Site
from ktransformers.gpu_options import check_gpu, interpreting
from ktransformers.host_experts import ExpertsCall, HostExperts
from ktransformers.phase import is_decode
from ktransformers.streamed_experts import Mode, StreamedCall, StreamedLayer
from ktransformers.streams import Stream, recorded_graph, stream_of

KNOWN = (v2.DeepseekV2Moe.forward, v3.DeepseekV3MoE.forward)  # what is done alike here


class _Deferred(threading.local):
    """What a layer leaves to the next one, on each thread."""

    call: ExpertsCall | None = None


class HybridMoE(Operator):
    """Compute routed experts on the CPU and shared experts on the device, at the same time."""

    consumes = ()
    host_children: ClassVar[tuple[str, ...]] = ("experts",)

    def __init__(
        self,
        module: nn.Module,
        site: Site,
        deferred_experts: int,
        streamed: StreamedLayer | None = None,
    ):
        super().__init__()
        self.streamed = streamed
        self.site = site
        self.deferred_experts = deferred_experts
        self.gate: nn.Module = module.gate  # type: ignore[assignment]  # to mypy Tensor | Module
        self.experts: nn.Module = module.experts  # type: ignore[assignment]
        self.shared_experts: nn.Module = module.shared_experts  # type: ignore[assignment]
        self._arriving = _Deferred()
        self._leaving: _Deferred | None = None  # the next layer's
        self._record: Callable[[int, torch.Tensor], None] | None = None

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        site: Site,
        *,
        deferred_experts: int = 0,
        stream_prefill: Mode = "auto",
        stream_gib: float = 4,
    ) -> Self:
        """Build the operator for an MoE module of DeepSeek-V2 or V3.

        Args:
            deferred_experts: of each token, how many are added one layer later, in decode.
            stream_prefill: whether a GPU computes the routed experts of prefill, from weights that
                are copied there meanwhile; auto: where that is faster, as reckoned for each chunk.
            stream_gib: memory of the GPU, in GiB, for those weights; all layers share it.

        Raises ValueError for another module, where deferral leaves no expert to be awaited, and
        where prefill can't be streamed but always should.
        """
        if type(module).forward not in KNOWN:
            raise ValueError(
                "takes the place of a DeepseekV2Moe or DeepseekV3MoE, not of "
                f"{type(module).__name__}"
            )
        if type(deferred_experts) is not int or deferred_experts < 0:
            raise ValueError(f"deferred_experts {deferred_experts!r} is not a number of 0 or more")
        return cls(module, site, deferred_experts, _streamed(site, stream_prefill, stream_gib))

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
        layers = [other for other in operators.values() if isinstance(other, HybridMoE)]
        for other in layers:
            if _follows(other.site, self.site) and deferred:
                self._leaving = other._arriving
        if self.streamed is not None:
            self.streamed.connect(experts, [o.streamed for o in layers if o.streamed is not None])

    def footprint(self) -> Footprint:
        """Say that the children need what is needed, but for buffers that layers share."""
        buffers = 0 if self.streamed is None else self.streamed.device_bytes()
        return Footprint(self.site.device, buffers, 0, 0)

    def prefill_tokens(self) -> int | None:
        """Say how long a chunk hides the copies of weights, where these are streamed."""
        return None if self.streamed is None else self.streamed.chunk_tokens()

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
        if self.streamed is not None:
            check_gpu(self.site.device)

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

        stream = stream_of(x.device)
        now: ExpertsCall | StreamedCall
        later: list[ExpertsCall] = []
        resident: torch.Tensor | None = None
        if self._is_streamed(len(x), hidden_states.shape[1]):
            now = self._streamed_call(stream, x, index, weights)
        else:
            (now, *later), resident = experts.start(x, parts)
        shared = self.shared_experts(hidden_states)
        out: torch.Tensor = now.join()
        if resident is not None:
            out = out + resident
        out = out.view_as(hidden_states) + shared
        arrived, self._arriving.call = self._arriving.call, None
        if arrived is not None:
            out = out + arrived.join(stream).view_as(hidden_states)
        if self._leaving is not None:  # what a forward that failed has left there goes
            self._leaving.call = later[0] if later else None
        return out

    def _is_streamed(self, tokens: int, new_tokens: int) -> bool:
        """Tell whether the device computes all experts of a forward; no graph holds that."""
        if self.streamed is None or is_decode(new_tokens) or recorded_graph() is not None:
            return False
        if new_tokens == 1:  # of a prompt's last layer: all its weights for one position
            return False
        return self.streamed.chosen(tokens)

    def _streamed_call(
        self, stream: Stream, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> StreamedCall:
        # Triton is heavy, and needed here alone.
        from ktransformers.operators.kernels.packed_experts import SortedTokens

        assert self.streamed is not None
        experts: HostExperts = self.experts  # type: ignore[assignment]  # as `connect` has found
        experts.native_layer()  # or it says that weights are not loaded
        E, F = experts.num_experts, experts.moe_intermediate_size
        tokens = SortedTokens(x, index, weights, E, experts.weights.format, F)
        return self.streamed.call(stream, len(x), tokens.add, tokens.result)

    def extra_repr(self) -> str:
        """Show the number where the module tree is printed."""
        return f"deferred_experts={self.deferred_experts}"


def _follows(site: Site, before: Site) -> bool:
    return None not in (site.layer, before.layer) and site.layer == before.layer + 1  # type: ignore[operator]  # it looks


def _streamed(site: Site, mode: Mode, gib: float) -> StreamedLayer | None:
    """Return what streams a layer's weights, or None where that is not asked for or can't be.

    Raises ValueError where it can't be, but always should.
    """
    if mode not in ("auto", "never", "always"):
        raise ValueError(f"stream_prefill {mode!r} is not auto, never or always")
    if type(gib) not in (int, float) or not 0 < gib < math.inf:
        raise ValueError(f"stream_gib {gib!r} is not a number above 0")
    reason = None
    if site.device.type != "cuda" and not (mode == "always" and interpreting()):
        reason = f"{site.device} is no GPU"
    elif site.dtype not in (torch.float16, torch.bfloat16):
        reason = f"takes float16 or bfloat16 activations, not {site.dtype}"
    if mode == "always" and reason is not None:
        raise ValueError(f"stream_prefill always: {reason}")
    if mode == "never" or reason is not None:
        return None
    return StreamedLayer(site, mode, int(gib * 2**30))


def _heaviest_first(
    index: torch.Tensor, weights: torch.Tensor, count: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut each token's experts in two: the `count` heaviest, and the others."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    index, weights = index.gather(-1, order), weights.gather(-1, order)
    return [(index[:, :count], weights[:, :count]), (index[:, count:], weights[:, count:])]
