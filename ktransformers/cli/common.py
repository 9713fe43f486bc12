"""What the verbs share: their common arguments, how a model is opened, and how errors are shown."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ktransformers.cache import LatentCache
    from ktransformers.generation import Timing

P = ParamSpec("P")


class CacheMode(str, Enum):
    """How packed weights get from a cache into memory."""

    auto = "auto"
    map = "map"
    copy = "copy"


class DtypeName(str, Enum):
    """The dtypes that can be asked for, named as torch names them."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class KvFormat(str, Enum):
    """What the values of the KV cache are kept in."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"
    int8 = "int8"
    fp8 = "fp8"


USER_ERROR = 2  # exit codes
INTERRUPTED = 128 + 2  # as a shell reports SIGINT
BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model's folder, or its hub id: deepseek-ai/DeepSeek-V2-Lite."
    ),
]
Rules = Annotated[
    str,
    typer.Option(
        metavar="FILE|NAME",
        help="A rule file, or the name of a shipped one: `ktransformers rules`.",
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Override a variable of the rule file; repeatable."
    ),
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(help="Of activations and unpacked weights.  [default: the model's own]"),
]
Cache = Annotated[
    str,
    typer.Option(
        metavar="DIR|auto|none",
        help="Packed weights that `ktransformers pack` wrote; auto takes MODEL/packed, if it is "
        "there.",
    ),
]
CacheModeOption = Annotated[
    CacheMode,
    typer.Option(
        "--cache-mode",
        help="Map the cache, shared with other processes, or copy it to memory; auto copies what "
        "NUMA nodes have shards or replicas of.",
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Log what is done, and show tracebacks of errors.")
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="0 always takes the likeliest token.  [default: the model's own]"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="Sample from this share of probability.  [default: the model's own]"
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(min=1, help="Sample from so many tokens.  [default: the model's own]"),
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Sample from tokens at least this times as likely as the likeliest.  "
        "[default: the model's own]",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        help="Over 1 makes tokens that were there less likely.  [default: the model's own]",
    ),
]
Stop = Annotated[
    list[str],
    typer.Option("--stop", metavar="TEXT", help="End the answer before this text; repeatable."),
]
CacheLens = Annotated[
    int | None,
    typer.Option(
        "--cache-lens",
        min=1,
        help="Tokens to keep in the KV cache, prompt and answers together.  "
        "[default: the model's context]",
    ),
]
CacheFormat = Annotated[
    KvFormat,
    typer.Option(
        "--cache-format",
        help="Of the KV cache's values; auto: what its rules ask for, or the model's own.",
    ),
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        "--chunk-size",
        min=1,
        help="Tokens of the prompt to compute at once.  [default: chosen by cost and memory]",
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")]


def errors_for_users(function: Callable[P, None]) -> Callable[P, None]:
    """Let what ends a verb early be a message on stderr and an exit code, with no traceback."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        _show_log(verbose=kwargs.get("verbose") is True)
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            # The interpreter flushes once more when it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except KeyboardInterrupt as interrupt:
            typer.echo(f"interrupted\n{interrupt}".rstrip(), err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError) as error:
            logging.getLogger(__name__).info("", exc_info=True)
            typer.echo(_message(error), err=True)
            raise typer.Exit(USER_ERROR) from None

    return wrapped


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _show_log(*, verbose: bool) -> None:
    log = logging.getLogger("ktransformers")
    log.handlers = [logging.StreamHandler()] if verbose else []
    log.setLevel(logging.INFO if verbose else logging.NOTSET)


def quiet_libraries() -> None:
    """Keep what transformers says of itself off the terminal; its errors are raised anyway."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)\.")


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is ready to generate."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def context(self) -> int:
        """Tokens that the model was made for, prompt and answer together."""
        return int(self.model.config.max_position_embeddings)

    def new_cache(self, tokens: int | None, format: KvFormat) -> LatentCache | None:
        """Return an empty KV cache for so many tokens; None for a model that takes no such cache.

        Raises ValueError where the options are for another model.
        """
        # It imports torch.
        from ktransformers.cache import LatentCache, default_limit

        if not getattr(self.model.config, "kv_lora_rank", None):
            if tokens is None and format is KvFormat.auto:
                return None
            raise ValueError(
                "--cache-lens and --cache-format are for models with latent attention; "
                f"{type(self.model).__name__} has none"
            )
        limit = default_limit(self.model) if tokens is None else min(tokens, self.context)
        known = None if format is KvFormat.auto else format.value
        return LatentCache.for_model(self.model, limit, known)

    def encode(self, text: str, *, add_special_tokens: bool) -> torch.Tensor:
        """Return a text's tokens, [1, T]."""
        import torch

        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)


def open_model(
    model: str,
    rules: str,
    overrides: list[str],
    dtype: DtypeName | None,
    cache: str,
    cache_mode: CacheMode,
    *,
    checkpoint: str | None = None,
    needs_chat_template: bool = False,
) -> Opened:
    """Load a model under its rules; what is quick to check comes first.

    `checkpoint` is where the weights are, if not in the model's folder.

    Raises ValueError for whatever the user got wrong.
    """
    from ktransformers.hub import resolve_model
    from ktransformers.rules import load_rules

    load_rules(rules, overrides=overrides)  # before torch is imported: it may fail at once
    folder = resolve_model(model, needs_weights=False)  # likewise
    quiet_libraries()

    from ktransformers import optimize_and_load

    tokenizer = _open_tokenizer(model, folder)
    if needs_chat_template and tokenizer.chat_template is None:
        raise ValueError(
            f"{model}: its tokenizer has no chat template; `ktransformers generate` needs none"
        )
    loaded = optimize_and_load(
        model,
        rules,
        overrides=overrides,
        checkpoint=checkpoint,
        dtype=torch_dtype(dtype),
        cache=None if cache == "none" else cache,
        cache_mode=cache_mode.value,
    )
    return Opened(loaded, tokenizer)


def torch_dtype(name: DtypeName | None) -> torch.dtype | None:
    """Return the dtype of that name."""
    import torch

    if name is None:
        return None
    dtype = getattr(torch, name.value)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _open_tokenizer(model: str, folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model}: no tokenizer that can be read (--verbose shows why); expected "
            "tokenizer.json and tokenizer_config.json beside config.json"
        ) from error
    return tokenizer


def sampling_arguments(
    *,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop: Sequence[str],
) -> dict[str, Any]:
    """Return what `generate` takes for the options; what was not given stays the model's own.

    Raises ValueError for options that contradict one another.
    """
    chooses = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    given = {name: value for name, value in chooses.items() if value is not None}
    others: dict[str, Any] = {}
    if repetition_penalty is not None:
        others["repetition_penalty"] = repetition_penalty
    if stop:
        others["stop_strings"] = list(stop)
    if temperature == 0:
        more = [name for name in given if name != "temperature"]
        if more:
            raise ValueError(
                f"--temperature 0 always takes the likeliest token: leave out {', '.join(more)}"
            )
        return {"do_sample": False, **dict.fromkeys(chooses), **others}
    return {"do_sample": True, **given, **others} if given else others


def new_tokens(limit: int, prompt: torch.Tensor, context: int, cache: LatentCache | None) -> int:
    """Return how many tokens to generate at most: `limit`, or what context and cache have left.

    Raises ValueError where the prompt leaves no room.
    """
    length = prompt.shape[1]
    rooms = [(context - length, f"the model's context {context:,}")]
    if cache is not None:  # that never holds the last token, which nothing reads
        rooms.append((cache.max_tokens + 1 - length, f"the cache {cache.max_tokens:,}"))
    room, what = min(rooms)
    if room < 1:
        raise ValueError(f"the prompt is {length:,} tokens, and {what} with the answer; shorten it")
    return min(limit, room)


def write_answer(answer: Generator[str], begin: str = "") -> tuple[str, bool]:
    """Write an answer to stdout as it comes; return it, and whether Ctrl-C ended it.

    `begin` is what of it was put into the model's mouth.
    """
    text = begin
    sys.stdout.write(begin)
    interrupted = False
    try:
        with closing(answer):
            for piece in answer:
                text += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    sys.stdout.write("" if text.endswith("\n") else "\n")
    sys.stdout.flush()
    return text, interrupted


def summary(timing: Timing) -> str:
    """Return an answer's timing as one line."""
    parts = []
    if timing.prefill_speed is not None:
        computed = timing.prompt_tokens - timing.cached_tokens
        count = f"{computed:,} of {timing.prompt_tokens:,}" if timing.cached_tokens else computed
        parts.append(f"prefill {count} tokens, {timing.prefill_speed:,.1f} tok/s")
    if timing.decode_speed is not None:
        parts.append(f"decode {timing.new_tokens:,} tokens, {timing.decode_speed:,.1f} tok/s")
    return "; ".join(parts)
