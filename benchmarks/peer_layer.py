"""What a peer is to the benchmarks: one MoE layer in another engine, in a process of its own.

A module `peer_<name>.py` says which variants it has for a weight format, and makes the layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from moe_layer import Sizes, Weights

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-peers"  # where `make peers` puts those that are no dependency of ours

# One call: experts `[T, K]` in, output `[T, D]` out; x and the weights of experts are prepared.
Call = Callable[[torch.Tensor], torch.Tensor]


class CannotRun(Exception):
    """A peer that this machine cannot run, with the reason."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a peer: the better one counts."""

    format: str  # in the peer's own words
    threads: int
    repack: bool = False  # weights, for its faster kernels

    def __str__(self) -> str:
        """Write it for a table."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.format}{', repacked' if self.repack else ''}, {threads}"


class PeerLayer(Protocol):
    """Experts in a peer's own format."""

    def prepare(self, x: torch.Tensor, weights: torch.Tensor) -> Call:
        """Set up calls with x `[T, D]` in bf16 and the experts' weights `[T, K]`."""
        ...


class Peer(Protocol):
    """A module `peer_<name>.py`."""

    # The most that its output may be off fp32, relative, before it is taken for wrong.
    MAX_ERROR: dict[str, float]

    def variants(self, weight_format: str, threads: int) -> list[Variant]:
        """List its ways to run our format's counterpart; none where it has none.

        Raises CannotRun where this machine can't run it.
        """
        ...

    def make_layer(self, sizes: Sizes, experts: list[Weights], variant: Variant) -> PeerLayer:
        """Make a layer of copies of a few experts. Raises CannotRun."""
        ...


PEERS = {
    "onednn": "peer_onednn",
    "grouped_mm": "peer_grouped_mm",
    "llama.cpp": "peer_llama_cpp",
    "kt-kernel": "peer_kt_kernel",
}
# The package that each needs, where it is no dependency of ours.
PACKAGES = {
    "llama.cpp": "llama-cpp-python",
    "ik_llama.cpp": "ik-llama-cpp-python",
    "kt-kernel": "kt-kernel",
}


def load_peer(name: str) -> Peer:
    """Import a peer's module."""
    module: Peer = importlib.import_module(PEERS[name])
    return module


def why_absent(name: str) -> tuple[str | None, bool]:
    """Say why a peer is not there to be measured, and whether it can't be; None where it is."""
    package = PACKAGES.get(name)
    if package is None or any(FOLDER.glob(f".{package}==*")):
        return None, False
    for log in FOLDER.glob(f"{package}==*.absent"):
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return f"{package} can't be installed: {lines[-1] if lines else 'no reason given'}", True
    return f"{package} is not installed: make peers", False
