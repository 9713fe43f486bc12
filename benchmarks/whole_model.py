"""A whole synthetic model, and what every engine is asked to do with it.

Layer sizes are V2-Lite's, with a `q_lora_rank`, which llama.cpp wants of a model of few layers. It
is made once, under `build/`, and kept, with what transformers computes from it in bf16: an engine
is measured once its logits are close to those.

An engine reads a prompt and returns the logits of its last position alone, as llama-bench has it,
then takes token after token. Prompts are random tokens, so that experts are chosen evenly.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from make_model import TOKENIZER, TOKENIZER_FILES, real_config, write_model

CACHE = Path(__file__).parents[1] / "build" / "end-to-end"
LAYERS = 8
Q_LORA_RANK = 1536  # of V2 and V3
REFERENCE = "logits.safetensors"
# Short, so that transformers takes no time for them; several, because a single prompt may lie where
# a rounding chooses another expert.
CHECKED_PROMPTS = (9, 17, 24, 33, 40, 48, 57, 64)
# By the bits of weights. Random layers make more of an error than trained ones, as all that they
# read is what others before them wrote: 8 smaller layers end at 0.996 in int8 and 0.77 in int4, or
# at 0.998 and 0.92 with embeddings as large as what a layer adds. Files of llama.cpp differ in the
# quantiser alone, so that 8 bits show whether they are right.
MIN_COSINE = {"bf16": 0.999, "8": 0.99, "4": 0.6}

Ids = list[int]


@dataclass(frozen=True, slots=True)
class ModelVariant:
    """One way to run a whole model in another engine: the best one counts."""

    format: str  # in the engine's own words
    threads: int
    flash: bool = False  # flash attention
    repack: bool = False  # weights, for its faster kernels

    def __str__(self) -> str:
        """Write it for a table."""
        flags = [name for name in ("flash", "repack") if getattr(self, name)]
        return ", ".join([self.format, *flags])


class Engine(Protocol):
    """A loaded model with a cache of its own."""

    def prefill(self, ids: Ids) -> torch.Tensor:
        """Read a prompt into an empty cache; return the logits of its last position."""
        ...

    def step(self, token: int) -> torch.Tensor:
        """Read one more token; return its logits."""
        ...


class ModelPeer(Protocol):
    """A module that runs whole models in another engine."""

    def variants(self, weight: str, threads: int) -> list[ModelVariant]:
        """List its ways to run our format's counterparts."""
        ...

    def load(self, folder: Path, variant: ModelVariant, max_tokens: int) -> Engine:
        """Load a model of `whole_model`. Raises CannotRun."""
        ...


MODEL_PEERS = {
    "llama.cpp": "peer_llama_model",
    "ik_llama.cpp": "peer_ik_model",
    "transformers": "peer_transformers",
}


def load_model_peer(name: str) -> ModelPeer:
    """Import a peer's module."""
    module: ModelPeer = importlib.import_module(MODEL_PEERS[name])
    return module


def random_ids(count: int, vocab_size: int) -> Ids:
    """Draw tokens, the same for the same count; those of special meaning are left out."""
    generator = torch.Generator().manual_seed(count)
    ids: Ids = torch.randint(3, vocab_size, (count,), generator=generator).tolist()
    return ids


def vocab_size(folder: Path) -> int:
    """Return how many tokens a model knows."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def model_folder(layers: int = LAYERS) -> Path:
    """Return the folder of the model, which is written where it is missing: 1.2 GB a layer.

    Raises SystemExit where the disk has not enough room.
    """
    folder = CACHE / f"v2-lite-{layers}"
    with locked(CACHE):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                write_model(unfinished, real_config("v2-lite", layers, q_lora_rank=Q_LORA_RANK))
            except ValueError as error:
                raise SystemExit(str(error)) from None
            for name in TOKENIZER_FILES:
                shutil.copy(TOKENIZER / name, unfinished)
            unfinished.rename(folder)
    return folder


def checked_logits(prefill: Callable[[Ids], torch.Tensor], vocabulary: int) -> torch.Tensor:
    """Return the logits of the prompts that are compared, `[prompts, vocabulary]` in fp32."""
    prompts = (random_ids(count, vocabulary) for count in CHECKED_PROMPTS)
    return torch.stack([prefill(ids).float() for ids in prompts])


def keep_reference(folder: Path, logits: torch.Tensor) -> None:
    """Keep what transformers computes."""
    save_file({"logits": logits.contiguous()}, folder / REFERENCE)


def cosine(folder: Path, logits: torch.Tensor) -> float:
    """Return how close logits are to those of transformers: the mean over prompts."""
    expected = load_file(folder / REFERENCE)["logits"]
    return float(torch.nn.functional.cosine_similarity(logits, expected).mean())


def bits(format: str) -> str:
    """Return the key of `MIN_COSINE` for a format, ours or a peer's."""
    return "bf16" if format == "bf16" else next(digit for digit in format if digit in "48")


def prefill_seconds(engine: Engine, ids: Ids) -> float:
    """Time one prompt."""
    start = time.perf_counter()
    engine.prefill(ids)
    return time.perf_counter() - start


def decode_seconds(engine: Engine, ids: Ids, tokens: int) -> float:
    """Time greedy tokens after a prompt, less the first, which prefill made."""
    token = int(engine.prefill(ids).argmax())
    start = time.perf_counter()
    for _ in range(tokens - 1):
        token = int(engine.step(token).argmax())
    return time.perf_counter() - start
