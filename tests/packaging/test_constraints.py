"""The pins of `make` and the ranges of pyproject.toml say the same."""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def needed() -> dict[str, Requirement]:
    """Return what the build and the package ask for, by name."""
    texts = PYPROJECT["build-system"]["requires"] + PYPROJECT["project"]["dependencies"]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in texts}


def pins(name: str) -> dict[str, Version]:
    """Return the versions that a constraints file pins for this Python."""
    lines = (ROOT / name).read_text().splitlines()
    asked = [Requirement(line) for line in lines if not line.startswith("#")]
    here = [each for each in asked if each.marker is None or each.marker.evaluate()]
    return {each.name: Version(str(each.specifier).removeprefix("==")) for each in here}


def test_lowest_pins_are_the_lower_bounds() -> None:
    lowest = pins("constraints-lowest.txt")
    bounds = {
        name: Version(bound.version)
        for name, requirement in needed().items()
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert bounds == {name: lowest[name] for name in needed()}


def test_pins_lie_within_the_ranges() -> None:
    pinned = pins("constraints.txt")
    outside = [name for name, each in needed().items() if pinned[name] not in each.specifier]
    assert outside == []


def test_every_development_tool_is_pinned() -> None:
    tools = {
        canonicalize_name(Requirement(text).name)
        for text in PYPROJECT["project"]["optional-dependencies"]["dev"]
    }
    assert tools - pins("constraints.txt").keys() == set()
