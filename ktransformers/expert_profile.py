"""How often a model's layers used each of their experts: a small file of JSON.

    {"tokens": 8192, "uses": {"3": [812, 77, ...], "4": [...], ...}}

with a list for each layer that has experts, by its number, of the uses of every expert of it, while
so many tokens were computed. `benchmarks/expert_policies.py` records one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

File = str | os.PathLike[str]


def write_profile(path: File, tokens: int, uses: Mapping[int, Sequence[int]]) -> None:
    """Write the uses of each expert, by layer."""
    text = json.dumps({"tokens": tokens, "uses": {str(at): list(of) for at, of in uses.items()}})
    Path(path).write_text(text + "\n", encoding="utf-8")


def uses_of_layer(path: File, layer: int | None, num_experts: int) -> list[int]:
    """Return the uses of each expert of a layer.

    Raises ValueError, naming the file, where it can't be read, is no profile, or one of another
    model.
    """
    uses = _read(path)
    if str(layer) not in uses:
        raise ValueError(
            f"profile {os.fspath(path)}: counts uses in layers {', '.join(uses)}, not in layer "
            f"{layer}: it is of another model"
        )
    found = uses[str(layer)]
    if len(found) != num_experts:
        raise ValueError(
            f"profile {os.fspath(path)}: layer {layer} has {len(found)} experts there and "
            f"{num_experts} here: it is of another model"
        )
    return found


def _read(path: File) -> dict[str, list[int]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"profile {os.fspath(path)}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"profile {os.fspath(path)}: not JSON: {error}") from error
    uses = content.get("uses") if isinstance(content, dict) else None
    counted = isinstance(uses, dict) and all(
        isinstance(of, list) and all(type(count) is int and count >= 0 for count in of)
        for of in uses.values()
    )
    if not isinstance(uses, dict) or not counted:
        raise ValueError(
            f"profile {os.fspath(path)}: expected {{'uses': {{layer: [uses of each expert]}}}}, as "
            "benchmarks/expert_policies.py writes it"
        )
    return uses


def most_used(uses: Sequence[int], count: int) -> list[int]:
    """Return the experts that were used most, the most used first, ties by their number."""
    return sorted(range(len(uses)), key=lambda expert: -uses[expert])[:count]


def chosen_experts(resident: object, num_experts: int, uses: Sequence[int] | None) -> list[int]:
    """Return the experts that a list names, or so many: the most used first, or the first.

    Raises ValueError for what is neither, and for experts that the layer has not.
    """
    if isinstance(resident, list):
        for expert in resident:
            if type(expert) is not int or not 0 <= expert < num_experts:
                raise ValueError(
                    f"resident names expert {expert!r}, but the layer's are 0 to {num_experts - 1}"
                )
            if resident.count(expert) > 1:
                raise ValueError(f"resident names expert {expert} more than once")
        if resident:
            return resident
    elif type(resident) is int and resident >= 1:
        if resident > num_experts:
            raise ValueError(
                f"resident {resident} is more than the layer has: {num_experts} experts"
            )
        return list(range(resident)) if uses is None else most_used(uses, resident)
    raise ValueError(
        f"resident {resident!r} is neither a number of 1 or more nor a list of experts"
    )
