"""Which of a layer's experts a GPU should hold: hit rates of policies on a model's own routing.

Every token of a text is a step, as decode would compute it. The profile is of the first half, and
all policies are measured on the second, by the share of uses that the GPU serves. LRU begins with
the profile's experts.

Run: python benchmarks/expert_policies.py      The last line is one JSON object.
With --profile FILE it writes the profile of the whole text, for `ResidentExperts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer

from ktransformers import optimize_and_load
from ktransformers.expert_profile import write_profile
from ktransformers.research.expert_policies import compare, record_trace
from results import Report, emit, markdown

FOLDER = Path(__file__).parents[1] / "examples" / "tiny-deepseek-v3"
RULES = [
    {
        "match": {"name": r"\.mlp\.experts$"},
        "replace": {"class": "ktransformers.operators.experts.CpuExperts"},
    }
]
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of a layer's experts, that there are slots for


def main(
    folder: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="A model with held_out.txt beside it."),
    ] = FOLDER,
    tokens: Annotated[
        int, typer.Option(min=2, help="Of the held-out text, from its start.")
    ] = 8192,
    window: Annotated[int, typer.Option(min=1, help="Tokens that the model sees at once.")] = 512,
    profile: Annotated[Path | None, typer.Option(help="Write the uses of each expert.")] = None,
    save: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Measure it; the last line is one JSON object."""
    if not (folder / "held_out.txt").is_file():
        raise typer.BadParameter(f"{folder} has no held_out.txt, a text to take the routing of")
    text = (folder / "held_out.txt").read_text("utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    trace = record_trace(optimize_and_load(folder, RULES), ids[:tokens], window=window)
    steps, layers, top_k = trace.chosen.shape
    before, after = trace.split(steps // 2)
    report: Report = {"steps": steps, "layers": layers, "experts": trace.num_experts}
    rows, titles = [], ["slots"]
    for slots in dict.fromkeys(max(1, int(share * trace.num_experts)) for share in SHARES):
        shares = compare(before, after, slots)
        titles = ["slots", *shares]
        rows.append([str(slots), *(f"{100 * share:.1f} %" for share in shares.values())])
        report |= {f"{name}, {slots} slots": share for name, share in shares.items()}
    print(
        f"{folder.name}: {layers} layers of {trace.num_experts} experts, {top_k} a token; "
        f"{steps:,} tokens in windows of {window}"
    )
    print(markdown(titles, rows))
    if profile is not None:
        write_profile(profile, steps, trace.uses())
    emit("expert_policies", report, save=save)


if __name__ == "__main__":
    typer.run(main)
