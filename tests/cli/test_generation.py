"""Streaming: whole characters, an end on demand, and times."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ktransformers.generation import Timing, _Stopped, _stopped_by, stream, whole_characters

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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    beyond = torch.tensor([[len(tokenizer)]])
    with pytest.raises(IndexError, match="index out of range"):
        list(stream(model, tokenizer, beyond, max_new_tokens=4, **GREEDY))


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
