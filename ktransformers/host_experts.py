"""A layer's routed experts on the CPU, called from a stream of another device and joined later.

Shape suffixes: T tokens, D hidden_size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ktransformers import _native
from ktransformers.base import Checkpoint, Site
from ktransformers.engine import ExpertsHandle
from ktransformers.numa import Placement
from ktransformers.packed_weights import ExpertsWeights
from ktransformers.placement import PackedMatrices, PlacedOperator, PlacedTensor
from ktransformers.streams import Stream, recorded_graph, stream_of

Routing = tuple[torch.Tensor, torch.Tensor]  # top_k_index and top_k_weights, [T, K]


class HostExperts(PlacedOperator):
    """Routed experts on the CPU, all of a layer's or some, which an operator around may start.

    Buffers hold the packed weights (uint8 bytes in a layout of `csrc/`, scales in fp32, or bf16 for
    int4); the native layer reads them in place.
    """

    gate_up_packed: torch.Tensor  # these where weights are one part; see PlacedOperator
    gate_up_scale: torch.Tensor
    down_packed: torch.Tensor
    down_scale: torch.Tensor

    def __init__(
        self,
        site: Site,
        *,
        num_experts: int,
        hidden_size: int,
        width: int,
        weight_format: str,
        threads: int,
        placement: Placement,
        chunk_tokens: int | None = None,
        on_host: Sequence[int] | None = None,
    ):
        """Describe the layer; `on_host` are those of its experts that the CPU computes, or all."""
        super().__init__()
        self.site = site
        self.weight_format = weight_format
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.moe_intermediate_size = width
        self.threads = threads
        self.chunk_tokens = chunk_tokens
        self.on_host = tuple(range(num_experts) if on_host is None else on_host)
        modules = tuple(f"{site.name}.{expert}" for expert in self.on_host)
        self.weights = ExpertsWeights(modules, hidden_size, width, weight_format)
        self._layer: _native.Experts | None = None
        self.place(placement)

    def packed_matrices(self) -> dict[str, PackedMatrices]:
        """Name the packed integers and their scales, gate before up."""
        return self.weights.matrices()

    def packed_format(self) -> str:
        """Say which of the formats of `csrc/` the bytes are in."""
        return f"{self.weight_format}, gate before up"

    def pack_into(self, memory: Mapping[str, PlacedTensor], checkpoint: Checkpoint) -> None:
        """Read, quantise and pack three matrices per expert."""
        self.weights.pack(memory, checkpoint)

    def compute_with(self, parts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Build the native layer on these tensors."""
        self._layer = self.weights.build(
            parts,
            threads=self.threads,
            chunk_tokens=self.chunk_tokens,
            numa=self.placement.mode,
            nodes=self.placement.nodes,
        )

    def native_layer(self) -> _native.Experts:
        """Return the native layer. Raises RuntimeError where weights are not loaded."""
        if self._layer is None:
            raise RuntimeError(self._refusal("weights are not loaded"))
        return self._layer

    def start(
        self, hidden_states: torch.Tensor, parts: Sequence[Routing]
    ) -> tuple[list[ExpertsCall], torch.Tensor | None]:
        """Start what a token's experts are to do, in the stream of its device.

        Args:
            hidden_states: [T, D].
            parts: of the routing, each to be joined by itself.

        Returns a call of the CPU for each part, and what experts beside the CPU make of all parts
        together, [T, D] on the device; None where there are none.
        """
        stream, layer = stream_of(hidden_states.device), self.native_layer()
        host_states = stream.copy_in(hidden_states)
        return [ExpertsCall(stream, layer, host_states, *part) for part in parts], None


class ExpertsCall:
    """One call of a layer, from its submission in a stream on.

    It holds the memory of the host that the layer works in, and a handle of its own, so that an
    error is raised where it belongs. In a graph it is called once in each replay, and lives as long
    as the graph.
    """

    def __init__(
        self,
        stream: Stream,
        layer: _native.Experts,
        host_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ):
        """Copy the routing to the host and submit the work, once the stream is there.

        Args:
            stream: of the device that the routing is on.
            layer: computes.
            host_states: [T, D], as `Stream.copy_in` returned it.
            top_k_index: [T, K], on the device, as is top_k_weights.
            top_k_weights: [T, K].
        """
        self._in_flight = False
        self._stream = stream
        index, weights = stream.copy_in(top_k_index), stream.copy_in(top_k_weights)
        self._out = stream.host_empty(host_states.shape, host_states.dtype)
        self._done: torch.Tensor | None = None
        if stream.by_flag:
            self._done = stream.host_empty(torch.Size([1]), torch.int32)
        self._handle = ExpertsHandle(layer)
        self._function = self._handle.host_function(
            host_states, index, weights, self._out, self._done, stream.job_times()
        )
        stream.submit(self._function)
        graph = recorded_graph()
        if graph is not None:
            graph.own(self._check)
        self._in_flight = graph is None

    def join(self, stream: Stream | None = None) -> torch.Tensor:
        """Return the result, [T, D], on the device of a stream that waits for it.

        Args:
            stream: comes here after the submission; that of the submission if it is not given.

        Raises what went wrong in the work, unless it is recorded: then each replay does.
        """
        stream = stream or self._stream
        stream.join(self._function, self._done)
        out = stream.copy_out(self._out)
        if recorded_graph() is None:
            stream.synchronize()
            self._in_flight = False
            self._check()
        return out

    def _check(self) -> None:
        self._handle.sync()

    def __del__(self) -> None:
        # After an error: the stream may not have come to the submission yet, and would call what
        # is freed here.
        if self._in_flight:
            self._stream.synchronize()
