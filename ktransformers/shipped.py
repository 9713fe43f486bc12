"""Which shipped rule file suits a model and this machine, where a person names none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ktransformers.inject import plan
from ktransformers.load import build_folder_on_meta
from ktransformers.research.explain import explain
from ktransformers.rules import load_rules, shipped_rules

FORMATS = ("int8", "int4")  # the more exact first
HEADROOM = 0.9  # of the memory, for weights: the rest is for the cache, activations and the system


@dataclass(frozen=True, slots=True)
class Choice:
    """A rule file's name, and why it was taken."""

    rules: str
    reason: str


def choose_rules(folder: Path, memory: int | None = None) -> Choice:
    """Return the shipped rule file for a model's folder and a machine with so much memory.

    `memory` is that of this machine by default. The first of int8 and int4 whose weights fit is
    taken; where none fits, the last, since a packed cache can be mapped.

    Raises ValueError where no file is for this kind of model.
    """
    model = build_folder_on_meta(folder)
    kind = str(model.config.model_type).replace("_", "-")
    names = [f"{kind}-cpu-{name}" for name in FORMATS if f"{kind}-cpu-{name}" in shipped_rules()]
    if not names:
        raise ValueError(
            f"{folder}: no rule file comes with the package for model_type "
            f"{model.config.model_type}; name one: --optimize_config_path"
        )
    if memory is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in names:
        costs = explain(model, plan(model, load_rules(name))).costs
        needed = sum(cost.weight_bytes for cost in costs.values())
        fits = needed <= HEADROOM * memory
        if fits:
            break
    size = f"{needed / 2**30:,.1f} GiB of weights, {memory / 2**30:,.1f} GiB of memory"
    return Choice(name, size if fits else f"{size}: too few, but nothing smaller is shipped")
