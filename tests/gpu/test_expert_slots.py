"""Least recently used on the device: its decisions, its copies, and what a graph makes of both."""

from __future__ import annotations

import pytest
import torch

from ktransformers.operators.kernels.expert_slots import ExpertSlots
from ktransformers.operators.kernels.expert_upload import BLOCK, expert_upload, words
from ktransformers.research.expert_policies import Lru
from ktransformers.streams import CpuStream

CPU = torch.device("cpu")


def trace(seed: int, E: int, T: int, K: int) -> list[torch.Tensor]:
    """Return some steps of a router with favourites that change, and with slots skipped."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for step in range(40):
        if step % 10 == 0:
            liking = torch.rand(E, generator=generator).pow(4) + 1e-3
        rows = [torch.multinomial(liking, K, generator=generator) for _ in range(T)]
        index = torch.stack(rows)
        steps.append(index.where(torch.rand(T, K, generator=generator) > 0.1, E))
    return steps


def used(index: torch.Tensor, E: int) -> list[int]:
    return [expert for expert in index.flatten().tolist() if expert != E]


@pytest.mark.parametrize(
    ("E", "S", "T", "K", "uploads"),
    [(8, 3, 1, 2, 1), (8, 3, 1, 4, 2), (8, 2, 3, 4, 9), (16, 8, 1, 4, 4), (5, 5, 2, 3, 1)],
)
def test_decisions_of_the_device_are_those_of_the_obvious_policy(
    device: torch.device, E: int, S: int, T: int, K: int, uploads: int
) -> None:
    for seed in range(4):
        begin = torch.randperm(E, generator=torch.Generator().manual_seed(seed))[:S].tolist()
        slots, policy = ExpertSlots.holding(begin, E, device), Lru(begin, E, uploads)
        moved = 0
        for index in trace(seed, E, T, K):
            slot_of = slots.slot_of[index.to(device)].cpu()
            before, hits = set(policy.resident), int((slot_of < S).sum())
            assert hits == policy.step(used(index, E))
            experts, targets = (each.tolist() for each in slots.step(index.to(device), uploads))
            new = [expert for expert in experts if expert != E]
            assert set(new) == policy.resident - before
            held = slots.experts.tolist()
            assert set(held) == policy.resident
            assert [held[target] for target in targets[: len(new)]] == new
            moved += len(new)
        assert slots.slot_of.tolist() == [held.index(e) if e in held else S for e in range(E + 1)]
        assert (moved > 0) == (S < E)


def test_expert_that_a_step_uses_never_leaves_in_it() -> None:
    slots = ExpertSlots.holding([0, 1], 4, CPU)
    experts, _ = slots.step(torch.tensor([[0, 1, 2, 3]]), 2)
    assert experts.tolist() == [4, 4]
    experts, targets = slots.step(torch.tensor([[1, 2]]), 2)
    assert (experts.tolist(), targets.tolist()[0]) == ([2, 4], 0)


def test_replays_decide_by_what_is_used_then() -> None:
    E, steps = 8, trace(1, 8, 1, 3)
    eager, recorded = (ExpertSlots.holding([3, 4], E, CPU) for _ in range(2))
    index = steps[0].clone()
    with CpuStream().capture() as graph:
        out = recorded.step(index, 1)
    want = eager.step(steps[0], 1)
    for following in steps[1:]:
        assert [each.tolist() for each in out] == [each.tolist() for each in want]
        index.copy_(following)
        graph.replay()
        want = eager.step(following, 1)
    assert recorded.experts.tolist() == eager.experts.tolist()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 33, 32), torch.int16),  # past a block
        ((1, 7), torch.bfloat16),
        ((3, 3), torch.uint8),
        ((4,), torch.float32),
    ],
)
def test_upload_copies_the_experts_that_the_device_names(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    host = torch.randint(0, 100, (5, *shape)).to(dtype)
    host = host.pin_memory() if device.type == "cuda" else host
    slots = torch.zeros(3, *shape, dtype=dtype, device=device)
    named = (torch.tensor(of, device=device) for of in ([4, 5, 1], [2, 1, 0]))
    expert_upload(host, slots, *named)
    assert torch.equal(slots.cpu(), torch.stack([host[1], torch.zeros_like(host[0]), host[4]]))


def test_upload_moves_whole_words() -> None:
    sizes = {16: torch.int64, 12: torch.int32, 6: torch.int16, 7: torch.uint8}
    assert [words(torch.zeros(2, n, dtype=torch.uint8)).dtype for n in sizes] == [*sizes.values()]
    assert words(torch.zeros(2, BLOCK, 8, dtype=torch.bfloat16)).shape == (2, 2 * BLOCK)


def test_upload_into_other_shapes_is_refused() -> None:
    host, index = torch.zeros(4, 8), torch.tensor([0])
    message = r"slots of torch.float32 \[4\], expected torch.float32 \[8\], as the host has"
    with pytest.raises(ValueError, match=message):
        expert_upload(host, torch.zeros(2, 4), index, index)
