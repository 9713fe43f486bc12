"""A latent cache on disk: one safetensors file that knows which model and rules made it.

Tokens lie in order, not in pages: latent [B, L, C], rope [B, L, R] and with int8 scale [B, L, G],
with fp8 [B, L], of each layer, and their ids as far as they are known. The header says what the
values depend on: the model's config, samples of its weights as they lie in memory, and what rules
replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ktransformers.cache import Format, LatentCache

LAYOUT = "ktransformers latent cache 2"
SAMPLES = 16  # values hashed of each weight
MADE_BY = {  # what the header says of the maker, and what a difference means
    "config": "another model",
    "weights": "another checkpoint, or weights packed in another way",
    "rules": "other rules",
}


def save_cache(cache: LatentCache, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Write a cache that `model` has filled. Whole or not at all: a file that was there stays.

    Raises ValueError for an empty cache, OSError where the disk refuses.
    """
    length = cache.completed()
    if length == 0:
        raise ValueError("the cache is empty: there is nothing to save")
    slots = cache.table.indexes(0, length)
    tensors = {
        f"{index}.{name}": tensor.flatten(0, 1)[slots].unflatten(0, (cache.table.batch, length))
        for index, layer in enumerate(cache.layers)
        for name, tensor in layer.tensors().items()
    }
    tensors["token_ids"] = cache.token_ids[:, :length].contiguous()
    header = {"layout": LAYOUT, "format": cache.format, **describe(model)}
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, header)
        partial.replace(target)
    except SafetensorError as error:
        raise OSError(f"{partial}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_cache(
    path: str | os.PathLike[str], model: PreTrainedModel, max_tokens: int
) -> LatentCache:
    """Read a cache that the same model under the same rules has filled.

    Raises ValueError, naming the file, for one of another model, other rules or another layout, for
    one that is damaged, and for one that holds more than `max_tokens`; OSError where none is there.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_maker(path, header, describe(model))
            cache = LatentCache(model.config, max_tokens, header["format"])
            cache.claim(model)
            _fill(cache, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    except _Damaged as error:
        raise ValueError(f"{path}: {error}") from None
    return cache


class _Damaged(Exception):
    """What is wrong with a file."""


def _check_maker(path: object, header: Mapping[str, str], mine: Mapping[str, str]) -> None:
    if header.get("layout") != LAYOUT or header.get("format") not in get_args(Format):
        found = header.get("layout", "no layout")
        raise ValueError(
            f"{path}: {found!r} is not a layout that is read here (expected {LAYOUT!r}); fill the "
            "cache anew"
        )
    for name, meaning in MADE_BY.items():
        if header.get(name) != mine[name]:
            detail = f": {header.get(name)}, not {mine[name]}" if name == "rules" else ""
            raise ValueError(f"{path}: this cache was made by {meaning}{detail}; fill it anew")


def _fill(cache: LatentCache, tensors: dict[str, torch.Tensor]) -> None:
    """Let the cache hold what was in a file."""
    token_ids, first = tensors.get("token_ids"), tensors.get("0.latent")
    if token_ids is None or first is None or first.ndim != 3 or not first.numel():
        raise _Damaged("no token_ids, or no latent of layer 0")
    B, length = first.shape[:2]
    if length > cache.max_tokens:
        raise _Damaged(
            f"holds {length:,} tokens of a sequence, but max_tokens (--cache_lens) is "
            f"{cache.max_tokens:,}"
        )
    cache.table.start(B)
    cache.table.reserve(0, length)
    slots = cache.table.indexes(0, length)
    for index, layer in enumerate(cache.layers):
        layer.reserve()
        for name, tensor in layer.tensors().items():
            found = tensors.get(f"{index}.{name}")
            shape = (B, length, *tensor.shape[2:])
            if found is None or found.shape != shape or found.dtype != tensor.dtype:
                what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise _Damaged(
                    f"{index}.{name}: found {what}, expected {tensor.dtype} {list(shape)}"
                )
            tensor.flatten(0, 1)[slots] = found.flatten(0, 1)
        layer.length = length
    cache.note_tokens(token_ids)


def describe(model: PreTrainedModel) -> dict[str, str]:
    """Return what the values in a cache depend on, as text."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    return {
        "config": _digest(json.dumps(config, sort_keys=True, default=str).encode()),
        "weights": _sampled(model),
        "rules": "; ".join(_replacements(model)) or "none",
    }


def _replacements(model: PreTrainedModel) -> list[str]:
    """Say what rules replaced, without the lines of the file that say so."""
    report: Any = getattr(model, "ktransformers_report", None)
    return [] if report is None else [line.rpartition("  [")[0] for line in report.replacements]


def _sampled(model: PreTrainedModel) -> str:
    """Hash a few values of every weight, spread evenly."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = chain(model.named_parameters(), model.named_buffers())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            flat = tensor.detach().reshape(-1)
            index = torch.linspace(0, tensor.numel() - 1, SAMPLES, dtype=torch.float64).long()
            sample = flat[index.to(flat.device)].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()
