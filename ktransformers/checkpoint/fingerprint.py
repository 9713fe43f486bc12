"""What tells one checkpoint from another without reading it: names, sizes, and samples of content.

A checkpoint of 700 GB cannot be hashed whenever it is opened. Of each file the beginning is
hashed, which holds the header of every format that is read here, and blocks spread evenly over the
rest. Another model has other headers; another revision of one model has other weights nearly
everywhere. A change of a few tensors between the samples is not seen: whoever edits weights by
hand packs again by hand. Times are left out, lest a copy be refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ktransformers.checkpoint.messages import listed
from ktransformers.parallel import in_parallel

HEAD = 1 << 20  # bytes hashed at a file's start: a shard's header is some 100 kB
SAMPLES = 16  # blocks hashed of the rest
BLOCK = 4096  # bytes of one
READERS = 16  # files sampled at once: disks and networks like many short reads side by side

Fingerprint = Mapping[str, "SourceFile"]  # by path, relative to the checkpoint's folder


@dataclass(frozen=True, slots=True)
class SourceFile:
    """What is known of one file of a checkpoint."""

    size: int
    sample: str  # BLAKE2b, 16 bytes in hex, of the bytes that are sampled


def fingerprint(folder: Path, files: Iterable[Path]) -> Fingerprint:
    """Return the fingerprint of a checkpoint's files. Raises OSError where one can't be read."""
    ordered = sorted(files)
    sampled = in_parallel([partial(_sample, path) for path in ordered], READERS)
    names = [os.path.relpath(path, folder) for path in ordered]
    return dict(zip(names, sampled, strict=True))


def _sample(path: Path) -> SourceFile:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(file.read(HEAD))
        rest = max(0, size - HEAD - BLOCK)
        for index in range(SAMPLES):
            file.seek(HEAD + rest * index // (SAMPLES - 1))
            digest.update(file.read(BLOCK))
    return SourceFile(size, digest.hexdigest())


def difference(recorded: Fingerprint, found: Fingerprint) -> str | None:
    """Say in which files two checkpoints differ; None where they are the same."""
    differing = [
        *(f"{name} is missing" for name in recorded.keys() - found.keys()),
        *(f"{name} is new" for name in found.keys() - recorded.keys()),
        *(
            f"{name} has {found[name].size:,} bytes, not {recorded[name].size:,}"
            if recorded[name].size != found[name].size
            else f"{name} has other contents"
            for name in recorded.keys() & found.keys()
            if recorded[name] != found[name]
        ),
    ]
    return listed(sorted(differing)) if differing else None
