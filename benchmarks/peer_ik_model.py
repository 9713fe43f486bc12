"""ik_llama.cpp with a whole model, through the bindings of ik-llama-cpp-python.

Files are those that llama.cpp quantises. Its best flags are `-mla 3 -fa 1 -fmoe 1`, with `-rtr 1`
(weights repacked at load) faster for some formats and slower for others.
"""

from __future__ import annotations

from pathlib import Path

import peer_llama_model
from peer_layer import CannotRun
from whole_model import ModelVariant, vocab_size

MLA = 3  # absorbed for decode, expanded for prefill


def variants(weight: str, threads: int) -> list[ModelVariant]:
    """List the counterparts of a format."""
    kind = weight.partition("-")[0]
    return [
        ModelVariant(name, threads, True, repack)
        for name in peer_llama_model.FORMATS.get(kind, ())
        for repack in (True, False)
    ]


def load(folder: Path, variant: ModelVariant, max_tokens: int) -> IkEngine:
    """Load the model with a cache of `max_tokens`. Raises CannotRun."""
    library = peer_llama_model.bindings("ik_llama_cpp", "_ctypes_api")
    path = peer_llama_model.quantised(folder, variant.format, variant.threads)
    library.llama_backend_init()
    options = library.llama_model_default_params()
    options.n_gpu_layers, options.mla, options.flash_attn = 0, MLA, variant.flash
    options.repack_tensors, options.use_mmap = variant.repack, not variant.repack
    model = library.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise CannotRun(f"ik_llama.cpp can't load {path}")
    setting = library.llama_context_default_params()
    setting.n_ctx = setting.n_batch = max_tokens
    setting.n_ubatch = min(max_tokens, peer_llama_model.MOST_AT_ONCE)
    setting.n_threads = setting.n_threads_batch = variant.threads
    setting.flash_attn, setting.mla_attn, setting.fused_moe_up_gate = variant.flash, MLA, True
    context = library.llama_init_from_model(model, setting)
    if not context:
        raise CannotRun(f"ik_llama.cpp has no context for {variant}")
    return IkEngine(library, context, vocab_size(folder))


class IkEngine(peer_llama_model.LlamaEngine):
    """A context of ik_llama.cpp's, whose cache has another name."""

    def clear(self) -> None:
        """Empty the cache."""
        self.library.llama_kv_cache_clear(self.context)
