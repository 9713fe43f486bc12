"""The process that a whole model runs in, in another engine: it measures when it is told to.

Reads lines `logits`, `prefill TOKENS` and `decode CONTEXT TOKENS`, and answers each in JSON: the
logits of the prompts that are compared, and seconds. The first line that it writes says that it is
ready, or why it can't be. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from peer_layer import CannotRun
from peer_worker import own_output
from whole_model import (
    Engine,
    ModelVariant,
    checked_logits,
    decode_seconds,
    load_model_peer,
    prefill_seconds,
    random_ids,
    vocab_size,
)


def answer(engine: Engine, vocabulary: int, line: str) -> object:
    """Do what a line asks."""
    command, *numbers = line.split()
    if command == "logits":
        return checked_logits(engine.prefill, vocabulary).tolist()
    counts = [int(number) for number in numbers]
    ids = random_ids(counts[0], vocabulary)
    if command == "prefill":
        return prefill_seconds(engine, ids)
    return decode_seconds(engine, ids, counts[1])


def main(
    name: str,
    folder: Annotated[Path, typer.Option()],
    format: Annotated[str, typer.Option()],
    threads: Annotated[int, typer.Option()],
    max_tokens: Annotated[int, typer.Option()],
    flash: Annotated[bool, typer.Option()] = False,
    repack: Annotated[bool, typer.Option()] = False,
) -> None:
    """Serve measurements on stdin and stdout."""
    answers = own_output()
    variant = ModelVariant(format, threads, flash, repack)
    try:
        engine = load_model_peer(name).load(folder, variant, max_tokens)
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            print(json.dumps(answer(engine, vocab_size(folder), line)), file=answers)
    except CannotRun as reason:
        print(json.dumps({"cannot": str(reason)}), file=answers)


if __name__ == "__main__":
    typer.run(main)
