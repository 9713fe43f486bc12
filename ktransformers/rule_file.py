"""YAML text -> nodes, values that know their line, from a file that nobody vouches for.

Built from PyYAML's stream of events, not with its loaders: they forget lines, keep the last of two
equal keys, recurse, and expand aliases before anyone can count. Nothing is constructed here but
strings, numbers, booleans, null, lists and mappings.

Unquoted scalars follow the core schema of YAML 1.2. Where YAML 1.1, which most Python tools read,
says otherwise (`on`, `no`, `010`, `1:30`, `1_000`, dates, `<<`), the file is ambiguous: an error.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

MAX_BYTES = 1_000_000  # of one file; shipped files have some 500
MAX_NODES = 20_000  # of one file, aliases expanded: some 1,500 rules
MAX_DEPTH = 20  # lists and mappings in one another; a rule without kwargs needs 4
MAX_KEY = 200  # characters
MAX_PROBLEMS = 100  # that are collected before giving up: a screen or two

# libyaml reads a megabyte in well under a second, the Python scanner in 20.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Place(NamedTuple):
    """A position that errors name and are sorted by."""

    order: int  # of the file among the files
    line: int  # 1-based; 0 for the whole file
    text: str  # "rules/v3.yaml:9: replace.clas", or "rules[2].replace.clas"


class RuleError(ValueError):
    """Every error of the rules at once, one a line; further lines of an error are indented."""


class Problems:
    """The errors found so far."""

    def __init__(self) -> None:
        self._found: list[tuple[Place, str]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, place: Place, message: str) -> None:
        """Add one; raises RuleError where there are too many to be worth going on."""
        self._found.append((place, message))
        if len(self._found) >= MAX_PROBLEMS:
            self.check()

    def check(self, cause: Exception | None = None) -> None:
        """Raise RuleError with all problems, by file and line, if there are any."""
        if not self._found:
            return
        ordered = sorted(dict.fromkeys(self._found), key=lambda problem: problem[0][:2])
        lines = [f"{place.text}: {message}" for place, message in ordered]
        if len(self._found) >= MAX_PROBLEMS:
            lines.append(f"stopped after {MAX_PROBLEMS} errors")
        raise RuleError("\n".join(lines)) from cause


@dataclass(frozen=True, slots=True)
class Source:
    """A rule file, or rules given as Python data."""

    order: int
    name: str | None  # as messages show it; None for Python data, whose "line" is a rule's index

    def at(self, line: int, path: str = "") -> Place:
        """Return the place of `path`, such as replace.kwargs.threads, for messages."""
        if self.name is None:
            dotted = f".{path}" if path and not path.startswith("[") else path
            return Place(self.order, line, f"rules[{line}]{dotted}")
        where = f"{self.name}:{line}" if line else self.name
        return Place(self.order, line, f"{where}: {path}" if path else where)


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its line: in a mapping, the line of the key."""

    value: Any  # None, bool, int, float, str, list[Node] or dict[str | int, Node]
    line: int


BROKEN = object()
"""The value of a node whose interpolation failed: already reported, so nobody else complains."""


def join(path: str, key: str | int) -> str:
    """Return the path of `key` in the mapping at `path`."""
    return f"{path}.{key}" if path else str(key)


def plain(node: Node) -> Any:
    """Return the value without its lines."""
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    if isinstance(node.value, dict):
        return {key: plain(item) for key, item in node.value.items()}
    return node.value


def wrap(value: Any, line: int, depth: int = 0) -> Node:
    """Return Python data as nodes that all stand on `line`.

    Raises ValueError where it nests deeper than a file may (as data that holds itself does).
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return Node({key: wrap(item, line, depth + 1) for key, item in value.items()}, line)
    if isinstance(value, list | tuple):
        return Node([wrap(item, line, depth + 1) for item in value], line)
    return Node(value, line)


def shown(value: Any) -> str:
    """Return `value` as a message shows what it found: short, and nothing of what is inside."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    return repr(value) if isinstance(value, int | float) else f"a {type(value).__name__}"


def nearest(word: str, candidates: Iterable[str], count: int = 1) -> str:
    """Return a further line for a message, with the candidates most like `word`; or nothing."""
    # The comparison is quadratic in the lengths, and both may come from a hostile file.
    short = [word for word in itertools.islice(candidates, 500) if len(word) < 200]
    near = difflib.get_close_matches(word[:200], short, count)
    return f"\n  nearest: {', '.join(near)}" if near else ""


class Form:
    """Checks the shape of what a file says; what is wrong goes to `problems`."""

    def __init__(self, source: Source, problems: Problems) -> None:
        self.source = source
        self.problems = problems

    def wrong(self, node: Node, path: str, message: str) -> None:
        """Add a problem at `node`, unless that is BROKEN."""
        if node.value is not BROKEN:
            self.problems.add(self.source.at(node.line, path), message)

    def any_mapping(self, node: Node, path: str) -> dict[str | int, Node]:
        """Return the members of a mapping; none, and a problem, where it is something else."""
        if isinstance(node.value, dict):
            return node.value
        self.wrong(node, path, f"expected a mapping, found {shown(node.value)}")
        return {}

    def mapping(
        self, node: Node, path: str, keys: tuple[str, ...], required: tuple[str, ...]
    ) -> dict[str | int, Node]:
        """Return the members of a mapping whose keys are known."""
        members = self.any_mapping(node, path)
        for key, member in members.items():
            if key not in keys:
                message = f"unknown key (expected {', '.join(keys)}){nearest(str(key), keys)}"
                self.wrong(member, join(path, str(key)[:80]), message)
        for key in required:
            if key not in members and isinstance(node.value, dict):
                self.wrong(node, path, f"missing key {key} (expected {', '.join(keys)})")
        return members

    def items(self, node: Node, path: str) -> list[Node]:
        """Return the items of a list."""
        if isinstance(node.value, list):
            return node.value
        self.wrong(node, path, f"expected a list, found {shown(node.value)}")
        return []

    def text(self, node: Node, path: str) -> str | None:
        """Return a string; None where it is something else."""
        if isinstance(node.value, str):
            return node.value
        self.wrong(node, path, f"expected a string, found {shown(node.value)}")
        return None

    def texts(self, node: Node, path: str) -> list[tuple[Node, str]]:
        """Return the strings of a list, or the one that stands for a list, with their paths."""
        nodes = {path: node}
        if isinstance(node.value, list):
            nodes = {f"{path}[{index}]": item for index, item in enumerate(node.value)}
        return [(item, at) for at, item in nodes.items() if self.text(item, at) is not None]


def parse_yaml(text: str, source: Source, problems: Problems) -> Node | None:
    """Return the only document of `text`, or None where it can't be read; add to `problems`."""
    try:
        return _Builder(source, problems).build(text)
    except _Unreadable as error:
        problems.add(source.at(error.line), str(error))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        detail = f"{error.context}: {error.problem}" if error.context else str(error.problem)
        # A mark at the end of the text may lie a line below it.
        line = min(mark.line + 1, max(1, len(text.splitlines()))) if mark else 0
        problems.add(source.at(line), f"not YAML: {detail}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.add(source.at(line), f"not YAML: character {error.character!r} is refused")
    return None


class _Unreadable(Exception):
    """Ends the reading of a file."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not been seen."""

    node: Node
    anchor: str | None
    first: int  # nodes counted before it
    key: Node | None = None  # of a mapping: the key that waits for its value


class _Builder:
    """Turns events into nodes, with a stack instead of recursion."""

    def __init__(self, source: Source, problems: Problems) -> None:
        self.source = source
        self.problems = problems
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Node, int]] = {}  # with the number of nodes in it
        self.count = 0
        self.root: Node | None = None
        self.resolver: Any = yaml.resolver.Resolver()

    def build(self, text: str) -> Node:
        events: Any = yaml.parse(text, Loader=_LOADER)
        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
                raise _Unreadable(line, "a second document; a rule file is one document")
            if isinstance(event, yaml.NodeEvent):
                self._start(event, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._end()
        if self.root is None or self.root.value is None:
            raise _Unreadable(0, "empty file; expected rules")
        return self.root

    def _start(self, event: Any, line: int) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._complete(self._alias(event.anchor, line))
            return
        self._count(1, line)
        if event.tag is not None:
            message = f"tag {shown(event.tag)} is not allowed; a rule file holds plain values"
            self._problem(line, message)
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self._scalar(event, line), line)
            if event.anchor is not None:
                self.anchors[event.anchor] = (node, 1)
            self._complete(node)
            return
        if len(self.stack) >= MAX_DEPTH:
            raise _Unreadable(line, f"nested more than {MAX_DEPTH} deep")
        node = Node([] if isinstance(event, yaml.SequenceStartEvent) else {}, line)
        self.stack.append(_Open(node, event.anchor, self.count - 1))

    def _end(self) -> None:
        done = self.stack.pop()
        if done.anchor is not None:
            self.anchors[done.anchor] = (done.node, self.count - done.first)
        self._complete(done.node)

    def _complete(self, node: Node) -> None:
        """Put a finished node where it belongs."""
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        if isinstance(parent.node.value, list):
            parent.node.value.append(node)
        elif parent.key is None:
            parent.key = node
        else:
            self._member(parent.node.value, parent.key, node)
            parent.key = None

    def _member(self, mapping: dict[str | int, Node], key: Node, node: Node) -> None:
        if not isinstance(key.value, str | int) or isinstance(key.value, bool):
            self._problem(key.line, f"a key must be a string, found {shown(key.value)}")
        elif len(str(key.value)) > MAX_KEY:
            self._problem(key.line, f"a key of more than {MAX_KEY} characters: {shown(key.value)}")
        elif key.value in mapping:
            first = mapping[key.value].line
            self._problem(key.line, f"duplicate key {shown(key.value)}, first on line {first}")
        else:
            mapping[key.value] = Node(node.value, key.line)

    def _alias(self, anchor: str | None, line: int) -> Node:
        if anchor is None or anchor not in self.anchors:
            raise _Unreadable(
                line, f"alias {shown(anchor)} stands before its anchor's end, or has none"
            )
        node, size = self.anchors[anchor]
        self._count(size, line)
        return node

    def _count(self, nodes: int, line: int) -> None:
        self.count += nodes
        if self.count > MAX_NODES:
            raise _Unreadable(line, f"more than {MAX_NODES:,} values, aliases expanded")

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> Any:
        text: str = event.value
        if not event.implicit[0]:
            return text
        value = _core_schema(text)
        tag = self.resolver.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
        if tag != "str" and isinstance(value, str):
            kind = {"bool": "a boolean", "timestamp": "a date", "merge": "a merge key"}
            message = f"{shown(text)} is {kind.get(tag, 'a number')} in YAML 1.1"
            hint = "quote it, or write true or false" if tag == "bool" else "quote it"
            self._problem(line, f"{message} and a string in YAML 1.2: {hint}")
        return value

    def _problem(self, line: int, message: str) -> None:
        self.problems.add(self.source.at(line), message)


_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")  # no leading zero: octal in YAML 1.1
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+")


def _core_schema(text: str) -> Any:
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text)
    if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text
