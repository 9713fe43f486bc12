"""`ktransformers plan`: a rule file for a machine and a model, from its config alone."""

from __future__ import annotations

from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktransformers.cli.common import Dtype, Model, Verbose, quiet_libraries, torch_dtype

if TYPE_CHECKING:
    from ktransformers.research.device_memory import Machine
    from ktransformers.research.machine_plan import Planned, Planner


class CpuWeight(str, Enum):
    """Formats of what the CPU computes, the more exact first."""

    int8 = "int8"
    int4 = "int4"


CONTEXT = 16384  # tokens: a long document, and a 20th of V3's VRAM on a card of 24 GB


def plan(
    model: Model,
    gpu: Annotated[
        list[float],
        typer.Option(
            metavar="GB",
            help="The memory of a GPU; once for each.  [default: those of this machine]",
        ),
    ] = [],  # noqa: B006  # typer copies it
    memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="The CPU's memory.  [default: this machine's]"),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(metavar="N", help="Threads.  [default: the cores of where it will run]"),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Of prompt and answer, to have room for.  [default: 16384, or the model's limit]",
        ),
    ] = None,
    weight: Annotated[
        CpuWeight | None,
        typer.Option(
            help="Of what the CPU computes.  [default: int8, or int4 where that finds no room]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to write.  [default: to stdout]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    dtype: Dtype = None,
    verbose: Verbose = False,
) -> None:
    """Write a rule file for a machine: which GPU has which layers, and what the CPU does.

    \b
    ktransformers plan deepseek-ai/DeepSeek-V3 --gpu 24 --gpu 24 --memory 512 --out rules.yaml
    ktransformers plan path/to/DeepSeek-V2-Lite        # for this machine, to look at

    Only the model's config is read. GPUs get attention, shared experts and dense layers in four
    bits, and as many routed experts as fit in what is left beside the cache, activations and the
    driver; the CPU has the other experts. What each device will need is at the head of the file,
    which `ktransformers explain MODEL --rules FILE` shows in detail.
    """
    from ktransformers.hub import resolve_model

    folder = resolve_model(model, needs_weights=False)  # before torch is imported: it may fail
    quiet_libraries()

    from ktransformers.load import build_folder_on_meta
    from ktransformers.machine import gpu_bytes, memory_bytes
    from ktransformers.research.device_memory import GB, Machine
    from ktransformers.research.machine_plan import Planner, check_request, context_limit

    skeleton = build_folder_on_meta(folder, torch_dtype(dtype))
    gpus = tuple(gpu) or tuple(_floor(nbytes / GB) for nbytes in gpu_bytes())
    machine = Machine(
        gpus,
        _floor(memory_bytes() / GB) if memory is None else memory,
        min(CONTEXT, context_limit(skeleton)) if context is None else context,
        cores,
    )
    wrong = check_request(skeleton, machine)
    if out is not None and out.exists() and not force:
        wrong.append(f"{out}: is there already; --force overwrites it")
    if wrong:
        raise ValueError("\n".join(wrong))
    planned = _first_that_fits(Planner(skeleton), machine, weight)
    options = {"context": context, "cores": cores, "dtype": dtype and dtype.value}
    text = planned.file(
        Path(model).name,
        model,
        [f"--{name} {value}" for name, value in options.items() if value is not None],
    )
    if out is None:
        typer.echo(text, nl=False)
        return
    out.write_text(text)
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    typer.echo("\n".join(line.removeprefix("# ") for line in head))
    typer.echo(f"{out}: written; look at it with `ktransformers explain {model} --rules {out}`")


def _floor(size: float) -> float:
    """Round down to a tenth: what is measured is long, and what is there no more."""
    return int(size * 10) / 10


def _first_that_fits(planner: Planner, machine: Machine, weight: CpuWeight | None) -> Planned:
    """Plan in the format that is asked for, or in the most exact one."""
    if weight is not None:
        return planner.plan(machine, weight.value)
    try:
        return planner.plan(machine, CpuWeight.int8.value)
    except ValueError:
        return planner.plan(machine, CpuWeight.int4.value)
