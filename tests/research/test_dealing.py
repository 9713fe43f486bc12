"""Dealing a model to devices: what goes where, with costs that one can add up in one's head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import pytest

from ktransformers.research.dealing import Deal, LayerCost, ModelCost, cpu_bytes, deal

DENSE = LayerCost(on_gpu=20, experts_on_gpu=0, experts_on_cpu=0, on_cpu=40)
MOE = LayerCost(on_gpu=10, experts_on_gpu=50, experts_on_cpu=100, on_cpu=120)
# 7 layers need 20 + 6 x 10 and 7 of cache; with embedding, head and activations 100 are enough.
COST = ModelCost(
    (DENSE, *[MOE] * 6), 5, 3, 1, activations=5, activations_with_experts=8, num_experts=10, top_k=4
)  # an expert takes 5 on a GPU; three in a layer are enough to be worth it


def dealt(*rooms: int, cost: ModelCost = COST) -> Deal:
    found = deal(cost, rooms)
    assert found is not None
    return found


def ranges(found: Deal) -> list[tuple[int, int]]:
    return [(stage.layers.start, stage.layers.stop) for stage in found.stages]


def test_one_gpu_with_room_for_all_but_experts_gets_all_but_experts() -> None:
    found = dealt(100)
    assert (found.cpu_layers, found.embedding_on_gpu, found.resident) == (0, True, ())
    assert cpu_bytes(COST, found) == 600


def test_what_is_left_holds_the_experts_of_the_first_layers() -> None:
    found = dealt(103 + 2 * 50)
    assert found.resident == (1, 2)
    assert cpu_bytes(COST, found) == 400
    assert dealt(102 + 2 * 50).resident == (1,)  # it needs activations of its own


def test_a_part_of_what_is_left_holds_some_experts_of_the_next_layer() -> None:
    found = dealt(103 + 50 + 29)
    assert (found.resident, found.partly_resident) == ((1,), {2: 5})
    assert cpu_bytes(COST, found) == 400 + 50


def test_experts_that_most_tokens_never_use_stay_with_the_cpu() -> None:
    assert dealt(103 + 3 * 5).partly_resident == {1: 3}  # a token uses 4 of 10
    assert dealt(103 + 3 * 5 - 1).partly_resident == {}


def test_the_embedding_leaves_the_gpu_first_and_then_the_first_layers() -> None:
    embedding, layer, two = dealt(99), dealt(80), dealt(70)
    assert (embedding.embedding_on_gpu, embedding.cpu_layers) == (False, 0)
    assert cpu_bytes(COST, embedding) == 605
    assert (layer.embedding_on_gpu, layer.cpu_layers) == (False, 1)
    assert cpu_bytes(COST, layer) == 605 + 40 + 1
    assert ranges(two) == [(2, 7)]
    assert cpu_bytes(COST, two) == 605 - 100 + 41 + 121


def test_a_gpu_without_room_for_a_layer_and_the_head_gets_nothing() -> None:
    assert deal(COST, [18]) is None
    assert dealt(19).cpu_layers == 6


def test_borders_are_where_gpus_hold_the_most_experts() -> None:
    # Tried one by one, for every border of up to three GPUs.
    for rooms in ([100, 150], [180, 90], [80, 80], [120, 60, 110], [95, 95, 95], [9, 200, 150]):
        best = 0
        for count in range(1, len(rooms) + 1):
            for cut, some in product(
                combinations(range(1, 7), count - 1), combinations(rooms, count)
            ):
                best = max(best, held_by(some, [0, *cut, 7]))
        found = dealt(*rooms)
        assert 10 * len(found.resident) + sum(found.partly_resident.values()) == best, rooms


def held_by(rooms: Sequence[int], cuts: list[int]) -> int:
    """Count the experts that fit with these borders; 0 where the layers do not."""
    held = 0
    for room, begin, end in zip(rooms, cuts, cuts[1:], strict=False):
        used = sum(layer.on_gpu + 1 for layer in COST.layers[begin:end])
        used += 5 * (begin == 0) + 3 * (end == 7)
        if used + 5 > room:
            return 0
        fitting = max(0, room - used - 8) // 5
        if fitting % 10 < 3:
            fitting -= fitting % 10
        held += min(fitting, 10 * sum(layer is MOE for layer in COST.layers[begin:end]))
    return held


@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_every_layer_is_on_one_gpu_and_experts_where_their_layer_is(gpus: int) -> None:
    found = dealt(*[130] * gpus)
    assert [layer for stage in found.stages for layer in stage.layers] == list(range(7))
    for stage in found.stages:
        assert set(stage.experts) <= set(stage.layers)
        assert stage.some is None or stage.some[0] in set(stage.layers) - set(stage.experts)


def test_where_borders_leave_a_choice_ranges_are_equal() -> None:
    cost = ModelCost((MOE,) * 6, 0, 0, 0, 0, activations_with_experts=99, num_experts=10, top_k=4)
    assert ranges(dealt(50, 50, cost=cost)) == [(0, 3), (3, 6)]


def test_no_more_gpus_are_used_than_hold_everything() -> None:
    assert len(dealt(403, 403).stages) == 1
    assert len(dealt(402, 402).stages) == 2


def test_a_gpu_that_is_too_small_for_anything_is_left_out() -> None:
    assert len(dealt(200, 10).stages) == 1


def test_small_gpus_before_and_between_others_are_left_out() -> None:
    assert [stage.gpu for stage in dealt(5, 200).stages] == [1]
    assert [stage.gpu for stage in dealt(200, 5, 200).stages] == [0, 2]
    assert [stage.gpu for stage in dealt(50, 403).stages] == [1]  # it holds everything
