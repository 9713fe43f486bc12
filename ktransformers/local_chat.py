"""The classic entry point, under its classic options: a chat with a model on this machine.

python ./ktransformers/local_chat.py --model_path DeepSeek-V2-Lite-Chat --prompt_file p.txt \
    --cpu_infer 33 --cache_lens 1536
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # Python puts a script's folder first, and ours has names like `cache`

import typer

from ktransformers.cli.chat import HELP, converse
from ktransformers.cli.common import (
    CacheMode,
    KvFormat,
    Seed,
    Stop,
    Verbose,
    errors_for_users,
    open_model,
    sampling_arguments,
)


class Mode(str, Enum):
    """The classic modes."""

    normal = "normal"
    long_context = "long_context"


def local_chat(
    model_path: Annotated[
        str, typer.Option("--model_path", help="A model's folder, or its hub id.")
    ],
    gguf_path: Annotated[
        str | None,
        typer.Option(
            "--gguf_path",
            help="Where the weights are: a folder of safetensors.  [default: the model's]",
        ),
    ] = None,
    optimize_config_path: Annotated[
        str | None,
        typer.Option(
            "--optimize_config_path",
            help="A rule file.  [default: the shipped one for this model and machine]",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt_file", help="What an empty line asks: a text file."),
    ] = None,
    cpu_infer: Annotated[
        int | None,
        typer.Option("--cpu_infer", min=1, help="Threads.  [default: the rule file's]"),
    ] = None,
    cache_lens: Annotated[
        int | None,
        typer.Option(
            "--cache_lens",
            min=1,
            help="Tokens to keep, prompt and answers.  [default: the model's context]",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", min=1, help="End an answer after so many.")
    ] = 1000,
    chunk_size: Annotated[
        int | None,
        typer.Option(
            "--chunk_size",
            min=1,
            help="Tokens of a prompt to compute at once.  [default: by cost and memory]",
        ),
    ] = None,
    mode: Annotated[
        Mode, typer.Option("--mode", help="Both do the same here: prompts are read in chunks.")
    ] = Mode.normal,
    force_think: Annotated[
        bool, typer.Option("--force_think", help="Begin every answer with <think>.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="cpu: choose no rule file for GPUs.  [default: one, where it fits those here]",
        ),
    ] = None,
    cache_format: Annotated[
        KvFormat,
        typer.Option(
            "--cache_format",
            help="What cached latents are kept in; auto: what the rules say, or the model's own.",
        ),
    ] = KvFormat.auto,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top_p", min=0.0, max=1.0, help="Sample from this share of probability."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top_k", min=1, help="Sample from so many tokens.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min_p",
            min=0.0,
            max=1.0,
            help="Sample from tokens at least this times as likely as the likeliest.",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition_penalty",
            min=0.01,
            help="Over 1 makes tokens that were there less likely.",
        ),
    ] = None,
    seed: Seed = None,
    stop: Stop = [],  # noqa: B006  # typer copies it
    verbose: Verbose = False,
) -> None:
    """Chat with a model. An empty line asks what is in the prompt file; Ctrl-C ends an answer."""
    if device not in (None, "cpu"):
        raise ValueError(
            f"--device {device}: rule files say what stands on which GPU; leave it out, or say cpu"
        )
    sampling = sampling_arguments(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )
    question = None if prompt_file is None else _read(prompt_file)
    weights = None if gguf_path is None else _weights(gguf_path)
    rules = optimize_config_path
    takes_threads = rules is not None
    if rules is None:
        rules, takes_threads = _choose_rules(model_path, cache_lens, with_gpus=device is None)
    opened = open_model(
        model_path,
        rules,
        [f"threads={cpu_infer}"] if cpu_infer is not None and takes_threads else [],
        None,
        "auto",
        CacheMode.map,
        checkpoint=weights,
    )
    if opened.tokenizer.chat_template is None:
        typer.echo("no chat template: the model continues what you type", err=True)
    settings = {
        "cache": opened.new_cache(cache_lens, cache_format),
        "chunk_size": chunk_size,
        **sampling,
    }

    import torch

    if seed is not None:
        torch.manual_seed(seed)
    typer.secho(HELP, dim=True, err=True)
    begin = "<think>\n" if force_think else ""
    converse(opened, max_new_tokens, settings, on_enter=question, begin=begin)


def _read(prompt_file: Path) -> str:
    try:
        return prompt_file.read_text("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt_file}: not UTF-8 at byte {error.start}") from None


def _choose_rules(model_path: str, context: int | None, *, with_gpus: bool) -> tuple[str, bool]:
    """Return the name of the rule file that suits, and say which it is.

    And whether it leaves the CPU anything to have threads for.
    """
    from ktransformers.cli.common import quiet_libraries
    from ktransformers.hub import resolve_model

    folder = resolve_model(model_path, needs_weights=False)
    quiet_libraries()

    from ktransformers.shipped import choose_rules

    choice = choose_rules(folder, gpus=None if with_gpus else (), context=context)
    typer.echo(f"rules: {choice.rules} ({choice.reason})", err=True)
    return choice.rules, choice.computes_on_cpu


def _weights(gguf_path: str) -> str:
    """Return the path, if it leads to safetensors."""
    path = Path(gguf_path)
    if path.suffix == ".gguf" or (path.is_dir() and not any(path.glob("*.safetensors"))):
        raise ValueError(
            f"{gguf_path}: GGUF is not read yet; pass a folder of safetensors, or leave out "
            "--gguf_path where they are in the model's folder"
        )
    return gguf_path


def main() -> None:
    """Run it as a command."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(errors_for_users(local_chat))
    app()


if __name__ == "__main__":
    main()
