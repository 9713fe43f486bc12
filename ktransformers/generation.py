"""Streaming over transformers' own `generate`: text as it comes, timed, and stopped at will.

`generate` runs on a thread of its own and hands over token ids; whoever iterates gets whole
characters. A stop takes effect at the next decoder layer, in prefill too, and leaves the model as
it was, since `generate` keeps nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

MAX_HELD_TOKENS = 3  # a character has at most four bytes in UTF-8, and a token at least one


@dataclass(slots=True)
class Timing:
    """How long one answer took so far."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0  # from the prompt to the first new token
    decode_s: float = 0.0  # from the first new token to the last

    @property
    def prefill_speed(self) -> float | None:
        """Prompt tokens per second; None before the first new token."""
        return self.prompt_tokens / self.prefill_s if self.new_tokens else None

    @property
    def decode_speed(self) -> float | None:
        """New tokens per second, less the first, which prefill made; None before the second."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None


class TimingStreamer(BaseStreamer):
    """Notes in a `Timing` when `generate` hands over the prompt, then each token; batch of one."""

    def __init__(self, timing: Timing):
        self.timing = timing
        self._prompt_at: float | None = None
        self._first_at = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one new token a call."""
        now = time.perf_counter()
        if self._prompt_at is None:
            self._prompt_at = now
            self.timing.prompt_tokens = value.numel()
            return
        if self.timing.new_tokens == 0:
            self._first_at = now
            self.timing.prefill_s = now - self._prompt_at
        self.timing.new_tokens += 1
        self.timing.decode_s = now - self._first_at
        self.on_token(int(value))

    def on_token(self, token_id: int) -> None:
        """Do something with a new token; here, nothing."""

    def end(self) -> None:
        """Do nothing: whoever called `generate` sees it return."""


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    *,
    timing: Timing | None = None,
    **sampling: Any,
) -> Generator[str]:
    """Generate one answer and yield its text, whole characters at a time.

    Args:
        model: any causal language model of transformers.
        tokenizer: decodes; special tokens are left out.
        input_ids: the prompt, [1, T].
        timing: is filled while the answer comes.
        sampling: what `generate` takes, such as max_new_tokens, do_sample, temperature.

    Closing the generator, or an exception such as KeyboardInterrupt while it waits, ends the
    generation before it returns. What `generate` raises is raised here.
    """
    streamer = _TokenQueue(timing or Timing())
    stop = threading.Event()

    def run() -> None:
        end: _End = _End()
        try:
            with _stopped_by(stop, model):
                model.generate(  # type: ignore[operator]  # typed for GenerationMixin alone
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    streamer=streamer,
                    **sampling,
                )
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  # raised by whoever reads
            end = _End(error)
        finally:
            streamer.queue.put(end)

    thread = threading.Thread(target=run, name="generate")
    thread.start()
    try:
        yield from whole_characters(tokenizer, streamer.token_ids())
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing in the queue."""

    error: BaseException | None = None


class _TokenQueue(TimingStreamer):
    """Hands tokens from the thread that generates to the one that reads."""

    def __init__(self, timing: Timing):
        super().__init__(timing)
        self.queue: SimpleQueue[int | _End] = SimpleQueue()

    def on_token(self, token_id: int) -> None:
        self.queue.put(token_id)

    def token_ids(self) -> Iterator[int]:
        """Yield tokens until the end; raise what ended them, if it was an error."""
        while True:
            item = self.queue.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is None:
                return
            else:
                raise item.error


class _Stopped(Exception):
    """Unwinds `generate` from within a layer."""


@contextmanager
def _stopped_by(stop: threading.Event, model: nn.Module) -> Iterator[None]:
    """Raise `_Stopped` at the next decoder layer once `stop` is set.

    A StoppingCriteria would be asked only after a whole prefill, which may take minutes. Hooks are
    the model's, and other threads may generate with it: only the one that is here stops.
    """
    here = threading.get_ident()

    def check(*_: object) -> None:
        if stop.is_set() and threading.get_ident() == here:
            raise _Stopped

    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    handles = [layer.register_forward_pre_hook(check) for layers in lists for layer in layers]
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
