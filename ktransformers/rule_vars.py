"""Variables of rule files: `vars`, overrides, and the interpolation of `${name}`.

The syntax is OmegaConf's: overrides are its dot-lists, `???` is a value that must be given, and a
value that is one reference keeps its type. What OmegaConf would do on top is refused or done here,
for files that nobody vouches for: its resolvers (`${oc.env:HOME}`) would read the environment of
whoever runs the file, and its expansion of `b: ${a}${a}`, `c: ${b}${b}`, ... would not end.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ktransformers.rule_file import (
    BROKEN,
    Node,
    Place,
    Problems,
    Source,
    join,
    nearest,
    plain,
    shown,
    wrap,
)

MAX_EXPANSION = 1_000_000  # characters and values that all interpolations of a load may add
MAX_CHAIN = 50  # variables that refer to variables, each a few stack frames

_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_REFERENCE = re.compile(r"(?<!\\)\$\{\s*([A-Za-z_]\w*(?:\.\w+)*)\s*\}", re.ASCII)
_NOT_PLAIN = re.compile(r"\\?\$\{[^}]{0,60}\}?")


class _Failed(Exception):
    """A reference that can't be replaced; without a message where that was reported before."""


class Variables:
    """What the `vars` of all files say, after overrides."""

    def __init__(
        self, values: Mapping[str, Any], places: Mapping[str, Place], problems: Problems
    ) -> None:
        """Resolve every variable, so that one that nobody uses is checked too."""
        self._values = values
        self._places = places
        self._problems = problems
        self._resolved: dict[str, Any] = {}
        self._budget = MAX_EXPANSION
        for name in values:
            with contextlib.suppress(_Failed):  # which is reported
                self._variable(name, ())

    def resolve(self, node: Node, source: Source, path: str) -> Node:
        """Return `node` with every `${name}` replaced, and BROKEN where that fails."""
        if isinstance(node.value, list):
            items = [
                self.resolve(item, source, f"{path}[{index}]")
                for index, item in enumerate(node.value)
            ]
            broken = any(item.value is BROKEN for item in items)
            return Node(BROKEN if broken else items, node.line)
        if isinstance(node.value, dict):
            members = {
                key: self.resolve(item, source, join(path, key)) for key, item in node.value.items()
            }
            return Node(members, node.line)
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        try:
            return wrap(self._text(node.value, ()), node.line)
        except (_Failed, ValueError) as error:
            if str(error):
                self._problems.add(source.at(node.line, path), str(error))
            return Node(BROKEN, node.line)

    def _variable(self, name: str, chain: tuple[str, ...]) -> Any:
        if name not in self._values:
            raise _Failed(f"${{{name[:80]}}}: no such variable{_among(name, self._values)}")
        if name in chain:
            cycle = " -> ".join((*chain[chain.index(name) :], name))
            raise _Failed(f"variables that need one another: {cycle}")
        if len(chain) >= MAX_CHAIN:
            raise _Failed(f"a chain of more than {MAX_CHAIN} variables")
        if name not in self._resolved:
            try:
                value = self._expand(self._values[name], (*chain, name))
            except _Failed as error:
                value = BROKEN
                if str(error):
                    self._problems.add(self._places[name], str(error))
            self._resolved[name] = value
        if self._resolved[name] is BROKEN:
            raise _Failed
        return self._resolved[name]

    def _expand(self, value: Any, chain: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [self._expand(item, chain) for item in value]
        if isinstance(value, dict):
            return {key: self._expand(item, chain) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        if value == "???":
            raise _Failed(f"has no value; override it: {chain[-1]}=...")
        return self._text(value, chain)

    def _text(self, text: str, chain: tuple[str, ...]) -> Any:
        _check_plain(text)
        whole = _REFERENCE.fullmatch(text)
        if whole:
            value = self._lookup(whole[1], chain)
            self._spend(value)
            return value
        pieces: list[str] = []
        end = 0
        for match in _REFERENCE.finditer(text):
            value = self._lookup(match[1], chain)
            if not isinstance(value, str | int | float):
                raise _Failed(f"{match[0]} is {shown(value)}, which can't stand inside a string")
            self._spend(value)
            pieces += text[end : match.start()], str(value)
            end = match.end()
        return "".join((*pieces, text[end:]))

    def _lookup(self, reference: str, chain: tuple[str, ...]) -> Any:
        name, *keys = reference.split(".")
        value = self._variable(name, chain)
        for key in keys:
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            else:
                raise _Failed(f"${{{reference[:80]}}}: {name} has no {shown(key)}")
        return value

    def _spend(self, value: Any) -> None:
        if self._budget < 0:
            raise _Failed  # reported when it ran out
        self._budget -= _size(value)
        if self._budget < 0:
            raise _Failed(f"interpolation adds more than {MAX_EXPANSION:,} characters and values")


def _size(value: Any) -> int:
    if isinstance(value, list):
        return 1 + sum(map(_size, value))
    if isinstance(value, dict):
        return 1 + sum(map(_size, value.values()))
    return len(value) if isinstance(value, str) else 1


def _check_plain(text: str) -> None:
    rest = _NOT_PLAIN.search(_REFERENCE.sub("", text)) if "${" in text else None
    if rest:
        raise _Failed(
            f"{rest[0]} is refused: only ${{name}} and ${{name.part}} are replaced, "
            "so that a rule file can't read the environment of who runs it"
        )


def merge_variables(
    files: Sequence[tuple[Source, Mapping[str | int, Node]]],
    overrides: Mapping[str, Any] | Sequence[str] | None,
    problems: Problems,
) -> Variables:
    """Merge the `vars` of files, of which earlier ones win, and the overrides, which win over all.

    What is wrong goes to `problems`.
    """
    values: dict[str, Any] = {}
    places: dict[str, Place] = {}
    for source, variables in reversed(files):
        for name, node in variables.items():
            place = source.at(node.line, f"vars.{name}")
            if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
                problems.add(place, "a variable's name is made of letters, digits and _")
                continue
            values[name] = _merged(values.get(name), plain(node))
            places[name] = place
    for place, given in _parse_overrides(overrides, problems):
        unknown = _first_unknown(given, values)
        if unknown is None:
            values = _merged(values, given)
            places.update(dict.fromkeys(given, place))
        else:
            problems.add(place, f"no such variable{_among(unknown, values)}")
    return Variables(values, places, problems)


def _merged(below: Any, above: Any) -> Any:
    """Return `above` over `below`: mappings key by key, all else replaced."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _merged(below.get(key), item) for key, item in above.items()}}
    return above


def _parse_overrides(
    overrides: Mapping[str, Any] | Sequence[str] | None, problems: Problems
) -> Iterator[tuple[Place, dict[str, Any]]]:
    if isinstance(overrides, str):
        raise TypeError(f"overrides must be a mapping or a list of strings, found {overrides!r}")
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            yield Place(-1, 0, f"override {name}"), {name: plain(wrap(value, 0))}
        return
    for text in overrides or ():
        place = Place(-1, 0, f"override {text[:80]}")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text])) if "=" in text else None
        except (yaml.YAMLError, OmegaConfBaseException):
            parsed = None
        if isinstance(parsed, dict):
            yield place, {str(name): value for name, value in parsed.items()}
        else:
            problems.add(place, "expected name=value, such as threads=8")


def _first_unknown(
    given: Mapping[str, Any], known: Mapping[str, Any], path: str = ""
) -> str | None:
    """Return the first name that `given` sets and `known` lacks."""
    for name, value in given.items():
        full = join(path, name)
        if name not in known:
            return full
        if isinstance(value, Mapping) and isinstance(known[name], Mapping):
            deeper = _first_unknown(value, known[name], full)
            if deeper is not None:
                return deeper
    return None


def _among(name: str, values: Mapping[str, Any]) -> str:
    """Return what variables there are, for a message."""
    if not values:
        return " (there are no variables)"
    some = ", ".join([*values][:20]) + (", ..." if len(values) > 20 else "")
    return f" (variables: {some}){nearest(name, values)}"
