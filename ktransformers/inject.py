"""plan: rules + a model -> a checked list of replacements; apply: the swap itself.

`plan` is pure. It gives each module to the first rule that matches it (`claims`), builds the
operators on the meta device and checks all of it, so that `apply` has nothing left to decide and
nothing left to refuse. Nothing else makes a `Plan`.

**Nesting.** A module's children may be claimed too, where its operator does not consume them: such
an operator keeps them as its own children, under the same names. So a claim is named by its path in
the old model, and found under the same path in the new one, outer operators first.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ktransformers.base import Operator, Site
from ktransformers.claims import LAYER, Claims, Entry, claim, import_path, list_modules
from ktransformers.devices import kept_device
from ktransformers.rule_file import Problems, nearest
from ktransformers.rules import Rule, format_layers


@dataclass(frozen=True, slots=True)
class Replacement:
    """One planned swap, or one module that `class: default` keeps."""

    name: str  # dotted module name
    module_class: str  # of the module that is taken
    operator_class: type[Operator] | None  # None for default, like `operator`
    kwargs: Mapping[str, Any]
    rule: Rule
    site: Site
    operator: Operator | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What rules do to a model, checked. Only `plan` makes one."""

    model: weakref.ref[nn.Module]  # that it was made for, and that `apply` takes
    rules: tuple[Rule, ...]
    replacements: tuple[Replacement, ...]  # in module order: outer before inner

    def names(self, rule: Rule) -> list[str]:
        """Return the modules that `rule` takes."""
        return [item.name for item in self.replacements if item.rule is rule]

    def kept_on(self) -> dict[str, torch.device]:
        """Return the modules that rules keep on a device, outer before inner."""
        kept = (item for item in self.replacements if item.operator_class is None)
        return {item.name: item.site.device for item in kept if "device" in item.kwargs}

    def rule_of(self) -> dict[str, Rule]:
        """Return the rule that takes it, for every module that is taken."""
        return {item.name: item.rule for item in self.replacements}


def plan(
    model: nn.Module,
    rules: Sequence[Rule],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Plan:
    """Decide which operator takes the place of which module, and check all that can be checked.

    The model is left as it is, whatever happens. `dtype` of the activations and `device` of what
    stays unpacked are the model's own by default, and the CPU for a model on the meta device.
    Raises RuleError with every error of every rule.
    """
    problems = Problems()
    modules = list_modules(model)
    targets = {rule.index: _target(rule, problems) for rule in rules}
    claims = claim(rules, modules, problems)
    blocked = _check_nesting(claims, targets, modules, problems)
    blocked |= _check_shared(claims, targets, modules, problems)
    builder = _Builder(model, dtype, targets)
    if device is not None:
        builder.device = device
    devices = _devices(claims, modules, builder.device, problems)
    replacements = [
        builder.replacement(entry, rule, devices[index])
        for index, (entry, rule) in enumerate(zip(modules, claims.taken, strict=True))
        if rule is not None and index not in blocked
    ]
    builder.connect(replacements)
    builder.report(problems)
    problems.check(cause=builder.cause)
    return Plan(weakref.ref(model), tuple(rules), tuple(replacements))


def apply(model: nn.Module, plan: Plan) -> None:
    """Mutate `model`: set the plan's operators as children of the modules around them.

    Raises ValueError, and mutates nothing, where the plan was made for another model or the model
    has changed since.
    """
    if plan.model() is not model:
        raise ValueError("this plan was made for another model")
    swaps = [(item, item.operator) for item in plan.replacements if item.operator is not None]
    modules = dict(model.named_modules(remove_duplicate=False))
    for item, _ in swaps:
        if type(modules.get(item.name)).__name__ != item.module_class:
            raise ValueError(f"{item.name} has changed since the plan was made")
    for item, operator in swaps:
        parent, _, child = item.name.rpartition(".")
        setattr(model.get_submodule(parent), child, operator)


def format_replacements(plan: Plan) -> list[str]:
    """Return a line for every rule and kind of module, folded over layers."""
    groups: dict[tuple[int, str, str], list[Replacement]] = {}  # the name has {} for the layer
    for item in plan.replacements:
        pattern = LAYER.sub(
            lambda found: found[0].removesuffix(found[1]) + "{}", item.name, count=1
        )
        groups.setdefault((item.rule.index, item.module_class, pattern), []).append(item)
    return [_format_group(pattern, items) for (_, _, pattern), items in groups.items()]


def _format_group(pattern: str, items: Sequence[Replacement]) -> str:
    first = items[0]
    name = pattern.replace("{}", _format_numbers([item.site.layer for item in items]))
    operator = "default" if first.operator_class is None else first.operator_class.__name__
    if first.operator_class is not None or first.kwargs:
        operator += f"({', '.join(f'{key}={value}' for key, value in first.kwargs.items())})"
    count = f"{len(items):,} module{'' if len(items) == 1 else 's'}"
    return f"{name}: {first.module_class} -> {operator}  [{first.rule.where}, {count}]"


def _format_numbers(layers: Sequence[int | None]) -> str:
    ranges: list[range] = []
    for layer in sorted(layer for layer in layers if layer is not None):
        if ranges and ranges[-1].stop == layer:
            ranges[-1] = range(ranges[-1].start, layer + 1)
        else:
            ranges.append(range(layer, layer + 1))
    text = format_layers(ranges)
    return text if len(layers) == 1 else f"{{{text}}}"


# The operator that a rule names


@dataclass(frozen=True, slots=True)
class _Target:
    """What a rule puts in a module's place."""

    operator_class: type[Operator]
    buildable: bool  # whether the rule's kwargs fit it


def _target(rule: Rule, problems: Problems) -> _Target | None:
    """Return the rule's operator; None for default, or where the class path is no operator."""
    if rule.class_path is None:
        return None
    place = rule.place("replace.class")
    try:
        found = import_path(rule.class_path)
    except ValueError as error:
        problems.add(place, str(error))
        return None
    # By the MRO: issubclass would ask the metaclass, which may answer what it likes.
    if not isinstance(found, type) or Operator not in found.__mro__:
        kind = "class" if isinstance(found, type) else type(found).__name__
        expected = "an Operator (a subclass of ktransformers.base.Operator)"
        problems.add(place, f"{rule.class_path} is a {kind}; expected {expected}")
        return None
    operator: type[Operator] = found
    if next(base for base in operator.__mro__ if "from_module" in vars(base)) is Operator:
        problems.add(place, f"{operator.__name__} does not define from_module")
        return None
    if isinstance(operator.consumes, str):
        message = f"{operator.__name__}.consumes is a string; expected a collection of names"
        problems.add(place, message)
        return None
    return _Target(operator, _check_kwargs(rule, operator, problems))


def _check_kwargs(rule: Rule, operator: type[Operator], problems: Problems) -> bool:
    """Check the rule's kwargs against the signature of `from_module(module, site, ...)`."""
    accepted = list(inspect.signature(operator.from_module).parameters.values())[2:]
    named = {p.name: p for p in accepted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted)
    unknown = [key for key in rule.kwargs if key not in named and not anything]
    for key in unknown:
        takes = f"takes {', '.join(named)}" if named else "takes none"
        message = f"unknown kwarg ({operator.__name__} {takes}){nearest(key, named)}"
        problems.add(rule.place(f"replace.kwargs.{key}"), message)
    needed = [key for key, p in named.items() if p.default is p.empty and key not in rule.kwargs]
    if needed:
        place = rule.place("replace.kwargs" if rule.kwargs else "replace.class")
        problems.add(place, f"{operator.__name__} needs {', '.join(needed)}")
    return not unknown and not needed


# Checks between claims


def _check_nesting(
    claims: Claims,
    targets: Mapping[int, _Target | None],
    modules: Sequence[Entry],
    problems: Problems,
) -> set[int]:
    """Report claims inside a child that an operator consumes; return their indexes.

    A rule that keeps modules (`default`) may take some there, but not all of its modules: it would
    do nothing.
    """
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}  # by rules: the modules
    rules: dict[int, Rule] = {}
    for inner, rule in enumerate(claims.taken):
        if rule is None or (targets[rule.index] is None and rule.class_path is not None):
            continue
        for child, outer in _ancestors(inner, modules):
            above = claims.taken[outer]
            target = None if above is None else targets[above.index]
            if above is not None and target is not None and _consumes(target, modules[child].name):
                rules |= {rule.index: rule, above.index: above}
                found.setdefault((rule.index, above.index), []).append((inner, outer))
    taken = Counter(rule.index for rule in claims.taken if rule is not None)
    inside = Counter(index for index, _ in {(i, p[0]) for (i, _), ps in found.items() for p in ps})
    for index, above_index in list(found):
        if rules[index].class_path is None and inside[index] < taken[index]:
            del found[index, above_index]
    for (index, above_index), pairs in found.items():
        above, target = rules[above_index], targets[above_index]
        assert target is not None
        inner, outer = pairs[0]
        problems.add(
            rules[index].place(""),
            f"rule {index} claims {modules[inner].name} inside {modules[outer].name}, "
            f"which {target.operator_class.__name__} of {above} consumes{_more(pairs)}\n"
            f"  end the regex with $, or set recursive: false on rule {above_index}",
        )
    return {inner for pairs in found.values() for inner, _ in pairs}


def _ancestors(index: int, modules: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    """Yield (child, parent) from a module up to the root."""
    while index:
        yield index, modules[index].parent
        index = modules[index].parent


def _consumes(target: _Target, name: str) -> bool:
    consumed = target.operator_class.consumes
    return consumed is None or name.rpartition(".")[2] in consumed


def _check_shared(
    claims: Claims,
    targets: Mapping[int, _Target | None],
    modules: Sequence[Entry],
    problems: Problems,
) -> set[int]:
    """Report replaced modules that have two names: one of them would keep the old module."""
    names: dict[int, list[str]] = {}
    for entry in modules:
        names.setdefault(id(entry.module), []).append(entry.name)
    shared = set()
    for index, rule in enumerate(claims.taken):
        same = names[id(modules[index].module)]
        if rule is not None and targets[rule.index] is not None and len(same) > 1:
            shared.add(index)
            message = f"rule {rule.index} takes one module of several names: {', '.join(same)}"
            problems.add(rule.place(""), f"{message}\n  a shared module can't be replaced")
    return shared


def _devices(
    claims: Claims, modules: Sequence[Entry], device: torch.device, problems: Problems
) -> list[torch.device]:
    """Return where each module stands: where a rule keeps it or what is around it, or `device`."""
    kept: dict[int, torch.device | None] = {}  # by rule
    devices: list[torch.device] = []
    for index, rule in enumerate(claims.taken):
        around = devices[modules[index].parent] if index else device
        if rule is not None and rule.class_path is None and rule.index not in kept:
            try:
                kept[rule.index] = kept_device(rule.kwargs)
            except ValueError as error:
                kept[rule.index] = None
                problems.add(rule.place("replace.kwargs.device"), str(error))
        devices.append((None if rule is None else kept.get(rule.index)) or around)
    return devices


def _more(items: Sequence[Any]) -> str:
    return f" (and {len(items) - 1:,} more)" if len(items) > 1 else ""


# Building


class _Builder:
    """Builds operators; collects what they refuse."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        targets: Mapping[int, _Target | None],
    ) -> None:
        tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.config = getattr(model, "config", None)
        self.dtype = tensor.dtype if dtype is None else dtype
        self.device = torch.device("cpu") if tensor.is_meta else tensor.device
        self.targets = targets
        self.refusals: dict[tuple[int, str], list[tuple[Rule, str]]] = {}  # by rule and reason
        self.cause: Exception | None = None

    def replacement(self, entry: Entry, rule: Rule, device: torch.device) -> Replacement:
        """Return the swap, without an operator where that refuses."""
        where = f"{rule.where}: rule {rule.index}"
        site = Site(entry.name, entry.layer, self.config, self.dtype, device, where)
        target = self.targets[rule.index]
        operator_class = operator = None
        if target is not None:
            operator_class = target.operator_class
            operator = self._build(operator_class, entry, site, rule) if target.buildable else None
        old = type(entry.module).__name__
        return Replacement(entry.name, old, operator_class, rule.kwargs, rule, site, operator)

    def _build(
        self, operator_class: type[Operator], entry: Entry, site: Site, rule: Rule
    ) -> Operator | None:
        kwargs = copy.deepcopy(dict(rule.kwargs))  # no operator sees what another changed
        accepted: Operator | None = None
        with self._refusing(rule, operator_class, entry.name):
            with torch.device("meta"):
                operator = operator_class.from_module(entry.module, site, **kwargs)
            _check_operator(operator, operator_class, entry.module)
            operator.training = entry.module.training
            accepted = operator
        return accepted

    def connect(self, replacements: Sequence[Replacement]) -> None:
        """Let operators find one another, once all of them could be built."""
        if self.refusals or any(item.operator_class and not item.operator for item in replacements):
            return
        built = [(item, item.operator) for item in replacements if item.operator is not None]
        operators = {item.name: operator for item, operator in built}
        for item, operator in built:
            with self._refusing(item.rule, type(operator), item.name):
                operator.connect(operators)

    @contextmanager
    def _refusing(self, rule: Rule, operator_class: type[Operator], name: str) -> Iterator[None]:
        """Keep what an operator refuses; name the operator in whatever else goes wrong."""
        try:
            yield
        except (ValueError, TypeError) as error:
            self.cause = self.cause or error
            self.refusals.setdefault((rule.index, str(error)), []).append((rule, name))
        except Exception as error:
            message = f"{rule.where}: {operator_class.__name__} at {name} failed"
            raise RuntimeError(message) from error

    def report(self, problems: Problems) -> None:
        """Report refusals, equal ones of a rule together."""
        for (index, reason), sites in self.refusals.items():
            rule, name = sites[0]
            target = self.targets[index]
            assert target is not None
            text = "\n  ".join(reason.splitlines())
            message = f"{target.operator_class.__name__} at {name}{_more(sites)}: {text}"
            problems.add(rule.place(""), message)


def _check_operator(operator: object, operator_class: type[Operator], old: nn.Module) -> None:
    """Hold what `from_module` returned to the contract. Raises TypeError."""
    if not isinstance(operator, operator_class):
        raise TypeError(f"from_module returned a {type(operator).__name__}")
    consumed = operator_class.consumes
    kept = () if consumed is None else [c for c in old.named_children() if c[0] not in consumed]
    for name, child in kept:
        if getattr(operator, name, None) is not child:
            raise TypeError(f"child {name} is not consumed, so the operator must keep it as is")
    mine = {id(tensor) for tensor in (*old.parameters(), *old.buffers())}
    for name, tensor in (*operator.named_parameters(), *operator.named_buffers()):
        if id(tensor) not in mine and not tensor.is_meta:
            raise TypeError(f"from_module puts {name} on {tensor.device}, not on the meta device")
