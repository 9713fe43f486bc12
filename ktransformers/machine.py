"""Whether this machine can run what a plan puts in place: asked before anything is loaded.

`plan` does not ask: a rule file for another machine can be looked at, and packed, on this one.
"""

from __future__ import annotations

from ktransformers.gpu_options import check_present
from ktransformers.inject import Plan, Replacement
from ktransformers.rule_file import Problems


def check_machine(planned: Plan) -> None:
    """Raise RuleError for all that cannot run or stand here, equal reasons of a rule together."""
    refusals: dict[tuple[int, str], list[Replacement]] = {}
    for item in planned.replacements:
        try:
            if item.operator is not None:
                item.operator.check_machine()
            elif item.operator_class is None:
                check_present(item.site.device)
        except ValueError as error:
            refusals.setdefault((item.rule.index, str(error)), []).append(item)
    problems = Problems()
    for (_, reason), items in refusals.items():
        first = items[0]
        more = f" (and {len(items) - 1:,} more)" if len(items) > 1 else ""
        what = "default" if first.operator is None else type(first.operator).__name__
        text = f"{what} at {first.name}{more}: {reason}"
        problems.add(first.rule.place(""), text)
    problems.check()
