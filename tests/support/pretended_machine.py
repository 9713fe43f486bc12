"""Trees of files that `_native.topology(root)` takes for a machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def as_list(ids: Iterable[int]) -> str:
    """Write ids as Linux does: `0-2,8`."""
    ranges: list[list[int]] = []
    for i in sorted(ids):
        if ranges and ranges[-1][1] == i - 1:
            ranges[-1][1] = i
        else:
            ranges.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def pretend(
    root: Path,
    nodes: Mapping[int, Iterable[int]],
    *,
    smt: int = 1,
    allowed: Iterable[int] | None = None,
    offline: Iterable[int] = (),
    memory: Iterable[int] | None = None,
    allowed_memory: Iterable[int] | None = None,
) -> str:
    """Make a machine of these nodes and CPUs; return its root.

    With `smt` 2 the siblings of a core are half the CPUs apart, as on Intel and AMD servers.
    """
    online = sorted({cpu for cpus in nodes.values() for cpu in cpus} - set(offline))
    count = max(online) + 1
    memory = set(nodes if memory is None else memory)
    system = root / "sys/devices/system"
    write(system / "cpu/online", as_list(online))
    for cpu in online:
        siblings = {cpu % (count // smt) + i * (count // smt) for i in range(smt)} & set(online)
        write(system / f"cpu/cpu{cpu}/topology/core_cpus_list", as_list(siblings))
    for node, cpus in nodes.items():
        write(system / f"node/node{node}/cpulist", as_list(set(cpus) & set(online)))
    write(system / "node/has_memory", as_list(memory))
    write(system / "node/online", as_list(nodes))  # a neighbour that is no node
    status = (
        f"Name:\tpython\nCpus_allowed_list:\t{as_list(online if allowed is None else allowed)}\n"
        f"Mems_allowed_list:\t{as_list(memory if allowed_memory is None else allowed_memory)}"
    )
    write(root / "proc/thread-self/status", status)
    return str(root)
