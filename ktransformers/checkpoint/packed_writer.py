"""Writing a packed cache, such that it is whole or says that it is not, whenever one is killed.

Every file is written under a temporary name, synced, renamed, and its folder synced. A file counts
once the index has its checksum, and the index is itself written so, after the file: a kill in
between leaves a file that is packed again.

Checksums are CRC-32, which the standard library computes at 3.6 GB/s on one core of an AMD EPYC
(Zen 3), where SHA-256 does 1.6 and BLAKE2b 0.8: fast enough to be lost beside a disk. They find
damage, not malice; whoever can write the weights can write their checksum.
"""

from __future__ import annotations

import fcntl
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from typing_extensions import Self

from ktransformers.checkpoint.packed import (
    CHUNK,
    INDEX,
    TEMPORARY,
    Advance,
    Entry,
    Index,
    check_file,
    padded,
    read_chunks,
    read_index,
)


class PackedWriter:
    """A cache that is being written, by this process alone; a context manager.

    All that it wants to write is declared first. Of an earlier try for the same source and the
    same operators, what is whole is kept.
    """

    def __init__(self, folder: Path, wanted: Index) -> None:
        """Name a folder, which may not exist yet, and all that is to be in it."""
        self.folder = folder
        self._index = wanted
        self._lock = threading.Lock()
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Make the folder and take it. Raises ValueError where another process packs into it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ValueError(f"{self.folder}: another process is packing into it") from None
        except OSError:
            pass  # a network file system without locks
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def found(self) -> Index | None:
        """Return the index of an earlier try, if there was one that got so far.

        Raises ValueError where the folder holds something else, or a cache of another layout.
        """
        if (self.folder / INDEX).exists():
            return read_index(self.folder)
        partial = self._partial_names()
        others = [path.name for path in self.folder.iterdir() if path.name not in partial]
        if others:
            raise ValueError(
                f"{self.folder}: holds other things, such as {min(others)}; choose a folder of its "
                "own"
            )
        return None

    def clear(self) -> None:
        """Remove what a kill left half written."""
        for name in self._partial_names():
            (self.folder / name).unlink(missing_ok=True)

    def _partial_names(self) -> set[str]:
        files = (entry.file_name for entry in self._index.entries.values())
        return {name + TEMPORARY for name in (INDEX, *files)}

    def begin(self, whole: Mapping[str, int]) -> None:
        """Write the index: `whole` operators, by name with checksums, are packed already."""
        self._index = replace(self._index, checksums=dict(whole))
        self._write_index()

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], advance: Advance) -> None:
        """Write one operator's file, then enter it in the index; safe from several threads.

        Raises OSError, and whatever `advance` raises; the operator is then not packed.
        """
        entry = self._index.entries[name]
        checksum = 0
        with self._replacing(entry.file_name) as write:
            for piece in _pieces(entry, tensors):
                checksum = zlib.crc32(piece, checksum)
                write(piece)
                advance(len(piece))
        with self._lock:
            checksums = {**self._index.checksums, name: checksum}
            self._index = replace(self._index, checksums=checksums)
            self._write_index()

    def _write_index(self) -> None:
        with self._replacing(INDEX) as write:
            write(memoryview(self._index.to_json()))

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that writes; the file bears its name once all is written and synced."""
        partial = self.folder / (name + TEMPORARY)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

        def write(piece: memoryview) -> None:
            while piece:  # one call writes 2 GiB at most, and less on a disk that gets full
                piece = piece[os.write(descriptor, piece) :]

        try:
            try:
                yield write
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(partial, self.folder / name)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        os.fsync(self._descriptor)


def _pieces(entry: Entry, tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """Yield a file's bytes in turn."""
    yield memoryview(entry.header())
    for name, (shape, dtype) in entry.layout.items():
        tensor = tensors[name]
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        values = flat.numpy().data
        for start in range(0, len(values), CHUNK):
            yield values[start : start + CHUNK]
        if padding := padded(len(values)) - len(values):
            yield memoryview(bytes(padding))


def damage(folder: Path, entry: Entry, checksum: int, advance: Advance) -> str | None:
    """Read a whole file and say what is wrong with it; None where it is as it was written."""
    path = folder / entry.file_name
    try:
        check_file(folder, entry)
        found = 0
        for piece in read_chunks(path):
            found = zlib.crc32(piece, found)
            advance(len(piece))
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    if found != checksum:
        return f"{path}: checksum {found:08x}, but {checksum:08x} when it was written: damaged"
    return None
