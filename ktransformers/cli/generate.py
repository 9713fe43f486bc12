"""`ktransformers generate`: a prompt in, its continuation out, made for pipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

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


def generate(
    model: Model,
    rules: Rules,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue.  [default: read from stdin]")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this file instead.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    max_new_tokens: Annotated[int, typer.Option(min=1, help="End after so many.")] = 256,
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
    """Continue a text. The continuation goes to stdout, everything else to stderr.

    \b
    ktransformers generate path/to/DeepSeek-V2-Lite "The sky is" --rules deepseek-v2-lite-cpu-int8
    ktransformers generate MODEL --rules FILE --prompt-file start.txt --temperature 0 >end.txt
    git diff | ktransformers generate MODEL --rules FILE --set threads=8 --max-new-tokens 40

    The prompt is taken as it is, without a chat template: `ktransformers chat` uses one.
    """
    text = _read_prompt(prompt, prompt_file)
    sampling = sampling_arguments(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )
    opened = open_model(model, rules, overrides, dtype, cache, cache_mode)

    import torch

    from ktransformers.generation import Timing, stream

    input_ids = opened.encode(text, add_special_tokens=True)
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt has no tokens; pass some text")
    kv_cache = opened.new_cache(cache_lens, cache_format)
    limit = new_tokens(max_new_tokens, input_ids, opened.context, kv_cache)
    if seed is not None:
        torch.manual_seed(seed)
    timing = Timing()
    settings = {"cache": kv_cache, "chunk_size": chunk_size, "max_new_tokens": limit, **sampling}
    answer = stream(opened.model, opened.tokenizer, input_ids, timing=timing, **settings)
    _, interrupted = write_answer(answer)
    if interrupted:
        raise KeyboardInterrupt
    typer.echo(summary(timing), err=True)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ValueError("two prompts: an argument and --prompt-file; give one of them")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        try:
            return prompt_file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{prompt_file}: not UTF-8 at byte {error.start}") from None
    if sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument, by --prompt-file or on stdin")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: not UTF-8 at byte {error.start}") from None
