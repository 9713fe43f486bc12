"""MlaAttention inside whole models and alone, against HuggingFace's eager attention in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.last_position import last_position_only
from ktransformers.operators.attention import MlaAttention
from ktransformers.operators.linear import CpuLinear
from ktransformers.packing import pack
from ktransformers.rules import RuleError
from packed_layer import dequantised
from tiny_models import random_model, v2_config, v3_config

DENSE = {"first_k_dense_replace": 3}  # a router would make a jump of a small difference
U16 = 2.0**-8  # half a step of bf16, relative
KWARGS: list[dict[str, Any]] = [
    {"weight": "bf16"},
    {"weight": "int8"},
    {"weight": "int4", "group_size": 32},
]
IDS = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(0))
LEFT, RIGHT = torch.ones_like(IDS), torch.ones_like(IDS)
LEFT[0, :9] = LEFT[2, :25] = 0
RIGHT[0, 31:] = RIGHT[2, 15:] = 0


def rules(**kwargs: Any) -> list[dict[str, Any]]:
    operator = "ktransformers.operators.attention.MlaAttention"
    replace = {"class": operator, "kwargs": {"weight": "bf16", "threads": 2, **kwargs}}
    return [{"match": {"name": r"\.self_attn$"}, "replace": replace}]


def pair(config: PreTrainedConfig, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model with MlaAttention, and a plain one with the weights that it packed."""
    plain = random_model(config)
    optimised = optimize_and_load(random_model(config), rules(**kwargs))
    for mine, theirs in zip(optimised.model.layers, plain.model.layers, strict=True):
        theirs.self_attn.kv_b_proj.weight.data = unpacked(mine.self_attn).float()
    plain.set_attn_implementation("eager")
    return optimised, plain


def unpacked(operator: MlaAttention) -> torch.Tensor:
    """Return the kv_b_proj that the packed weights stand for."""
    C, Dn, Dv = operator.kv_lora_rank, operator.qk_nope_head_dim, operator.v_head_dim
    name = operator.weight_format
    halves = []
    for head in range(operator.num_heads):
        uk = dequantised(operator.uk_packed[head], operator.uk_scale[head], C, Dn, name)
        halves += [
            uk.T,
            dequantised(operator.uv_packed[head], operator.uv_scale[head], Dv, C, name),
        ]
    return torch.cat(halves)


class Watched:
    """Records what goes into attention modules and what comes out."""

    def __init__(self, model: PreTrainedModel):
        self.calls: list[tuple[dict[str, Any], torch.Tensor]] = []
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append((kwargs, output[0]))


def tolerance(attention: Any, hidden_states: torch.Tensor, quantised: bool) -> torch.Tensor:
    """Return by how much bf16 arithmetic may move the output of each token.

    Queries, latents, rope parts, weights of the softmax and what leaves the absorbed form are each
    rounded to bf16; beside integer weights the rows that they multiply are rounded to int8. A score
    is then off by at most the sum of the magnitudes of its terms times those roundings, a weight by
    twice that, relative, and an output by that part of the largest value.
    """
    with torch.no_grad():
        normed = attention.kv_a_layernorm(
            attention.kv_a_proj_with_mqa(hidden_states)[..., : attention.kv_lora_rank]
        )
        rope = attention.kv_a_proj_with_mqa(hidden_states)[..., attention.kv_lora_rank :]
        if attention.q_lora_rank is None:
            q = attention.q_proj(hidden_states)
        else:
            q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden_states)))
        q = q.unflatten(-1, (attention.num_heads, -1))
        Dn = attention.qk_nope_head_dim
        weight = attention.kv_b_proj.weight.unflatten(0, (attention.num_heads, -1))
        uk, uv = weight[:, :Dn], weight[:, Dn:]
        absorbed = torch.einsum("bthd,hdc->bthc", q[..., :Dn].abs(), uk.abs())
        score = torch.einsum("bthc,blc->bhtl", absorbed, normed.abs()).amax((-1, -2))
        size = q[..., Dn:].norm(dim=-1).amax(1) * rope.norm(dim=-1).amax(1)[:, None]
        steps = 4 * U16 + (1 / 127 if quantised else 0)
        shift = 2 * steps * attention.scaling * (score + size)  # [B, H]
        values = torch.einsum("hvc,blc->bhlv", uv.abs(), normed.abs()).amax(2)  # [B, H, Dv]
        error = (torch.expm1(shift)[..., None] + 3 * steps) * values
        return error.flatten(1) @ attention.o_proj.weight.abs().T  # [B, D]


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "v2": lambda: v2_config(**DENSE),
    "v2 without q_lora": lambda: v2_config(**DENSE, q_lora_rank=None),
    "v3": lambda: v3_config(**DENSE),
    "v3 without q_lora": lambda: v3_config(**DENSE, q_lora_rank=None),
    "v3 not interleaved": lambda: v3_config(**DENSE, rope_interleave=False),
    "v3 with biases": lambda: v3_config(**DENSE, attention_bias=True),
}


@pytest.mark.parametrize("kwargs", KWARGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_output_equals_eager_attention(name: str, kwargs: dict[str, Any]) -> None:
    optimised, plain = pair(CONFIGS[name](), **kwargs)
    for mask in (None, LEFT, RIGHT):
        watched = Watched(plain)
        with torch.no_grad():
            plain(IDS, attention_mask=mask)
        for layer, (arguments, want) in enumerate(watched.calls):
            theirs = plain.model.layers[layer].self_attn
            with torch.no_grad():
                got, weights = optimised.model.layers[layer].self_attn(
                    **{**arguments, "past_key_values": None}
                )
            assert weights is None
            limit = tolerance(theirs, arguments["hidden_states"], kwargs["weight"] != "bf16")
            error = (got - want).abs()
            if mask is not None:
                error[mask == 0] = 0  # nobody reads the outputs of padding
            assert (error.amax(1) <= limit).all(), layer
            assert error.amax() <= 0.1 * want.abs().max() or kwargs["weight"] == "int4"


@pytest.mark.parametrize("padding", [None, LEFT, RIGHT])
@pytest.mark.parametrize("kind", ["latent", "int8", "dynamic", "static", "none"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(
    config: PreTrainedConfig, kind: str, padding: torch.Tensor | None
) -> None:
    config.update(DENSE)
    model = optimize_and_load(random_model(config), rules())
    caches: dict[str, Any] = {
        "latent": lambda: LatentCache.for_model(model, 100),
        "int8": lambda: LatentCache.for_model(model, 100, "int8"),
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=50),
        "none": lambda: None,
    }
    cache, logits = caches[kind](), []
    with torch.no_grad():
        want = model(IDS, attention_mask=padding).logits
        for begin, end in ((0, 11), (11, 39), (39, 40)):
            first = 0 if cache is None else begin
            mask = None if padding is None else padding[:, :end]
            piece = model(IDS[:, first:end], attention_mask=mask, past_key_values=cache).logits
            logits.append(piece[:, begin - first :])
    error = (torch.cat(logits, dim=1) - want).abs()
    if padding is not None:
        error[padding == 0] = 0
    # Pieces differ in the order of additions and in the form, int8 by a step of the latent.
    assert error.max() <= (0.3 if kind == "int8" else 0.1) * want.abs().max()
    assert error.median() <= (2**-5 if kind == "int8" else 2**-7) * want.abs().max()


def test_greedy_text_is_transformers_own_where_the_margin_allows(config: PreTrainedConfig) -> None:
    config.update(DENSE)
    optimised, plain = pair(config)
    assert optimised.generation_config is not None
    optimised.generation_config.eos_token_id = None
    for cache in (LatentCache.for_model(optimised, 100), DynamicCache(config=config)):
        tokens = optimised.generate(  # type: ignore[operator]  # typed for GenerationMixin alone
            IDS, attention_mask=LEFT, max_new_tokens=30, do_sample=False, past_key_values=cache
        )
        assert tokens.shape == (3, 70)
        mask = torch.cat([LEFT, torch.ones(3, 30, dtype=torch.long)], dim=1)
        with torch.no_grad():
            position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
            logits = plain(tokens, attention_mask=mask, position_ids=position_ids).logits
        chosen = logits[:, 39:-1].gather(-1, tokens[:, 40:, None])[..., 0]
        behind = logits[:, 39:-1].amax(-1) - chosen
        assert (behind <= 0.05 * logits.abs().max()).all()
        assert (behind == 0).float().mean() > 0.9


def test_projections_and_norms_may_be_claimed_by_other_rules(config: PreTrainedConfig) -> None:
    linear = {"class": "ktransformers.operators.linear.CpuLinear", "kwargs": {"weight": "bf16"}}
    more = [
        {"match": {"name": r"self_attn\.(q_a|q_b|kv_a|o)_proj(_with_mqa)?$"}, "replace": linear}
    ]
    model = optimize_and_load(random_model(config), rules() + more)
    attention = model.model.layers[0].self_attn
    assert {name for name, child in attention.named_children() if isinstance(child, CpuLinear)} == {
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "o_proj",
    }
    model(IDS)


def test_a_rule_for_kv_b_proj_inside_is_an_error() -> None:
    linear = {"class": "ktransformers.operators.linear.CpuLinear"}
    more = [{"match": {"name": r"kv_b_proj$"}, "replace": linear}]
    with pytest.raises(RuleError, match=r"kv_b_proj inside .* which MlaAttention .* consumes"):
        optimize_and_load(random_model(v3_config()), rules() + more)


def test_packed_weights_are_loaded_from_a_cache(
    config: PreTrainedConfig, save: Callable[..., Path]
) -> None:
    folder = save(random_model(config))
    pack(folder, rules())
    cached, read = (optimize_and_load(folder, rules(), cache=cache) for cache in ("auto", None))
    assert "packed" in str(cached.ktransformers_report.cache)
    with torch.no_grad():
        assert torch.equal(cached(IDS).logits, read(IDS).logits)


def test_attention_weights_are_refused(config: PreTrainedConfig) -> None:
    model = optimize_and_load(random_model(config), rules())
    model.set_attn_implementation("eager")  # else transformers refuses sooner
    reason = r"MlaAttentionV\d at .*: keeps no attention weights"
    with pytest.raises(RuntimeError, match=reason):
        model(IDS, output_attentions=True)
    with pytest.raises(RuntimeError, match=reason):
        model.generate(  # type: ignore[operator]  # as above
            IDS, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True
        )
    model.config.output_attentions = True
    with pytest.raises(RuntimeError, match=reason):
        model(IDS)
    model.config.output_attentions = False
    model(IDS)


def test_a_mask_that_is_not_causal_is_refused(config: PreTrainedConfig) -> None:
    model = optimize_and_load(random_model(config), rules())
    with pytest.raises(ValueError, match="is not causal with padding"):
        model(IDS, attention_mask=torch.ones(3, 1, 40, 40, dtype=torch.bool))


def test_a_request_that_can_not_fit_is_refused_before_any_work(config: PreTrainedConfig) -> None:
    model = optimize_and_load(random_model(config), rules())
    ran: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=r"^61 tokens, .* do not fit a cache of 60"):
        model.generate(  # type: ignore[operator]  # as above
            IDS, max_new_tokens=22, past_key_values=LatentCache.for_model(model, 60)
        )
    assert ran == []


def test_a_gradient_is_refused(config: PreTrainedConfig) -> None:
    model = optimize_and_load(random_model(config), rules())
    embedded = model.model.embed_tokens(IDS).requires_grad_()
    with pytest.raises(RuntimeError, match="packed weights have no gradient"):
        model(inputs_embeds=embedded)


@pytest.mark.parametrize(
    ("pattern", "kwargs", "reason"),
    [
        (r"\.mlp$", {}, "place of a DeepseekV2Attention or DeepseekV3Attention, not of Deepseek"),
        (r"self_attn$", {"weight": "int2"}, "weight 'int2' is not supported (expected int8, "),
        (r"self_attn$", {"threads": 0}, "threads 0 is not 'auto' or a number from 1 to 1024"),
        (
            r"self_attn$",
            {"cache_format": "fp8"},
            "cache_format 'fp8' is not supported (expected bf16, fp32, int8)",
        ),
    ],
)
def test_what_the_operator_cannot_do_it_says(pattern: str, kwargs: Any, reason: str) -> None:
    (rule,) = rules(**kwargs)
    with pytest.raises(RuleError) as caught:
        optimize_and_load(random_model(v3_config()), [{**rule, "match": {"name": pattern}}])
    assert reason in str(caught.value)


@pytest.mark.parametrize("cache_format", ["bf16", "fp32", "int8"])
def test_a_cache_is_made_in_the_format_that_rules_ask_for(cache_format: str) -> None:
    model = optimize_and_load(random_model(v3_config()), rules(cache_format=cache_format))
    assert LatentCache.for_model(model, 10).format == cache_format
    assert LatentCache.for_model(model, 10, "fp32").format == "fp32"


def test_layers_that_want_different_caches_are_refused_one_for_all() -> None:
    first, rest = rules(cache_format="int8"), rules(cache_format="bf16")
    first[0]["match"]["layers"] = "0"
    model = optimize_and_load(random_model(v3_config()), [*first, *rest])
    reason = "for caches in bf16, int8: give all rules one cache_format, or pass format"
    with pytest.raises(ValueError, match=reason):
        LatentCache.for_model(model, 10)


def test_a_model_in_bf16_computes_what_it_computes_in_fp32(config: PreTrainedConfig) -> None:
    config.update(DENSE)
    optimised = optimize_and_load(random_model(config, dtype=torch.bfloat16), rules())
    plain = random_model(config, dtype=torch.bfloat16).float()
    with torch.no_grad():
        got, want = optimised(IDS).logits.float(), plain(IDS).logits
    assert (got - want).abs().median() <= 2 * U16 * want.abs().max()


def test_the_plain_model_needs_no_operator_for_a_latent_cache(
    config: PreTrainedConfig, save: Callable[..., Path]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(save(random_model(config)))
    cache = LatentCache.for_model(plain, 100)
    with torch.no_grad():
        assert torch.equal(plain(IDS, past_key_values=cache).logits, plain(IDS).logits)


@pytest.mark.parametrize("padding", [None, LEFT])
def test_in_the_last_layer_the_last_position_alone_asks(
    config: PreTrainedConfig, padding: torch.Tensor | None
) -> None:
    """One query may be computed in another form than forty: the rounding to bf16 differs."""
    config.update(DENSE)
    model = optimize_and_load(random_model(config), rules())
    asked: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: asked.append(args[0].shape[1])
        )
    caches = [LatentCache.for_model(model, 50) for _ in range(2)]
    options: dict[str, Any] = {"attention_mask": padding, "logits_to_keep": 1}
    with torch.no_grad():
        want = model(IDS, past_key_values=caches[0], **options).logits
        with last_position_only(model):
            got = model(IDS, past_key_values=caches[1], **options).logits
    assert asked == [40, 40, 40, 40, 40, 1]
    assert torch.equal(*(cache.layers[2].gather(torch.float32)[0] for cache in caches))
    assert torch.equal(*(cache.layers[2].gather(torch.float32)[1] for cache in caches))
    assert (got - want).abs().max() <= 4 * U16 * want.abs().max()
