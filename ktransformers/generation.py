"""Streaming: text as it comes, timed, and stopped at will.

Where the model has latent attention, `prefill` reads the prompt into a `LatentCache`, which may
hold the beginning already, and `decode` answers, or for what that does not do transformers' own
`generate`, as for other models. That is done on a thread of its own, which hands over token ids;
whoever iterates gets whole characters. A stop takes effect at the next decoder layer, in prefill
too, and leaves the model as it was and the cache with the tokens that were completed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ktransformers.cache import LatentCache, check_fits, default_limit
from ktransformers.decode import decode, plain_request, stop_strings
from ktransformers.last_position import last_position_only
from ktransformers.parallel import POLL_S
from ktransformers.prefill import check_prompt, chunk_tokens, prefill
from ktransformers.stack import DecoderStack

MAX_HELD_TOKENS = 3  # a character has at most four bytes in UTF-8, and a token at least one


@dataclass(slots=True)
class Timing:
    """How long one answer took so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that a cache held already
    new_tokens: int = 0
    prefill_s: float = 0.0  # from the prompt to the first new token
    decode_s: float = 0.0  # from the first new token to the last

    @property
    def prefill_speed(self) -> float | None:
        """Prompt tokens computed per second; None before the first new token."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_s if self.new_tokens else None

    @property
    def decode_speed(self) -> float | None:
        """New tokens per second, less the first, which prefill made; None before the second."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None


class TimingStreamer(BaseStreamer):
    """Notes in a `Timing` when `generate` hands over the prompt, then each token; batch of one."""

    def __init__(self, timing: Timing):
        self.timing = timing
        self._prompt_at: float | None = None
        self._has_prompt = False
        self._first_at = 0.0

    def begin(self) -> None:
        """Take this for the time at which the prompt came: `generate` will only do the rest."""
        self._prompt_at = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then new tokens: one a call, or of an assistant some."""
        if self._has_prompt:
            for token_id in value.flatten().tolist():
                self.put_token(token_id)
            return
        self._has_prompt = True
        self._prompt_at = self._prompt_at or time.perf_counter()
        self.timing.prompt_tokens = value.numel()

    def put_token(self, token_id: int) -> None:
        """Take a new token."""
        now = time.perf_counter()
        assert self._prompt_at is not None
        if self.timing.new_tokens == 0:
            self._first_at = now
            self.timing.prefill_s = now - self._prompt_at
        self.timing.new_tokens += 1
        self.timing.decode_s = now - self._first_at

    def end(self) -> None:
        """Do nothing: whoever called `generate` sees it return."""


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    *,
    timing: Timing | None = None,
    cache: LatentCache | None = None,
    chunk_size: int | None = None,
    graph: bool | None = None,
    **sampling: Any,
) -> Generator[str]:
    """Generate one answer and yield its text, whole characters at a time.

    Args:
        model: any causal language model of transformers.
        tokenizer: decodes; special tokens are left out.
        input_ids: the prompt, [1, T].
        timing: is filled while the answer comes.
        cache: of a model with latent attention: what it has in common with the prompt is not
            computed again, and prompt and answer are in it afterwards. By default a new one.
        chunk_size: tokens of the prompt to compute at once; see `prefill`.
        graph: whether each new token is to be one graph; see `decode`.
        sampling: what `generate` takes, such as max_new_tokens, do_sample, temperature. The text
            ends before the first of stop_strings.

    Closing the generator, or an exception such as KeyboardInterrupt while it waits, ends the
    generation before it returns. What `generate` raises is raised here, and ValueError, before any
    work, for a prompt that can't be computed.
    """
    input_ids = check_prompt(model, input_ids)
    if len(input_ids) != 1:
        raise ValueError(f"{len(input_ids):,} prompts came: a stream is of one")
    stops = stop_strings(model, sampling)
    T, limit = input_ids.shape[1], sampling.get("max_new_tokens") or 1
    if cache is None and getattr(model.config, "kv_lora_rank", None):
        cache = LatentCache.for_model(model, default_limit(model, T + limit))
    if cache is not None:
        cache.claim(model)
        check_fits(T + limit - 1, cache.max_tokens)  # the last token is never read
    streamer = _TokenQueue(timing or Timing())
    go, stop = threading.Event(), threading.Event()

    def run() -> None:
        end: _End = _End()
        try:
            go.wait()
            with _kept(cache, streamer):
                _generate(
                    model, tokenizer, input_ids, cache, chunk_size, graph, streamer, stop, sampling
                )
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  # raised by whoever reads
            end = _End(error)
        finally:
            streamer.queue.put(end)

    thread = threading.Thread(target=run, name="generate")
    try:
        thread.start()
        go.set()  # no sooner: Ctrl-C in start() must find a thread that does nothing yet
        yield from text_before(stops, whole_characters(tokenizer, streamer.token_ids()))
    finally:
        stop.set()
        go.set()
        with suppress(RuntimeError):  # it is only just starting, and ends at its first layer
            thread.join()


def timed_answer(model: PreTrainedModel, input_ids: torch.Tensor, new_tokens: int) -> Timing:
    """Generate so many tokens greedily, as `stream` does, for their time alone.

    Args:
        model: one with latent attention.
        input_ids: the prompt, [1, T].
        new_tokens: all of them are generated, whatever ends a text otherwise.

    Raises what `stream` raises.
    """
    input_ids = check_prompt(model, input_ids)
    cache = LatentCache.for_model(model, input_ids.shape[1] + new_tokens)
    streamer = TimingStreamer(Timing())
    options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "stop_strings": None}
    sampling = {"do_sample": False, **options}
    _generate(model, None, input_ids, cache, None, None, streamer, threading.Event(), sampling)
    return streamer.timing


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: torch.Tensor,
    cache: LatentCache | None,
    chunk_size: int | None,
    graph: bool | None,
    streamer: TimingStreamer,
    stop: threading.Event,
    sampling: Mapping[str, Any],
) -> None:
    """Hand an answer to the streamer, token by token, until it ends or is stopped."""
    streamer.begin()
    request = None
    if cache is not None:
        streamer.timing.cached_tokens = cache.keep_prefix(input_ids)
        request = plain_request(model, tokenizer, input_ids, cache, sampling)
        if request is not None and DecoderStack.fits(model):
            streamer.put(input_ids)
            with _stopped_by(stop, model):
                new = input_ids[:, cache.get_seq_length() :]
                logits = prefill(model, new, cache, chunk_size=chunk_size)
            check = _raises_once(stop)
            decode(model, request, cache, logits, streamer.put_token, check, graph=graph)
            return
    if graph:
        raise ValueError("tokens are one graph in our own loop, which this request is not for")
    config = sampling.get("generation_config") or model.generation_config
    beams = sampling.get("num_beams") or getattr(config, "num_beams", None) or 1
    if beams > 1:
        raise ValueError(
            f"num_beams={beams}: which beam is best shows at the end, so there is no text to "
            "stream; call generate"
        )
    options = dict(sampling)
    if stop_strings(model, sampling):
        options["tokenizer"] = tokenizer
    with _stopped_by(stop, model), last_position_only(model):
        if cache is not None and request is not None:
            _prefill_all_but_one_chunk(model, input_ids, cache, chunk_size)
        elif cache is not None:  # an assistant's loop would not go on after what it holds
            cache.reset()
            streamer.timing.cached_tokens = 0
        model.generate(  # type: ignore[operator]  # typed for GenerationMixin alone
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            streamer=streamer,
            past_key_values=cache,
            **options,
        )


def _prefill_all_but_one_chunk(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: LatentCache, chunk_size: int | None
) -> None:
    """Leave to `generate` what it computes at once anyway: it wants the last logits."""
    chunk = chunk_size or chunk_tokens(model)
    begin = cache.get_seq_length()
    whole = (input_ids.shape[1] - begin - 1) // chunk * chunk
    if whole:
        prefill(model, input_ids[:, begin : begin + whole], cache, chunk_size=chunk)


@contextmanager
def _kept(cache: LatentCache | None, streamer: _TokenQueue) -> Iterator[None]:
    """Leave a cache, however the generation ends, with what all layers completed, and its ids."""
    try:
        yield
    finally:
        if cache is not None:
            cache.cut(cache.completed())
            if streamer.seen:
                cache.note_tokens(torch.tensor([streamer.seen]))


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing in the queue."""

    error: BaseException | None = None


class _TokenQueue(TimingStreamer):
    """Hands tokens from the thread that generates to the one that reads."""

    def __init__(self, timing: Timing):
        super().__init__(timing)
        self.seen: list[int] = []  # prompt and answer
        self.queue: SimpleQueue[int | _End] = SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self.seen = value.flatten().tolist()
        super().put(value)

    def put_token(self, token_id: int) -> None:
        super().put_token(token_id)
        self.seen.append(token_id)
        self.queue.put(token_id)

    def token_ids(self) -> Iterator[int]:
        """Yield tokens until the end; raise what ended them, if it was an error."""
        while True:
            item = self._next()
            if not isinstance(item, _End):
                yield item
            elif item.error is None:
                return
            else:
                raise item.error

    def _next(self) -> int | _End:
        while True:
            with suppress(Empty):
                return self.queue.get(timeout=POLL_S)


class _Stopped(Exception):
    """Unwinds `generate` from within a layer."""


def _raises_once(stop: threading.Event) -> Callable[[], None]:
    """Return a function that raises `_Stopped` once `stop` is set."""

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    return check


@contextmanager
def _stopped_by(stop: threading.Event, model: nn.Module) -> Iterator[None]:
    """Raise `_Stopped` at the next decoder layer once `stop` is set.

    A StoppingCriteria would be asked only after a whole prefill, which may take minutes. Hooks are
    the model's, and other threads may generate with it: only the one that is here stops.
    """
    here = threading.get_ident()
    check = _raises_once(stop)

    def hook(*_: object) -> None:
        if threading.get_ident() == here:
            check()

    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    handles = [layer.register_forward_pre_hook(hook) for layers in lists for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def whole_characters(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> Iterator[str]:
    """Decode tokens one by one, holding back the bytes of a character that is not yet whole.

    Each piece is decoded together with the one before it, since tokenizers treat the first token
    of a text in its own way.
    """
    before: list[int] = []
    held: list[int] = []

    def decoded(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def piece() -> str:
        return decoded(before + held)[len(decoded(before)) :]

    for token_id in token_ids:
        held.append(token_id)
        text = piece()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(held) <= MAX_HELD_TOKENS:
            continue
        if text:
            yield text
        before, held = held, []
    if held and (text := piece()):
        yield text


def text_before(stops: Sequence[str], pieces: Iterable[str]) -> Iterator[str]:
    """Yield text up to the first of some strings, holding back what may become one of them."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            held = held[: min(found)]
            break
        ready = len(held) - max((_begun(stop, held) for stop in stops), default=0)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held


def _begun(stop: str, text: str) -> int:
    """Return how much of a string the text ends in the beginning of."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
