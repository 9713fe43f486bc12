"""ResidentExperts: on a GPU where there is one, else in Triton's interpreter.

Its two sides are operators with tests of their own, CpuExperts and Int4Experts: what it must give
is their sum, to the bit, each with the other's experts skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from ktransformers import optimize_and_load
from ktransformers.base import Operator
from ktransformers.checkpoint import open_checkpoint
from ktransformers.decode_graph import DecodeGraph
from ktransformers.expert_profile import write_profile
from ktransformers.inject import plan
from ktransformers.load import LoadError, build_on_meta
from ktransformers.machine import check_machine
from ktransformers.numa import Placement
from ktransformers.operators.kernels import int4_experts
from ktransformers.operators.kernels.int4_expert_weights import Int4ExpertWeights
from ktransformers.operators.resident_experts import ResidentExperts
from ktransformers.packing import pack
from ktransformers.placement import PackedMatrices, PlacedTensor
from ktransformers.research.expert_policies import Lru
from ktransformers.research.explain import explain
from ktransformers.rules import RuleError, load_rules
from ktransformers.streams import CpuStream, use
from tiny_models import random_model, v3_config

if torch.cuda.is_available():
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

OPERATORS = "ktransformers.operators"
E = 8
LISTED: dict[str, Any] = {"resident": [5, 1]}
MOVING: dict[str, Any] = {"resident": 2, "policy": "lru"}
stands_in = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU stands in for a GPU where there is none"
)


def rule(name: str, operator: str, **kwargs: Any) -> dict[str, Any]:
    replace = {"class": f"{OPERATORS}.{operator}", "kwargs": kwargs}
    return {"match": {"name": name}, "replace": replace}


def experts(device: object, **kwargs: Any) -> dict[str, Any]:
    given = {"device": str(device), "group_size": 32, "threads": 1, **kwargs}
    return rule(r"\.mlp\.experts$", "resident_experts.ResidentExperts", **given)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(v3_config(), dtype=torch.bfloat16)


def loaded(model: Any, which: dict[str, Any], layer: int = 1) -> Any:
    """Return a layer's operator, with weights, outside of any model: no probe has called it."""
    planned = plan(model, load_rules([which]))
    operator = planned.replacements[layer - 1].operator
    assert operator is not None
    operator.load_weights(open_checkpoint(model))
    return operator


class Sides:
    """What a token's experts give, when some of them are the GPU's."""

    def __init__(self, model: Any, device: object, layer: int = 1):
        gpu = {"device": str(device), "group_size": 32}
        self.cpu = loaded(model, rule(r"\.mlp\.experts$", "experts.CpuExperts", threads=1), layer)
        self.gpu = loaded(model, rule(r"\.mlp\.experts$", "experts.Int4Experts", **gpu), layer)

    def host(self, resident: Collection[int], x: Any, index: Any, weights: Any) -> torch.Tensor:
        theirs = torch.isin(index, torch.tensor(sorted(resident)))
        return self.cpu(x, index.masked_fill(theirs, E), weights)

    def device(self, resident: Collection[int], x: Any, index: Any, weights: Any) -> torch.Tensor:
        theirs = torch.isin(index, torch.tensor(sorted(resident)))
        return self.gpu(x, index.masked_fill(~theirs, E), weights)

    def __call__(self, resident: Collection[int], *routed: torch.Tensor) -> torch.Tensor:
        return self.host(resident, *routed) + self.device(resident, *routed)


def routed(seed: int, T: int, K: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    weights = torch.rand(T, K, generator=generator)
    return torch.randn(T, 64, generator=generator).bfloat16(), index, weights


# Experts that stay


@pytest.mark.parametrize("kwargs", [LISTED, {**LISTED, "weight": "int4", "cpu_group_size": 32}])
def test_result_is_the_sum_of_both_sides(
    model: Any, device: torch.device, kwargs: dict[str, Any]
) -> None:
    operator, sides = loaded(model, experts(device, **kwargs)), Sides(model, device)
    if "weight" in kwargs:
        sides.cpu = loaded(
            model, rule(r"\.mlp\.experts$", "experts.CpuExperts", weight="int4", group_size=32)
        )
    x, index, weights = routed(0, 4)
    index[0, 1], index[3] = E, torch.tensor([5, 1, E, E])  # some skipped; all the GPU's
    with torch.no_grad():
        got = operator(x, index, weights)
        assert torch.equal(got, sides({1, 5}, x, index, weights))
        assert sides.host({1, 5}, x, index, weights)[3].count_nonzero() == 0
        index[3] = E
        assert operator(x, index, weights)[3].count_nonzero() == 0
        assert operator(x[:0], index[:0], weights[:0]).shape == (0, 64)


def test_host_memory_of_resident_experts_is_never_allocated(
    model: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[int] = []
    allocate = PlacedTensor.allocate

    def counted(of: PackedMatrices, placement: Placement) -> PlacedTensor:
        placed = allocate(of, placement)
        allocated.append(sum(part.nbytes for part in placed.parts))
        return placed

    whole = loaded(model, rule(r"\.mlp\.experts$", "experts.CpuExperts", threads=1))
    planned = plan(model, load_rules([experts(device, resident=[5, 1, 0])]))
    operator: Any = planned.replacements[0].operator
    host, gpu = operator.footprints()
    assert host.weight_bytes == operator.packed_bytes() == whole.packed_bytes() * 5 // 8
    assert (str(host.device), gpu.device) == ("cpu", operator.device)
    flops = whole.footprint().flops_per_token
    assert (host.flops_per_token, gpu.flops_per_token) == (flops * 5 // 8, flops * 3 // 8)
    read = whole.footprint().bytes_read_per_token * 5 // 8
    assert host.bytes_read_per_token == read
    monkeypatch.setattr(PlacedTensor, "allocate", counted)
    operator.load_weights(open_checkpoint(model))
    assert sum(allocated) == host.weight_bytes
    assert operator.native_layer().num_experts == 5
    held = {name: buffer for name, buffer in operator.named_buffers() if "resident" in name}
    assert sum(buffer.nbytes for buffer in held.values()) == gpu.weight_bytes
    assert {buffer.device.type for buffer in held.values()} == {device.type}
    assert sum(b.nbytes for b in operator.buffers()) == host.weight_bytes + gpu.weight_bytes


def test_a_number_takes_the_first_experts_or_those_of_a_profile(
    model: Any, device: torch.device, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, 9, {1: [0, 1, 5, 1, 0, 9, 0, 0], 2: [8, 0, 0, 0, 0, 0, 7, 1]})

    def residents(**kwargs: Any) -> list[Any]:
        planned = plan(model, load_rules([experts(device, **kwargs)]))
        return [item.operator for item in planned.replacements]

    assert [each.resident for each in residents(resident=3)] == [(0, 1, 2)] * 2
    profiled = residents(resident=2, profile=str(path))
    assert [each.resident for each in profiled] == [(2, 5), (0, 6)]
    assert [each.share for each in profiled] == [14 / 16, 15 / 16]
    moving = residents(**MOVING, profile=str(path))
    assert [each.resident for each in moving] == [(5, 2), (0, 6)]  # the most used is the latest


# Experts that come and go


@pytest.mark.parametrize("uploads", [1, 2])
def test_experts_that_were_used_last_are_the_gpus(
    model: Any, device: torch.device, uploads: int
) -> None:
    operator = loaded(model, experts(device, **MOVING, uploads=uploads))
    sides, policy = Sides(model, device), Lru([0, 1], E, uploads)
    seen = set()
    with torch.no_grad():
        for step in range(8):
            tokens = routed(step, 2 if step == 4 else 1, K=3)
            assert torch.equal(operator(*tokens), sides(policy.resident, *tokens))
            policy.step(tokens[1].flatten().tolist())
            seen |= policy.resident
    assert len(seen) > 3  # slots were filled again and again


def test_lru_costs_the_host_all_experts_in_both_formats(model: Any, device: torch.device) -> None:
    operator = loaded(model, experts(device, **MOVING))
    whole = loaded(model, rule(r"\.mlp\.experts$", "experts.CpuExperts", threads=1))
    host, gpu = operator.footprints()
    assert host.weight_bytes == whole.packed_bytes() + E * gpu.weight_bytes // 2
    held = {name: b.nbytes for name, b in operator.named_buffers()}
    slots = sum(nbytes for name, nbytes in held.items() if name.startswith("slots_"))
    assert slots == gpu.weight_bytes
    assert sum(held.values()) == host.weight_bytes + gpu.weight_bytes


@pytest.mark.parametrize("kwargs", [LISTED, {**MOVING, "uploads": 2}])
def test_replays_of_a_graph_are_the_eager_steps(
    model: Any, device: torch.device, kwargs: dict[str, Any]
) -> None:
    eager, recorded = (loaded(model, experts(device, **kwargs)) for _ in range(2))
    graph = DecodeGraph(recorded, eager.device)
    with torch.no_grad():
        # A graph is warmed up, and recorded; a CUDA graph's recording does nothing.
        for _ in range(1 if device.type == "cuda" else 2):
            eager(*routed(0, 1))
        for step in range(5):
            tokens = [tensor.to(device) for tensor in routed(step, 1)]
            assert torch.equal(graph(*tokens), eager(*tokens))


@stands_in
def test_threads_take_turns_between_reading_slots_and_changing_them(model: Any) -> None:
    operator, events = loaded(model, experts("cpu", **MOVING)), []
    read, change = operator._policy.tables, operator._policy.used

    def reads() -> Any:
        events.append("reads")
        return read()

    def changes(index: torch.Tensor) -> None:
        change(index)
        events.append("changed")

    operator._policy.tables, operator._policy.used = reads, changes

    def work(seed: int) -> None:
        with torch.no_grad():
            for step in range(2):
                operator(*routed(2 * seed + step, 1))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events == ["reads", "changed"] * 6


# Beside shared experts


HYBRID = rule(r"^model\.layers\.[12]\.mlp$", "hybrid.HybridMoE")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(torch.tensor([[3, 1, 4]], device=model.device)).logits
    return output


@pytest.mark.parametrize("kwargs", [LISTED, MOVING])
def test_hybrid_moe_around_it_changes_no_bit(device: torch.device, kwargs: dict[str, Any]) -> None:
    models: list[Any] = []
    for more in ([HYBRID], []):
        plain: Any = random_model(v3_config(), dtype=torch.bfloat16)
        models.append(optimize_and_load(plain.to(device), [experts(device, **kwargs), *more]))
    assert torch.equal(*map(logits, models))
    for each in models:
        assert each.ktransformers_report.experts_per_token == 4
        assert each.ktransformers_report.kernels[0].startswith("Triton ")


@stands_in
def test_both_sides_and_the_shared_experts_run_between_submission_and_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = random_model(v3_config(num_hidden_layers=2), dtype=torch.bfloat16)
    optimize_and_load(model, [experts("cpu", **MOVING), HYBRID])
    events: list[str] = []
    kernel = int4_experts.int4_experts

    def noted(*args: Any) -> torch.Tensor:
        events.append("resident")
        return kernel(*args)

    monkeypatch.setattr(int4_experts, "int4_experts", noted)
    moe = model.model.layers[1].mlp
    moe.shared_experts.register_forward_hook(lambda *_: events.append("shared"))
    with use(CpuStream(events.append)), torch.no_grad():
        moe(torch.randn(1, 1, 64).bfloat16())
    copies = ["copy in"] * 3
    assert events == [*copies, "submit", "resident", "shared", "join", "copy out"]


def test_of_deferred_experts_the_gpus_are_added_at_once(device: torch.device) -> None:
    plain: Any = random_model(v3_config(), dtype=torch.bfloat16)
    sides = [Sides(plain, device, layer) for layer in (1, 2)]
    moe = rule(r"^model\.layers\.[12]\.mlp$", "hybrid.HybridMoE", deferred_experts=2)
    model: Any = plain.to(device)
    optimize_and_load(model, [experts(device, **LISTED), moe])
    first, second = (model.model.layers[layer].mlp for layer in (1, 2))
    tokens = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = tokens.to(device)

    def routing(moe: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _, weights, index = moe.gate(x)
        order = weights.argsort(dim=-1, descending=True, stable=True)
        return index.gather(1, order).cpu(), weights.gather(1, order).cpu()

    with torch.no_grad():
        got = [first(x).cpu(), second(x).cpu()]
        flat, wants, later = tokens[:, 0], [], torch.zeros(2, 64).bfloat16()
        for moe, of, awaited in ((first, sides[0], 2), (second, sides[1], 4)):
            index, weights = routing(moe)
            now = of.host({1, 5}, flat, index[:, :awaited], weights[:, :awaited])
            now = now + of.device({1, 5}, flat, index, weights)
            wants.append(now[:, None] + moe.shared_experts(x).cpu())
            if awaited == 4:
                wants[-1] = wants[-1] + later[:, None]
            else:
                later = of.host({1, 5}, flat, index[:, awaited:], weights[:, awaited:])
    assert later.count_nonzero() > 0
    assert all(torch.equal(a, b) for a, b in zip(got, wants, strict=True))


# Planned, packed, explained


@pytest.mark.parametrize("kwargs", [LISTED, MOVING])
def test_packed_cache_gives_the_same_logits_mapped_and_copied(
    device: torch.device, save: Callable[..., Path], tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    folder = save(random_model(v3_config(num_hidden_layers=2), dtype=torch.bfloat16))
    rules, packed = [experts(device, **kwargs)], tmp_path / "packed"
    want = logits(optimize_and_load(folder, rules, cache=None))
    assert pack(folder, rules, packed).written == 1
    for mode, done in (("map", "mapped"), ("copy", "copied")):
        model = optimize_and_load(folder, rules, cache=packed, cache_mode=mode)  # type: ignore[arg-type]
        assert f"of 1 operators {done}" in str(model.ktransformers_report)
        assert torch.equal(logits(model), want)
    other = [experts(device, resident=[1, 6])]
    with pytest.raises(LoadError, match=r"packed as .* but the rules want .*experts 1, 6"):
        optimize_and_load(folder, other, cache=packed)


@pytest.mark.parametrize("kwargs", [LISTED, MOVING])
def test_costs_are_explained_by_device(kwargs: dict[str, Any]) -> None:
    model = build_on_meta(v3_config(), torch.bfloat16)
    planned = plan(model, load_rules([experts("cuda:0", **kwargs)]))
    explained = explain(model, planned)
    needs = [need for item in planned.replacements for need in _operator(item).footprints()]
    gpu, plain = explained.costs["cuda:0"], explained.plain_costs["cpu"]
    assert gpu.weight_bytes == sum(need.weight_bytes for need in needs[1::2])
    assert gpu.bytes_read_per_token == sum(need.bytes_read_per_token for need in needs[1::2])
    flops = explained.costs["cpu"].flops_per_token + gpu.flops_per_token
    assert flops == plain.flops_per_token  # nothing is computed twice
    assert gpu.flops_per_token == 2 * (2 / 8) * 4 * 3 * 2 * 64 * 32
    [row] = [row for row in explained.rows if row.label == "experts"]
    assert row.weight_bytes == sum(need.weight_bytes for need in needs[:2])


def _operator(item: Any) -> Operator:
    assert isinstance(item.operator, ResidentExperts)
    return item.operator


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({}, "ResidentExperts needs resident"),
        ({"resident": 9}, "resident 9 is more than the layer has: 8 experts"),
        ({"resident": 8}, "resident experts are all 8 of the layer: Int4Experts is the operator"),
        ({"resident": 0}, "resident 0 is neither a number of 1 or more nor a list of experts"),
        ({"resident": True}, "resident True is neither a number of 1 or more nor a list"),
        ({"resident": []}, "resident [] is neither a number of 1 or more nor a list of experts"),
        ({"resident": [0, 8]}, "resident names expert 8, but the layer's are 0 to 7"),
        ({"resident": [-1]}, "resident names expert -1, but the layer's are 0 to 7"),
        ({"resident": [3, 1, 3]}, "resident names expert 3 more than once"),
        ({"resident": 2, "policy": "lfu"}, "policy 'lfu' is not supported (expected static, lru)"),
        ({"resident": 2, "uploads": 1}, "uploads 1 is for policy lru: static moves no expert"),
        ({**MOVING, "uploads": 0}, "uploads 0 is not a number of 1 or more"),
        ({**MOVING, "resident": [1]}, "resident is a list, which lru would not keep"),
        ({"resident": [1], "profile": "p.json"}, "resident is a list, and profile would choose"),
        ({"resident": 2, "profile": 3}, "profile 3 is not the path of a file"),
        ({"resident": 2, "profile": "no/p.json"}, "profile no/p.json: No such file or directory"),
        ({**LISTED, "cpu_group_size": 32}, "cpu_group_size 32 is for weight int4, not int8"),
        ({**LISTED, "group_size": 64}, "in_features 32 is not a multiple of group_size 64"),
    ],
)
def test_what_the_operator_cannot_do_it_says(kwargs: dict[str, Any], reason: str) -> None:
    skeleton = build_on_meta(v3_config(), torch.bfloat16)
    with pytest.raises(RuleError) as caught:
        plan(skeleton, load_rules([experts("cuda:0", **kwargs)]))
    assert reason in str(caught.value)
    with pytest.raises(RuleError, match="device 'gpu' is not a GPU: expected such as cuda:0"):
        plan(skeleton, load_rules([experts("gpu", **LISTED)]))


def test_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, 1, {1: [1] * 4})
    skeleton = build_on_meta(v3_config(), torch.bfloat16)
    with pytest.raises(RuleError) as caught:
        plan(skeleton, load_rules([experts("cuda:0", resident=2, profile=str(path))]))
    assert "layer 1 has 4 experts there and 8 here: it is of another model" in str(caught.value)
    assert "counts uses in layers 1, not in layer 2: it is of another model" in str(caught.value)


def test_other_activations_than_bf16_are_refused() -> None:
    skeleton = build_on_meta(v3_config(), torch.float32)
    with pytest.raises(RuleError, match=r"takes bfloat16 activations, not torch\.float32"):
        plan(skeleton, load_rules([experts("cuda:0", **LISTED)]))


def test_operator_around_it_must_stand_where_it_does() -> None:
    skeleton, rules = build_on_meta(v3_config(), torch.bfloat16), [experts("cuda:1", **LISTED)]
    plan(skeleton, load_rules(rules))
    plan(skeleton, load_rules([*rules, HYBRID]), device=torch.device("cuda:1"))
    with pytest.raises(RuleError) as caught:
        plan(skeleton, load_rules([*rules, HYBRID]), device=torch.device("cuda:0"))
    assert (
        "its device is cuda:1, but HybridMoE around it stands on cuda:0: keep the layer on cuda:1 "
        "by a rule with class: default"
    ) in str(caught.value)


def test_machine_without_its_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    skeleton = build_on_meta(v3_config(), torch.bfloat16)
    planned = plan(skeleton, load_rules([experts("cuda:0", **LISTED)]))
    with pytest.raises(RuleError, match=r"ResidentExperts at .*: needs a GPU, cuda:0, and torch"):
        check_machine(planned)


def test_gpu_without_room_is_named(
    model: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Int4ExpertWeights, "put", full)
    message = (
        rf"ResidentExperts at .*: no memory on {device}.* for 18,432 bytes of resident experts"
    )
    with pytest.raises(MemoryError, match=message):
        loaded(model, experts(device, **LISTED))


def test_missing_weights_and_gradients_are_refused(model: Any, device: torch.device) -> None:
    planned = plan(model, load_rules([experts(device, **LISTED)]))
    operator: Any = planned.replacements[0].operator
    x, index, weights = routed(0, 1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="weights are not loaded"):
        operator(x, index, weights)
    with pytest.raises(RuntimeError, match="packed weights have no gradient"):
        operator(x.requires_grad_(), index, weights)
