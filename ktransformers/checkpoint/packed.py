"""The packed cache: operators' weights as they compute from them, in files that can be mapped.

A cache is a folder. `packed.json`, the index, says which layout the folder has, which checkpoint
it was made from, and for each operator what its bytes mean and their checksum, or null while the
operator is not packed yet. Beside it lies one safetensors file per operator:

    8 bytes     length of the header, little-endian
    header      JSON, padded with spaces, so that the data begins at a multiple of 4,096
    tensors     each a flat U8 tensor, padded with zeros to a multiple of 4,096

Safetensors allows no holes between tensors, so what aligns them is their padded sizes. True shapes
and dtypes are the operator's to know (`PackedOperator.packed_layout`) and the index repeats them.
A header is a function of the index's entry, byte for byte: whoever opens a file compares it.

Nothing in a cache depends on the machine that wrote it, be it instruction set, threads or NUMA.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch

from ktransformers.base import PackedOperator
from ktransformers.checkpoint.fingerprint import Fingerprint, SourceFile

LAYOUT_VERSION = 1  # of the folder, the index and the files; what tensors mean is packed_format's
INDEX = "packed.json"
TEMPORARY = ".partial"  # the suffix of what is being written
PAGE = 4096  # what sizes are padded to: the page size of x86-64
CHUNK = 16 << 20  # bytes per read or write: a stop is noticed, and progress shown, in between

Mode = Literal["map", "copy"]
Range = tuple[int, torch.Tensor]  # a first byte, and flat uint8 memory for what is there
Advance = Callable[[int], None]  # is told of bytes done
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # as packed_layout returns it

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One operator in a cache: what its file holds, and how the bytes are to be read."""

    operator: str  # the module's dotted name
    class_path: str
    packed_format: str
    layout: Layout

    @classmethod
    def of(cls, name: str, operator: PackedOperator) -> Entry:
        """Describe what `operator`, which stands or would stand at `name`, packs."""
        layout = {
            tensor: (tuple(shape), dtype)
            for tensor, (shape, dtype) in operator.packed_layout().items()
        }
        kind = type(operator)
        path = f"{kind.__module__}.{kind.__qualname__}"
        return cls(name, path, operator.packed_format(), layout)

    @property
    def file_name(self) -> str:
        """Return the name of the file in the cache's folder."""
        return f"{quote(self.operator, safe='')}.safetensors"

    def header(self) -> bytes:
        """Return the file's first bytes, up to where the data begins."""
        header: dict[str, Any] = {
            "__metadata__": {
                "ktransformers_layout_version": str(LAYOUT_VERSION),
                "operator": self.operator,
                "class": self.class_path,
                "packed_format": self.packed_format,
            }
        }
        end = 0
        for tensor, (shape, dtype) in self.layout.items():
            begin, end = end, end + padded(tensor_bytes(shape, dtype))
            offsets = [begin, end]
            header[tensor] = {"dtype": "U8", "shape": [end - begin], "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        length = padded(8 + len(text)) - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    def file_bytes(self) -> int:
        """Return the size of the whole file."""
        data = sum(padded(tensor_bytes(*tensor)) for tensor in self.layout.values())
        return len(self.header()) + data

    def offsets(self) -> dict[str, int]:
        """Return where in the file each tensor begins."""
        offsets, end = {}, len(self.header())
        for tensor, (shape, dtype) in self.layout.items():
            offsets[tensor] = end
            end += padded(tensor_bytes(shape, dtype))
        return offsets

    def views(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors in a whole file's bytes, as views."""
        views = {}
        for tensor, begin in self.offsets().items():
            shape, dtype = self.layout[tensor]
            flat = whole[begin : begin + tensor_bytes(shape, dtype)]
            views[tensor] = flat.view(dtype).view(shape)
        return views

    def difference(self, wanted: Entry) -> str | None:
        """Say how this entry differs from what rules want in its place; None where it does not."""
        for what, found, other in (
            ("by", self.class_path, wanted.class_path),
            ("as", self.packed_format, wanted.packed_format),
        ):
            if found != other:
                return f"packed {what} {found}, but the rules want {other}"
        if self.layout != wanted.layout:
            return "packed in other shapes than the rules want: the configs differ"
        return None


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of a tensor's elements."""
    return torch.Size(shape).numel() * dtype.itemsize


def padded(size: int) -> int:
    """Round up to whole pages."""
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True, slots=True)
class Index:
    """What `packed.json` says."""

    source: str  # the checkpoint's folder or file, for messages
    fingerprint: Fingerprint
    entries: Mapping[str, Entry]  # by operator, all that are to be packed
    checksums: Mapping[str, int]  # CRC-32 of the whole file, of those that are

    def unpacked(self) -> list[str]:
        """Name the operators that are not packed yet."""
        return [name for name in self.entries if name not in self.checksums]

    def to_json(self) -> bytes:
        """Return the file's bytes."""
        operators = {
            name: {
                "class": entry.class_path,
                "packed_format": entry.packed_format,
                "tensors": {
                    tensor: [str(dtype).removeprefix("torch."), *shape]
                    for tensor, (shape, dtype) in entry.layout.items()
                },
                "bytes": entry.file_bytes(),
                "crc32": f"{self.checksums[name]:08x}" if name in self.checksums else None,
            }
            for name, entry in self.entries.items()
        }
        files = {name: asdict(file) for name, file in sorted(self.fingerprint.items())}
        index = {
            "layout_version": LAYOUT_VERSION,
            "source": {"path": self.source, "files": files},
            "operators": operators,
        }
        return json.dumps(index, indent=1).encode() + b"\n"


def read_index(folder: Path) -> Index:
    """Read a cache's index.

    Raises ValueError, naming the file, where there is none, it has another layout version or is
    damaged.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        version = index["layout_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder}: no packed cache (there is no {INDEX}); make one: {pack_command(folder)}"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(path, error)) from None
    if version != LAYOUT_VERSION:
        raise ValueError(
            f"{path}: layout version {version}, but this ktransformers reads {LAYOUT_VERSION}; "
            f"delete the folder and pack again: {pack_command(folder)}"
        )
    try:
        return _parse(index)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path}: damaged ({type(error).__name__}: {error}); delete the folder and pack again: "
        f"{pack_command(path.parent)}"
    )


def pack_command(folder: Path, source: str = "MODEL") -> str:
    """Return the command that makes a cache, for messages."""
    return f"`ktransformers pack {source} --rules FILE --out {folder}`"


def _parse(index: Any) -> Index:
    entries, checksums = {}, {}
    for name, found in index["operators"].items():
        layout = {
            tensor: (tuple(int(size) for size in shape), _DTYPES[dtype])
            for tensor, (dtype, *shape) in found["tensors"].items()
        }
        entries[name] = Entry(name, found["class"], found["packed_format"], layout)
        if found["crc32"] is not None:
            checksums[name] = int(found["crc32"], 16)
    source = index["source"]
    files = {name: SourceFile(**file) for name, file in source["files"].items()}
    return Index(source["path"], files, entries, checksums)


# Files


def check_file(folder: Path, entry: Entry) -> None:
    """Hold a file to its size and its header, which is quick. Raises ValueError naming it."""
    path = folder / entry.file_name
    header, expected = entry.header(), entry.file_bytes()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            found = file.read(len(header))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes, expected {expected:,}")
    if found != header:
        raise ValueError(f"{path}: its header is damaged, or of another operator")


def read_chunks(path: Path) -> Iterator[memoryview]:
    """Yield a file's bytes in turn; each piece is good until the next. Raises OSError."""
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            yield buffer[:length]


def open_tensors(
    folder: Path, entry: Entry, mode: Mode, advance: Advance
) -> dict[str, torch.Tensor]:
    """Return an operator's packed tensors, mapped or copied; the file has passed `check_file`.

    Mapped ones are pages of the file, shared by all processes that map it, and read when they are
    first touched. The mapping is private, so that no write could reach the file; like the copy, it
    lives as long as any of the tensors. `advance` is told of bytes that are copied.

    Raises ValueError, naming the file, where that fails.
    """
    path, size = folder / entry.file_name, entry.file_bytes()
    try:
        if mode == "map":
            whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        else:
            whole = _anonymous(size)
            _read(path, [(0, whole)], advance)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except RuntimeError as error:  # torch's, of a mapping
        raise ValueError(f"{path}: cannot be mapped: {error}") from error
    return entry.views(whole)


def read_into(
    folder: Path, entry: Entry, memory: Mapping[str, Iterable[Range]], advance: Advance
) -> None:
    """Read an operator's packed tensors into memory of its own; the file has passed `check_file`.

    `memory` names, for each tensor, which of its bytes go where. Raises ValueError, naming the
    file, where that fails.
    """
    path, offsets = folder / entry.file_name, entry.offsets()
    ranges = ((offsets[name] + at, to) for name, into in memory.items() for at, to in into)
    try:
        _read(path, ranges, advance)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error


def _anonymous(size: int) -> torch.Tensor:
    """Return memory of this process, in huge pages where the kernel grants them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _read(path: Path, ranges: Iterable[Range], advance: Advance) -> None:
    with path.open("rb", buffering=0) as file:
        for begin, memory in ranges:
            file.seek(begin)
            unread = memory.numpy().data
            while unread and (length := file.readinto(unread[:CHUNK])):
                unread = unread[length:]
                advance(length)
            if unread:
                raise ValueError(f"{path}: ends {len(unread):,} bytes too soon")
