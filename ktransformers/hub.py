"""A model's folder: a local one, or one that is fetched from the HuggingFace hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's own
    DryRunError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

# What a model is made of, in the root folder of its repository. Never code, and never the same
# weights in another format.
DESCRIPTION = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def resolve_model(model: str, *, needs_weights: bool = True) -> Path:
    """Return the folder of a model, given as a local path or as a hub id.

    A path that exists never touches the network. Of a hub id only missing files are fetched:
    config and tokenizer, and the safetensors files if `needs_weights`. Without a network, or with
    HF_HUB_OFFLINE set, what was fetched before is used.

    Raises ValueError, saying what to do, where there is no such model, it is not for us to read,
    the disk is too small or the download breaks off.
    """
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ValueError(f"{model}: no folder with a config.json; pass a model's whole folder")
        return path
    wanted = [*DESCRIPTION, *WEIGHTS] if needs_weights else list(DESCRIPTION)
    try:
        missing = _missing_bytes(model, wanted, needs_weights)
        if missing is None:
            return Path(snapshot_download(model, allow_patterns=wanted, local_files_only=True))
        _check_disk(model, missing)
        return Path(snapshot_download(model, allow_patterns=wanted))
    except HFValidationError:
        raise ValueError(
            f"{model}: no such folder, and no hub id (expected the form owner/name)"
        ) from None
    except (OSError, HTTPError) as error:  # most errors of huggingface_hub are an OSError
        raise ValueError(f"{model}: {_reason(model, error)}") from error


class _Silent(tqdm):
    """A progress bar for what takes no time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["disable"] = True
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]  # tqdm has no types


def _missing_bytes(model: str, wanted: list[str], needs_weights: bool) -> int | None:
    """Return how many bytes of the wanted files the cache lacks; None where the hub is away.

    Raises ValueError where the repository lacks what makes a model.
    """
    try:
        files = snapshot_download(model, allow_patterns=wanted, dry_run=True, tqdm_class=_Silent)
    except DryRunError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise error.__cause__ from None
        return None
    names = {file.filename for file in files}
    if "config.json" not in names:
        raise ValueError(f"{model}: the repository has no config.json; it is no transformers model")
    if needs_weights and not any(n.endswith(".safetensors") for n in names):
        raise ValueError(
            f"{model}: the repository has no model.safetensors, whole or in shards; choose one "
            "that has"
        )
    return sum(file.file_size or 0 for file in files if file.will_download)


def _check_disk(model: str, missing: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise ValueError(
            f"{model}: {missing / 1e9:,.1f} GB are to be downloaded to {cache}, where "
            f"{free / 1e9:,.1f} GB are free; make room, or set HF_HOME to a folder on a larger disk"
        )


def _reason(model: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"its owner grants access to each user: accept the terms at "
            f"{constants.ENDPOINT}/{model}, then log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "no such folder, and the hub has no such model; check the name, or log in with "
            "`hf auth login` if it is private"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"no such folder, the hub cannot be reached, and {constants.HF_HUB_CACHE} does not "
            "hold all of it; connect (and unset HF_HUB_OFFLINE), or pass a local folder"
        )
    return f"the download broke off ({error}); run the same again, and it goes on where it was"
