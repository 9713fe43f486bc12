"""`ktransformers chat`: a conversation in a terminal."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktransformers.cli.common import (
    Cache,
    CacheFormat,
    CacheLens,
    CacheMode,
    CacheModeOption,
    ChunkSize,
    Dtype,
    KvFormat,
    MinP,
    Model,
    Opened,
    Overrides,
    RepetitionPenalty,
    Rules,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    Verbose,
    new_tokens,
    open_model,
    sampling_arguments,
    summary,
    write_answer,
)

if TYPE_CHECKING:
    import torch

HELP = "/reset forgets the conversation, /exit leaves; Ctrl-C ends an answer"

Message = dict[str, str]  # role and content, as chat templates take them


def chat(
    model: Model,
    rules: Rules,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    max_new_tokens: Annotated[int, typer.Option(min=1, help="End an answer after so many.")] = 2048,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = [],  # noqa: B006  # typer copies it
    seed: Seed = None,
    dtype: Dtype = None,
    cache: Cache = "auto",
    cache_mode: CacheModeOption = CacheMode.auto,
    cache_lens: CacheLens = None,
    cache_format: CacheFormat = KvFormat.auto,
    chunk_size: ChunkSize = None,
    verbose: Verbose = False,
) -> None:
    """Talk with a model, in its own chat template.

    \b
    ktransformers chat path/to/DeepSeek-V2-Lite-Chat --rules deepseek-v2-lite-cpu-int8
    ktransformers chat MODEL --rules FILE --set threads=16 --temperature 0

    Ctrl-C ends an answer. At the prompt /reset forgets the conversation, and /exit, Ctrl-D or
    Ctrl-C twice leaves.
    """
    sampling = sampling_arguments(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )
    opened = open_model(model, rules, overrides, dtype, cache, cache_mode, needs_chat_template=True)

    import torch

    if seed is not None:
        torch.manual_seed(seed)
    kv_cache = opened.new_cache(cache_lens, cache_format)
    settings = {"cache": kv_cache, "chunk_size": chunk_size, **sampling}
    typer.secho(HELP, dim=True, err=True)
    converse(opened, max_new_tokens, settings)


def converse(
    opened: Opened,
    limit: int,
    settings: dict[str, Any],
    *,
    on_enter: str | None = None,
    begin: str = "",
) -> None:
    """Answer lines of stdin until the user leaves.

    Args:
        opened: the model.
        limit: tokens of an answer.
        settings: for `stream`.
        on_enter: what an empty line asks, or the end of input from a pipe that asked nothing.
        begin: how every answer begins.
    """
    messages: list[Message] = []
    asked = False
    while True:
        line = _read_line()
        if line is None and on_enter and not asked and not sys.stdin.isatty():
            _answer(opened, messages, on_enter, limit, settings, begin)
        if line in (None, "/exit"):
            return
        line = line.strip() or on_enter or ""
        if line == "/reset":
            messages = []
        elif re.fullmatch(r"/\w+", line):
            typer.echo(f"{line}: unknown command (expected /reset, /exit)", err=True)
        elif line:
            messages = _answer(opened, messages, line, limit, settings, begin)
            asked = True


def _read_line() -> str | None:
    """Return what the user typed; None where they want to leave."""
    # Importing it is what gives input() its line editing and history; some Pythons lack it.
    with suppress(ImportError):
        import readline  # noqa: F401

    interrupted = False
    while True:
        try:
            return input(">>> " if sys.stdin.isatty() else "")
        except EOFError:
            typer.echo()
            return None
        except KeyboardInterrupt:
            if interrupted:
                typer.echo()
                return None
            interrupted = True
            typer.secho("\n(Ctrl-C again, Ctrl-D or /exit leaves)", dim=True, err=True)


def _answer(
    opened: Opened,
    messages: list[Message],
    line: str,
    limit: int,
    settings: dict[str, Any],
    begin: str,
) -> list[Message]:
    """Write the answer to a line, and return the conversation with both.

    Of the turns before, nothing is computed again that is still in the cache of `settings`.
    """
    # It imports torch.
    from ktransformers.generation import Timing, stream

    asked = [*messages, {"role": "user", "content": line}]
    input_ids = _prompt(opened, asked, begin)
    try:
        most = new_tokens(limit, input_ids, opened.context, settings["cache"])
    except ValueError as error:
        typer.echo(f"{error}, or /reset", err=True)
        return messages
    timing = Timing()
    settings = {**settings, "max_new_tokens": most}
    answer = stream(opened.model, opened.tokenizer, input_ids, timing=timing, **settings)
    reply, interrupted = write_answer(answer, begin)
    ended = "; ended by Ctrl-C" if interrupted else ""
    if timing.new_tokens == most:
        ended = f"; ended after {most:,} tokens"
    typer.secho(f"[{summary(timing)}{ended}]", dim=True, err=True)
    return [*asked, {"role": "assistant", "content": reply}]


def _prompt(opened: Opened, messages: list[Message], begin: str) -> torch.Tensor:
    """Return a conversation as tokens; without a template, its texts one after the other."""
    if opened.tokenizer.chat_template is None:
        text = "".join(message["content"] for message in messages)
        return opened.encode(text + begin, add_special_tokens=True)
    text = str(
        opened.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
    if begin and text.endswith(begin):  # templates of reasoning models may write it themselves
        begin = ""
    return opened.encode(text + begin, add_special_tokens=False)  # the template wrote its own
