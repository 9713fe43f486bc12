"""Using a packed cache: which one fits a plan, and its tensors into the plan's operators.

What the rules do not pack still comes from the original checkpoint; what they pack is not read
from there. A cache that is named must fit, or the load is refused. The one beside the weights is
looked at by itself: it must be sound, but may have been packed for other rules, and is then left
alone; the report says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from ktransformers import _native
from ktransformers.base import Checkpoint, PackedOperator
from ktransformers.checkpoint.fingerprint import Fingerprint, difference, fingerprint
from ktransformers.checkpoint.messages import joined, listed
from ktransformers.checkpoint.packed import (
    INDEX,
    Entry,
    Index,
    Mode,
    check_file,
    open_tensors,
    pack_command,
    read_index,
    read_into,
)
from ktransformers.inject import Plan
from ktransformers.parallel import in_parallel
from ktransformers.placement import PlacedOperator
from ktransformers.progress import byte_progress
from ktransformers.weights import MAX_READERS, LoadError, Reading

logger = logging.getLogger(__name__)

AUTO = "auto"
DEFAULT_FOLDER = "packed"  # in the folder of the weights

CacheMode = Literal["auto", "map", "copy"]


@dataclass(frozen=True, slots=True)
class UsedCache:
    """A cache that fits, checked, and the operators that it fills."""

    folder: Path
    modes: Mapping[str, Mode]
    operators: Mapping[str, PackedOperator]
    entries: Mapping[str, Entry]

    def fill(self) -> None:
        """Give the operators their tensors; they compute from now on.

        Raises ValueError, naming the file, where that fails.
        """
        copied = sum(self._copied_bytes(name) for name in self.operators)
        readers = min(MAX_READERS, _native.default_threads())
        with byte_progress("Loading packed weights", copied) as advance:

            def opened(name: str) -> Callable[[], None]:
                return self._open(name, advance)

            for use in in_parallel([partial(opened, name) for name in self.operators], readers):
                use()

    def _open(self, name: str, advance: Callable[[int], None]) -> Callable[[], None]:
        """Map or copy an operator's tensors; return what makes it compute with them."""
        operator, entry, mode = self.operators[name], self.entries[name], self.modes[name]
        if mode == "copy" and isinstance(operator, PlacedOperator):
            memory = operator.placed_memory()
            ranges = {tensor: placed.ranges() for tensor, placed in memory.items()}
            read_into(self.folder, entry, ranges, advance)
            # What goes to another device is read from the file when it is copied there.
            mapped = (
                open_tensors(self.folder, entry, "map", advance) if operator.elsewhere() else {}
            )

            def use() -> None:
                operator.use_placed(memory)
                operator.use_elsewhere({tensor: mapped[tensor] for tensor in operator.elsewhere()})

            return use
        return partial(operator.use_packed, open_tensors(self.folder, entry, mode, advance))

    def _copied_bytes(self, name: str) -> int:
        if self.modes[name] == "map":
            return 0
        operator = self.operators[name]
        if isinstance(operator, PlacedOperator):
            return operator.packed_bytes()
        return self.entries[name].file_bytes()

    def rest_of(self, reading: Reading) -> Reading:
        """Return what is still to be read from the checkpoint."""
        filled = set(map(id, self.operators.values()))
        left = tuple(operator for operator in reading.operators if id(operator) not in filled)
        return replace(reading, operators=left)

    def __str__(self) -> str:
        done: tuple[tuple[Mode, str], ...] = (("map", "mapped"), ("copy", "copied"))
        lines = []
        for mode, verb in done:
            sizes = [
                self.entries[name].file_bytes()
                for name in self.operators
                if self.modes[name] == mode
            ]
            if sizes:
                lines.append(f"{sum(sizes) / 2**20:,.1f} MiB of {len(sizes)} operators {verb}")
        return f"{' and '.join(lines)} from {self.folder}"


def _mode_of(operator: PackedOperator, wanted: CacheMode) -> Mode:
    """Return how an operator gets its tensors: what lies on several nodes cannot be mapped."""
    if wanted != "auto":
        return wanted
    return "copy" if _in_parts(operator) else "map"


def _in_parts(operator: PackedOperator) -> bool:
    return isinstance(operator, PlacedOperator) and operator.placement.in_parts


def _check_mode(operators: Mapping[str, PackedOperator], mode: CacheMode) -> None:
    placed = [name for name, operator in operators.items() if _in_parts(operator)]
    if mode != "map" or not placed:
        return
    operator = operators[placed[0]]
    assert isinstance(operator, PlacedOperator)
    raise LoadError(
        f"cache_mode map: the weights of {type(operator).__name__} at {listed(placed, 1)} lie in "
        f"parts (numa: {operator.placement}), and a mapped file lies in one; use cache_mode copy "
        "or auto, or numa: interleave"
    )


def packed_operators(planned: Plan) -> dict[str, PackedOperator]:
    """Return the plan's operators that have packed weights, by name."""
    return {
        item.name: item.operator
        for item in planned.replacements
        if isinstance(item.operator, PackedOperator)
    }


def checkpoint_fingerprint(weights: Path, checkpoint: Checkpoint) -> Fingerprint:
    """Return the fingerprint of the files that hold a checkpoint's tensors."""
    files = {info.file for info in checkpoint.infos().values()}
    return fingerprint(_folder(weights), map(Path, files))


def _folder(weights: Path) -> Path:
    return weights if weights.is_dir() else weights.parent


def find_cache(
    planned: Plan,
    checkpoint: Checkpoint,
    weights: Path | None,
    cache: str | os.PathLike[str] | None,
    mode: CacheMode,
) -> tuple[UsedCache | None, str | None]:
    """Return the cache to use, if any, and what the report is to say of it.

    `weights` is where the checkpoint lies; None where it is a loaded module. `cache` is a folder,
    "auto" for the one beside the weights, if any, or None.

    Raises LoadError, in a sentence that says what to do, where the cache is not to be used.
    """
    if mode not in get_args(CacheMode):
        raise ValueError(f"cache_mode {mode!r}: expected auto, map or copy")
    operators = packed_operators(planned)
    named = cache is not None and cache != AUTO
    if cache is None or (not named and (not operators or weights is None)):
        return None, None
    if not operators:
        return None, f"not used: {os.fspath(cache)}: these rules pack nothing"
    if weights is None:
        raise LoadError(
            f"cache {os.fspath(cache)}: the weights are a loaded module's, which nothing can be "
            "compared with; leave cache out, or load from the checkpoint that was packed"
        )
    folder = Path(cache) if named else _folder(weights) / DEFAULT_FOLDER
    if not named and not (folder / INDEX).exists():
        return None, None
    escape = (
        ""
        if named
        else f"\n{folder} was found beside the weights; cache=None (--cache none) ignores it"
    )
    try:
        index = read_index(folder)
        wanted = [Entry.of(name, operator) for name, operator in operators.items()]
        other = _other_rules(index, wanted)
        if other is not None and not named:
            line = f"not used: {folder} was packed for other rules: {other}"
            logger.info("packed cache: %s", line)
            return None, line
        _check(folder, index, checkpoint_fingerprint(weights, checkpoint), weights, other)
        _check_files(folder, index, wanted)
    except ValueError as error:
        raise LoadError(f"{error}{escape}") from error
    _check_mode(operators, mode)
    modes = {name: _mode_of(operator, mode) for name, operator in operators.items()}
    used = UsedCache(folder, modes, operators, index.entries)
    logger.info("packed cache: %s", used)
    return used, str(used)


def _other_rules(index: Index, wanted: Iterable[Entry]) -> str | None:
    """Say which of the wanted operators the cache has not or otherwise; None where it has all."""
    others = [
        f"{entry.operator} is {what}"
        for entry in wanted
        if (
            what := index.entries[entry.operator].difference(entry)
            if entry.operator in index.entries
            else "not in it"
        )
    ]
    return listed(others, 1) if others else None


def _check(
    folder: Path, index: Index, found: Fingerprint, weights: Path, other_rules: str | None
) -> None:
    other = difference(index.fingerprint, found)
    if other is not None:
        raise ValueError(
            f"{folder}: packed from another checkpoint ({index.source}) than {weights}: {other}; "
            f"delete the folder and pack again: {pack_command(folder, str(weights))}"
        )
    if other_rules is not None:
        raise ValueError(
            f"{folder}: packed for other rules: {other_rules}; pack again into another folder: "
            "`ktransformers pack MODEL --rules FILE --out DIR`"
        )


def _check_files(folder: Path, index: Index, wanted: Iterable[Entry]) -> None:
    """Hold the files to what is quick to check; whole contents are for `pack --verify`."""
    command = pack_command(folder, index.source)
    names = [entry.operator for entry in wanted]
    unpacked = [name for name in names if name not in index.checksums]
    if unpacked:
        raise ValueError(
            f"{folder}: packing was not finished: {listed(unpacked, 1)} of {len(names)} operators "
            f"not packed; go on with it: {command}"
        )
    errors = []
    for name in names:
        try:
            check_file(folder, index.entries[name])
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError(f"{joined(errors)}\npack again, which mends it: {command}")
