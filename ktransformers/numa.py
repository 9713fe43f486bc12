"""Which NUMA nodes packed weights lie on, and how they are spread over them.

`interleave` deals the pages of a weight to the nodes in turn. `shard` gives each node a slice of
the outputs of every matrix, which its cores compute first; nothing is there twice. `replicate`
gives each node a copy. What a part holds is planned in `csrc/numa_memory.h`; outputs are the same
bits in every mode. On one node a weight is one part, whatever the mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from ktransformers import _native
from ktransformers.cpu_options import affinity

PANEL = 32  # outputs that lie together in every packed layout

Bind = Callable[[int, int, list[int]], object]  # address, bytes, nodes


@dataclass(frozen=True, slots=True)
class Placement:
    """How weights are spread, and over which nodes."""

    mode: str  # interleave, shard or replicate
    nodes: tuple[int, ...]
    unbound: str | None = None  # why memory is not bound to the nodes, if it is not
    bind: Bind | None = None  # the kernel's, or a pretended one

    @property
    def in_parts(self) -> bool:
        """Whether weights lie in several parts, one for each node."""
        return self.mode != "interleave" and len(self.nodes) > 1

    @property
    def copies(self) -> int:
        """How often each weight is there."""
        return len(self.nodes) if self.mode == "replicate" else 1

    @property
    def binding(self) -> Bind | None:
        """What binds memory: None for the kernel, or what does nothing where that refuses."""
        return self.bind if self.unbound is None else lambda *_: None

    def __str__(self) -> str:
        nodes = ", ".join(map(str, self.nodes))
        return f"{self.mode} over node{'s' if len(self.nodes) > 1 else ''} {nodes}"


def weight_placement(numa: object) -> Placement:
    """Return where weights lie in a mode, or, without one, in that of the environment."""
    if numa is not None and not isinstance(numa, str):
        raise ValueError(f"numa {numa!r}: expected interleave, shard or replicate")
    mode = _native.numa_mode(numa)
    asked = numa is not None or mode != "interleave"
    return try_binding(Placement(mode, _nodes(mode, affinity())), asked=asked)


@lru_cache(maxsize=3)
def _nodes(mode: str, affinity: frozenset[int] | None) -> tuple[int, ...]:
    del affinity  # only another mask changes the answer
    return tuple(_native.topology().nodes(mode))


def try_binding(placement: Placement, *, asked: bool) -> Placement:
    """Bind a page on each node. Where the kernel refuses, that is an error if it was asked for."""
    outputs = PANEL * len(placement.nodes)
    plan = _native.numa_plan(
        placement.mode, matrices=1, outputs=outputs, output_bytes=1, nodes=placement.nodes
    )
    try:
        for part in plan:
            part.allocate(bind=placement.binding)
    except OSError as error:
        if asked:
            raise ValueError(f"numa {placement.mode}: {error.strerror}") from error
        return replace(placement, unbound=error.strerror)
    return placement


ANYWHERE = Placement("interleave", (0,), unbound="a cache knows no nodes")
