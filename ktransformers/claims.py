"""Which rule takes which module: names, classes and layers matched, the first rule wins.

Everything here reads the model and the rules and changes neither.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex
from torch import nn

from ktransformers.rule_file import Problems, nearest
from ktransformers.rules import Match, Rule, format_layers

# Of processor time, as `regex` counts, for all the names of a plan: 20 rules on DeepSeek-V3, 1,215
# modules, take 0.05.
MATCH_SECONDS = 1.0

LAYER = regex.compile(r"(?:^|\.)layers\.([0-9]+)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Entry:
    """A module of the tree."""

    name: str
    module: nn.Module
    parent: int  # its index in the list; the root is its own
    layer: int | None  # the number after the first `layers` of its name


@dataclass(frozen=True, slots=True)
class Claims:
    """What rules mean to modules, both by index."""

    matched: Mapping[int, Sequence[int]]  # rule -> modules; lacks rules that can't be asked
    taken: Sequence[Rule | None]  # module -> the rule that takes it
    closed: Sequence[Rule | None]  # module -> the rule above whose recursive: false shuts it


def list_modules(model: nn.Module) -> list[Entry]:
    """Return the model and its modules in pre-order, one entry a name."""
    entries: list[Entry] = []
    indexes: dict[str, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found = LAYER.search(name)
        layer = int(found[1]) if found else None
        indexes[name] = len(entries)
        entries.append(Entry(name, module, indexes[name.rpartition(".")[0]], layer))
    return entries


def claim(rules: Sequence[Rule], modules: Sequence[Entry], problems: Problems) -> Claims:
    """Give every module to the first rule that matches it, and check what each rule gets.

    Raises RuleError at once where a pattern runs out of time: what later rules get is unknown.
    """
    matched = _Matcher(modules, problems).match_all(rules)
    first: dict[int, Rule] = {}
    for rule in rules:
        for index in matched.get(rule.index, ()):
            first.setdefault(index, rule)
    taken: list[Rule | None] = [None]
    closed: list[Rule | None] = [None]
    for index, entry in enumerate(modules[1:], 1):
        above = taken[entry.parent]
        shut = above if above is not None and not above.recursive else closed[entry.parent]
        closed.append(shut)
        taken.append(first.get(index) if shut is None else None)
    claims = Claims(matched, taken, closed)
    for rule in rules:
        _check_count(rule, claims, problems)
    return claims


def import_path(path: str) -> Any:
    """Return what an import path names; nothing is called, but the module's code runs.

    Raises ValueError with the reason where it names nothing.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the code of that module may raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            hint = nearest(missing, _siblings(missing))
            raise ValueError(f"no module {missing}{hint}") from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"can't import {module_name}: {reason}") from error
    try:
        return getattr(module, name)
    except Exception as error:  # a module may answer for its names with code
        raise ValueError(f"{module_name} has no {name}{nearest(name, vars(module))}") from error


def _siblings(module_name: str) -> Iterator[str]:
    """Return the full names of the modules in the package that `module_name` would be in."""
    package = module_name.rpartition(".")[0]
    for entry in pkgutil.iter_modules(getattr(sys.modules.get(package), "__path__", [])):
        yield f"{package}.{entry.name}"


class _Matcher:
    """Asks rules which modules they match."""

    def __init__(self, modules: Sequence[Entry], problems: Problems) -> None:
        self.modules = modules
        self.problems = problems
        self.types = {type(entry.module) for entry in modules}
        self.layers = 1 + max(-1 if entry.layer is None else entry.layer for entry in modules)
        self.deadline = time.process_time() + MATCH_SECONDS
        self.spent: dict[int, float] = {}  # seconds, by rule

    def match_all(self, rules: Sequence[Rule]) -> dict[int, list[int]]:
        matched = {}
        for rule in rules:
            try:
                types = self._types(rule.match.class_path)
                start = time.process_time()
                matched[rule.index] = self._match(rule.match, types)
                self.spent[rule.index] = time.process_time() - start
                if rule.expect != "any" and not self._outside(rule) and not matched[rule.index]:
                    self.problems.add(rule.place(""), self._why_none(rule, types))
            except (ValueError, TypeError) as error:
                self.problems.add(rule.place("match.class"), str(error))
            except TimeoutError as error:
                self.spent[rule.index] = time.process_time() - start
                self._too_slow(rules, rule, str(error))
        return matched

    def _match(self, match: Match, types: Collection[type]) -> list[int]:
        """Return the modules that all parts match; the root is never one."""
        return [
            index
            for index, entry in enumerate(self.modules[1:], 1)
            if type(entry.module) in types
            and (match.layers is None or _in_layers(entry.layer, match.layers))
            and (match.name is None or self._search(match.name, entry.name))
        ]

    def _search(self, pattern: regex.Pattern[str], name: str) -> bool:
        left = self.deadline - time.process_time()
        if left <= 0:
            raise TimeoutError(name)
        try:
            return pattern.search(name, timeout=left) is not None
        except TimeoutError:
            raise TimeoutError(name) from None

    def _too_slow(self, rules: Sequence[Rule], current: Rule, name: str) -> None:
        """Report the rule that took most of the time, and stop."""
        slowest = max(rules, key=lambda rule: self.spent.get(rule.index, 0.0))
        at = f" (stopped at {name})" if slowest is current else ""
        self.problems.add(
            slowest.place("match.name"),
            f"takes too long: all names together get {MATCH_SECONDS:g} s{at}\n"
            "  a repeat inside a repeat, such as (a+)+, tries every way to split the name",
        )
        self.problems.check()

    def _types(self, path: str | None) -> Collection[type]:
        """Return the types of modules that a class means, subclasses included.

        Raises ValueError or TypeError where it is an import path that names no class.
        """
        if path is None:
            return self.types
        if "." not in path:
            return [t for t in self.types if path in [base.__name__ for base in t.__mro__]]
        try:
            wanted = import_path(path)
        except ValueError as error:
            reason = str(error).splitlines()[0]  # the model knows a better hint
            raise ValueError(f"{reason}{self._nearest_type(path)}") from error
        if not isinstance(wanted, type):
            raise TypeError(f"{path} is a {type(wanted).__name__}, not a class")
        return [t for t in self.types if wanted in t.__mro__]

    def _nearest_type(self, path: str) -> str:
        """Return a hint: the model's class of that name, wherever it is, or one like it."""
        paths = {f"{t.__module__}.{t.__qualname__}": t.__name__ for t in self.types}
        name = path.rpartition(".")[2]
        same = [full for full, last in paths.items() if last == name]
        return f"\n  nearest: {same[0]}" if same else nearest(path, paths)

    def _outside(self, rule: Rule) -> bool:
        """Report ranges without a single layer of the model."""
        outside = [part for part in rule.match.layers or () if part.start >= self.layers]
        if outside:
            has = f"{self.layers} layers, 0 to {self.layers - 1}" if self.layers else "no layers"
            message = f"no layer {format_layers(outside)}: the model has {has}"
            self.problems.add(rule.place("match.layers"), message)
        return bool(outside)

    def _why_none(self, rule: Rule, types: Collection[type]) -> str:
        """Return the message for a rule that matches no module."""
        match = rule.match
        text = f"rule {rule.index} matches no module: {match}"
        if match.name is not None and not self._match(Match(name=match.name), self.types):
            return text + _nearest_names(match.name.pattern, self.modules[1:])
        if match.class_path is not None and not self._match(Match(), types):
            if "." in match.class_path:
                return text + self._nearest_type(match.class_path)
            return text + nearest(match.class_path, sorted(t.__name__ for t in self.types))
        alone = {
            "name": (Match(name=match.name), self.types),
            "class": (Match(), types),
            "layers": (Match(layers=match.layers), self.types),
        }
        given = {"name": match.name, "class": match.class_path, "layers": match.layers}
        counts = [
            f"{part} {len(self._match(*alone[part])):,}"
            for part, value in given.items()
            if value is not None
        ]
        return f"{text}\n  modules that each part alone matches: {', '.join(counts)}"


def _in_layers(layer: int | None, layers: Sequence[range]) -> bool:
    # Asked for None, an open range would look at every number that it holds.
    return layer is not None and any(layer in part for part in layers)


def _nearest_names(pattern: str, modules: Sequence[Entry]) -> str:
    """Return a hint: names that look like the regex once its operators are gone."""
    wanted = regex.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", pattern)
    wanted = regex.sub(r"[\\^$()\[\]?*+|]", "", wanted)
    parts = 0 if pattern.startswith("^") else wanted.count(".") + 1
    alike: dict[str, list[str]] = {}  # by name, or end of a name, without its numbers
    for entry in modules:
        end = ".".join(entry.name.split(".")[-parts:])
        alike.setdefault(regex.sub(r"[0-9]+", "0", end), []).append(entry.name)
    near = difflib.get_close_matches(wanted[:200], alike, 1)
    return f"\n  nearest: {', '.join(alike[near[0]][:2])}" if near else ""


def _check_count(rule: Rule, claims: Claims, problems: Problems) -> None:
    """Report a rule that takes nothing of what it matches, or not as much as it expects.

    What a rule of an earlier file took from an included rule is no loss: that file overrides it.
    """
    matched = claims.matched.get(rule.index, ())
    if not matched or rule.expect == "any":
        return
    owners = [claims.taken[index] or claims.closed[index] for index in matched]
    mine = sum(claims.taken[index] is rule for index in matched)
    overridden = sum(owner is not None and _overrides(owner, rule) for owner in owners)
    if not mine and not overridden:
        others = ", ".join(dict.fromkeys(str(owner) for owner in owners if owner is not rule))
        shut = any(claims.closed[index] for index in matched)
        hint = "its recursive: false shuts out others" if shut else "put the specific rule first"
        message = f"rule {rule.index} takes nothing: all that it matches belongs to {others}"
        problems.add(rule.place(""), f"{message}\n  {hint}")
    elif rule.expect is not None and mine + overridden != rule.expect:
        message = f"rule {rule.index} takes {_count(mine + overridden)}, expected {rule.expect}"
        problems.add(rule.place("expect"), message)


def _overrides(owner: Rule, rule: Rule) -> bool:
    """Tell whether `owner` stands in a file that comes before the file of `rule`."""
    return owner.place("").order < rule.place("").order


def _count(modules: int) -> str:
    return f"{modules:,} module{'' if modules == 1 else 's'}"
