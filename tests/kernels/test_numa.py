"""Weights on NUMA nodes: which bytes lie where, on pretended machines and on this one."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from ktransformers import _native
from pretended_machine import pretend

MODES = ("interleave", "shard", "replicate")
NODES = ([0], [0, 1], [0, 8], [0, 1, 2, 3], [0, 1, 8, 9])
# DeepSeek-V3's gate and up, its down, fewer panels than nodes, panels that do not divide evenly.
WEIGHTS = ((2 * 8, 2048, 7168), (8, 7168, 2048), (3, 64, 64), (2, 32 * 7, 100))


def pretended_nodes(root: Path, ids: Sequence[int], mode: str) -> list[int]:
    """Read the nodes that a mode uses from a machine with these, two cores each."""
    machine = pretend(root, {node: (2 * i, 2 * i + 1) for i, node in enumerate(ids)})
    return _native.topology(machine).nodes(mode)


@pytest.mark.parametrize("ids", NODES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_shards_are_every_output_once(
    tmp_path: Path, ids: list[int], weight: tuple[int, int, int]
) -> None:
    matrices, outputs, output_bytes = weight
    nodes = pretended_nodes(tmp_path, ids, "shard")
    parts = _native.numa_plan(
        "shard", matrices=matrices, outputs=outputs, output_bytes=output_bytes, nodes=nodes
    )
    assert [part.nodes for part in parts] == [[node] for node in ids]
    next_output = 0
    for part in parts:
        assert part.first_output == next_output
        assert part.outputs % 32 == 0
        assert part.nbytes == matrices * part.outputs * output_bytes
        next_output += part.outputs
    assert next_output == outputs
    assert sum(part.nbytes for part in parts) == matrices * outputs * output_bytes
    sizes = {part.outputs for part in parts}
    assert max(sizes) - min(sizes) <= 32


@pytest.mark.parametrize("ids", NODES, ids=str)
def test_replicas_are_everything_on_every_node(tmp_path: Path, ids: list[int]) -> None:
    nodes = pretended_nodes(tmp_path, ids, "replicate")
    parts = _native.numa_plan("replicate", matrices=3, outputs=96, output_bytes=64, nodes=nodes)
    assert [part.nodes for part in parts] == [[node] for node in ids]
    assert all((part.first_output, part.outputs) == (0, 96) for part in parts)
    assert sum(part.nbytes for part in parts) == len(ids) * 3 * 96 * 64


@pytest.mark.parametrize("ids", NODES, ids=str)
def test_interleaving_is_one_part_over_all_nodes(tmp_path: Path, ids: list[int]) -> None:
    nodes = pretended_nodes(tmp_path, ids, "interleave")
    (part,) = _native.numa_plan("interleave", matrices=3, outputs=96, output_bytes=64, nodes=nodes)
    assert part.nodes == ids
    assert (part.first_output, part.outputs, part.nbytes) == (0, 96, 3 * 96 * 64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", NODES, ids=str)
def test_each_part_is_bound_whole_and_alone(tmp_path: Path, ids: list[int], mode: str) -> None:
    nodes = pretended_nodes(tmp_path, ids, mode)
    parts = _native.numa_plan(mode, matrices=3, outputs=32 * 5, output_bytes=100, nodes=nodes)
    bound: list[tuple[int, int, list[int]]] = []
    memory = [
        from_dlpack(part.allocate(bind=lambda *binding: bound.append(binding))) for part in parts
    ]
    assert [(address, nodes) for address, _, nodes in bound] == [
        (tensor.data_ptr(), part.nodes) for tensor, part in zip(memory, parts, strict=True)
    ]
    assert [size for _, size, _ in bound] == [part.allocated for part in parts]
    pages: set[int] = set()
    for (address, size, _), tensor in zip(bound, memory, strict=True):
        assert tensor.dtype == torch.uint8
        assert address % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
        assert 0 <= size - tensor.numel() < mmap.PAGESIZE
        own = set(range(address, address + size, mmap.PAGESIZE))
        assert not pages & own
        pages |= own
    assert len(pages) * mmap.PAGESIZE == sum(part.allocated for part in parts)


def test_nodes_without_a_panel_take_no_memory() -> None:
    parts = _native.numa_plan("shard", matrices=2, outputs=32, output_bytes=64, nodes=[0, 1, 2])
    assert [part.outputs for part in parts] == [0, 0, 32]
    assert [part.allocated for part in parts] == [0, 0, mmap.PAGESIZE]
    bound: list[int] = []
    empty = parts[0].allocate(bind=lambda *_: bound.append(1))
    assert from_dlpack(empty).numel() == 0
    assert bound == []


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_works_on_this_machine(mode: str) -> None:
    weight = torch.arange(3 * 128 * 64, dtype=torch.int32).to(torch.uint8).view(3, 128, 64)
    for part in _native.numa_plan(mode, matrices=3, outputs=128, output_bytes=64):
        flat = from_dlpack(part.allocate())
        assert not flat.any()
        mine = weight[:, part.first_output : part.first_output + part.outputs]
        flat.view(3, part.outputs, 64).copy_(mine)
        assert torch.equal(flat, mine.reshape(-1))


@pytest.mark.parametrize("mode", MODES)
def test_kernel_takes_the_policy(mode: str) -> None:
    maps = Path("/proc/self/numa_maps")
    if not maps.exists():
        pytest.skip("this kernel has no NUMA support")
    for part in _native.numa_plan(mode, matrices=1, outputs=128, output_bytes=64):
        flat = from_dlpack(part.allocate())
        lines = [line.split() for line in maps.read_text().splitlines()]
        policy = next(line[1] for line in lines if int(line[0], 16) == flat.data_ptr())
        assert policy.startswith("prefer" if len(part.nodes) == 1 else "interleave")


def test_kernels_read_what_lies_in_a_part() -> None:
    n, k = 64, 128
    (part,) = _native.numa_plan("interleave", matrices=1, outputs=n, output_bytes=k)
    packed = from_dlpack(part.allocate())
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    scale, ordinary = torch.empty(n), torch.empty(n * k, dtype=torch.uint8)
    _native.pack(weight, packed, scale, "int8")
    _native.pack(weight, ordinary, scale, "int8")
    assert torch.equal(packed, ordinary)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps, which is Linux's")
def test_memory_is_freed_with_its_last_reference() -> None:
    (part,) = _native.numa_plan(
        "replicate", matrices=1, outputs=32, output_bytes=1 << 21, nodes=[0]
    )
    array = part.allocate(bind=lambda *_: None)
    tensor = from_dlpack(array)
    last = tensor[5:6]

    def is_mapped(address: int) -> bool:
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in lines]
        return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)

    address = tensor.data_ptr() + (1 << 24)
    del array, tensor
    assert is_mapped(address)
    del last
    assert not is_mapped(address)


def test_error_in_the_recorder_is_the_callers() -> None:
    (part,) = _native.numa_plan("replicate", matrices=1, outputs=32, output_bytes=64, nodes=[0])

    def refuse(*_: object) -> None:
        raise KeyError("refused")

    with pytest.raises(KeyError, match="refused"):
        part.allocate(bind=refuse)


@pytest.mark.skipif(sys.platform != "linux", reason="mbind is Linux's")
def test_node_that_is_not_there_is_an_error() -> None:
    # 1023 is the last that Linux can be built for; no machine has that many.
    (part,) = _native.numa_plan("replicate", matrices=1, outputs=32, output_bytes=64, nodes=[1023])
    with pytest.raises(OSError, match=r"mbind: .*: nodes 1023"):
        part.allocate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "split"}, "numa='split': expected interleave, shard or replicate"),
        ({"outputs": 33}, "outputs=33: expected a positive multiple of 32"),
        ({"outputs": 0}, "outputs=0: expected a positive multiple of 32"),
        ({"matrices": 0}, "matrices=0, output_bytes=64: expected at least 1 each, and less than"),
        ({"matrices": 1 << 58}, "and less than 2^63 bytes in all"),
        ({"nodes": []}, "nodes: expected at least one"),
        ({"nodes": [0, 1024]}, "nodes[1] is 1024, expected 0 to 1023"),
        ({"nodes": [2, -1]}, "nodes[1] is -1, expected 0 to 1023"),
        ({"nodes": [1, 1]}, "nodes: 1 is there twice"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    valid = {"mode": "shard", "matrices": 2, "outputs": 64, "output_bytes": 64, "nodes": [0, 1]}
    with pytest.raises(ValueError) as error:
        _native.numa_plan(**{**valid, **arguments})  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize("mode", MODES)
def test_mode_that_is_asked_for_stands(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("USE_NUMA", "1")
    assert _native.numa_mode(mode) == mode


@pytest.mark.parametrize(
    ("variable", "mode"),
    [("1", "replicate"), ("0", "interleave"), ("", "interleave"), (None, "interleave")],
)
def test_classic_switch_means_replicate(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, mode: str
) -> None:
    if variable is None:
        monkeypatch.delenv("USE_NUMA", raising=False)
    else:
        monkeypatch.setenv("USE_NUMA", variable)
    assert _native.numa_mode() == mode


def test_unknown_mode_or_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^numa='both': expected interleave, shard or replicate$"):
        _native.numa_mode("both")
    monkeypatch.setenv("USE_NUMA", "yes")
    with pytest.raises(ValueError, match=r"^USE_NUMA=yes: expected 0 or 1"):
        _native.numa_mode()


def test_memory_outlives_the_interpreter_without_complaint() -> None:
    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
(part,) = native.numa_plan("interleave", matrices=1, outputs=32, output_bytes=64)
kept = sys.kept = part.allocate()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, _native.__file__], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
