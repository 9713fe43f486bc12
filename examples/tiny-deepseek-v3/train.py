"""Train, export and evaluate the small DeepSeek-V3 of this folder."""

import json
import math
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from tiny_corpus import (
    BOS,
    HELD_OUT_SHIPPED,
    encode_documents,
    file_document,
    read_corpus,
    train_tokenizer,
    training_documents,
)
from tiny_evaluation import (
    chat_prompt,
    complete,
    expert_curve,
    expert_shares,
    load_model,
    load_tokenizer,
    nats_per_token,
    read_held_out,
)
from tiny_kernels import use_training_kernels
from tiny_model import save_model, save_tokenizer
from tiny_training import Settings, Trainer

HERE = Path(__file__).resolve().parent
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Work = Annotated[
    Path, typer.Option(help="Folder of the checkpoint from which an interrupted run goes on.")
]
Folder = Annotated[Path, typer.Option(help="Folder of the HuggingFace checkpoint.")]

# Nothing here stands in the training text word for word.
QUESTIONS = (
    "Return the number of lines in a file.",
    "Return True if the path is a directory.",
)
BEGINNINGS = (
    '# file: stack.py\n"""A stack of limited size."""\n\nclass Stack:\n',
    "def read_lines(path):\n",
)


@app.command()
def train(
    steps: Annotated[
        int, typer.Option(help="Steps of 4096 tokens; an epoch has about 890.")
    ] = 1500,
    minutes: Annotated[
        float, typer.Option(help="Wall clock; the schedule goes by it if steps take longer.")
    ] = 180.0,
    muon_lr: Annotated[float, typer.Option(help="Peak learning rate of the matrices.")] = 5e-3,
    adamw_lr: Annotated[float, typer.Option(help="Peak learning rate of the rest.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the weights and of the data's order.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads for torch.")] = 2,
    work: Work = HERE / ".train",
) -> None:
    """Train from CPython 3.11.7's standard library; run again to go on where it stopped.

    The loss printed is the mean of the last 50 steps; "worst load" is the busiest expert's share
    over the mean of its layer, 1 being perfect balance. Where other programs use the same cores,
    set GOMP_SPINCOUNT=50000: by default OpenMP's threads burn the time they wait for each other,
    which cost up to three quarters of the speed here.
    """
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus()
    documents = training_documents(corpus)
    tokenizer = train_tokenizer(documents)
    save_tokenizer(tokenizer, work)
    shipped = [file_document(path, corpus.held_out[path]) for path in HELD_OUT_SHIPPED]
    (work / "held_out.txt").write_text("".join(shipped), encoding="utf-8")
    held_out = torch.tensor([t for ids in encode_documents(tokenizer, shipped) for t in ids])
    encoded = encode_documents(tokenizer, documents)
    files = sum(len(ids) for ids in encoded[: len(corpus.training)])
    total = sum(len(ids) for ids in encoded)
    typer.echo(f"{total} training tokens, {1 - files / total:.1%} of them chat")
    settings = Settings(steps=steps, minutes=minutes, muon_lr=muon_lr, adamw_lr=adamw_lr, seed=seed)
    Trainer(encoded, held_out, settings, work).run(typer.echo)


@app.command()
def export(work: Work = HERE / ".train", folder: Folder = HERE) -> None:
    """Write the checkpoint of a run, finished or not, as a HuggingFace folder in bf16."""
    saved = torch.load(work / "checkpoint.pt", weights_only=True)
    save_model(saved["model"], folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "held_out.txt"):
        shutil.copyfile(work / name, folder / name)
    progress = saved["progress"]
    typer.echo(
        f"step {progress['step']}, {progress['tokens'] / 1e6:.2f} M tokens, "
        f"{progress['seconds'] / 3600:.2f} hours of training -> {folder}"
    )


@app.command()
def evaluate(
    folder: Folder = HERE,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads for torch.")] = 2,
) -> None:
    """Print what the README claims: perplexity, the experts' curve and shares, samples.

    Reads held_out.txt beside the checkpoint, so that it runs with any Python. The last line is
    the same as JSON.
    """
    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(folder)
    held_out = read_held_out(folder / "held_out.txt", tokenizer)
    typer.echo(f"held_out.txt: {held_out.text_bytes} bytes, {len(held_out.ids)} tokens")
    model = load_model(folder, torch.bfloat16)
    bf16 = math.exp(nats_per_token(model, held_out.ids))
    typer.echo(f"bf16, windows of 512: perplexity {bf16:.3f}")
    exact = load_model(folder, torch.float32)
    fp32 = math.exp(nats_per_token(exact, held_out.ids))
    typer.echo(f"fp32, windows of 512: perplexity {fp32:.3f}")

    typer.echo("the rest in fp32 with the training kernels, which are several times faster")
    use_training_kernels(exact)
    windows = {w: nats_per_token(exact, held_out.ids, window=w) for w in (512, 1024, 2048)}
    for window, nats in windows.items():
        bits = nats * len(held_out.ids) / held_out.text_bytes / math.log(2)
        typer.echo(f"windows of {window}: perplexity {math.exp(nats):.3f}, {bits:.3f} bits/byte")
    curve = expert_curve(exact, held_out.ids)
    best = curve[max(curve)]
    typer.echo("experts per token -> perplexity (windows of 512)")
    for top_k, perplexity in curve.items():
        typer.echo(f"  {top_k}  {perplexity:7.3f}  {perplexity / best - 1:+.1%}")

    shares_LE = expert_shares(exact, held_out.ids)
    typer.echo(f"share of one expert in its layer's choices (even: {1 / shares_LE.shape[1]:.3%})")
    for layer, shares_E in enumerate(shares_LE, start=exact.config.first_k_dense_replace or 0):
        typer.echo(f"  layer {layer}  min {shares_E.min():.3%}  max {shares_E.max():.3%}")

    for question in QUESTIONS:
        typer.echo(
            "\n--- " + complete(model, tokenizer, chat_prompt(tokenizer, question), seed=None)
        )
    for beginning in BEGINNINGS:
        typer.echo("\n--- " + complete(model, tokenizer, BOS + beginning, seed=seed))
    result = {
        "perplexity_fp32": round(fp32, 4),
        "perplexity_by_window": {w: round(math.exp(n), 4) for w, n in windows.items()},
        "perplexity_bf16": round(bf16, 4),
        "perplexity_by_experts": {k: round(p, 4) for k, p in curve.items()},
        "expert_share_min": [round(x, 5) for x in shares_LE.amin(1).tolist()],
        "expert_share_max": [round(x, 5) for x in shares_LE.amax(1).tolist()],
    }
    typer.echo("\n" + json.dumps(result))


if __name__ == "__main__":
    app()
