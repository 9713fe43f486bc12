"""`ktransformers chat`: a conversation in a terminal."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from ktransformers.cli.common import (
    Cache,
    CacheMode,
    CacheModeOption,
    Dtype,
    Model,
    Opened,
    Overrides,
    Rules,
    Seed,
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
    seed: Seed = None,
    dtype: Dtype = None,
    cache: Cache = "auto",
    cache_mode: CacheModeOption = CacheMode.auto,
    verbose: Verbose = False,
) -> None:
    """Talk with a model, in its own chat template.

    \b
    ktransformers chat path/to/DeepSeek-V2-Lite-Chat --rules deepseek-v2-lite-cpu-int8
    ktransformers chat MODEL --rules FILE --set threads=16 --temperature 0

    Ctrl-C ends an answer. At the prompt /reset forgets the conversation, and /exit, Ctrl-D or
    Ctrl-C twice leaves.
    """
    sampling = sampling_arguments(temperature, top_p, top_k)
    opened = open_model(model, rules, overrides, dtype, cache, cache_mode, needs_chat_template=True)

    import torch

    if seed is not None:
        torch.manual_seed(seed)
    typer.secho(HELP, dim=True, err=True)
    messages: list[Message] = []
    while (line := _read_line()) not in (None, "/exit"):
        if line == "/reset":
            messages = []
        elif re.fullmatch(r"/\w+", line):
            typer.echo(f"{line}: unknown command (expected /reset, /exit)", err=True)
        elif line.strip():
            messages = _answer(opened, messages, line, max_new_tokens, sampling)


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
    opened: Opened, messages: list[Message], line: str, limit: int, sampling: dict[str, Any]
) -> list[Message]:
    """Write the answer to a line, and return the conversation with both."""
    # It imports torch.
    from ktransformers.generation import Timing, stream

    asked = [*messages, {"role": "user", "content": line}]
    text = opened.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    input_ids = opened.encode(str(text), add_special_tokens=False)  # the template wrote its own
    try:
        most = new_tokens(limit, input_ids, opened.context)
    except ValueError as error:
        typer.echo(f"{error}, or /reset", err=True)
        return messages
    timing = Timing()
    sampling = {"max_new_tokens": most, **sampling}
    answer = stream(opened.model, opened.tokenizer, input_ids, timing=timing, **sampling)
    reply, interrupted = write_answer(answer)
    ended = "; ended by Ctrl-C" if interrupted else ""
    if timing.new_tokens == most:
        ended = f"; ended after {most:,} tokens"
    typer.secho(f"[{summary(timing)}{ended}]", dim=True, err=True)
    return [*asked, {"role": "assistant", "content": reply}]
