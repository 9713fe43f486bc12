"""`ktransformers explain`: what rules make of a model, before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktransformers.cli.common import (
    Dtype,
    Model,
    Overrides,
    Rules,
    Verbose,
    quiet_libraries,
    torch_dtype,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ktransformers.inject import Replacement
    from ktransformers.research.explain import Costs, Explanation

PIPED_WIDTH = 200  # columns where the output is no terminal: enough that no line is broken


def explain(
    model: Model,
    rules: Rules,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    dtype: Dtype = None,
    verbose: Verbose = False,
) -> None:
    """Show what the rules take and what the result needs; no weights are read.

    \b
    ktransformers explain path/to/DeepSeek-V3 --rules deepseek-v3-cpu-int8
    ktransformers explain deepseek-ai/DeepSeek-V3 --rules my-rules.yaml --set threads=32

    Of a hub id only the config is fetched. Layers and experts that are equal are one row, and so
    is every part of the model that no rule took.
    """
    from ktransformers.hub import resolve_model
    from ktransformers.rules import load_rules

    parsed = load_rules(rules, overrides=overrides)  # before torch is imported: it may fail at once
    folder = resolve_model(model, needs_weights=False)  # likewise
    quiet_libraries()

    from rich.console import Console

    from ktransformers.inject import plan
    from ktransformers.load import build_folder_on_meta
    from ktransformers.research import explain as research

    chosen = torch_dtype(dtype)
    skeleton = build_folder_on_meta(folder, chosen)
    explanation = research.explain(skeleton, plan(skeleton, parsed, dtype=chosen))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(_tree(explanation))
    console.print()
    console.print(_needs(explanation))
    console.print(
        "Per token: products with weights, for one token alone; attention over the context and "
        "activations are left out."
    )


def _tree(explanation: Explanation) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("module", no_wrap=True)
    table.add_column("class", overflow="fold")
    table.add_column("weights", justify="right", no_wrap=True)
    table.add_column("rule", overflow="fold")
    for row in explanation.rows:
        taken = row.replacement
        table.add_row(
            "  " * row.depth + (row.label or "model"),
            escape(row.module_class if taken is None else _swap(taken)),
            (f"{row.count} x " if row.count > 1 else "") + _bytes(row.weight_bytes),
            "" if taken is None else escape(taken.rule.where),
            style="dim" if taken is None else "bold",
        )
    return table


def _swap(taken: Replacement) -> str:
    if taken.operator_class is None:
        return f"{taken.module_class} (kept)"
    kwargs = ", ".join(f"{name}={value!r}" for name, value in taken.kwargs.items())
    return f"{taken.module_class} -> {taken.operator_class.__name__}({kwargs})"


def _needs(explanation: Explanation) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("device")
    for title in ("weights", "FLOPs per token", "weights read per token"):
        table.add_column(title, justify="right")
    _add_needs(table, "with these rules", explanation.costs)
    _add_needs(table, "as HuggingFace has it", explanation.plain_costs)
    return table


def _add_needs(table: Table, title: str, costs: Costs) -> None:
    for device, cost in sorted(costs.items()):
        table.add_row(
            title,
            device,
            _bytes(cost.weight_bytes),
            _scaled(cost.flops_per_token, 1000, ("", "k", "M", "G", "T")),
            _bytes(cost.bytes_read_per_token),
        )


def _bytes(count: int) -> str:
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(count: int, step: int, units: tuple[str, ...]) -> str:
    value = float(count)
    for unit in units[:-1]:
        if value < step:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= step
    return f"{value:.3g} {units[-1]}"
