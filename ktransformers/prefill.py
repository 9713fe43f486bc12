"""Prefill in chunks: a prompt of any length in memory that does not grow with it.

A chunk reads every weight once, so that a large one costs less per token; what it needs beside
the weights grows with it. `chunk_tokens` weighs the two.

Shape suffixes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ktransformers.base import Operator
from ktransformers.cache import LatentCache
from ktransformers.phase import phase
from ktransformers.progress import token_progress
from ktransformers.stack import last_logits_of

# An int8 expert reads a byte for two operations per token, and machines do some 50 in that time
# (docs/log.md): from about 24 tokens on it computes longer than it reads. At four times that,
# reading is hidden even where experts are chosen unevenly.
TOKENS_PER_EXPERT = 96
DENSE_CHUNK = 512  # tokens, for a model without experts, whose weights are all used by each
MEMORY = 128 << 20  # bytes of activations of a chunk, or so large a part of the weights:
MEMORY_SHARE = 512
GPU_SHARE = 4  # of what a GPU has free, a part for activations
STEP = 64  # tokens; chunks are multiples, as kernels and pages are


def prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[Sequence[int]],
    cache: LatentCache,
    *,
    attention_mask: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Read prompts into a cache, after what it holds; return the last positions' logits.

    Args:
        model: a causal language model with latent attention.
        input_ids: the new tokens, [B, T].
        cache: is filled; after an error or Ctrl-C it holds the chunks that were completed.
        attention_mask: 0 for padding, [B, cached + T].
        chunk_size: tokens of each sequence at a time; where it is not given chunks of one size, and
            of at most `chunk_tokens`.

    Raises ValueError, before any work, for a request that can't be computed.
    """
    token_ids = check_prompt(model, input_ids)
    B, T = token_ids.shape
    cache.claim(model)
    past = cache.completed()
    cache.check_request(B, past + T)
    positions = _positions(attention_mask, B, past, T)
    chunk = _even(T, max(1, chunk_tokens(model) // B)) if chunk_size is None else chunk_size
    if chunk < 1:
        raise ValueError(f"chunk_size {chunk} is not a number of 1 or more")
    known = cache.token_ids if past else token_ids[:, :0]
    logits = token_ids[:, :0]
    last_logits = last_logits_of(model)
    try:
        reading = token_progress("Reading the prompt", T)
        with torch.no_grad(), phase("prefill"), reading as advance:
            for begin in range(0, T, chunk):
                ids = token_ids[:, begin : begin + chunk]
                start, end = past + begin, past + begin + ids.shape[1]
                mask = None if attention_mask is None else attention_mask[:, :end]
                position_ids = None if positions is None else positions[:, start:end]
                logits = last_logits(ids, cache, mask, position_ids)
                advance(ids.shape[1])
    finally:
        cache.cut(cache.completed())
        if known.shape == (B, past):
            cache.note_tokens(torch.cat([known, token_ids], dim=1))
    return logits


def _even(tokens: int, most: int) -> int:
    """Return the size of equal chunks: a small last one would read all weights for a few tokens."""
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def check_prompt(
    model: PreTrainedModel, input_ids: torch.Tensor | Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return the prompts as a tensor [B, T]. Raises ValueError for what is no such thing."""
    if not isinstance(input_ids, torch.Tensor):
        lengths = sorted({len(ids) for ids in input_ids})
        if len(lengths) > 1:
            raise ValueError(
                f"the prompts have {', '.join(map(str, lengths))} tokens: pad them to one length, "
                "and pass an attention_mask"
            )
        input_ids = torch.tensor(input_ids, dtype=torch.long)
    if input_ids.ndim != 2:
        raise ValueError(f"prompts of shape {list(input_ids.shape)}: expected [batch, tokens]")
    if input_ids.numel() == 0:
        raise ValueError("the prompt has no tokens; pass some text")
    if input_ids.is_floating_point():
        raise ValueError(f"prompts of {input_ids.dtype}: expected token ids")
    vocabulary = model.config.vocab_size
    wrong = ((input_ids < 0) | (input_ids >= vocabulary)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"token {column} of prompt {row} is {int(input_ids[row, column]):,}, but the model "
            f"knows 0 to {vocabulary - 1:,}: the tokenizer is of another model"
        )
    return input_ids


def _positions(mask: torch.Tensor | None, B: int, past: int, T: int) -> torch.Tensor | None:
    """Number the tokens that are no padding, as `generate` does."""
    if mask is None:
        return None
    if mask.shape != (B, past + T):
        raise ValueError(
            f"attention_mask of shape {list(mask.shape)}: expected {[B, past + T]}, a value for "
            "each cached and each new token"
        )
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def chunk_tokens(model: PreTrainedModel, memory: int | None = None) -> int:
    """Return how many tokens of all sequences to compute at once.

    So many that each expert gets `TOKENS_PER_EXPERT` of them on average, or what operators are
    fastest with, but no more than fit `memory` bytes of activations: by default 128 MiB, or where
    that is more a 512th of the weights; where operators asked a quarter of what GPUs have free.
    """
    config = model.config
    experts = getattr(config, "n_routed_experts", None) or getattr(
        config, "num_local_experts", None
    )
    wanted = DENSE_CHUNK
    if experts:
        wanted = TOKENS_PER_EXPERT * experts // config.num_experts_per_tok
    operators = [module for module in model.modules() if isinstance(module, Operator)]
    asked = [tokens for each in operators if (tokens := each.prefill_tokens()) is not None]
    wanted = max([wanted, *asked])
    if memory is None:
        tensors = (*model.parameters(), *model.buffers())
        memory = max(MEMORY, sum(tensor.nbytes for tensor in tensors) // MEMORY_SHARE)
        gpus = {tensor.device for tensor in tensors if tensor.is_cuda}
        if asked and gpus:
            memory = min(map(_free, gpus)) // GPU_SHARE
    fitting = memory // activation_bytes(config, model.dtype.itemsize)
    return max(STEP, min(wanted, fitting) // STEP * STEP)


def _free(gpu: torch.device) -> int:
    """Return the bytes that a tensor may still take, torch's own reserve included."""
    unused = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + unused


def activation_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Estimate the bytes beside the weights that a token of a chunk needs.

    That is attention with its queries, their rotated copy and its output, four rows of the hidden
    size, and for each expert that a token has a row of the intermediate size, in fp32 and as the
    next product takes it; without experts an MLP with its gate, its up and their product. They are
    added up, though no two are in use at a time: scratch memory is kept for the next call. (Beside
    experts, the few dense layers are computed some tokens at a time.)
    """
    D, H = config.hidden_size, config.num_attention_heads
    head = getattr(config, "qk_head_dim", None) or D // H
    routed = getattr(config, "moe_intermediate_size", None) or 0
    experts = (4 + itemsize) * routed * (getattr(config, "num_experts_per_tok", None) or 0)
    mlp = 3 * itemsize * (getattr(config, "intermediate_size", None) or 0)
    return int(itemsize * (3 * H * head + 4 * D) + (experts or mlp))
