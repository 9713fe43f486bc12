"""A whole token as one graph: recorded once for each batch size, then replayed.

    graph = DecodeGraph(step, device)
    logits = graph(token_ids, position_ids)   # records where the batch size is new, and replays

Python runs while it is recorded only: each replay does the same work on the memory of then, the
host's part included, with the inputs copied to where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ktransformers.streams import Graph, Stream, stream_of


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: Graph
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


class DecodeGraph:
    """Calls a function of tensors through graphs."""

    def __init__(
        self,
        step: Callable[..., torch.Tensor],
        device: torch.device,
        others: Sequence[Stream] = (),
    ):
        """Take a function of tensors with the batch in front.

        Args:
            step: runs twice before its first replay, to warm up and to be recorded, so that doing
                it again must change nothing: where it writes to a cache, its inputs say where.
            device: that its inputs are on.
            others: of further devices that it works on.
        """
        self._step = step
        self._device = device
        self._others = others
        self._recorded: dict[int, _Recorded] = {}  # by batch size

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return what `step` does; it is overwritten by the next call with this batch size.

        Raises what went wrong on the host, after which the graph is as good as before; and
        ValueError for inputs of another shape than those of the first call.
        """
        batch = inputs[0].shape[0]
        if batch not in self._recorded:
            self._recorded[batch] = self._record(inputs)
        recorded = self._recorded[batch]
        for static, value in zip(recorded.inputs, inputs, strict=True):
            if static.shape != value.shape or static.dtype != value.dtype:
                raise ValueError(
                    f"an input of {value.dtype} {list(value.shape)}: the graph for batches of "
                    f"{batch} was recorded with {static.dtype} {list(static.shape)}"
                )
            static.copy_(value)
        recorded.graph.replay()
        return recorded.output

    def batch_sizes(self) -> list[int]:
        """Return the batch sizes that graphs were recorded for."""
        return list(self._recorded)

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> _Recorded:
        static = tuple(tensor.to(self._device, copy=True) for tensor in inputs)
        with torch.no_grad():
            self._step(*static)  # what is made at a first call is made outside of the graph
        with stream_of(self._device).capture(*self._others) as graph:
            output = self._step(*static)
        return _Recorded(graph, static, output)
