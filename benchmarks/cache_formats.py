"""What the format of a cache costs a model: perplexity, and divergence from the original.

Held-out text is read in windows, each into a cache of its own, under shipped rules; the original
is transformers' in bf16. Attention reads what has been cached, so each token pays for rounding.

Run: python benchmarks/cache_formats.py      The last line is one JSON object.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.cache import Format, LatentCache
from results import Report, emit, markdown

FOLDER = Path(__file__).parents[1] / "examples" / "tiny-deepseek-v3"
RULES = ("tiny-cpu-int8", "tiny-cpu-int4")
FORMATS: tuple[Format, ...] = ("bf16", "int8")


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, ids: torch.Tensor, window: int, format: Format | None
) -> torch.Tensor:
    """Return log probabilities [N - 1, V] in fp64; with a format out of caches in it."""
    pieces = []
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window + 1][None, :-1]
        cache = None if format is None else LatentCache(model.config, window, format)
        pieces.append(model(input_ids=piece, past_key_values=cache).logits[0])
    return torch.cat(pieces).double().log_softmax(-1)


def main(
    tokens: Annotated[int, typer.Option(min=2, help="Of the held-out text.")] = 8193,
    window: Annotated[int, typer.Option(min=1, help="Tokens that the model sees at once.")] = 1024,
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure it for the bundled model; the last line is one JSON object."""
    text = (FOLDER / "held_out.txt").read_text("utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(FOLDER)(text, verbose=False)["input_ids"])
    ids = ids[:tokens]
    original = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
    p = log_likelihoods(original, ids, window, None)
    report: Report = {"tokens": len(ids), "window": window}
    rows = []
    for rules in RULES:
        model = optimize_and_load(FOLDER, rules)
        for form in FORMATS:
            q = log_likelihoods(model, ids, window, form)
            perplexity = math.exp(nn.functional.nll_loss(q, ids[1:]).item())
            apart = nn.functional.kl_div(q, p, reduction="batchmean", log_target=True).item()
            rows.append([rules, form, f"{perplexity:.3f}", f"{apart:.5f}"])
            report |= {f"{rules}_{form}_perplexity": perplexity, f"{rules}_{form}_kl": apart}
    print(markdown(("rules", "cache", "perplexity", "KL from the original (nats)"), rows))
    emit("cache-formats", report, save=save)


if __name__ == "__main__":
    typer.run(main)
