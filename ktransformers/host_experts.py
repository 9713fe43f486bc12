"""A layer's routed experts on the CPU, called from a stream of another device and joined later.

Shape suffixes: T tokens, D hidden_size, K experts per token.
"""

from __future__ import annotations

import torch

from ktransformers import _native
from ktransformers.engine import ExpertsHandle
from ktransformers.placement import PlacedOperator
from ktransformers.streams import Stream, recorded_graph


class HostExperts(PlacedOperator):
    """Routed experts on the CPU, whose native layer an operator around them may call itself."""

    def native_layer(self) -> _native.Experts:
        """Return the layer. Raises RuntimeError where weights are not loaded."""
        raise NotImplementedError(f"{type(self).__name__} does not define native_layer")


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
            host_states, index, weights, self._out, self._done
        )
        stream.submit(self._function)
        graph = recorded_graph()
        if graph is not None:
            graph.own(self._check)
        self._in_flight = graph is None

    def join(self) -> torch.Tensor:
        """Return the result on the device, [T, D], for which the stream waits.

        Raises what went wrong in the work, unless it is recorded: then each replay does.
        """
        self._stream.join(self._function, self._done)
        out = self._stream.copy_out(self._out)
        if recorded_graph() is None:
            self._stream.synchronize()
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
