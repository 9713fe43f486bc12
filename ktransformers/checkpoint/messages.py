"""Pieces of error messages: names near a wrong one, lists cut to a readable length."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from ktransformers.base import TensorInfo

_NUMBER = re.compile(r"\d+")


def nearest_names(wanted: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to `limit` of `names` that look most like `wanted`, best first.

    Names that differ in numbers only count as one, so that a checkpoint of 90,000 tensors is a
    few dozen candidates; of such a group the one that shares most numbers with `wanted` is named.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("0", name), []).append(name)
    numbers = _NUMBER.findall(wanted)

    def shared_numbers(name: str) -> int:
        return sum(a == b for a, b in zip(_NUMBER.findall(name), numbers, strict=False))

    close = difflib.get_close_matches(_NUMBER.sub("0", wanted), groups, n=limit)
    return [max(groups[pattern], key=shared_numbers) for pattern in close]


def missing_tensor(wanted: str, infos: Mapping[str, TensorInfo]) -> str:
    """Say that a checkpoint lacks a tensor, where it was looked for, and what is like it."""
    files = list(dict.fromkeys(info.file for info in infos.values()))
    text = f"{listed(files, 1) or 'empty checkpoint'}: no tensor {wanted}"
    nearest = nearest_names(wanted, infos)
    return f"{text}\n  nearest: {', '.join(nearest)}" if nearest else text


def listed(names: Sequence[str], limit: int = 3) -> str:
    """Join names; those beyond `limit` are counted."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit:,} more" if len(names) > limit else shown


def joined(errors: Sequence[str], limit: int = 20) -> str:
    """Put errors one a line; those beyond `limit` are counted."""
    lines = list(errors[:limit])
    if len(errors) > limit:
        lines.append(f"(and {len(errors) - limit:,} more errors)")
    return "\n".join(lines)
