"""Models whose token can be one graph, answers of theirs, and attention that is quick to replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.cache_pages import PAGE_TOKENS
from ktransformers.decode import decode, plain_request
from ktransformers.prefill import prefill
from ktransformers.stack import DecoderStack
from ktransformers.token_graph import TokenGraph, places_of
from tiny_models import random_model, v3_config

OPERATORS = "ktransformers.operators"
IDS = torch.arange(12)[None]
ONE_LAYER: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "first_k_dense_replace": 0,
}
TWO_LAYERS = {**ONE_LAYER, "num_hidden_layers": 2}
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


def rules(device: torch.device, moe: str = "DeepseekV3MoE", **hybrid: Any) -> list[dict[str, Any]]:
    """Return those of a model whose token can be one graph."""
    place = {"device": str(device)}
    kept = r"^model\.(embed_tokens|layers\.\d+|norm|rotary_emb)$|^lm_head$"
    taken = [
        ({"name": kept}, "default", place),
        ({"name": r"\.self_attn$"}, f"{OPERATORS}.gpu_attention.GpuMlaAttention", place),
        ({"class": moe}, f"{OPERATORS}.hybrid.HybridMoE", hybrid),
        ({"name": r"\.mlp\.experts$"}, f"{OPERATORS}.experts.CpuExperts", {"threads": 1}),
    ]
    return [
        {"match": match, "replace": {"class": path, "kwargs": kwargs}}
        for match, path, kwargs in taken
    ]


def load(device: torch.device, config: Any = None, **hybrid: Any) -> Any:
    """Load a tiny model, by default of one layer."""
    config = v3_config(**ONE_LAYER) if config is None else config
    moe = {"deepseek_v2": "DeepseekV2Moe", "deepseek_v3": "DeepseekV3MoE"}[config.model_type]
    model = random_model(config, dtype=torch.bfloat16)
    return optimize_and_load(model, rules(device, moe, **hybrid))


def answer(
    model: Any,
    cache: LatentCache,
    ids: torch.Tensor,
    tokens: int,
    *,
    graph: bool | None,
    on_token: Callable[[], object] = lambda: None,
    **options: Any,
) -> list[int]:
    """Decode so many tokens after a prompt, of which the cache may hold a part."""
    options = {**GREEDY, "min_new_tokens": tokens, "max_new_tokens": tokens, **options}
    request = plain_request(model, None, ids, cache, options)
    assert request is not None
    found: list[int] = []

    def take(token: int) -> None:
        found.append(token)
        on_token()

    logits = prefill(model, ids[:, cache.get_seq_length() :], cache)
    decode(model, request, cache, logits, take, graph=graph)
    return found


def eager(model: Any, cache: LatentCache, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a token without a graph."""
    logits: torch.Tensor = DecoderStack(model).last_logits(ids.to(places(model)[0]), cache)
    return logits


def places(model: Any) -> list[torch.device]:
    """Return the devices of a model."""
    return list(places_of(model))


def token_graph(model: Any, cache: LatentCache) -> TokenGraph:
    """Make a graph of a model on one device."""
    return TokenGraph(DecoderStack(model), cache, places(model)[0])


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Compare logits; libraries may choose other kernels in a graph."""
    return bool((got - want).abs().max() <= 2**-6 * want.abs().max())


def attention_in_torch(
    self: Any,
    q: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: LatentCache | None,
) -> torch.Tensor:
    """Do what GpuMlaAttention.compute does, through operations of torch that read the lengths.

    Triton's interpreter takes a hundred times as long; where graphs are tested, it has had its
    turn with one model.
    """
    assert attention_mask is None
    (B, T, C), R = latent.shape, k_rope.shape[-1]
    if cache is None:  # when a loaded model is probed
        cache = LatentCache(self.site.config, T, "bf16")
    pages = cache.make_room(self.layer_idx, B, T, C, R, latent.device)
    position = pages.lengths[:, None] - T + torch.arange(T)
    page = pages.block_table.gather(1, (position // PAGE_TOKENS).long())
    rows = (page * PAGE_TOKENS + position % PAGE_TOKENS).flatten().long()
    pages.latent.view(-1, C).index_copy_(0, rows, latent.flatten(0, 1))
    pages.rope.view(-1, R).index_copy_(0, rows, k_rope.flatten(0, 1))
    cache.wrote(self.layer_idx, T)
    table = pages.block_table.long()
    keys, ropes = (cached[table].flatten(1, 2).float() for cached in (pages.latent, pages.rope))
    token = torch.arange(keys.shape[1])
    keys = keys.masked_fill((token >= pages.lengths[:, None])[..., None], 0)  # what may be NaN
    q_nope, q_rope = q.float().split((self.qk_nope_head_dim, R), -1)
    q_latent = torch.einsum("bthd,hdc->bthc", q_nope, self.uk.float())
    score = torch.einsum("bthc,blc->bhtl", q_latent, keys)
    score = (score + torch.einsum("bthr,blr->bhtl", q_rope, ropes)) * self.scaling
    later = token > position[:, -q.shape[1] :, None]  # than the query, which may be the last alone
    weight = score.masked_fill(later[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhtl,blc,hcv->bthv", weight, keys, self.uv.float())
    return out.flatten(2).to(q.dtype)
