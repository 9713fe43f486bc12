"""What `make demo` runs: a small DeepSeek-V3, as HuggingFace runs it and under a rule file.

Everything shown is measured while you wait, in under a minute on two cores. Reaches for no network.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ktransformers import optimize_and_load
from ktransformers.generation import stream
from ktransformers.report import Report, bytes_by_device, count_experts
from ktransformers.research.measure import (
    MIN_REPEATS,
    Speed,
    decode_speed,
    perplexity,
    prefill_speed,
)

FOLDER = Path(__file__).parent / "tiny-deepseek-v3"
RULES = "tiny-cpu-int8"

PROMPT = '''def largest(values):
    """Return the largest of the values, or None if there are none."""
'''
NEW_TOKENS = 64  # of the text that is shown
HELD_OUT_TOKENS = 2048  # perplexity of these, in windows of
WINDOW = 512
PREFILL_TOKENS = 256
DECODE_TOKENS = 32  # as many before them
REPEATS = 5
SECONDS = 10.0  # for each speed, where a machine is so busy that fewer samples must do


@dataclass(frozen=True, slots=True)
class Measured:
    """What the table says of one model."""

    weight_bytes: int
    prefill: Speed
    decode: Speed
    perplexity: float
    experts_per_token: float | None


def main() -> None:
    """Load twice, generate, measure, compare."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(highlight=False)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

    console.print(f"Loading {FOLDER.name} under the rules {RULES}:", style="bold")
    optimized = optimize_and_load(FOLDER, RULES)
    report = optimized.ktransformers_report
    assert isinstance(report, Report)  # to mypy every attribute of a module is a tensor
    for line in report.replacements:
        console.print(f"  {line}", markup=False, soft_wrap=True)

    console.print("\nGenerating:", style="bold")
    show_generation(optimized, tokenizer, console)

    console.print("\nMeasuring, beside what HuggingFace makes of the same folder ...", style="bold")
    plain = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
    held_out = (FOLDER / "held_out.txt").read_text("utf-8")
    token_ids = torch.tensor(tokenizer(held_out)["input_ids"])
    console.print(table(*measure([plain, optimized], token_ids)))
    console.print(
        f"\n{torch.get_num_threads()} threads, kernels {report.isa}; speeds are the median of "
        f"{MIN_REPEATS} to {REPEATS} (slowest - fastest), with {PREFILL_TOKENS} tokens of prompt "
        f"and {DECODE_TOKENS} new ones; perplexity of {HELD_OUT_TOKENS:,} held-out tokens.\n"
        "\nGo on with:\n"
        f"  .venv/bin/ktransformers chat examples/{FOLDER.name} --rules {RULES}\n"
        f"  .venv/bin/ktransformers explain examples/{FOLDER.name} --rules {RULES}",
        soft_wrap=True,
    )


def show_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    """Stream what the model makes of the prompt."""
    torch.manual_seed(0)
    console.print(PROMPT, markup=False, end="", style="dim")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    answer = stream(model, tokenizer, prompt["input_ids"], max_new_tokens=NEW_TOKENS)
    with closing(answer):
        for text in answer:
            console.print(text, markup=False, end="", soft_wrap=True)
    console.print()


def measure(models: list[PreTrainedModel], token_ids: torch.Tensor) -> list[Measured]:
    """Measure each model on the same tokens, taking turns."""
    prefill = prefill_speed(models, token_ids[:PREFILL_TOKENS], repeats=REPEATS, seconds=SECONDS)
    decode = decode_speed(
        models,
        token_ids[:DECODE_TOKENS],
        new_tokens=DECODE_TOKENS,
        repeats=REPEATS,
        seconds=SECONDS,
    )
    measured = []
    for model, prefill_of_it, decode_of_it in zip(models, prefill, decode, strict=True):
        with count_experts(model) as counter:
            of_held_out = perplexity(model, token_ids[:HELD_OUT_TOKENS], window=WINDOW)
        weights = sum(bytes_by_device(model).values())
        measured.append(Measured(weights, prefill_of_it, decode_of_it, of_held_out, counter.mean))
    return measured


def table(plain: Measured, optimized: Measured) -> Table:
    """Put both side by side."""

    def speed(measured: Speed) -> str:
        return f"{measured.median:,.0f} ({measured.low:,.0f} - {measured.high:,.0f})"

    result = Table()
    result.add_column("")
    result.add_column("HuggingFace, bf16", justify="right")
    result.add_column(RULES, justify="right", style="bold")
    both = (plain, optimized)
    result.add_row("weights, MiB", *(f"{each.weight_bytes / 2**20:.1f}" for each in both))
    result.add_row("prefill, tok/s", *(speed(each.prefill) for each in both))
    result.add_row("decode, tok/s", *(speed(each.decode) for each in both))
    result.add_row("perplexity", *(f"{each.perplexity:.3f}" for each in both))
    result.add_row("experts per token", *(f"{each.experts_per_token:.2f}" for each in both))
    return result


if __name__ == "__main__":
    main()
