"""Whole tokens as graphs: recorded once for each batch size, and replayed with other inputs."""

from __future__ import annotations

import pytest
import torch

from ktransformers.decode_graph import DecodeGraph

CPU = torch.device("cpu")


class Step:
    """Writes to a cache where its inputs say, and sums it up."""

    def __init__(self) -> None:
        self.calls = 0
        self.cache = torch.zeros(2, 8)

    def __call__(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        cache = self.cache[: len(x)]
        cache.scatter_(1, position[:, None], x[:, None])
        return cache.cumsum(1)[:, -1]


def test_each_batch_size_is_recorded_once() -> None:
    step = Step()
    graph = DecodeGraph(step, CPU)
    total = torch.zeros(2)
    for position in range(4):
        x = torch.tensor([1.0, 10.0]) * (position + 1)
        total += x
        assert torch.equal(graph(x, torch.full((2,), position)), total)
    assert (step.calls, graph.batch_sizes()) == (2, [2])
    assert graph(torch.tensor([5.0]), torch.tensor([4])).tolist() == [15]
    assert graph(torch.zeros(2), torch.tensor([5, 5])).tolist() == [15, 100]
    assert (step.calls, graph.batch_sizes()) == (4, [2, 1])


def test_inputs_are_copied_and_the_callers_stay_its_own() -> None:
    graph = DecodeGraph(Step(), CPU)
    x, position = torch.tensor([1.0]), torch.tensor([0])
    graph(x, position)
    x.fill_(7)
    assert graph(torch.tensor([2.0]), position).tolist() == [2]
    assert x.tolist() == [7]


@pytest.mark.parametrize("x", [torch.ones(1, 1), torch.ones(1, dtype=torch.float64)])
def test_inputs_of_another_shape_are_refused(x: torch.Tensor) -> None:
    graph = DecodeGraph(Step(), CPU)
    graph(torch.ones(1), torch.tensor([0]))
    with pytest.raises(ValueError) as caught:
        graph(x, torch.tensor([0]))
    assert str(caught.value) == (
        f"an input of {x.dtype} {list(x.shape)}: the graph for batches of 1 was recorded with "
        "torch.float32 [1]"
    )
