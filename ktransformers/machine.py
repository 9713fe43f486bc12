"""What this machine has, and whether it can run what a plan puts in place.

`plan` does not ask: a rule file for another machine can be looked at, and packed, on this one. What
is to be loaded is asked for before anything is.
"""

from __future__ import annotations

import os

import torch

from ktransformers.gpu_options import check_present
from ktransformers.inject import Plan, Replacement
from ktransformers.rule_file import Problems


def check_machine(planned: Plan) -> None:
    """Raise RuleError for all that cannot run or stand here, a sentence for each reason."""
    refusals: dict[str, list[Replacement]] = {}
    for item in planned.replacements:
        try:
            if item.operator is not None:
                item.operator.check_machine()
            elif item.operator_class is None:
                check_present(item.site.device)
        except ValueError as error:
            refusals.setdefault(str(error), []).append(item)
    problems = Problems()
    for reason, items in refusals.items():
        first, rules = items[0], {item.rule.index for item in items}
        more = f" (and {len(items) - 1:,} more)" if len(items) > 1 else ""
        if len(rules) > 1:
            more = f" (and {len(items) - 1:,} more, of {len(rules)} rules)"
        what = "default" if first.operator is None else type(first.operator).__name__
        text = f"{what} at {first.name}{more}: {reason}"
        problems.add(first.rule.place(""), text)
    problems.check()


def memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> tuple[int, ...]:
    """Return the memory of each GPU of this machine, in order; none where torch finds none."""
    if not torch.cuda.is_available():
        return ()
    count = torch.cuda.device_count()
    return tuple(torch.cuda.get_device_properties(index).total_memory for index in range(count))
