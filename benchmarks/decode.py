"""Decode of a whole model, token by token, under rule files and as HuggingFace has it, in turns.

What is timed is what people call: `ktransformers.generation.stream`, greedy, from the first new
token to the last. The process is held to as many cores as there are threads.

Run: python benchmarks/decode.py --help         The last line is one JSON object.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.generation import Timing, stream
from limits import quartiles
from results import Report, emit, markdown

TINY = Path(__file__).parents[1] / "examples" / "tiny-deepseek-v3"
PLAIN = "huggingface-bf16"


def hold_to_cores(count: int) -> None:
    """Run on `count` of the cores that this process may use, torch's threads too."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:count]))
    torch.set_num_threads(count)


def load(model: Path, rules: str, threads: int) -> PreTrainedModel:
    """Load a model under a rule file, or as HuggingFace has it."""
    if rules == PLAIN:
        plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        return plain
    return optimize_and_load(model, rules, overrides=[f"threads={threads}"])


def decode(model: PreTrainedModel, tokenizer: object, prompt: torch.Tensor, tokens: int) -> float:
    """Generate greedily and return new tokens per second."""
    timing = Timing()
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    for _ in stream(model, tokenizer, prompt, timing=timing, **options):  # type: ignore[arg-type]  # as it is loaded
        pass
    if timing.new_tokens != tokens or timing.decode_speed is None:
        raise SystemExit(f"{timing.new_tokens} tokens came, expected {tokens}")
    return timing.decode_speed


def main(
    model: Annotated[Path, typer.Option(help="A folder with weights and tokenizer.")] = TINY,
    rules: Annotated[
        str, typer.Option(help=f"Rule files, with commas between; or {PLAIN}.")
    ] = f"tiny-cpu-int8,{PLAIN}",
    threads: Annotated[int, typer.Option(min=1, help="Threads, and cores to run on.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of each sample.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all rule files.")] = 5,
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure decode under several rule files; the last line is one JSON object."""
    hold_to_cores(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    models = {name: load(model, name, threads) for name in rules.split(",")}
    prompt = torch.arange(context)[None] % next(iter(models.values())).config.vocab_size
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, loaded in models.items():
            speed = decode(loaded, tokenizer, prompt, tokens)
            if number > 0:  # the first warms up
                speeds[name].append(speed)
    report: Report = {"threads": threads, "context": context}
    rows = []
    for name, samples in speeds.items():
        lower, median, upper = quartiles(samples)
        rows.append((name, f"{median:,.0f} ({lower:,.0f} to {upper:,.0f})"))
        report[f"{name}_tok_s"] = median
    print(f"{model.name}: {threads} threads, {tokens} tokens after {context}")
    print(markdown(("rules", "decode, tok/s (quartiles)"), rows))
    emit("decode", report, save=save)


if __name__ == "__main__":
    typer.run(main)
