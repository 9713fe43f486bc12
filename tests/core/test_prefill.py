"""Prefill in chunks: the same logits, less work, and a cache that is valid whatever happens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.last_position import last_position_only, only_last_position
from ktransformers.prefill import activation_bytes, chunk_tokens, prefill
from tiny_models import random_model, v2_config, v3_config

IDS = torch.randint(3, 96, (2, 50), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :20] = 0
MANY = {"n_routed_experts": 64, "num_experts_per_tok": 4, "topk_group": 2}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model(v3_config())


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare logits of fp32 models that add up in different orders."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@pytest.mark.parametrize("chunk_size", [1, 16, 49, 50, None])
def test_logits_are_those_of_a_plain_forward(
    config: PreTrainedConfig, chunk_size: int | None
) -> None:
    model = random_model(config)
    cache = LatentCache.for_model(model, 60)
    with torch.no_grad():
        position_ids = (MASK.cumsum(-1) - 1).clamp_min(0)
        want = model(IDS, attention_mask=MASK, position_ids=position_ids).logits[:, -1]
    got = prefill(model, IDS, cache, attention_mask=MASK, chunk_size=chunk_size)
    assert close(got, want)
    assert cache.get_seq_length() == 50
    assert torch.equal(cache.token_ids, IDS)


def test_a_second_prompt_goes_on_after_the_first(model: PreTrainedModel) -> None:
    together, apart = (LatentCache.for_model(model, 60) for _ in range(2))
    want = prefill(model, IDS, together, attention_mask=MASK)
    prefill(model, IDS[:, :30], apart, attention_mask=MASK[:, :30])
    assert close(prefill(model, IDS[:, 30:], apart, attention_mask=MASK, chunk_size=7), want)
    assert torch.equal(apart.token_ids, IDS)


def test_the_last_layer_computes_one_position_and_a_plain_forward_all(
    model: PreTrainedModel,
) -> None:
    lengths: list[int] = []
    mlp = model.model.layers[-1].mlp
    with torch.no_grad(), last_position_only(model):
        hook = mlp.experts.register_forward_pre_hook(lambda _, args: lengths.append(len(args[0])))
        one = model(IDS, logits_to_keep=1).logits
        plain = model(IDS).logits
        recorded = model(IDS, logits_to_keep=1, output_hidden_states=True)
        hook.remove()
        again = model(IDS, output_hidden_states=True)
    assert lengths == [2, 100, 100]
    assert torch.equal(again.logits, plain)
    assert close(one[:, 0], plain[:, -1])
    assert torch.equal(recorded.hidden_states[-1], again.hidden_states[-1])
    with torch.no_grad():
        assert close(model(IDS, logits_to_keep=1).logits, plain[:, -1:])


def test_the_last_layer_alone_is_told_that_one_position_is_enough(model: PreTrainedModel) -> None:
    """A hook of another layer may call another model, which would hear it too."""
    told: list[bool] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_: told.append(only_last_position()))
        for layer in model.model.layers
    ]
    prefill(model, IDS, LatentCache.for_model(model, 60))
    for hook in hooks:
        hook.remove()
    assert told == [False, False, True]


@pytest.mark.parametrize(("layer", "kept"), [(0, 32), (1, 32), (2, 48)])
def test_an_interrupt_leaves_what_all_layers_have_completed(
    model: PreTrainedModel, layer: int, kept: int
) -> None:
    cache = LatentCache.for_model(model, 60)
    calls: list[int] = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prefill(model, IDS, cache, chunk_size=16)
    hook.remove()
    assert cache.get_seq_length() == cache.completed() == kept
    assert torch.equal(cache.token_ids, IDS[:, :kept])
    whole = prefill(model, IDS, LatentCache.for_model(model, 60))
    assert close(prefill(model, IDS[:, kept:], cache), whole)


def test_an_interrupted_generate_of_an_optimised_model_leaves_a_valid_cache() -> None:
    rule = {
        "match": {"name": r"\.mlp\.experts$"},
        "replace": {"class": "ktransformers.operators.experts.CpuExperts"},
    }
    model = optimize_and_load(random_model(v3_config()), [rule])
    cache = LatentCache.for_model(model, 60)
    calls: list[int] = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, past_key_values=cache, **options)  # type: ignore[operator]  # typed for GenerationMixin alone
    hook.remove()
    assert cache.get_seq_length() == cache.completed() == 51
    cache.cut(49)
    again = model.generate(IDS, past_key_values=cache, **options)  # type: ignore[operator]  # as above
    assert torch.equal(again, model.generate(IDS, **options))  # type: ignore[operator]  # as above


@pytest.mark.parametrize(
    ("prompts", "options", "reason"),
    [
        ([[]], {}, "the prompt has no tokens; pass some text"),
        ([[5, 6], [7]], {}, "the prompts have 1, 2 tokens: pad them to one length, and pass an"),
        ([[5, 96]], {}, "token 1 of prompt 0 is 96, but the model knows 0 to 95"),
        ([[5], [-1]], {}, "token 0 of prompt 1 is -1, but the model knows 0 to 95"),
        ([[5] * 61], {}, "61 tokens, prompt and answer together, do not fit a cache of 60"),
        (torch.tensor([5]), {}, r"prompts of shape \[1\]: expected \[batch, tokens\]"),
        (torch.tensor([[5.0]]), {}, r"prompts of torch\.float32: expected token ids"),
        ([[5]], {"attention_mask": torch.ones(1, 2)}, r"shape \[1, 2\]: expected \[1, 1\]"),
        ([[5]], {"chunk_size": 0}, "chunk_size 0 is not a number of 1 or more"),
    ],
)
def test_a_request_that_can_not_be_computed_is_refused_before_any_work(
    model: PreTrainedModel, prompts: Any, options: dict[str, Any], reason: str
) -> None:
    cache = LatentCache.for_model(model, 60)
    ran: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=reason):
        prefill(model, prompts, cache, **options)
    hook.remove()
    assert ran == []
    assert cache.get_seq_length() == 0
    prefill(model, [[5, 6, 7]], cache)


def test_a_cache_that_another_model_filled_is_refused_until_it_is_reset(
    model: PreTrainedModel,
) -> None:
    """Its sizes are the same: only who filled it tells."""
    rule = {
        "match": {"name": r"\.self_attn$"},
        "replace": {"class": "ktransformers.operators.attention.MlaAttention"},
    }
    other: Any = optimize_and_load(random_model(v3_config()), [rule])
    cache = LatentCache.for_model(model, 60)
    whole = prefill(model, IDS, cache)
    cache.cut(40)
    refused = "this cache was filled by another model, or under other rules; reset it, or make one"
    with pytest.raises(ValueError, match=refused):
        prefill(other, IDS[:, 40:], cache)
    with pytest.raises(ValueError, match=refused):
        other.generate(IDS, past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 40
    assert close(prefill(model, IDS[:, 40:], copy.deepcopy(cache)), whole)
    cache.reset()
    prefill(other, IDS, cache)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([[5, 96]], "token 1 of prompt 0 is 96, but the model knows 0 to 95: the tokenizer is of"),
        ([[]], "the prompt has no tokens; pass some text"),
        ([5, 6], r"prompts of shape \[2\]: expected \[batch, tokens\]"),
    ],
)
def test_generate_of_an_optimised_model_refuses_what_is_no_prompt(ids: Any, reason: str) -> None:
    rule = {
        "match": {"name": r"\.mlp\.experts$"},
        "replace": {"class": "ktransformers.operators.experts.CpuExperts"},
    }
    model: Any = optimize_and_load(random_model(v3_config()), [rule])
    prompt = torch.tensor(ids, dtype=torch.long)
    for given in ({"inputs": prompt}, {"input_ids": prompt}):
        with pytest.raises(ValueError, match=reason):
            model.generate(**given, max_new_tokens=2)
    assert model.generate(IDS, max_new_tokens=2, min_new_tokens=2).shape == (2, 52)


def test_a_long_prompt_shows_a_bar(
    model: PreTrainedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktransformers.progress.PATIENCE_S", 3600.0)
    prefill(model, IDS, LatentCache.for_model(model, 60), chunk_size=10)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("ktransformers.progress.PATIENCE_S", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich draw without a terminal
    prefill(model, IDS, LatentCache.for_model(model, 60), chunk_size=10)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Reading the prompt" in err
    assert "50/50" in err


def test_a_cache_of_other_sequences_is_refused(model: PreTrainedModel) -> None:
    cache = LatentCache.for_model(model, 60)
    prefill(model, IDS, cache)
    with pytest.raises(ValueError, match="the cache holds 2 sequences, but 1 came"):
        prefill(model, IDS[:1], cache)


def test_a_chunk_gives_every_expert_its_share_within_the_memory() -> None:
    model = random_model(v2_config(**MANY))
    assert chunk_tokens(model) == 96 * 64 // 4
    token = activation_bytes(model.config, 4)
    assert chunk_tokens(model, memory=token * 700) == 640
    assert chunk_tokens(model, memory=0) == 64


def test_a_chunk_of_a_model_without_experts_is_fixed() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    heads: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1}
    assert chunk_tokens(random_model(LlamaConfig(**sizes, **heads))) == 512


@pytest.mark.parametrize(
    ("tokens", "sizes"), [(192, [192]), (193, [97, 96]), (385, [129, 129, 127]), (576, [192] * 3)]
)
def test_chunks_are_of_one_size(
    tokens: int, sizes: list[int], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktransformers.prefill.chunk_tokens", lambda model: 192)
    read: list[int] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, args, out: read.append(args[0].shape[1]))
    ids = torch.full((1, tokens), 5)
    prefill(model, ids, LatentCache.for_model(model, tokens))
    handle.remove()
    assert read == sizes
