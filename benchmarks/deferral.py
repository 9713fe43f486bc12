"""What expert deferral costs a model: perplexity, and divergence from the undeferred model.

Every token is computed as decode would compute it, with its experts deferred, over windows of
held-out text; a real answer comes after a prompt that defers nothing, so that this is its bound.
Beside it, what leaving out the same experts costs.

Run: python benchmarks/deferral.py      The last line is one JSON object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer, PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.phase import phase
from ktransformers.research.measure import divergence, perplexity
from results import Report, emit, markdown

FOLDER = Path(__file__).parents[1] / "examples" / "tiny-deepseek-v3"
DEFERRED = (0, 1, 2)
OPERATORS = "ktransformers.operators"


def rule(name: str, operator: str, **kwargs: object) -> dict[str, Any]:
    """Return a rule."""
    replace = {"class": f"{OPERATORS}.{operator}", "kwargs": kwargs}
    return {"match": {"name": name}, "replace": replace}


def load(folder: Path, weight: str, *more: dict[str, Any]) -> PreTrainedModel:
    """Load a model with its experts in a format, and more rules."""
    rules = [rule(r"\.mlp\.experts$", "experts.CpuExperts", weight=weight), *more]
    return optimize_and_load(folder, rules, dtype=torch.float32)


def main(
    folder: Annotated[Path, typer.Argument(help="A model with held_out.txt beside it.")] = FOLDER,
    tokens: Annotated[int, typer.Option(min=2, help="Of the held-out text, from its start.")] = 1
    << 20,
    window: Annotated[int, typer.Option(min=1, help="Tokens that the model sees at once.")] = 512,
    weight: Annotated[str, typer.Option(help="Format of the experts.")] = "int8",
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure it; the last line is one JSON object."""
    text = (folder / "held_out.txt").read_text("utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    ids = ids[:tokens]
    plain = load(folder, weight)
    report: Report = {"tokens": len(ids), "window": window}
    rows = []
    for d in DEFERRED:
        moe = rule(r"^model\.layers\.\d+\.mlp$", "hybrid.HybridMoE", deferred_experts=d)
        moe["match"]["class"] = "DeepseekV3MoE"
        top_k = plain.config.num_experts_per_tok - d
        fewer = rule(r"\.mlp\.gate$", "router.ReducedTopK", top_k=top_k)
        models = {"deferred": load(folder, weight, moe), "left_out": load(folder, weight, fewer)}
        row = [str(d)]
        for name, model in models.items():
            with phase("decode"):
                found = perplexity(model, ids, window=window)
                apart = divergence(model, plain, ids, window=window)
            row += [f"{found:.3f}", f"{apart:.5f}"]
            report |= {f"{name}_{d}_perplexity": found, f"{name}_{d}_kl": apart}
        rows.append(row)
    print(f"{folder.name}, experts in {weight}, {len(ids):,} tokens in windows of {window}")
    titles = ("d", "deferred: perplexity", "KL (nats)", "left out: perplexity", "KL (nats)")
    print(markdown(titles, rows))
    emit("deferral", report, save=save)


if __name__ == "__main__":
    typer.run(main)
