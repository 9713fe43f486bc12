"""Operators on NUMA nodes: what lies where on pretended machines, and that bits do not change."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktransformers import _native, optimize_and_load
from ktransformers.base import Site, TensorInfo
from ktransformers.inject import plan
from ktransformers.load import LoadError
from ktransformers.numa import ANYWHERE, Placement, try_binding, weight_placement
from ktransformers.packing import pack
from ktransformers.placement import PlacedOperator
from ktransformers.report import bytes_by_device, numa_lines
from ktransformers.rules import RuleError, load_rules
from packed_layer import FORMATS, same_bits
from pretended_machine import pretend
from pretended_operators import PretendedExperts, PretendedLinear
from tiny_models import random_model, v3_config

MODES = ("interleave", "shard", "replicate")
NODES = ([0], [0, 1], [0, 8], [3, 5, 8, 9])
E, D, F = 3, 100, 160  # D in 4 panels of 32, F in 5
IDS = torch.arange(24).reshape(2, 12)


class Weights:
    """A checkpoint of normal weights, by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
        }

    def infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(t.shape), t.dtype, "memory", t.nbytes)
            for name, t in self.tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()


def site(machine: str) -> Site:
    config = SimpleNamespace(pretended_machine=machine, num_experts_per_tok=2)
    return Site("layer", None, config, torch.float32, torch.device("cpu"), "test")


def make(
    kind: str, machine: str, mode: str, format: str = "int8", **kwargs: Any
) -> PretendedExperts | PretendedLinear:
    options: dict[str, Any] = {
        "weight_format": format,
        "threads": 1,
        "placement": Placement(mode, ()),
        **kwargs,
    }
    if kind == "linear":
        return PretendedLinear(site(machine), in_features=D, out_features=F, **options)
    options |= {"num_experts": E, "hidden_size": D, "width": F}
    return PretendedExperts(site(machine), **options)


def machine_of(root: Path, nodes: Sequence[int]) -> str:
    return pretend(root, {node: (2 * i, 2 * i + 1) for i, node in enumerate(nodes)})


def output(operator: PretendedExperts | PretendedLinear, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, D, generator=generator)
    if isinstance(operator, PretendedLinear):
        return operator(x)
    index = torch.randint(0, E + 1, (tokens, 2), generator=generator)
    return operator(x, index, torch.rand(tokens, 2, generator=generator))


def whole_weights(kind: str, machine: str, weights: Weights) -> dict[str, torch.Tensor]:
    operator = make(kind, machine, "interleave")
    operator.place(ANYWHERE)
    operator.load_weights(weights)
    assert operator.bound == []
    return dict(operator.named_buffers())


def parts_of(operator: PlacedOperator, tensor: str) -> list[torch.Tensor]:
    return [operator.get_buffer(name) for name in operator.buffer_names(tensor)]


@pytest.mark.parametrize("kind", ["experts", "linear"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_every_part_is_bound_to_its_node_and_holds_its_outputs(
    kind: str, mode: str, nodes: list[int], tmp_path: Path
) -> None:
    operator = make(kind, machine_of(tmp_path, nodes), mode)
    weights = Weights(dict(operator.weight_shapes()))
    whole = whole_weights(kind, machine_of(tmp_path, nodes), weights)
    operator.load_weights(weights)
    assert operator.is_bound
    by_address = {address: (size, on) for address, size, on in operator.bound}
    assert len(by_address) == len(operator.bound)
    for name, of in operator.packed_matrices().items():
        rows = whole[name].view(of.matrices, of.outputs, of.per_output)
        seen = []
        for i, part in enumerate(parts_of(operator, name)):
            if part.numel() == 0:
                continue
            size, on = by_address.pop(part.data_ptr())
            assert 0 <= size - part.nbytes < mmap.PAGESIZE
            alone = mode != "interleave" and len(nodes) > 1
            assert on == ([nodes[i]] if alone else nodes)
            panels = of.outputs // 32
            share = range(panels * i // len(nodes) * 32, panels * (i + 1) // len(nodes) * 32)
            held = share if mode == "shard" else range(of.outputs)
            mine = rows[:, held.start : held.stop]
            assert torch.equal(part.view(mine.shape), mine)
            seen += list(held)
        copies = len(nodes) if mode == "replicate" else 1
        assert seen == list(range(of.outputs)) * copies
    assert by_address == {}  # nothing else was bound
    held_bytes = sum(buffer.nbytes for buffer in operator.buffers())
    once = sum(tensor.nbytes for tensor in whole.values())
    assert held_bytes == once * (len(nodes) if mode == "replicate" else 1)
    assert bytes_by_device(operator) == {"cpu": held_bytes}
    assert operator.footprint().weight_bytes == held_bytes
    read = once // E * 2 if kind == "experts" else once
    assert operator.footprint().bytes_read_per_token == read


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["experts", "linear"])
def test_outputs_are_the_same_bits_in_every_mode(kind: str, format: str, tmp_path: Path) -> None:
    one = make(kind, machine_of(tmp_path / "one", [0]), "interleave", format)
    weights = Weights(dict(one.weight_shapes()))
    one.load_weights(weights)
    expected = {tokens: output(one, tokens) for tokens in (1, 70)}
    for number, nodes in enumerate(NODES):
        machine = machine_of(tmp_path / str(number), nodes)
        for mode in MODES:
            for threads in (1, 3):
                operator = make(kind, machine, mode, format, threads=threads)
                operator.load_weights(weights)
                for tokens, want in expected.items():
                    assert same_bits(output(operator, tokens), want), (mode, nodes, threads)


def test_workers_read_the_copy_of_their_node(tmp_path: Path) -> None:
    # This process runs on nodes that exist; the one that does not has a copy of another weight.
    here = sorted({node for node, _ in _native.topology().cores})
    nobody = 1023
    operator = make("linear", machine_of(tmp_path, [0]), "interleave", threads=3)
    weights = Weights(dict(operator.weight_shapes()))
    operator.load_weights(weights)
    want = output(operator, 70)
    right, scale = operator.get_buffer("packed"), operator.get_buffer("scale")
    for nodes in ([nobody, *here], [*here, nobody]):
        copies = [torch.zeros_like(right) if node == nobody else right for node in nodes]
        layer = _native.Linear(
            copies,
            [scale] * len(nodes),
            format="int8",
            in_features=D,
            out_features=F,
            threads=3,
            numa="replicate",
            nodes=nodes,
        )
        x = torch.randn(70, D, generator=torch.Generator().manual_seed(1))
        out = torch.empty(70, F)
        layer.forward(x, out)
        assert same_bits(out, want)


def test_nodes_without_a_copy_read_another(tmp_path: Path) -> None:
    operator = make("linear", machine_of(tmp_path, [1022, 1023]), "replicate", threads=3)
    weights = Weights(dict(operator.weight_shapes()))
    operator.load_weights(weights)
    one = make("linear", machine_of(tmp_path / "one", [0]), "interleave")
    one.load_weights(weights)
    assert same_bits(output(operator, 9), output(one, 9))


def test_every_mode_works_on_this_machine() -> None:
    models = [optimize_and_load(random_model(v3_config()), rules("Cpu", numa=m)) for m in MODES]
    want, *others = map(logits, models)
    assert all(torch.equal(other, want) for other in others)


def rules(prefix: str, **kwargs: object) -> list[dict[str, Any]]:
    """Return rules for all routed experts and the head."""
    place = "ktransformers.operators.{}" if prefix == "Cpu" else "pretended_operators"

    def rule(name: str, kind: str) -> dict[str, Any]:
        path = f"{place.format(kind.lower())}.{prefix}{kind}"
        return {"match": {"name": name}, "replace": {"class": path, "kwargs": kwargs}}

    return [rule(r"\.mlp\.experts$", "Experts"), rule("^lm_head$", "Linear")]


@pytest.fixture
def model(save: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder whose config names a machine of the nodes 0 and 2."""
    machine = machine_of(tmp_path / "machine", [0, 2])
    return save(random_model(v3_config(pretended_machine=machine)))


def logits(loaded: Any) -> Any:
    with torch.no_grad():
        return loaded(IDS).logits


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def operators_of(loaded: Any) -> list[Any]:
    return [module for module in loaded.modules() if isinstance(module, PlacedOperator)]


def test_the_report_says_what_each_mode_takes(model: Path) -> None:
    taken = {}
    for mode in MODES:
        loaded: Any = optimize_and_load(model, rules("Pretended", numa=mode))
        report = loaded.ktransformers_report
        once = sum(o.packed_bytes() // o.placement.copies for o in operators_of(loaded))
        times = "2 x " if mode == "replicate" else ""
        assert report.numa == (f"{mode} over nodes 0, 2: {times}{mib(once)}",)
        assert f"\nNUMA: {report.numa[0]}\n" in str(report)
        taken[mode] = report.bytes_by_device["cpu"]
    assert taken["shard"] == taken["interleave"]
    assert taken["replicate"] == taken["interleave"] + once


def test_what_is_packed_does_not_depend_on_nodes(model: Path, tmp_path: Path) -> None:
    contents = []
    for mode in MODES:
        folder = tmp_path / mode
        pack(model, rules("Pretended", numa=mode), folder)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", ["int4", "bf16"])
def test_a_cache_gives_each_node_what_packing_anew_gives_it(
    mode: str, weight: str, model: Path
) -> None:
    wanted = rules("Pretended", numa=mode, weight=weight)
    anew: Any = optimize_and_load(model, wanted)
    pack(model, wanted)
    cached: Any = optimize_and_load(model, wanted)
    copied = mode != "interleave"  # one mapping can lie on no two nodes
    done = "copied" if copied else "mapped"
    assert f" of 3 operators {done} from " in cached.ktransformers_report.cache
    place = f"{mode} over nodes 0, 2: " if copied else "mapped, bound to no node: "
    assert cached.ktransformers_report.numa[0].startswith(place)
    assert torch.equal(logits(cached), logits(anew))
    for was, now in zip(operators_of(anew), operators_of(cached), strict=True):
        assert now.is_bound == copied
        assert (len(now.bound) > 0) == copied
        if copied:
            assert [on for *_, on in now.bound] == [on for *_, on in was.bound]
        pairs = zip(was.named_buffers(), now.named_buffers(), strict=True)
        assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)


def test_a_copy_is_bound_where_weights_are_interleaved_too(model: Path) -> None:
    wanted = rules("Pretended", numa="interleave")
    pack(model, wanted)
    copied: Any = optimize_and_load(model, wanted, cache_mode="copy")
    for operator in operators_of(copied):
        assert operator.is_bound
        assert all(on == [0, 2] for *_, on in operator.bound)
    assert torch.equal(logits(copied), logits(optimize_and_load(model, wanted, cache=None)))


def test_what_a_mapping_cannot_be_is_refused(model: Path) -> None:
    wanted = rules("Pretended", numa="shard")
    pack(model, wanted)
    with pytest.raises(LoadError) as caught:
        optimize_and_load(model, wanted, cache_mode="map")
    assert (
        "cache_mode map: the weights of PretendedExperts at model.layers.1.mlp.experts and 2 more "
        "lie in parts (numa: shard over nodes 0, 2), and a mapped file lies in one; use cache_mode "
        "copy or auto, or numa: interleave"
    ) in str(caught.value)


def test_some_operators_may_be_copied_and_others_mapped(model: Path) -> None:
    wanted = [rules("Pretended", numa="shard")[0], rules("Pretended", numa="interleave")[1]]
    pack(model, wanted)
    loaded: Any = optimize_and_load(model, wanted)
    report = loaded.ktransformers_report
    assert " of 1 operators mapped and " in report.cache
    assert " of 2 operators copied from " in report.cache
    assert [line.partition(":")[0] for line in report.numa] == [
        "shard over nodes 0, 2",
        "mapped, bound to no node",
    ]


def test_kwarg_wins_over_the_classic_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_NUMA", "1")
    assert weight_placement(None).mode == "replicate"
    assert weight_placement("shard").mode == "shard"
    monkeypatch.delenv("USE_NUMA")
    assert weight_placement(None).mode == "interleave"


@pytest.mark.parametrize("numa", ["split", 2, True])
@pytest.mark.parametrize("kind", [0, 1])
def test_unknown_mode_is_an_error_of_the_rule(numa: object, kind: int) -> None:
    with pytest.raises(
        RuleError, match=r"numa.{1,3}(split|2|True).*: expected interleave, shard or"
    ):
        optimize_and_load(random_model(v3_config()), [rules("Cpu", numa=numa)[kind]])


def refuse(*_: object) -> None:
    raise OSError(1, "mbind: Operation not permitted: nodes 0")


@pytest.mark.parametrize("mode", MODES)
def test_a_kernel_that_refuses_to_bind_is_an_error_where_it_was_asked_for(mode: str) -> None:
    placement = Placement(mode, (0, 1), bind=refuse)
    with pytest.raises(ValueError, match=rf"^numa {mode}: mbind: Operation not permitted"):
        try_binding(placement, asked=True)
    reason = "mbind: Operation not permitted: nodes 0"
    assert try_binding(placement, asked=False) == replace(placement, unbound=reason)


def test_weights_that_are_not_bound_are_told_of(tmp_path: Path) -> None:
    machine = machine_of(tmp_path, [0, 1])
    config = v3_config(pretended_machine=machine)
    model = random_model(config)
    swaps = plan(model, load_rules(rules("Pretended")))
    operator: Any = swaps.replacements[0].operator
    operator.placement = replace(operator.placement, unbound="mbind: no", bind=refuse)
    operator.load_weights(Weights(dict(operator.weight_shapes())))
    assert numa_lines(operator)[0].startswith("interleave over nodes 0, 1, not bound (mbind: no): ")


@pytest.mark.parametrize("chunk_tokens", [0, -1, 1.5, True, "many", (1 << 20) + 1])
@pytest.mark.parametrize("kind", [0, 1])
def test_chunk_size_is_checked(chunk_tokens: object, kind: int) -> None:
    with pytest.raises(RuleError) as caught:
        optimize_and_load(
            random_model(v3_config()), [rules("Cpu", chunk_tokens=chunk_tokens)[kind]]
        )
    reason = f"chunk_tokens {chunk_tokens!r} is not a number from 1 to 1,048,576"
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", ["experts", "linear"])
def test_bits_do_not_depend_on_the_chunk_size(kind: str, tmp_path: Path) -> None:
    machine = machine_of(tmp_path, [0])
    want = None
    for chunk_tokens in (None, 1, 7, 64, 2000):
        operator = make(kind, machine, "interleave", threads=2, chunk_tokens=chunk_tokens)
        operator.load_weights(Weights(dict(operator.weight_shapes())))
        got = output(operator, 130)
        want = got if want is None else want
        assert same_bits(got, want)
