"""Quality and speed of a model, the same way for every model: perplexity, divergence, prefill,
decode.

Memory of weights is `ktransformers.report.bytes_by_device`, experts per token
`ktransformers.report.count_experts`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ktransformers.generation import Timing, TimingStreamer, timed_answer
from ktransformers.report import Report

MIN_REPEATS = 3  # below which a median says little


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, measured several times."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The slowest sample."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """The fastest sample."""
        return max(self.samples)


@torch.no_grad()
def perplexity(model: PreTrainedModel, token_ids: torch.Tensor, *, window: int) -> float:
    """Return exp of the mean negative log likelihood of every token but the first.

    Args:
        model: any causal language model of transformers.
        token_ids: one stream of tokens, [N].
        window: tokens that the model sees at once. Windows do not overlap, so that the first
            prediction of each has one token to go by.

    Raises ValueError where there is nothing to predict.
    """
    total = 0.0  # a Python float is fp64
    for piece in _windows("perplexity", token_ids, window):
        piece = piece.to(model.device)
        loss = nn.functional.cross_entropy(_logits(model, piece), piece[1:], reduction="sum")
        total += loss.item()
    return math.exp(total / (len(token_ids) - 1))


@torch.no_grad()
def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, token_ids: torch.Tensor, *, window: int
) -> float:
    """Return how far predictions of a model are from a reference's: mean KL divergence, in nats.

    That is the mean over all predictions of sum over v of p(v) * (log p(v) - log q(v)), where p is
    the reference's and q the model's. 0 where both predict the same; the arguments are those of
    `perplexity`.
    """
    total = 0.0
    for piece in _windows("divergence", token_ids, window):
        q, p = (_logits(of, piece).double().log_softmax(-1).cpu() for of in (model, reference))
        total += nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
    return total / (len(token_ids) - 1)


def _windows(what: str, token_ids: torch.Tensor, window: int) -> Iterator[torch.Tensor]:
    """Yield a window and the token after it at a time."""
    if token_ids.ndim != 1 or len(token_ids) < 2 or window < 1:
        raise ValueError(
            f"{what} of tokens {tuple(token_ids.shape)} in windows of {window}: expected at "
            "least two tokens, [N], and a window of at least one"
        )
    for start in range(0, len(token_ids) - 1, window):
        yield token_ids[start : start + window + 1]


def _logits(model: PreTrainedModel, piece: torch.Tensor) -> torch.Tensor:
    """Return the logits of all tokens but the first, in fp32."""
    input_ids = piece[None, :-1].to(model.device)
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits[0]
    return logits.float()


def prefill_speed(
    models: Sequence[PreTrainedModel],
    token_ids: torch.Tensor,
    *,
    repeats: int = 5,
    seconds: float = math.inf,
) -> list[Speed]:
    """Measure prompt tokens per second of each model.

    Models take turns, so that a noisy machine is as noisy to one as to the other; a first run of
    each warms up and is not counted.

    Args:
        models: the models to compare.
        token_ids: the prompt, [T].
        repeats: samples per model.
        seconds: after these no sample beyond the third is begun.
    """

    def sample(model: PreTrainedModel) -> float:
        speed = _generate(model, token_ids, 1).prefill_speed
        assert speed is not None
        return speed

    return _in_turns(models, sample, repeats, seconds)


def decode_speed(
    models: Sequence[PreTrainedModel],
    token_ids: torch.Tensor,
    *,
    new_tokens: int = 32,
    repeats: int = 5,
    seconds: float = math.inf,
) -> list[Speed]:
    """Measure new tokens per second of each model, greedily.

    A model under rules, with latent attention, is asked as `stream` does it, any other through its
    `generate`.

    Args:
        models: the models to compare; they take turns as in `prefill_speed`.
        token_ids: the prompt that they go on from, [T].
        new_tokens: generated in each sample, at least two: the first is prefill's.
        repeats, seconds: as in `prefill_speed`.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens {new_tokens}: expected at least 2, the first is prefill's")

    def sample(model: PreTrainedModel) -> float:
        speed = _generate(model, token_ids, new_tokens).decode_speed
        assert speed is not None
        return speed

    return _in_turns(models, sample, repeats, seconds)


def _in_turns(
    models: Sequence[PreTrainedModel],
    sample: Callable[[PreTrainedModel], float],
    repeats: int,
    seconds: float,
) -> list[Speed]:
    start = time.monotonic()
    for model in models:
        sample(model)
    rounds: list[list[float]] = []
    while len(rounds) < repeats:
        if len(rounds) >= MIN_REPEATS and time.monotonic() - start > seconds:
            break
        rounds.append([sample(model) for model in models])
    return [Speed(samples) for samples in zip(*rounds, strict=True)]


def _generate(model: PreTrainedModel, token_ids: torch.Tensor, new_tokens: int) -> Timing:
    """Let a model answer: one under rules as `stream` does, another as transformers does."""
    input_ids = token_ids[None].to(model.device)
    report: object = getattr(model, "ktransformers_report", None)  # of a model under rules
    if isinstance(report, Report) and getattr(model.config, "kv_lora_rank", None):
        return timed_answer(model, input_ids, new_tokens)
    timing = Timing()
    model.generate(  # type: ignore[operator]  # typed for GenerationMixin alone
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=TimingStreamer(timing),
    )
    return timing
