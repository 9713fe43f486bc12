"""Operators on a pretended machine; rules name them as they do any other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ktransformers import _native
from ktransformers.base import Site
from ktransformers.numa import Placement
from ktransformers.operators.experts import CpuExperts
from ktransformers.operators.linear import CpuLinear

Bound = list[tuple[int, int, list[int]]]  # address, bytes, nodes


def pretended(placement: Placement, site: Site) -> tuple[Placement, Bound]:
    """Place on the machine whose files the model's config names, and record what is bound."""
    nodes = _native.topology(site.config.pretended_machine).nodes(placement.mode)
    bound: Bound = []
    return replace(placement, nodes=tuple(nodes), bind=lambda *part: bound.append(part)), bound


class PretendedExperts(CpuExperts):
    """CpuExperts there."""

    def __init__(self, site: Site, *, placement: Placement, **kwargs: Any):
        placement, bound = pretended(placement, site)
        super().__init__(site, placement=placement, **kwargs)
        self.bound = bound


class PretendedLinear(CpuLinear):
    """CpuLinear there."""

    def __init__(self, site: Site, *, placement: Placement, **kwargs: Any):
        placement, bound = pretended(placement, site)
        super().__init__(site, placement=placement, **kwargs)
        self.bound = bound
