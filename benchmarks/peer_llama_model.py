"""llama.cpp with a whole model, through the bindings of llama-cpp-python.

Weights are quantised by llama.cpp itself from a GGUF file in bf16, and the files kept beside the
model. Variants are flash attention on and off, and for Q4_K_M, where it makes prefill slower on
some machines, weights repacked or not.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch

from gguf_model import write_gguf
from peer_layer import FOLDER, CannotRun
from whole_model import Ids, ModelVariant, locked, vocab_size

FORMATS = {"int8": ("Q8_0",), "int4": ("Q4_0", "Q4_K_M")}
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}  # of enum llama_ftype
MOST_AT_ONCE = 2048  # tokens that it computes together, of longer prompts
FLASH_TYPES = {False: 0, True: 1}  # of enum llama_flash_attn_type
DISK = 1.7  # of the bytes of a model in bf16: a copy in GGUF while quantising, and the result


def variants(weight: str, threads: int) -> list[ModelVariant]:
    """List the counterparts of a format, in all ways to run them."""
    kind = weight.partition("-")[0]
    return [
        ModelVariant(name, threads, flash, repack)
        for name in FORMATS.get(kind, ())
        for flash in (True, False)
        for repack in ((True, False) if name == "Q4_K_M" else (True,))
    ]


def bindings(package: str, module: str) -> Any:
    """Import a package's bindings without its own `__init__`, which wants packages of its own."""
    bare = types.ModuleType(package)
    bare.__path__ = [str(FOLDER / package)]
    sys.modules.setdefault(package, bare)
    try:
        return importlib.import_module(f"{package}.{module}")
    except (ImportError, OSError, RuntimeError) as error:
        raise CannotRun(f"{package}: {error}") from None


def llama() -> Any:
    """Return llama.cpp's functions."""
    return bindings("llama_cpp", "llama_cpp")


def quantised(folder: Path, format: str, threads: int) -> Path:
    """Return the GGUF file of a format, made where it is missing. Raises CannotRun."""
    path = folder / f"model-{format}.gguf"
    with locked(folder):
        if not path.exists():
            whole, unfinished = folder / "model-bf16.gguf", path.with_suffix(".unfinished")
            needed = DISK * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise CannotRun(
                    f"{folder}: a GGUF file takes {needed / 1e9:.1f} GB while it is made, but "
                    f"{free / 1e9:.1f} GB are free"
                )
            write_gguf(folder, whole)
            library = llama()
            library.llama_backend_init()
            options = library.llama_model_quantize_default_params()
            options.nthread, options.ftype = threads, FILE_TYPES[format]
            names = (str(name).encode() for name in (whole, unfinished))
            status = library.llama_model_quantize(*names, ctypes.byref(options))
            whole.unlink()
            if status:
                raise CannotRun(f"llama.cpp can't quantise to {format}: status {status}")
            unfinished.rename(path)
    return path


def load(folder: Path, variant: ModelVariant, max_tokens: int) -> LlamaEngine:
    """Load the model with a cache of `max_tokens`. Raises CannotRun."""
    path = quantised(folder, variant.format, variant.threads)
    library = llama()
    library.llama_backend_init()
    options = library.llama_model_default_params()
    options.n_gpu_layers = 0
    options.use_extra_bufts = variant.repack
    model = library.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise CannotRun(f"llama.cpp can't load {path}")
    setting = library.llama_context_default_params()
    setting.n_ctx = setting.n_batch = max_tokens
    setting.n_ubatch = min(max_tokens, MOST_AT_ONCE)
    setting.n_threads = setting.n_threads_batch = variant.threads
    setting.flash_attn_type = FLASH_TYPES[variant.flash]
    context = library.llama_init_from_model(model, setting)
    if not context:
        raise CannotRun(f"llama.cpp has no context for {variant}")
    return LlamaEngine(library, context, vocab_size(folder))


class LlamaEngine:
    """A context of llama.cpp's: pointers, never freed."""

    def __init__(self, library: Any, context: Any, vocabulary: int):
        self.library = library
        self.context = context
        self.vocabulary = vocabulary
        self.length = 0

    def clear(self) -> None:
        """Empty the cache."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)

    def prefill(self, ids: Ids) -> torch.Tensor:
        """Read a prompt into an empty cache; return the logits of its last position."""
        self.clear()
        self.length = 0
        return self._decode(ids)

    def step(self, token: int) -> torch.Tensor:
        """Read one more token; return its logits."""
        return self._decode([token])

    def _decode(self, ids: Ids) -> torch.Tensor:
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, self.length + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(ids) - 1
        status = self.library.llama_decode(self.context, batch)
        self.library.llama_batch_free(batch)
        if status:
            raise CannotRun(f"llama_decode of {len(ids)} tokens ended with status {status}")
        self.length += len(ids)
        found = self.library.llama_get_logits_ith(self.context, -1)
        values = (ctypes.c_float * self.vocabulary).from_address(ctypes.addressof(found.contents))
        return torch.frombuffer(values, dtype=torch.float32).clone()
