"""Perplexity against an obvious loop; speeds of models that take turns."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.research.measure import (
    Speed,
    decode_speed,
    divergence,
    perplexity,
    prefill_speed,
)
from tiny_models import random_model, v3_config

TOKEN_IDS = torch.arange(23) * 5 % 96


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model(v3_config())


def obvious_perplexity(model: PreTrainedModel, token_ids: torch.Tensor, window: int) -> float:
    losses = []
    for position in range(1, len(token_ids)):
        start = (position - 1) // window * window
        with torch.no_grad():
            logits = model(token_ids[None, start:position], use_cache=False).logits[0, -1]
        losses.append(-torch.log_softmax(logits.double(), -1)[token_ids[position]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("window", [1, 7, 11, 22, 23, 100])
def test_perplexity_is_that_of_an_obvious_loop(model: PreTrainedModel, window: int) -> None:
    # Attention sums in another order for another length; fp32 all the same.
    want = obvious_perplexity(model, TOKEN_IDS, window)
    assert perplexity(model, TOKEN_IDS, window=window) == pytest.approx(want, rel=1e-4)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_the_vocabulary() -> None:
    model = random_model(v3_config())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # log(96) rounded to fp32 and taken back by exp: eps * log(96), times some for summation.
    assert perplexity(model, TOKEN_IDS, window=8) == pytest.approx(96, rel=1e-5)


@pytest.mark.parametrize(
    ("token_ids", "window", "message"),
    [
        (TOKEN_IDS[:1], 8, "perplexity of tokens (1,) in windows of 8"),
        (TOKEN_IDS[None], 8, "perplexity of tokens (1, 23) in windows of 8"),
        (TOKEN_IDS, 0, "perplexity of tokens (23,) in windows of 0"),
    ],
)
def test_perplexity_of_nothing_is_an_error(
    model: PreTrainedModel, token_ids: torch.Tensor, window: int, message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        perplexity(model, token_ids, window=window)
    assert str(raised.value) == (
        f"{message}: expected at least two tokens, [N], and a window of at least one"
    )


def test_divergence_is_that_of_an_obvious_loop() -> None:
    model, reference = random_model(v3_config()), random_model(v3_config(), seed=1)
    total = 0.0
    for start in range(0, 22, 8):
        piece = TOKEN_IDS[None, start : min(start + 8, 22)]
        with torch.no_grad():
            q, p = (
                m(piece, use_cache=False).logits[0].double().softmax(-1) for m in (model, reference)
            )
        total += sum(float((p[t] * (p[t] / q[t]).log()).sum()) for t in range(len(p)))
    assert divergence(model, reference, TOKEN_IDS, window=8) == pytest.approx(total / 22, rel=1e-6)
    assert divergence(model, model, TOKEN_IDS, window=8) == 0
    with pytest.raises(ValueError, match=r"^divergence of tokens \(1,\) in windows of 8: expected"):
        divergence(model, model, TOKEN_IDS[:1], window=8)


def test_models_take_turns_after_a_warm_up() -> None:
    models = [random_model(v3_config()), random_model(v3_config(), seed=1)]
    calls: list[int] = []
    for index, each in enumerate(models):
        each.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    speeds = prefill_speed(models, TOKEN_IDS, repeats=3)
    assert calls == [0, 1] * 4
    assert [len(speed.samples) for speed in speeds] == [3, 3]
    assert all(sample > 0 for speed in speeds for sample in speed.samples)


def test_time_cuts_samples_down_to_three(model: PreTrainedModel) -> None:
    [speed] = prefill_speed([model], TOKEN_IDS, repeats=9, seconds=0)
    assert len(speed.samples) == 3


def test_decode_generates_as_many_tokens_as_asked_whatever_the_model_wants() -> None:
    model = random_model(v3_config())
    model.generation_config.eos_token_id = list(range(95))  # it wants to end at once
    lengths: list[int] = []

    def note_length(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note_length, with_kwargs=True)
    speeds = decode_speed([model], TOKEN_IDS, new_tokens=4, repeats=1)
    assert lengths == [23, 1, 1, 1] * 2
    assert len(speeds[0].samples) == 1


def test_a_model_under_rules_is_measured_in_the_loop_that_people_get() -> None:
    model = random_model(v3_config())
    model.generation_config.eos_token_id = list(range(95))
    rule = {
        "match": {"name": r"\.self_attn$"},
        "replace": {"class": "ktransformers.operators.attention.MlaAttention"},
    }
    optimize_and_load(model, [rule])
    caches: list[object] = []

    def note_cache(_: object, __: object, kwargs: dict[str, object]) -> None:
        caches.append(kwargs["past_key_values"])

    model.model.layers[0].register_forward_pre_hook(note_cache, with_kwargs=True)
    decode_speed([model], TOKEN_IDS, new_tokens=4, repeats=1)
    assert len(caches) == 2 * 4  # prefill, and three of four tokens: the last is not read
    assert all(isinstance(cache, LatentCache) for cache in caches)  # transformers makes another


def test_decode_of_one_token_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError) as raised:
        decode_speed([model], TOKEN_IDS, new_tokens=1)
    assert str(raised.value) == "new_tokens 1: expected at least 2, the first is prefill's"


def test_speed_is_the_median_with_its_spread() -> None:
    speed = Speed((3.0, 9.0, 4.0))
    assert (speed.low, speed.median, speed.high) == (3.0, 4.0, 9.0)
