"""YAML -> rules; every error says file:line, and all errors come at once.

The text becomes nodes (`rule_file`), the nodes' `${name}` become values (`rule_vars`), and here the
values become rules: files found and included, keys and types checked. Nothing of the model or of
the operators is looked at before `inject.plan`.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import regex

from ktransformers.rule_file import (
    Form,
    Node,
    Place,
    Problems,
    RuleError,
    Source,
    join,
    plain,
    shown,
    wrap,
)
from ktransformers.rule_include import RuleFile, read_files, shipped_rules
from ktransformers.rule_vars import merge_variables

__all__ = [
    "Match",
    "Rule",
    "RuleError",
    "load_rules",
    "parse_layers",
    "shipped_rules",
    "top_k_of_layer",
]

MAX_PATTERN = 1_000  # characters of a regex


@dataclass(frozen=True, slots=True)
class Match:
    """Which modules a rule means; what is None matches all. The parts are ANDed."""

    name: regex.Pattern[str] | None = None  # searched, unanchored, in the full dotted name
    class_path: str | None = None  # import path, or bare name of a class
    layers: tuple[range, ...] | None = None  # ascending, disjoint; "3-" ends at sys.maxsize

    def __str__(self) -> str:
        parts = []
        if self.name is not None:
            parts.append(f"name '{self.name.pattern}'")
        if self.class_path is not None:
            parts.append(f"class {self.class_path}")
        if self.layers is not None:
            parts.append(f"layers {format_layers(self.layers)}")
        return " and ".join(parts)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a rule file: match and replace."""

    index: int  # 1-based, over the file and what it includes
    match: Match
    class_path: str | None  # of the operator; None for `class: default`
    kwargs: Mapping[str, Any]
    recursive: bool  # whether rules are tried below a module that this one takes
    expect: int | Literal["any"] | None  # how many modules it must take
    places: Mapping[str, Place]  # of its parts: "", "match.name", "replace.kwargs.threads"

    @property
    def where(self) -> str:
        """Its position for messages: "rules/v3.yaml:12", or "rules[2]"."""
        return self.places[""].text

    def place(self, path: str) -> Place:
        """Return where the value at `path` stands, or else where the rule does."""
        return self.places.get(path, self.places[""])

    def __str__(self) -> str:
        return f"rule {self.index} ({self.where})"


def load_rules(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
) -> tuple[Rule, ...]:
    """Read rules from a file, from a shipped file by its name, or from a list of dicts.

    `overrides` replace variables of the file: a mapping, or strings such as "threads=8".
    Raises RuleError with every error.
    """
    problems = Problems()
    if isinstance(source, str | os.PathLike):
        files = read_files(os.fspath(source), problems)
    else:
        files = [_python_rules(source, problems)]
    given = [(file.source, file.variables) for file in files]
    variables = merge_variables(given, overrides, problems)
    numbered = [(file.source, node) for file in files for node in file.rules]
    rules = tuple(
        _RuleForm(source, problems).rule(variables.resolve(node, source, ""), index)
        for index, (source, node) in enumerate(numbered, 1)
    )
    if not rules and not problems:
        problems.add(Place(0, 0, files[0].source.name or "rules"), "no rules")
    problems.check()
    return rules


def _python_rules(source: Sequence[Mapping[str, Any]], problems: Problems) -> RuleFile:
    if isinstance(source, Mapping) or not isinstance(source, Sequence):
        raise TypeError(f"rules must be a path or a list of dicts, found {shown(source)}")
    origin = Source(0, None)
    nodes = []
    for index, item in enumerate(source):
        try:
            nodes.append(wrap(item, index))
        except ValueError as error:
            problems.add(origin.at(index), str(error))
    return RuleFile(origin, {}, nodes)


# Rules


class _RuleForm(Form):
    """Turns a node into a rule."""

    def rule(self, node: Node, index: int) -> Rule:
        """Return the rule, which is not to be used where it added problems."""
        keys = ("match", "replace", "recursive", "expect")
        top = self.mapping(node, "", keys, required=("match", "replace"))
        replace: dict[str | int, Node] = {}
        if "replace" in top:
            replace = self.mapping(top["replace"], "replace", ("class", "kwargs"), ("class",))
        kwargs = self._kwargs(replace)
        return Rule(
            index=index,
            match=self._match(top["match"]) if "match" in top else Match(),
            class_path=self._operator(replace["class"], kwargs) if "class" in replace else None,
            kwargs={str(key): plain(value) for key, value in kwargs.items()},
            recursive=self._recursive(top["recursive"]) if "recursive" in top else True,
            expect=self._expect(top["expect"]) if "expect" in top else None,
            places=dict(self._places(node, "")),
        )

    def _places(self, node: Node, path: str) -> list[tuple[str, Place]]:
        places = [(path, self.source.at(node.line, path))]
        if isinstance(node.value, dict) and path.count(".") < 2:
            for key, member in node.value.items():
                places += self._places(member, join(path, key))
        return places

    def _match(self, node: Node) -> Match:
        keys = ("name", "class", "layers")
        members = self.mapping(node, "match", keys, ())
        if node.value == {}:
            self.wrong(node, "match", f"expected at least one of {', '.join(keys)}")
        return Match(
            name=self._pattern(members["name"]) if "name" in members else None,
            class_path=self._class_path(members["class"]) if "class" in members else None,
            layers=self._layers(members["layers"]) if "layers" in members else None,
        )

    def _pattern(self, node: Node) -> regex.Pattern[str] | None:
        text = self.text(node, "match.name")
        if text is None:
            return None
        if not 0 < len(text) <= MAX_PATTERN:
            message = f"expected a regex of 1 to {MAX_PATTERN:,} characters, found {len(text):,}"
            self.wrong(node, "match.name", message)
            return None
        try:
            return regex.compile(text)
        except regex.error as error:
            self.wrong(node, "match.name", f"bad regex {shown(text)}: {error}")
        except RecursionError:
            self.wrong(node, "match.name", f"bad regex {shown(text)}: nested too deeply")
        return None

    def _class_path(self, node: Node) -> str | None:
        text = self.text(node, "match.class")
        if text is not None and not _is_dotted(text):
            message = f"{shown(text)} is neither an import path nor the name of a class"
            self.wrong(node, "match.class", message)
        return text

    def _layers(self, node: Node) -> tuple[range, ...] | None:
        try:
            return parse_layers(plain(node))
        except ValueError as error:
            self.wrong(node, "match.layers", str(error))
            return None

    def _operator(self, node: Node, kwargs: Mapping[str | int, Node]) -> str | None:
        """Return the operator's class path; None for default."""
        text = self.text(node, "replace.class")
        if text == "default":
            for key, value in kwargs.items():
                if key != "device":
                    message = "class: default keeps the module and takes device alone"
                    self.wrong(value, f"replace.kwargs.{key}", message)
            return None
        if text is not None and not (_is_dotted(text) and "." in text):
            expected = "default, or an import path such as package.module.Class"
            self.wrong(node, "replace.class", f"expected {expected}, found {shown(text)}")
        return text

    def _kwargs(self, replace: Mapping[str | int, Node]) -> dict[str | int, Node]:
        if "kwargs" not in replace:
            return {}
        kwargs = self.any_mapping(replace["kwargs"], "replace.kwargs")
        for key, value in kwargs.items():
            if not isinstance(key, str):
                self.wrong(value, f"replace.kwargs.{key}", "the name of a kwarg is a string")
        return kwargs

    def _recursive(self, node: Node) -> bool:
        if not isinstance(node.value, bool):
            self.wrong(node, "recursive", f"expected true or false, found {shown(node.value)}")
        return node.value is not False

    def _expect(self, node: Node) -> int | Literal["any"] | None:
        value = node.value
        if value == "any":
            return "any"
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        message = f"expected a number of modules above 0, or any, found {shown(value)}"
        self.wrong(node, "expect", message)
        return None


def _is_dotted(text: str) -> bool:
    return len(text) <= 200 and all(part.isidentifier() for part in text.split("."))


# Layers


def parse_layers(value: Any) -> tuple[range, ...]:
    """Return the layers that '3', '3-60', '3-', '0,2,5-7', 3 or a list of these mean, ascending.

    Raises ValueError where that is no list of layers, or names a layer twice.
    """
    parts: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        parts += item.split(",") if isinstance(item, str) else [item]
    ranges = [_parse_range(part) for part in parts]
    if not ranges:
        raise ValueError("expected layers, found an empty list")
    ordered = tuple(sorted(ranges, key=lambda layers: layers.start))
    for low, high in itertools.pairwise(ordered):
        if high.start < low.stop:
            raise ValueError(f"{format_layers([low])} and {format_layers([high])} overlap")
    return ordered


def top_k_of_layer(top_k: Mapping[str, int], layer: int | None, num_layers: int) -> int:
    """Return the number that a mapping from layers to experts per token has for a layer.

    Raises ValueError where it has none or several, or names layers that the model has not.
    """
    for layers in top_k:
        if any(span.start >= num_layers for span in parse_layers(layers)):
            raise ValueError(f"top_k names layers {layers}, but the model has {num_layers}")
    numbers = {
        number
        for layers, number in top_k.items()
        if layer is not None and any(layer in span for span in parse_layers(layers))
    }
    if len(numbers) != 1:
        found = "no number" if not numbers else f"several numbers, {sorted(numbers)},"
        raise ValueError(f"top_k gives {found} for layer {layer}: {dict(top_k)}")
    return numbers.pop()


def _parse_range(part: Any) -> range:
    text = str(part).strip() if isinstance(part, str | int) else ""
    match = regex.fullmatch(r"([0-9]{1,6})(?:\s*(-)\s*([0-9]{1,6})?)?", text)
    if match is None or isinstance(part, bool):
        raise ValueError(
            f"expected layers such as 3, '3-60', '3-' or '0,2,5-7', found {shown(part)}"
        )
    first = int(match[1])
    last = int(match[3]) if match[3] else first if match[2] is None else sys.maxsize - 1
    if last < first:
        raise ValueError(f"{shown(text)} runs backward; write '{last}-{first}'")
    return range(first, last + 1)


def format_layers(layers: Sequence[range]) -> str:
    """Return layers as a rule file writes them."""
    return ",".join(
        f"{part.start}-"
        if part.stop == sys.maxsize
        else f"{part.start}"
        if len(part) == 1
        else f"{part.start}-{part.stop - 1}"
        for part in layers
    )
