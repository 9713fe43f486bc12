"""Cores, nodes and processor time, read from pretended machines and from this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktransformers import _native
from pretended_machine import pretend, write

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /sys and /proc")


def test_every_cpu_is_a_core_without_smt(tmp_path: Path) -> None:
    machine = _native.topology(pretend(tmp_path, {0: range(4)}))
    assert machine.cores == [(0, [0]), (0, [1]), (0, [2]), (0, [3])]
    assert machine.memory_nodes == [0]
    assert machine.threads == 4


def test_siblings_are_one_core(tmp_path: Path) -> None:
    nodes = {0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}
    machine = _native.topology(pretend(tmp_path, nodes, smt=2))
    assert machine.cores == [(0, [0, 4]), (0, [1, 5]), (1, [2, 6]), (1, [3, 7])]
    assert machine.threads == 4


def test_older_kernels_name_siblings_otherwise(tmp_path: Path) -> None:
    root = pretend(tmp_path, {0: range(4)}, smt=2)
    for path in tmp_path.glob("sys/devices/system/cpu/cpu*/topology/core_cpus_list"):
        path.rename(path.with_name("thread_siblings_list"))
    assert _native.topology(root).cores == [(0, [0, 2]), (0, [1, 3])]


def test_node_numbers_may_have_gaps(tmp_path: Path) -> None:
    machine = _native.topology(pretend(tmp_path, {8: (0, 1), 0: (2, 3), 10: (4, 5)}))
    assert machine.cores == [(0, [2]), (0, [3]), (8, [0]), (8, [1]), (10, [4]), (10, [5])]
    assert machine.memory_nodes == [0, 8, 10]


def test_affinity_mask_leaves_cores_and_siblings_out(tmp_path: Path) -> None:
    nodes = {0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}
    machine = _native.topology(pretend(tmp_path, nodes, smt=2, allowed=(1, 2, 6, 7)))
    assert machine.cores == [(0, [1]), (1, [2, 6]), (1, [7])]
    assert machine.threads == 3


def test_offline_cpus_are_no_cores(tmp_path: Path) -> None:
    root = pretend(tmp_path, {0: range(4)}, allowed=range(4), offline=(1, 3))
    assert _native.topology(root).cores == [(0, [0]), (0, [2])]


def test_nodes_without_memory_or_cores_are_told_apart(tmp_path: Path) -> None:
    nodes: dict[int, tuple[int, ...]] = {0: (0, 1), 1: (2, 3), 2: ()}
    machine = _native.topology(pretend(tmp_path, nodes, memory=(0, 2)))
    assert machine.cores == [(0, [0]), (0, [1]), (1, [2]), (1, [3])]
    assert machine.memory_nodes == [0, 2]
    assert machine.nodes("interleave") == [0, 2]
    assert machine.nodes("shard") == machine.nodes("replicate") == [0]


def test_mask_on_a_node_without_memory_leaves_the_other_nodes_for_weights(tmp_path: Path) -> None:
    root = pretend(tmp_path, {0: (0,), 1: (1,), 2: (2,)}, allowed=(0,), memory=(1, 2))
    assert _native.topology(root).nodes("shard") == [1, 2]


def test_memory_that_a_cgroup_forbids_is_not_used(tmp_path: Path) -> None:
    root = pretend(tmp_path, {0: (0,), 1: (1,), 2: (2,)}, allowed_memory=(1, 2))
    assert _native.topology(root).memory_nodes == [1, 2]


@linux
@pytest.mark.parametrize("policy", [2, 3], ids=["membind", "interleave"])  # <linux/mempolicy.h>
def test_memory_policy_of_numactl_is_kept_to(tmp_path: Path, policy: int) -> None:
    root = pretend(tmp_path, {0: (0,), 1: (1,), 2: (2,)})
    script = f"""
import ctypes, platform, sys
set_mempolicy = {{"x86_64": 238, "aarch64": 237}}[platform.machine()]
mask = ctypes.c_ulong(1)  # node 0, which every machine has
if ctypes.CDLL(None).syscall(set_mempolicy, {policy}, ctypes.byref(mask), 65) != 0:
    sys.exit(77)
from ktransformers import _native
print(_native.topology({root!r}).nodes("interleave"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the system does not let a process set its memory policy")
    assert done.stdout == "[0]\n", done.stderr
    assert _native.topology(root).nodes("interleave") == [0, 1, 2]


def test_without_nodes_all_memory_is_node_0(tmp_path: Path) -> None:
    write(tmp_path / "proc/thread-self/status", "Cpus_allowed_list:\t0,2")
    machine = _native.topology(str(tmp_path))
    assert machine.cores == [(0, [0]), (0, [2])]
    assert machine.memory_nodes == [0]


def test_without_a_mask_no_thread_is_held(tmp_path: Path) -> None:
    machine = _native.topology(str(tmp_path))
    assert machine.cores
    assert all(core == (0, []) for core in machine.cores)
    assert all(not cpus for _, cpus in machine.place_threads(len(machine.cores)))


def test_damaged_lists_cost_no_more_than_what_they_say(tmp_path: Path) -> None:
    root = pretend(tmp_path, {0: range(4)})
    write(tmp_path / "sys/devices/system/cpu/online", "0-1,3-x")
    write(tmp_path / "sys/devices/system/node/has_memory", "")
    write(tmp_path / "sys/devices/system/node/node0/cpulist", "0-4000000000")
    machine = _native.topology(root)
    assert machine.cores == [(0, [0]), (0, [1])]
    assert machine.memory_nodes == [0]


@pytest.mark.parametrize(
    ("file", "text", "threads"),
    [
        ("cpu.max", "250000 100000", 2),
        ("cpu.max", "50000 100000", 1),
        ("cpu.max", "max 100000", 4),
        ("a/cpu.max", "300000 100000", 3),
        ("a/b/cpu.max", "900000 100000", 4),
        ("other/cpu.max", "100000 100000", 4),
    ],
)
def test_cgroup_quota_caps_the_threads(tmp_path: Path, file: str, text: str, threads: int) -> None:
    root = pretend(tmp_path, {0: range(4)})
    write(tmp_path / "proc/self/cgroup", "0::/a/b")
    write(tmp_path / "sys/fs/cgroup" / file, text)
    machine = _native.topology(root)
    assert machine.threads == threads
    assert len(machine.cores) == 4


def test_first_version_of_cgroups_counts_too(tmp_path: Path) -> None:
    root = pretend(tmp_path, {0: range(4)})
    write(tmp_path / "proc/self/cgroup", "3:memory:/a\n2:cpu,cpuacct:/a")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", "200000")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us", "100000")
    assert _native.topology(root).threads == 2


def test_threads_on_every_core_have_one_each_and_the_caller_its_own(tmp_path: Path) -> None:
    nodes = {0: (0, 1, 4, 5), 8: (2, 3, 6, 7)}
    machine = _native.topology(pretend(tmp_path, nodes, smt=2))
    assert machine.place_threads(4) == [(0, [0, 4]), (8, [2, 6]), (0, [1, 5]), (8, [3, 7])]
    assert machine.place_threads(4, caller_cpu=7) == [
        (8, [3, 7]),
        (0, [0, 4]),
        (8, [2, 6]),
        (0, [1, 5]),
    ]


@pytest.mark.parametrize("threads", [1, 3, 5, 7])
def test_other_numbers_of_threads_are_held_to_nodes_in_turn(tmp_path: Path, threads: int) -> None:
    nodes = {0: (0, 1, 4, 5), 8: (2, 3, 6, 7)}
    machine = _native.topology(pretend(tmp_path, nodes, smt=2))
    cpus = {0: [0, 4, 1, 5], 8: [2, 6, 3, 7]}
    expected = [(node, cpus[node]) for node in [0, 8] * threads][:threads]
    assert machine.place_threads(threads) == expected


def test_larger_nodes_take_the_turns_that_are_left(tmp_path: Path) -> None:
    machine = _native.topology(pretend(tmp_path, {0: (0,), 1: (1, 2, 3)}))
    assert [node for node, _ in machine.place_threads(8)] == [0, 1, 1, 1] * 2


def test_one_node_is_nothing_to_hold_to(tmp_path: Path) -> None:
    machine = _native.topology(pretend(tmp_path, {4: range(4)}))
    assert machine.place_threads(3) == [(4, [])] * 3


def test_number_of_threads_is_checked(tmp_path: Path) -> None:
    machine = _native.topology(pretend(tmp_path, {0: (0,)}))
    with pytest.raises(ValueError, match=r"^threads=0: expected 1 to 1024$"):
        machine.place_threads(0)


@linux
def test_this_machine_is_what_the_mask_says() -> None:
    machine = _native.topology()
    allowed = os.sched_getaffinity(0)
    assert {cpu for _, cpus in machine.cores for cpu in cpus} == allowed
    assert machine.threads == _native.default_threads()
    assert set(machine.nodes("shard")) <= set(machine.memory_nodes)
