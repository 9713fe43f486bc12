"""Streaming: whole characters, an end on demand, and times."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ktransformers import optimize_and_load
from ktransformers.cache import Format, LatentCache
from ktransformers.cli.common import KvFormat
from ktransformers.generation import (
    Timing,
    TimingStreamer,
    _Stopped,
    _stopped_by,
    stream,
    text_before,
    whole_characters,
)
from ktransformers.stack import DecoderStack
from tiny_models import random_model

GREEDY: dict[str, Any] = {"do_sample": False}
# One, two, three and four bytes in UTF-8; then a byte that begins nothing.
TEXT = "a \N{LATIN SMALL LETTER E WITH ACUTE}\N{EURO SIGN}\N{GRINNING FACE}\n  b"


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def input_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return torch.tensor([tokenizer("hello")["input_ids"]])


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "generate"] == []


def test_text_is_what_generate_returns(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    want = model.generate(input_ids, max_new_tokens=40, **GREEDY)[0, 5:]  # type: ignore[operator]
    answer = stream(model, tokenizer, input_ids, max_new_tokens=40, **GREEDY)
    assert "".join(answer) == tokenizer.decode(want, skip_special_tokens=True)


@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_p": 0.5, "top_k": 0},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "min_p": 0.1},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "eos_token_id": list(range(1, 40)), "top_k": 0},
        {"do_sample": True, "stop_strings": ["e", "1"]},
        {"do_sample": True, "stop_strings": "e"},
    ],
    ids=lambda sampling: next(reversed(sampling)),
)
def test_sampled_tokens_are_those_of_generate_for_the_seed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    sampling: dict[str, Any],
) -> None:
    options = {**sampling, "max_new_tokens": 60}
    given = {"tokenizer": tokenizer} if "stop_strings" in sampling else {}
    torch.manual_seed(5)
    ids = model.generate(input_ids, **options, **given)[0, 5:]  # type: ignore[operator]  # as above

    def its_own_loop(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(type(model), "_sample", its_own_loop)
    torch.manual_seed(5)
    cache = LatentCache.for_model(model, 100)
    text = "".join(stream(model, tokenizer, input_ids, cache=cache, **options))
    assert cache.token_ids[0, 5:].tolist() == ids[:-1].tolist()
    assert not any(stop in text for stop in sampling.get("stop_strings", []))
    if "stop_strings" in sampling or "eos_token_id" in sampling:
        assert len(ids) < 60


@pytest.mark.parametrize(
    ("pieces", "stops", "want"),
    [
        (["ab", "cd"], ["x"], ["ab", "cd"]),
        (["ab", "cd", "ef"], ["bcde"], ["a"]),
        (["ab", "cd", "ef"], ["bcdx"], ["a", "bcdef"]),
        (["ab", "cd"], ["cdx"], ["ab", "cd"]),
        (["abcd"], ["d", "bc"], ["a"]),
        (["aa", "ab", "c"], ["aab"], ["a"]),
        (["\n", "\nx"], ["\n\n"], []),
        ([], ["x"], []),
        (["ab"], [], ["ab"]),
    ],
)
def test_text_ends_before_a_stop_string_however_it_is_cut(
    pieces: list[str], stops: list[str], want: list[str]
) -> None:
    assert list(text_before(stops, pieces)) == want


def test_what_the_loop_does_not_do_streams_through_generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    options = {"max_new_tokens": 20, "stop_strings": ["e"], **GREEDY}
    timing = Timing()
    cache = LatentCache.for_model(model, 60)
    looked_up = stream(
        model,
        tokenizer,
        input_ids,
        timing=timing,
        cache=cache,
        chunk_size=2,
        prompt_lookup_num_tokens=2,
        max_new_tokens=20,
        **GREEDY,
    )
    assert "".join(looked_up) == "".join(
        stream(model, tokenizer, input_ids, max_new_tokens=20, **GREEDY)
    )
    assert timing.new_tokens == 20
    for sampled in ({}, {"do_sample": True}):
        with pytest.raises(ValueError, match=r"^num_beams=2: which beam is best shows at the end"):
            list(stream(model, tokenizer, input_ids, num_beams=2, **options | sampled))


def test_a_stop_string_of_the_model_itself_is_heard(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"max_new_tokens": 40, **GREEDY}
    whole = "".join(stream(model, tokenizer, input_ids, **options))
    stop = whole[len(whole) // 2]
    monkeypatch.setattr(model.generation_config, "stop_strings", [stop])
    text = "".join(stream(model, tokenizer, input_ids, **options))
    assert text == whole.partition(stop)[0]


def test_a_stop_string_of_the_model_itself_is_heard_beside_a_given_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"generation_config": GenerationConfig(max_new_tokens=40, **GREEDY)}
    whole = "".join(stream(model, tokenizer, input_ids, **options))
    stop = whole[len(whole) // 2]
    monkeypatch.setattr(model.generation_config, "stop_strings", [stop])
    text = "".join(stream(model, tokenizer, input_ids, **options))
    assert text == whole.partition(stop)[0]


def test_stopping_criteria_may_be_none_beside_a_stop_string(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    options = {"stop_strings": "e", "max_new_tokens": 40, **GREEDY}
    want = list(stream(model, tokenizer, input_ids, **options))
    assert list(stream(model, tokenizer, input_ids, stopping_criteria=None, **options)) == want


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds"])
def test_other_inputs_of_the_model_are_heard(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor, name: str
) -> None:
    inputs = {"position_ids": 3 * torch.arange(5)[None], "inputs_embeds": torch.ones(1, 5, 64)}
    options = {"max_new_tokens": 40, **GREEDY}
    plain = "".join(stream(model, tokenizer, input_ids, **options))
    options[name] = inputs[name]
    want = model.generate(input_ids, **options)[0, 5:]  # type: ignore[operator]  # as above
    text = "".join(stream(model, tokenizer, input_ids, **options))
    assert text == tokenizer.decode(want, skip_special_tokens=True)
    assert text != plain


def test_a_streamer_of_the_caller_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    streamer = TimingStreamer(Timing())
    with pytest.raises(TypeError, match="streamer"):
        list(stream(model, tokenizer, input_ids, max_new_tokens=2, streamer=streamer))


def test_an_empty_stop_string_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="a stop string is empty, which would end every answer"):
        list(stream(model, tokenizer, input_ids, stop_strings=["a", ""]))


def test_a_character_of_several_tokens_comes_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    assert list(whole_characters(tokenizer, ids)) == list(TEXT)


def test_bytes_that_are_no_character_are_not_held_for_ever(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    first_byte = tokenizer("\N{GRINNING FACE}")["input_ids"][0]
    pieces = list(whole_characters(tokenizer, [first_byte] * 8))
    assert pieces == ["\N{REPLACEMENT CHARACTER}" * 4] * 2


def test_a_character_that_is_never_completed_is_shown_at_the_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = tokenizer("a\N{GRINNING FACE}")["input_ids"][:-1]
    assert list(whole_characters(tokenizer, ids)) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("a<pad>b<eos>")["input_ids"]
    assert list(whole_characters(tokenizer, ids)) == ["a", "b"]


def test_closing_ends_the_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    timing = Timing()
    answer = stream(model, tokenizer, input_ids, timing=timing, max_new_tokens=200, **GREEDY)
    with closing(answer):
        next(answer)
    assert 1 <= timing.new_tokens < 200


def test_ctrl_c_while_it_waits_ends_the_generation_and_leaves_the_model_usable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    def interrupt(*_: object) -> None:
        handle.remove()
        signal.raise_signal(signal.SIGINT)  # is handled in the main thread

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    timing = Timing()
    with pytest.raises(KeyboardInterrupt):
        list(stream(model, tokenizer, input_ids, timing=timing, max_new_tokens=200, **GREEDY))
    assert timing.new_tokens < 200
    again = "".join(stream(model, tokenizer, input_ids, max_new_tokens=8, **GREEDY))
    assert again == "".join(stream(model, tokenizer, input_ids, max_new_tokens=8, **GREEDY))


def test_a_stop_takes_effect_at_the_next_layer_also_of_a_prefill(
    model: PreTrainedModel, input_ids: torch.Tensor
) -> None:
    stop = threading.Event()
    ran: list[int] = []
    hooks = [
        model.model.layers[0].register_forward_hook(lambda *_: stop.set()),
        model.model.layers[1].register_forward_hook(lambda *_: ran.append(1)),
    ]
    with pytest.raises(_Stopped), _stopped_by(stop, model):
        model(input_ids)
    assert ran == []
    model(input_ids)  # outside of the context, nothing stops it
    assert ran == [1]
    for hook in hooks:
        hook.remove()


def test_a_stop_ends_its_own_thread_alone(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    stop = threading.Event()
    stop.set()
    with _stopped_by(stop, model):
        other = threading.Thread(target=model, args=(input_ids,))
        ran: list[int] = []
        hook = model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
        other.start()
        other.join()
    hook.remove()
    assert ran == [1]


def test_what_generate_raises_is_raised_to_the_reader(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": -1.0, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="temperature"):
        list(stream(model, tokenizer, input_ids, **options))


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ([[]], {}, "the prompt has no tokens"),
        ([[259]], {}, "token 0 of prompt 0 is 259, but the model knows 0 to 258"),
        ([[5], [6]], {}, "2 prompts came: a stream is of one"),
        ([[5] * 9], {"max_new_tokens": 3}, "^11 tokens, .* do not fit a cache of 10; "),
    ],
)
def test_a_prompt_that_can_not_be_computed_is_refused(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[list[int]],
    options: dict[str, Any],
    reason: str,
) -> None:
    cache = LatentCache.for_model(model, 10)
    with pytest.raises(ValueError, match=reason):
        list(stream(model, tokenizer, torch.tensor(prompt), cache=cache, **options, **GREEDY))
    assert cache.get_seq_length() == 0
    assert list(stream(model, tokenizer, torch.tensor([[5]]), cache=cache, max_new_tokens=2))


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 19])
def test_a_long_prompt_is_read_in_chunks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chunk_size: int | None
) -> None:
    ids = torch.tensor([tokenizer("a prompt of 20 bytes")["input_ids"]])
    lengths: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    options = {"max_new_tokens": 1, **GREEDY}
    text = "".join(stream(model, tokenizer, ids, chunk_size=chunk_size, **options))
    hook.remove()
    assert sum(lengths) == 20
    assert max(lengths) == (chunk_size or 20)
    want = model.generate(ids, **options)[0, 20:]  # type: ignore[operator]  # as above
    assert text == tokenizer.decode(want)


def test_the_next_turn_computes_only_what_is_new(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    cache = LatentCache.for_model(model, 60)
    asked = torch.tensor([tokenizer("a prompt of 20 bytes")["input_ids"]])
    options = {"max_new_tokens": 10, **GREEDY}
    list(stream(model, tokenizer, asked, cache=cache, **options))
    assert cache.get_seq_length() == cache.token_ids.shape[1] == 29
    more = torch.cat([cache.token_ids, torch.tensor([[7, 8, 9]])], dim=1)
    timing = Timing()
    reply = "".join(stream(model, tokenizer, more, cache=cache, timing=timing, **options))
    assert (timing.prompt_tokens, timing.cached_tokens) == (32, 29)
    assert timing.prefill_speed == 3 / timing.prefill_s
    assert reply == "".join(stream(model, tokenizer, more, **options))


def whole_layers(folder: Path) -> PreTrainedModel:
    """Load the model with layers that decode a token in one native call."""
    operator = "ktransformers.operators.decoder_layer.CpuDecoderLayer"
    layer = {"match": {"name": r"^model\.layers\.\d+$"}, "replace": {"class": operator}}
    return optimize_and_load(folder, [layer])


def test_a_cache_is_valid_after_an_answer_of_whole_layers_is_closed(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = whole_layers(folder)
    assert DecoderStack(model).chain is not None
    ids = torch.tensor([tokenizer("a prompt of 20 bytes")["input_ids"]])
    cache = LatentCache.for_model(model, 250)
    options = {"max_new_tokens": 200, **GREEDY}
    answer = stream(model, tokenizer, ids, cache=cache, **options)
    next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt())  # as where it waits for the next piece
    length = cache.get_seq_length()
    assert 20 <= cache.completed() == length == cache.token_ids.shape[1] < 219
    timing = Timing()
    again = "".join(stream(model, tokenizer, ids, cache=cache, timing=timing, **options))
    assert again == "".join(stream(model, tokenizer, ids, **options))
    assert (timing.cached_tokens, timing.new_tokens) == (19, 200)


@pytest.mark.parametrize("at", [1, 4])
def test_a_cache_is_valid_after_ctrl_c(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, at: int
) -> None:
    ids = torch.tensor([tokenizer("a prompt of 20 bytes")["input_ids"]])
    cache = LatentCache.for_model(model, 60)
    calls: list[int] = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)  # is handled in the main thread

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    options = {"max_new_tokens": 30, **GREEDY}
    with pytest.raises(KeyboardInterrupt):
        list(stream(model, tokenizer, ids, cache=cache, chunk_size=8, **options))
    hook.remove()
    length = cache.get_seq_length()
    assert cache.completed() == length == cache.token_ids.shape[1]
    again = "".join(stream(model, tokenizer, ids, cache=cache, **options))
    assert again == "".join(stream(model, tokenizer, ids, **options))


def test_a_model_without_latent_attention_streams_too(
    tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 259,
    }
    heads: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = random_model(LlamaConfig(**sizes, **heads, eos_token_id=None))
    timing = Timing()
    list(stream(model, tokenizer, input_ids, timing=timing, max_new_tokens=5, **GREEDY))
    assert (timing.prompt_tokens, timing.cached_tokens, timing.new_tokens) == (5, 0, 5)


def test_an_answer_is_timed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    timing = Timing()
    assert (timing.prefill_speed, timing.decode_speed) == (None, None)
    list(stream(model, tokenizer, input_ids, timing=timing, max_new_tokens=5, **GREEDY))
    assert (timing.prompt_tokens, timing.new_tokens) == (5, 5)
    assert timing.prefill_speed == 5 / timing.prefill_s
    assert timing.decode_speed == 4 / timing.decode_s


def test_one_new_token_has_no_decode_speed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> None:
    timing = Timing()
    list(stream(model, tokenizer, input_ids, timing=timing, max_new_tokens=1, **GREEDY))
    assert timing.prefill_speed is not None
    assert timing.decode_speed is None


def test_a_cache_may_be_asked_for_in_every_format() -> None:
    assert {each.value for each in KvFormat} == {"auto", *get_args(Format)}
