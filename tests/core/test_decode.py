"""The decode loop gives the tokens of transformers' `generate`, seed for seed, without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.masking_utils import create_causal_mask

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.decode import Request, _ends, decode, plain_request
from ktransformers.prefill import prefill
from ktransformers.report import count_experts
from ktransformers.stack import BLOCK, DecoderStack
from tiny_models import random_model, v2_config, v3_config

OPERATORS = "ktransformers.operators"
LAYER: dict[str, Any] = {
    "match": {"name": r"^model\.layers\.\d+$"},
    "replace": {"class": f"{OPERATORS}.decoder_layer.CpuDecoderLayer", "kwargs": {"threads": 1}},
}
ATTENTION = {
    "match": {"name": r"\.self_attn$"},
    "replace": {"class": f"{OPERATORS}.attention.MlaAttention", "kwargs": {"threads": 1}},
}
EXPERTS = {
    "match": {"name": r"\.mlp\.experts$"},
    "replace": {"class": f"{OPERATORS}.experts.CpuExperts", "kwargs": {"threads": 1}},
}
FIRST_ATTENTION = {**ATTENTION, "match": {"name": r"layers\.0\.self_attn$"}}
HEAD = {
    "match": {"name": "^lm_head$"},
    "replace": {"class": f"{OPERATORS}.linear.CpuLinear", "kwargs": {"threads": 1}},
}
RULES: dict[str, list[dict[str, Any]]] = {
    "huggingface": [],
    "experts": [EXPERTS],
    "attention": [ATTENTION],
    "attention of one layer": [FIRST_ATTENTION],
    "layers": [LAYER],
    "layers and head": [LAYER, HEAD],
}
WITHOUT_INT8 = {
    "huggingface": [],
    "attention": [ATTENTION],
    "layers": [
        {**LAYER, "replace": {**LAYER["replace"], "kwargs": {"threads": 1, "weight": "bf16"}}}
    ],
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.5, "top_k": 0},
    "min_p": {"do_sample": True, "min_p": 0.2, "top_k": 0},
    "repetition_penalty": {"do_sample": False, "repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"do_sample": False, "no_repeat_ngram_size": 2},
    "several stop tokens": {"do_sample": True, "eos_token_id": list(range(4, 12)), "top_k": 0},
    "min_new_tokens": {"do_sample": True, "eos_token_id": list(range(2, 40)), "min_new_tokens": 6},
    "guidance_scale": {"do_sample": False, "guidance_scale": 1.5},
}
IDS = torch.randint(12, 96, (1, 30), generator=torch.Generator().manual_seed(0))


def load(config: PreTrainedConfig, rules: str) -> PreTrainedModel:
    model = random_model(config)
    return optimize_and_load(model, RULES[rules]) if RULES[rules] else model


def request_of(
    model: PreTrainedModel, cache: LatentCache, input_ids: torch.Tensor = IDS, **options: Any
) -> Request | None:
    return plain_request(model, None, input_ids, cache, options)


def tokens_of_ours(model: PreTrainedModel, input_ids: torch.Tensor, **options: Any) -> list[int]:
    chunk_size = options.pop("chunk_size", None)
    cache = LatentCache.for_model(model, 120)
    request = request_of(model, cache, input_ids, **options)
    assert request is not None
    tokens: list[int] = []
    logits = prefill(model, input_ids, cache, chunk_size=chunk_size)
    decode(model, request, cache, logits, tokens.append)
    assert cache.get_seq_length() == input_ids.shape[1] + len(tokens) - 1
    return tokens


def tokens_of_generate(
    model: PreTrainedModel, input_ids: torch.Tensor, **options: Any
) -> list[int]:
    cache = LatentCache.for_model(model, 120)
    ids = model.generate(input_ids, past_key_values=cache, **options)  # type: ignore[operator]  # typed for GenerationMixin alone
    return list(ids[0, input_ids.shape[1] :].tolist())


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("sampling", ["greedy", "temperature"])
def test_tokens_are_those_of_generate_whatever_is_replaced(
    config: PreTrainedConfig, rules: str, sampling: str
) -> None:
    model = load(config, rules)
    over_a_block = {"min_new_tokens": 45, "max_new_tokens": 45}
    options = {**SAMPLING[sampling], **over_a_block}
    torch.manual_seed(3)
    want = tokens_of_generate(model, IDS, **options)
    torch.manual_seed(3)
    assert tokens_of_ours(model, IDS, **options) == want


@pytest.mark.parametrize("sampling", SAMPLING)
def test_tokens_are_those_of_generate_however_they_are_chosen(sampling: str) -> None:
    model = random_model(v3_config())
    options = {**SAMPLING[sampling], "max_new_tokens": 30}
    for seed in range(2):
        torch.manual_seed(seed)
        want = tokens_of_generate(model, IDS, **options)
        torch.manual_seed(seed)
        assert tokens_of_ours(model, IDS, **options) == want


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"attn_implementation": "eager"},
    ],
)
def test_tokens_are_those_of_generate_for_other_rotary_and_attention(
    changes: dict[str, Any],
) -> None:
    config = v3_config(max_position_embeddings=48, **changes)
    model = random_model(config)
    options = {"do_sample": False, "max_new_tokens": 45}
    assert tokens_of_ours(model, IDS, **options) == tokens_of_generate(model, IDS, **options)


@pytest.mark.parametrize("chunk_size", [1, 7, 29, 30])
def test_the_size_of_chunks_changes_no_token(config: PreTrainedConfig, chunk_size: int) -> None:
    model = random_model(config)
    options = {"do_sample": False, "max_new_tokens": 20}
    want = tokens_of_generate(model, IDS, **options)
    assert tokens_of_ours(model, IDS, chunk_size=chunk_size, **options) == want


def test_arguments_of_generate_are_heard(config: PreTrainedConfig) -> None:
    model = random_model(config)

    def never_50(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 50:] = -torch.inf
        return scores

    def after_40(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= 40])

    tokens = tokens_of_ours(
        model,
        IDS,
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=30),
        logits_processor=LogitsProcessorList([never_50]),
        stopping_criteria=StoppingCriteriaList([after_40]),
    )
    assert len(tokens) == 10
    assert max(tokens) < 50


def test_criteria_of_the_caller_see_each_token_up_to_the_last_one() -> None:
    model = random_model(v3_config())
    options = {"do_sample": True, "top_k": 0, "eos_token_id": list(range(4, 12))}

    def seen_by(tokens_of: Callable[..., list[int]]) -> list[list[int]]:
        seen: list[list[int]] = []

        def watch(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            seen.append(input_ids[0].tolist())
            return torch.tensor([False])

        torch.manual_seed(1)
        criteria = StoppingCriteriaList([watch])
        tokens = tokens_of(model, IDS, max_new_tokens=30, stopping_criteria=criteria, **options)
        assert seen[-1] == IDS[0].tolist() + tokens
        return seen

    found = seen_by(tokens_of_ours)
    assert found == seen_by(tokens_of_generate)
    assert 1 < len(found) < 30


def test_what_ends_an_answer_comes_to_numbers_but_for_what_has_more_to_say() -> None:
    reminds = MaxLengthCriteria(12, max_position_embeddings=11)
    other = MaxTimeCriteria(60.0)
    known = [
        EosTokenCriteria(3),
        EosTokenCriteria([5, 7]),
        MaxLengthCriteria(20),
        MaxLengthCriteria(15, max_position_embeddings=15),
    ]
    criteria = StoppingCriteriaList([*known, reminds, other])
    assert _ends(criteria) == ({3, 5, 7}, 15, [reminds, other])


def test_angles_of_a_block_are_those_of_each_position(config: PreTrainedConfig) -> None:
    stack = DecoderStack(random_model(config))
    x = torch.empty(1, 1, 64)
    for past in range(2 * BLOCK):
        together, alone = stack._next_angles(x, past), stack.rotary(x, torch.tensor([[past]]))
        if isinstance(alone, torch.Tensor):
            together, alone = [together], [alone]
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("rules", ["layers", "layers and head"])
def test_embedding_norm_or_head_that_somebody_watches_or_replaced_is_called(
    config: PreTrainedConfig, rules: str
) -> None:
    model = load(config, rules)
    assert DecoderStack(model).chain is not None
    cache = LatentCache.for_model(model, 60)
    want = prefill(model, IDS[:, :1], cache)
    seen: list[torch.Tensor] = []
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        handle = module.register_forward_hook(lambda _, args, out: seen.append(out))
        cache.reset()
        assert torch.allclose(prefill(model, IDS[:, :1], cache), want, rtol=1e-5, atol=1e-5)
        handle.remove()
    assert [out.shape[-1] for out in seen] == [64, 64, 96]
    for name in ("embed_tokens", "norm"):
        usual = getattr(model.model, name)
        setattr(model.model, name, torch.nn.Sequential(usual))
        assert DecoderStack(model).chain is None
        setattr(model.model, name, usual)


def test_embeddings_of_another_dtype_than_the_layers_are_looked_up_outside() -> None:
    model = load(v3_config(), "layers")
    model.model.embed_tokens.to(torch.bfloat16)
    assert DecoderStack(model).chain is None


def test_embeddings_that_change_or_learn_where_they_are_looked_up_are_called() -> None:
    embedding = (model := load(v3_config(), "layers")).model.embed_tokens
    embedding.max_norm = 1.0
    assert DecoderStack(model).chain is None
    embedding.max_norm = None
    embedding.weight.requires_grad_(requires_grad=True)
    assert DecoderStack(model).chain is None
    with torch.no_grad():
        assert DecoderStack(model).chain is not None


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2},
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"num_return_sequences": 2, "do_sample": True},
        {"position_ids": 3 * torch.arange(30)[None]},
        {"inputs_embeds": torch.zeros(1, 30, 64)},
        {"streamer": object()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_loop_does_not_do_is_no_plain_request(options: dict[str, Any]) -> None:
    model = random_model(v3_config())
    cache = LatentCache.for_model(model, 60)
    assert request_of(model, cache, max_new_tokens=5) is not None
    assert request_of(model, cache, max_new_tokens=5, **options) is None
    assert request_of(model, cache, max_new_tokens=5, assistant_model=model) is None


def test_a_model_that_is_not_known_or_not_as_it_was_is_left_to_transformers() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    heads: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1}
    assert not DecoderStack.fits(random_model(LlamaConfig(num_hidden_layers=1, **sizes, **heads)))
    model = random_model(v2_config())
    assert DecoderStack.fits(model)
    assert DecoderStack.fits(optimize_and_load(random_model(v2_config()), [LAYER]))
    handle = model.model.register_forward_hook(lambda *_: None)
    assert not DecoderStack.fits(model)
    handle.remove()
    model.forward = lambda: None
    assert not DecoderStack.fits(model)


def test_an_answer_that_does_not_fit_the_cache_is_refused_before_any_work() -> None:
    model = random_model(v3_config())
    cache = LatentCache.for_model(model, 40)
    with pytest.raises(ValueError, match="41 tokens, prompt and answer together, do not fit a"):
        request_of(model, cache, max_length=42)


@pytest.mark.parametrize("rules", ["huggingface", "layers"])
def test_a_check_is_made_before_each_layer_and_may_end_the_answer(rules: str) -> None:
    model = load(v3_config(), rules)
    cache = LatentCache.for_model(model, 120)
    request = request_of(model, cache, min_new_tokens=9, max_new_tokens=9)
    assert request is not None
    logits = prefill(model, IDS, cache)
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 3 * 2 + 2:  # before the second layer for the fourth token
            raise InterruptedError

    tokens: list[int] = []
    with pytest.raises(InterruptedError):
        decode(model, request, cache, logits, tokens.append, check)
    assert len(tokens) == 3
    assert cache.completed() == 30 + 2
    cache.cut(30 + 2)
    all_ids = torch.cat([IDS, torch.tensor([tokens])], dim=1)
    want = prefill(model, all_ids, LatentCache.for_model(model, 120))
    again = prefill(model, all_ids[:, -1:], cache)
    assert (again - want).abs().max() <= 1e-4 * want.abs().max()


def test_layers_whose_routing_is_watched_are_called_one_by_one() -> None:
    model = load(v3_config(), "layers")
    assert DecoderStack(model).chain is not None
    with count_experts(model) as counter:
        assert DecoderStack(model).chain is None
        tokens_of_ours(model, IDS, do_sample=False, max_new_tokens=5)
    assert counter.mean == 4
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert DecoderStack(model).chain is None
    handle.remove()


def test_layers_whose_forward_is_not_the_operator_s_are_called_one_by_one() -> None:
    model = load(v3_config(), "layers")
    layers: Any = model.model.layers
    kind: Any = type(layers[1])
    layers[1].forward = lambda *_, **__: None
    assert DecoderStack(model).chain is None
    del layers[1].forward
    assert DecoderStack(model).chain is not None
    other = type("Other", (kind,), {"forward": lambda *_, **__: None})
    for layer in layers:
        layer.__class__ = other
    assert DecoderStack(model).chain is None


@pytest.mark.parametrize("rules", RULES)
def test_attention_that_is_causal_gets_no_mask(
    rules: str, config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody makes one of queries x keys, which would grow with the prompt."""
    model = load(config, rules)
    made: list[int] = []
    masks: list[torch.Tensor | None] = []

    def make(*args: Any) -> Any:
        made.append(1)
        return create_causal_mask(*args)

    monkeypatch.setattr("ktransformers.stack.create_causal_mask", make)
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    prefill(model, IDS, LatentCache.for_model(model, 40), chunk_size=10)
    handle.remove()
    causal = rules in ("attention", "layers", "layers and head")
    assert len(made) == (0 if causal else 3)
    assert len(masks) == 3
    assert all((mask is None) == causal for mask in masks[1:])


@pytest.mark.parametrize("rules", WITHOUT_INT8)
def test_the_next_turn_goes_on_after_what_an_answer_has_cached(rules: str) -> None:
    """Inside of a page too, and where the conversation keeps another answer.

    All experts are chosen, and no weights are int8: a router, and activations in int8, would make a
    jump of what bf16 rounds in attention, 2**-8 a step, some steps in each of three layers.
    """
    model = random_model(v3_config(num_experts_per_tok=8, n_group=1, topk_group=1))
    if WITHOUT_INT8[rules]:
        model = optimize_and_load(model, WITHOUT_INT8[rules])
    cache = LatentCache.for_model(model, 120)
    request = request_of(model, cache, do_sample=False, min_new_tokens=60, max_new_tokens=60)
    assert request is not None
    tokens: list[int] = []
    logits = prefill(model, IDS, cache)
    decode(model, request, cache, logits, tokens.append)
    cache.note_tokens(torch.cat([IDS, torch.tensor([tokens])], dim=1))
    for kept in (89, 70, 64, 10):
        more = torch.cat([cache.token_ids[:, :kept], torch.tensor([[7, 8, 9]])], dim=1)
        assert cache.keep_prefix(more) == kept
        got = prefill(model, more[:, kept:], cache)
        want = prefill(model, more, LatentCache.for_model(model, 120))
        assert (got - want).abs().max() <= 0.1 * want.abs().max()
        assert (got - want).abs().median() <= 2**-6 * want.abs().max()
