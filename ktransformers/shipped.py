"""Which shipped rule file suits a model and this machine, where a person names none.

Files for GPUs say in their names what they are for: deepseek-v3-2x24gb-cpu-int4. The one for most
GPU memory is taken whose plan fits, else one for the CPU alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ktransformers.inject import plan
from ktransformers.load import build_folder_on_meta
from ktransformers.machine import gpu_bytes, memory_bytes
from ktransformers.research.device_memory import CPU_SHARE, GB, Machine, predict
from ktransformers.research.explain import explain
from ktransformers.research.machine_plan import context_limit
from ktransformers.rules import RuleError, load_rules, shipped_rules

FORMATS = ("int8", "int4")  # the more exact first
CONTEXT = 8192  # tokens that GPUs must have room for, or the model's limit


@dataclass(frozen=True, slots=True)
class Choice:
    """A rule file's name, and why it was taken."""

    rules: str
    reason: str

    @property
    def computes_on_cpu(self) -> bool:
        """Tell whether the CPU has a part in it, and the file a variable for its threads."""
        return "-cpu-" in self.rules


def choose_rules(
    folder: Path,
    memory: int | None = None,
    gpus: Sequence[int] | None = None,
    context: int | None = None,
) -> Choice:
    """Return the shipped rule file for a model's folder and a machine.

    `memory` and the memory of each GPU, in bytes, are this machine's by default. A file for GPUs is
    taken where one fits; else the first of int8 and int4 whose weights fit the memory, and where
    neither does, the last, since a packed cache can be mapped. GPUs must have room for a `context`
    of so many tokens.

    Raises ValueError where no file is for this kind of model.
    """
    model = build_folder_on_meta(folder)
    kind = str(model.config.model_type).replace("_", "-")
    memory = memory_bytes() if memory is None else memory
    gpus = gpu_bytes() if gpus is None else gpus
    tokens = min(context or CONTEXT, context_limit(model))
    machine = Machine(tuple(nbytes / GB for nbytes in gpus), memory / GB, tokens)
    return _for_gpus(model, kind, machine) or _for_cpu(model, kind, memory, folder)


def _for_gpus(model: PreTrainedModel, kind: str, machine: Machine) -> Choice | None:
    """Return the file for most GPU memory whose plan fits."""
    context = machine.context
    for name in _gpu_files(kind, machine.gpus):
        try:
            planned = plan(model, load_rules(name), dtype=model.dtype)
        except RuleError:  # it is for a model of this kind with other sizes
            continue
        needs = predict(model, planned, context)
        if all(need.total <= machine.room(device) for device, need in needs.items()):
            parts = [f"{device} {need.total / GB:,.1f} GB" for device, need in needs.items()]
            return Choice(name, f"needs {', '.join(parts)}, for {context:,} tokens")
    return None


def _gpu_files(kind: str, gpus: Sequence[float]) -> list[str]:
    """Return files of a kind of model for GPUs that are here, those for most GPU memory first."""

    def found() -> Iterator[tuple[int, str, str]]:
        for name in shipped_rules():
            match = re.fullmatch(rf"{kind}(?:-lite)?-(\d+)x(\d+)gb(?:-cpu-(\w+))?", name)
            if match is not None:
                count, size = int(match[1]), int(match[2])
                if count <= len(gpus) and min(gpus[:count]) >= size:
                    yield -count * size, match[3] or "", name

    return [name for _, _, name in sorted(found(), key=lambda item: (item[0], item[1] == "int4"))]


def _for_cpu(model: PreTrainedModel, kind: str, memory: int, folder: Path) -> Choice:
    names = [f"{kind}-cpu-{name}" for name in FORMATS if f"{kind}-cpu-{name}" in shipped_rules()]
    if not names:
        raise ValueError(
            f"{folder}: no rule file comes with the package for model_type "
            f"{model.config.model_type}; name one: --optimize_config_path"
        )
    for name in names:
        costs = explain(model, plan(model, load_rules(name))).costs
        needed = sum(cost.weight_bytes for cost in costs.values())
        fits = needed <= CPU_SHARE * memory
        if fits:
            break
    size = f"{needed / 2**30:,.1f} GiB of weights, {memory / 2**30:,.1f} GiB of memory"
    return Choice(name, size if fits else f"{size}: too few, but nothing smaller is shipped")
