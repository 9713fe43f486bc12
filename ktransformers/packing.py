"""Making a packed cache: each operator reads and packs its weights, which are written and let go.

The model itself is never built with weights: peak memory is one packed operator per reader.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ktransformers import _native
from ktransformers.base import Checkpoint, PackedOperator
from ktransformers.checkpoint import CountingCheckpoint, open_checkpoint
from ktransformers.checkpoint.fingerprint import difference
from ktransformers.checkpoint.messages import joined
from ktransformers.checkpoint.packed import Entry, Index, pack_command, read_index
from ktransformers.checkpoint.packed_writer import PackedWriter, damage
from ktransformers.hub import resolve_model
from ktransformers.inject import plan
from ktransformers.load import build_folder_on_meta
from ktransformers.numa import ANYWHERE
from ktransformers.packed import DEFAULT_FOLDER, checkpoint_fingerprint, packed_operators
from ktransformers.parallel import in_parallel
from ktransformers.placement import PlacedOperator
from ktransformers.progress import byte_progress
from ktransformers.rules import Rule, load_rules
from ktransformers.weights import MAX_READERS, check_weights, serve_ties

MEMORY_SHARE = 0.5  # of what is free, for operators that are being packed; the rest caches files


@dataclass(frozen=True, slots=True)
class Packed:
    """What packing did."""

    folder: Path
    written: int  # operators
    kept: int  # operators that were there and whole
    damaged: tuple[str, ...]  # what was wrong with those that were there and not whole
    nbytes: int  # of all operators' files


def pack(
    model: str | os.PathLike[str],
    rules: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    out: str | os.PathLike[str] | None = None,
    *,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Packed:
    """Pack what `rules` pack of a model into a folder, from which `optimize_and_load` maps it.

    What an earlier try left whole is kept. `model` is a folder or a hub id; `out` is the folder
    `packed` in the model's by default. `dtype` is of activations, as in `optimize_and_load`.

    Raises `RuleError` and `LoadError` as that does, and ValueError where the folder holds something
    else, the disk is too small or writing fails. That, and KeyboardInterrupt, say how to go on.
    """
    source, checkpoint, operators = _open(model, load_rules(rules, overrides=overrides), dtype)
    target = source / DEFAULT_FOLDER if out is None else Path(out)
    return pack_operators(target, source.absolute(), checkpoint, operators)


def _open(
    model: str | os.PathLike[str], rules: Sequence[Rule], dtype: torch.dtype | None
) -> tuple[Path, Checkpoint, dict[str, PackedOperator]]:
    """Return where the weights are, the weights, and the operators, which nobody else holds."""
    skeleton = build_folder_on_meta(resolve_model(os.fspath(model), needs_weights=False), dtype)
    planned = plan(skeleton, rules, dtype=dtype)
    operators = packed_operators(planned)
    if not operators:
        raise ValueError("these rules pack nothing: no operator of theirs has packed weights")
    folder = resolve_model(os.fspath(model))
    checkpoint = serve_ties(open_checkpoint(folder), skeleton, planned)
    check_weights(skeleton, planned, checkpoint)
    return folder, checkpoint, operators


def pack_operators(
    folder: Path, source: Path, checkpoint: Checkpoint, operators: dict[str, PackedOperator]
) -> Packed:
    """Pack operators by name; takes each out of `operators` when its turn comes.

    Raises as `pack` does.
    """
    entries = {name: Entry.of(name, operator) for name, operator in operators.items()}
    wanted = Index(str(source), checkpoint_fingerprint(source, checkpoint), entries, {})
    with PackedWriter(folder, wanted) as writer:
        whole, damaged = _whole(folder, wanted, writer.found())
        for name in whole:
            del operators[name]
        writer.clear()
        _check_disk(folder, [entries[name] for name in operators])
        written = len(operators)
        try:
            writer.begin(whole)
            _pack_all(writer, checkpoint, entries, operators)
        except OSError as error:
            reason = f"{error.filename or folder}: {error.strerror or error}"
            raise ValueError(f"{reason}\n{_progress(folder)}") from error
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(_progress(folder)) from error
    nbytes = sum(entry.file_bytes() for entry in entries.values())
    return Packed(folder, written, len(whole), tuple(damaged), nbytes)


def _progress(folder: Path) -> str:
    """Say how far packing got, and how to go on."""
    try:
        index = read_index(folder)
    except ValueError:
        return f"{folder}: nothing is packed yet"
    done = len(index.checksums)
    return (
        f"{folder}: {done} of {len(index.entries)} operators are packed; the same command goes on "
        "with the rest"
    )


def _whole(folder: Path, wanted: Index, found: Index | None) -> tuple[dict[str, int], list[str]]:
    """Return the checksums of operators that are packed, read and found whole, and all damage.

    Raises ValueError where the folder holds a cache of another checkpoint or for other rules.
    """
    if found is None:
        return {}, []
    other = difference(found.fingerprint, wanted.fingerprint)
    if other is not None:
        raise ValueError(
            f"{folder}: packed from another checkpoint than {wanted.source}: {other}; choose "
            "another --out, or delete the folder"
        )
    other = _other_rules(found, wanted)
    if other is not None:
        raise ValueError(
            f"{folder}: packed for other rules: {other}; choose another --out, or delete the folder"
        )
    damages = _damages(folder, found)
    whole = {name: crc for name, crc in found.checksums.items() if damages[name] is None}
    return whole, [text for text in damages.values() if text is not None]


def _other_rules(found: Index, wanted: Index) -> str | None:
    for name in (*wanted.entries, *found.entries):
        if name not in found.entries:
            return f"{name} is not in it"
        if name not in wanted.entries:
            return f"{name} is in it, but the rules do not pack it"
        if other := found.entries[name].difference(wanted.entries[name]):
            return f"{name} is {other}"
    return None


def _damages(folder: Path, index: Index) -> dict[str, str | None]:
    """Read all that is packed; say of each operator what is wrong with it."""
    entries = [index.entries[name] for name in index.checksums]
    total = sum(entry.file_bytes() for entry in entries)
    with byte_progress("Verifying", total) as advance:
        jobs = [
            partial(damage, folder, entry, index.checksums[entry.operator], advance)
            for entry in entries
        ]
        return dict(zip(index.checksums, in_parallel(jobs, _readers()), strict=True))


def verify(folder: str | os.PathLike[str]) -> int:
    """Read a whole cache and hold it to its checksums; return its bytes.

    Raises ValueError listing every file that is missing or damaged, and what is not packed yet.
    """
    path = Path(folder)
    index = read_index(path)
    errors = [text for text in _damages(path, index).values() if text is not None]
    errors += [f"{path}: {name} is not packed yet" for name in index.unpacked()]
    if errors:
        command = pack_command(path, index.source)
        raise ValueError(f"{joined(errors)}\npack again, which mends it: {command}")
    return sum(entry.file_bytes() for entry in index.entries.values())


def _check_disk(folder: Path, entries: Sequence[Entry]) -> None:
    needed = sum(entry.file_bytes() for entry in entries)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder}: {needed / 1e9:,.3f} GB are to be written, where {free / 1e9:,.3f} GB are "
            "free; make room, or choose an --out on a larger disk"
        )


def _pack_all(
    writer: PackedWriter,
    checkpoint: Checkpoint,
    entries: Mapping[str, Entry],
    operators: dict[str, PackedOperator],
) -> None:
    """Pack in parallel; after an error or Ctrl-C no further tensor is read or written."""
    infos = checkpoint.infos()
    read = sum(infos[name].nbytes for o in operators.values() for name in o.weight_shapes())
    sizes = [entries[name].file_bytes() for name in operators]
    readers = min(_readers(), _fitting(max(sizes, default=1)))
    queue = deque(operators)
    stop = threading.Event()
    with byte_progress("Packing (read and written)", read + sum(sizes)) as advance:
        stoppable = _stoppable(advance, stop)
        watched = CountingCheckpoint(checkpoint, stoppable)

        def pack_next() -> None:
            name = queue.popleft()
            operator = operators.pop(name)  # and when this ends, it is gone
            if isinstance(operator, PlacedOperator):
                operator.place(ANYWHERE)
            operator.load_weights(watched)
            tensors = {tensor: operator.get_buffer(tensor).cpu() for tensor in entries[name].layout}
            writer.write(name, tensors, stoppable)

        in_parallel([pack_next] * len(sizes), readers, stop.set)


def _stoppable(advance: Callable[[int], None], stop: threading.Event) -> Callable[[int], None]:
    def on_bytes(nbytes: int) -> None:
        if stop.is_set():
            raise InterruptedError("packing was stopped")
        advance(nbytes)

    return on_bytes


def _readers() -> int:
    return min(MAX_READERS, _native.default_threads())


def _fitting(largest: int) -> int:
    """Return how many operators of this size may be packed at once; one, if none fits."""
    with open("/proc/meminfo", encoding="ascii") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    return max(1, int(free * MEMORY_SHARE) // largest)
