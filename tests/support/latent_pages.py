"""Random pages of latents, and how far kernels on a GPU may be from their reference on them.

Shape suffixes: B sequences, T queries of each, H heads, L keys, C kv_lora_rank, R
qk_rope_head_dim, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ktransformers.cache import DTYPES, SCALED, LatentPages
from ktransformers.cache_pages import PAGE_TOKENS

U = 2.0**-24
# Relative, of one rounding to bf16: to the nearest on a GPU is half of this, but the interpreter
# cuts off.
STEP16 = 2.0**-7


def random_pages(
    lengths: Sequence[int], C: int, R: int, format: str, device: torch.device, seed: int = 0
) -> LatentPages:
    """Draw pages that lie in any order; what is no token's is no number, what is no page -1."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    P = sum(counts) + 1
    order = torch.randperm(P, generator=generator).int().split([*counts, 1])
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    latent = torch.full((P, PAGE_TOKENS, C), torch.nan)
    rope = torch.full((P, PAGE_TOKENS, R), torch.nan)
    scale = torch.full((P, PAGE_TOKENS), torch.nan) if format in SCALED else None
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count] = order[b]
        pages = order[b].long().repeat_interleave(PAGE_TOKENS)[:length]
        at = pages, torch.arange(length) % PAGE_TOKENS
        latent[at] = torch.randn(length, C, generator=generator)
        rope[at] = torch.randn(length, R, generator=generator)
        if scale is not None:  # any will do
            scale[at] = torch.rand(length, generator=generator) + 0.5
    kinds = DTYPES[format]
    pages = LatentPages(
        latent.to(kinds[0]),
        scale,
        rope.to(kinds[1]),
        table,
        torch.tensor(lengths, dtype=torch.int32),
    )
    return on(pages, device)


def on(pages: LatentPages, device: torch.device) -> LatentPages:
    """Bring pages to a device."""
    return LatentPages(
        pages.latent.to(device),
        None if pages.scale is None else pages.scale.to(device),
        pages.rope.to(device),
        pages.block_table.to(device),
        pages.lengths.to(device),
    )


def random_queries(
    shape: tuple[int, ...], R: int, dtype: torch.dtype, device: torch.device, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw queries [*, C] and their rope parts [*, R]."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(shape, generator=generator).to(dtype)
    rope = torch.randn(*shape[:-1], R, generator=generator).to(dtype)
    return latent.to(device), rope.to(device)


def tolerance(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: LatentPages, scaling: float
) -> float:
    """Return by how much an output may differ from the reference, which is in fp32 too.

    A product of k terms is off by 2 k u of the terms' magnitudes, so a score by that of its own,
    and again where the base of its logarithm changes; a weight is off by as much, relative, and by
    its rounding to the queries' dtype; and so is the output, which sums them up and is rounded
    itself, of the largest latent.
    """
    C, R = pages.latent.shape[-1], pages.rope.shape[-1]
    latent = pages.latent.float()
    if pages.scale is not None:
        latent = latent * pages.scale[..., None]
    latent, rope = latent.nan_to_num().abs(), pages.rope.float().nan_to_num().abs()
    score = scaling * float(
        (q_latent.float().abs().flatten(0, -2).amax(0) * latent.flatten(0, 1).amax(0)).sum()
        + (q_rope.float().abs().flatten(0, -2).amax(0) * rope.flatten(0, 1).amax(0)).sum()
    )
    L = int(pages.lengths.max())
    exact = 4 * (C + R) * U * score + 2 * L * U
    roundings = 0.0 if q_latent.dtype == torch.float32 else 2 * STEP16
    return 2 * (exact + roundings) * float(latent.max())


def sequence(pages: LatentPages, b: int) -> LatentPages:
    """Return the pages of one sequence alone."""
    one = slice(b, b + 1)
    return replace(pages, block_table=pages.block_table[one], lengths=pages.lengths[one])
