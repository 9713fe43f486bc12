"""Finds and reads rule files: the one that was asked for and, after it, those that it includes.

A file is found by its path, relative to the file that includes it, or else among those that come
with the package, by name.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktransformers.rule_file import (
    MAX_BYTES,
    Form,
    Node,
    Place,
    Problems,
    Source,
    nearest,
    parse_yaml,
    shown,
)

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # new in Python 3.11

MAX_INCLUDE_DEPTH = 8


def shipped_rules() -> list[str]:
    """Return the names of the rule files that come with the package."""
    return sorted(_shipped())


def _shipped() -> dict[str, Traversable]:
    folder = importlib.resources.files("ktransformers").joinpath("optimize_rules")
    return {
        entry.name.removesuffix(".yaml"): entry
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }


@dataclass(frozen=True, slots=True)
class RuleFile:
    """What a file holds, its includes apart."""

    source: Source
    variables: Mapping[str | int, Node]
    rules: Sequence[Node]


@dataclass(frozen=True, slots=True)
class _Found:
    """A file that exists."""

    name: str  # for messages
    file: Traversable
    folder: Path | None  # that its includes are relative to; None for a shipped file

    @property
    def identity(self) -> str:
        return str(self.file.resolve()) if isinstance(self.file, Path) else str(self.file)


def _find(name: str, folder: Path | None) -> _Found | None:
    """Find a file by its path in `folder`, or else a shipped one by its name."""
    try:
        path = None if folder is None else folder / name
        if path is not None and path.is_file():
            return _Found(str(path), path, path.parent)
    except OSError:  # a name that is too long, a folder that may not be entered
        pass
    shipped = _shipped().get(name.removesuffix(".yaml"))
    return None if shipped is None else _Found(shipped.name, shipped, None)


def _not_found(name: str) -> str:
    shipped = shipped_rules()
    return f"no such rule file (shipped: {', '.join(shipped)}){nearest(name, shipped)}"


def read_files(name: str, problems: Problems) -> list[RuleFile]:
    """Return the file and, after it, what it includes. Raises RuleError if one can't be read."""
    found = _find(name, Path())
    if found is None:
        problems.add(Place(0, 0, name), _not_found(name))
        problems.check()
    assert found is not None
    reader = _Reader(problems)
    reader.read(found, ())
    if not reader.complete:  # what is missing would cause errors elsewhere
        problems.check()
    return reader.files


class _Reader:
    """Reads a file, then what it includes; each file once."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.files: list[RuleFile] = []
        self.seen: set[str] = set()
        self.complete = True

    def read(self, found: _Found, chain: tuple[_Found, ...]) -> None:
        source = Source(len(self.seen), found.name)
        self.seen.add(found.identity)
        root = self._parse(found, source)
        if root is None:
            self.complete = False
            return
        form = Form(source, self.problems)
        if isinstance(root.value, list):
            self.files.append(RuleFile(source, {}, root.value))
            return
        if not isinstance(root.value, dict):
            message = "expected a mapping with rules, or a list of rules"
            form.wrong(root, "", f"{message}, found {shown(root.value)}")
            return
        top = form.mapping(root, "", ("vars", "include", "rules"), required=())
        if not top.keys() & {"include", "rules"}:
            form.wrong(root, "", "no rules (expected rules, include or both)")
        variables = form.any_mapping(top["vars"], "vars") if "vars" in top else {}
        rules = form.items(top["rules"], "rules") if "rules" in top else []
        self.files.append(RuleFile(source, variables, rules))
        for include, path in form.texts(top["include"], "include") if "include" in top else ():
            self._include(include, path, form, (*chain, found))

    def _parse(self, found: _Found, source: Source) -> Node | None:
        try:
            with found.file.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except OSError as error:
            self.problems.add(source.at(0), f"can't be read: {error.strerror}")
            return None
        if len(data) > MAX_BYTES:
            self.problems.add(source.at(0), f"more than {MAX_BYTES:,} bytes; not a rule file")
            return None
        try:
            return parse_yaml(data.decode("utf-8-sig"), source, self.problems)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self.problems.add(source.at(line), "not UTF-8")
            return None

    def _include(self, node: Node, path: str, form: Form, chain: tuple[_Found, ...]) -> None:
        found = _find(node.value, chain[-1].folder)
        if found is None:
            self.complete = False
            form.wrong(node, path, f"{shown(node.value)}: {_not_found(node.value)}")
            return
        names = [*(file.name for file in chain), found.name]
        if found.identity in [file.identity for file in chain]:
            form.wrong(node, path, f"files that include one another: {' -> '.join(names)}")
        elif len(chain) >= MAX_INCLUDE_DEPTH:
            deep = f"included more than {MAX_INCLUDE_DEPTH} deep"
            form.wrong(node, path, f"{deep}: {' -> '.join(names)}")
        elif found.identity not in self.seen:
            self.read(found, chain)
