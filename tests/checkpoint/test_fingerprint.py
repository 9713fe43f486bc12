"""Fingerprints: cheap for any size, blind to places and times, not to another model."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ktransformers.checkpoint.fingerprint import HEAD, Fingerprint, difference, fingerprint


def of(folder: Path) -> Fingerprint:
    return fingerprint(folder, folder.iterdir())


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_copy_elsewhere_at_another_time_is_the_same(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, a=b"1" * 3_000_000, b=b"") for name in "xy")
    os.utime(two / "a", (0, 0))
    assert difference(of(one), of(two)) is None


@pytest.mark.parametrize("size", [1, 5_000, HEAD, HEAD + 1, HEAD + 5_000, 3 * HEAD])
def test_first_and_last_byte_count(size: int, tmp_path: Path) -> None:
    plain = of(write(tmp_path / "plain", a=bytes(size)))
    for name, data in (
        ("first", b"1" + bytes(size - 1)),
        ("last", bytes(size - 1) + b"1"),
    ):
        found = of(write(tmp_path / name, a=data))
        assert difference(plain, found) == "a has other contents"


def test_a_revision_whose_weights_differ_throughout_is_seen(tmp_path: Path) -> None:
    header = b"h" * 4096
    one = of(write(tmp_path / "x", a=header + b"1" * 5 * HEAD))
    assert difference(one, of(write(tmp_path / "y", a=header + b"2" * 5 * HEAD)))


def test_a_difference_names_files_and_sizes(tmp_path: Path) -> None:
    one = of(write(tmp_path / "x", a=b"1", b=bytes(2000), c=b"1"))
    two = of(write(tmp_path / "y", a=b"1", b=bytes(1000), d=b"1"))
    want = "b has 1,000 bytes, not 2,000, c is missing, d is new"
    assert difference(one, two) == want


def test_a_hundred_shards_of_a_gigabyte_take_less_than_a_second(tmp_path: Path) -> None:
    for index in range(100):
        with (tmp_path / f"{index}.safetensors").open("wb") as file:
            file.truncate(1 << 30)  # sparse: takes no disk
    start = time.perf_counter()
    assert len(of(tmp_path)) == 100
    assert time.perf_counter() - start < 1
