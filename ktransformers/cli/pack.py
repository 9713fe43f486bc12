"""`ktransformers pack`: quantise and pack weights once, so that later starts only map them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktransformers.cli.common import (
    Dtype,
    Overrides,
    Verbose,
    quiet_libraries,
    torch_dtype,
)

if TYPE_CHECKING:
    from ktransformers.packing import Packed


def pack(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model's folder, or its hub id.")
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="A rule file, or the name of a shipped one: `ktransformers rules`.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder to write.  [default: MODEL/packed]"),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Pack nothing; read a packed folder and check it."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    dtype: Dtype = None,
    verbose: Verbose = False,
) -> None:
    """Pack a model's weights once, so that it starts at once from then on.

    \b
    ktransformers pack path/to/DeepSeek-V3 --rules deepseek-v3-cpu-int8
    ktransformers pack MODEL --rules FILE --out /fast/disk/packed
    ktransformers pack --verify /fast/disk/packed

    What the rules pack is written as it is computed with, for every instruction set and any number
    of threads. `chat` and `generate` take it from MODEL/packed by themselves, or from where --cache
    says; MODEL stays needed for all that the rules do not pack.

    After Ctrl-C, a full disk or a kill, the same command checks what is there and goes on.
    """
    if verify is not None:
        if model is not None or rules is not None or out is not None:
            raise ValueError("--verify DIR takes no MODEL, --rules or --out")
        _verify(verify)
        return
    if model is None or rules is None:
        raise ValueError("expected MODEL and --rules FILE to pack, or --verify DIR to check")

    from ktransformers.hub import resolve_model
    from ktransformers.rules import load_rules

    load_rules(rules, overrides=overrides)  # before torch is imported: it may fail at once
    resolve_model(model, needs_weights=False)  # likewise
    quiet_libraries()

    from ktransformers import packing

    chosen = torch_dtype(dtype)
    _show(packing.pack(model, rules, out, overrides=overrides, dtype=chosen))


def _verify(folder: Path) -> None:
    quiet_libraries()

    from ktransformers import packing

    typer.echo(f"{folder}: {packing.verify(folder) / 2**20:,.1f} MiB are as they were written")


def _show(packed: Packed) -> None:
    for line in packed.damaged:
        typer.echo(f"{line}; packed again", err=True)
    kept = f", {packed.kept} were there and whole" if packed.kept else ""
    typer.echo(
        f"{packed.folder}: {packed.written} operators packed{kept}; "
        f"{packed.nbytes / 2**20:,.1f} MiB in all"
    )
