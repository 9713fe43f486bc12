"""Safetensors files as a source of tensors.

Bytes are read with plain file reads, straight into the memory that the caller gets. The library's
own readers do not do here: its `mmap` returns views of mapped pages, which count as resident
memory and keep the whole mapping alive, and its `pread` (0.8) reads a whole tensor for a slice of
it, that is all experts for one. The library validates each header when a file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ktransformers.base import TensorInfo
from ktransformers.checkpoint.fp8 import DEFAULT_BLOCK, SCALE_SUFFIX
from ktransformers.checkpoint.messages import joined, listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUPPORTED = f"supported are {SINGLE}, {INDEX} with its shards, or a single .safetensors file"

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # worth naming in an error

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
SCALE_DTYPES = DTYPES | {"F8_E8M0": torch.float8_e8m0fnu}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's bytes lie."""

    path: Path
    offset: int  # in bytes from the file's start


def locate(path: Path) -> Mapping[Path, Sequence[str]]:
    """Return the safetensors files that `path` means, each with the names that it must hold.

    Raises ValueError where it means none, or an index that is invalid or names missing files.
    """
    if path.is_dir():
        if (path / SINGLE).is_file():
            return {path / SINGLE: ()}
        if (path / INDEX).is_file():
            return _read_index(path / INDEX)
        found = sorted(entry.name for entry in path.iterdir())
        weights = [name for name in found if name.endswith(WEIGHT_SUFFIXES)]
        what = listed(weights) if weights else "no weights"
        raise ValueError(f"{path}: holds {what}; {SUPPORTED}")
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: not a safetensors file; {SUPPORTED}")
    return {path: ()}


def _read_index(path: Path) -> dict[Path, list[str]]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{path}: weight_map: expected an object of tensor name to file name")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(shards)} shards are not in the folder: "
            f"{listed(missing)}; download them"
        )
    return {path.parent / shard: names for shard, names in shards.items()}


def fp8_block(folder: Path) -> tuple[int, int]:
    """Return the FP8 block that `config.json` in `folder` tells, or that of official checkpoints.

    Raises ValueError where the config is invalid.
    """
    path = folder / "config.json"
    if not path.is_file():
        return DEFAULT_BLOCK
    quantization = _read_json(path).get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if block is None:
        return DEFAULT_BLOCK
    match block:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(
        f"{path}: quantization_config.weight_block_size: {block}, expected two positive integers"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # of the JSON or of its encoding
        raise ValueError(f"{path}: invalid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class SafetensorsSource:
    """Tensors of one or more safetensors files, none of which stays open."""

    def __init__(self, files: Mapping[Path, Sequence[str]]) -> None:
        """Read the headers of `files`, each with the names that it must hold.

        Raises ValueError listing every file that is damaged, every tensor that is missing from
        its file or held by two, and every dtype that is not supported.
        """
        self._infos: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        errors: list[str] = []
        for path, expected in files.items():
            try:
                header, start = _read_header(path)
            except ValueError as error:
                errors.append(str(error))
                continue
            absent = [name for name in expected if name not in header]
            if absent:
                index = path.parent / INDEX
                errors.append(f"{index}: {path.name} lacks {listed(absent)}; download both again")
            errors += self._add(path, header, start)
        if errors:
            raise ValueError(joined(errors))

    def _add(self, path: Path, header: Mapping[str, Any], start: int) -> list[str]:
        unsupported: dict[str, list[str]] = {}
        twice: dict[Path, list[str]] = {}
        for name, entry in header.items():
            code = entry["dtype"]
            dtype = (SCALE_DTYPES if name.endswith(SCALE_SUFFIX) else DTYPES).get(code)
            if dtype is None:
                unsupported.setdefault(code, []).append(name)
            elif name in self._places:
                twice.setdefault(self._places[name].path, []).append(name)
            else:
                begin, end = entry["data_offsets"]
                self._infos[name] = TensorInfo(tuple(entry["shape"]), dtype, str(path), end - begin)
                self._places[name] = _Place(path, start + begin)
        return [
            *(
                f"{path}: {listed(names)}: dtype {code} is not supported (supported: "
                f"{', '.join(DTYPES)} with block scales); use the checkpoint in one of these"
                for code, names in unsupported.items()
            ),
            *(
                f"{path}: {listed(names)}: also in {other}; remove one"
                for other, names in twice.items()
            ),
        ]

    def stored(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by the files' name for it."""
        return self._infos

    def read_range(self, name: str, start: int, count: int) -> torch.Tensor:
        """Read `count` elements from `start` on, in row-major order, 1-D, in the stored dtype.

        Raises ValueError, naming file and tensor, where the file is gone or ends too soon.
        """
        place, dtype = self._places[name], self._infos[name].dtype
        data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        unread = data.numpy().data
        try:
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.offset + start * dtype.itemsize)
                while unread and (length := file.readinto(unread)):  # one call gives 2 GiB at most
                    unread = unread[length:]
        except OSError as error:
            raise ValueError(f"{place.path}: {name}: {error.strerror or error}") from error
        if unread:
            raise ValueError(
                f"{place.path}: {name}: the file ends {len(unread):,} bytes too soon; it was cut "
                "short after it was opened: download it again"
            )
        return data.view(dtype)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header, tensors alone, and the offset that its `data_offsets` count from."""
    try:
        with safe_open(path, framework="pt"):  # raises where the header and the file disagree
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except SafetensorError as error:
        raise ValueError(
            f"{path}: {path.stat().st_size:,} bytes that are cut short or no safetensors file "
            f"({error}); download it again"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    return header, 8 + length
