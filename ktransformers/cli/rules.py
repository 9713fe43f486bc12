"""`ktransformers rules`: which rule files come with the package."""

from __future__ import annotations

import importlib.resources

import typer


def rules() -> None:
    """List the rule files that come with the package."""
    from ktransformers.rules import shipped_rules

    folder = importlib.resources.files("ktransformers").joinpath("optimize_rules")
    names = shipped_rules()
    width = max(map(len, names), default=0)
    for name in names:
        first = folder.joinpath(f"{name}.yaml").read_text("utf-8").partition("\n")[0]
        about = first.removeprefix("#").strip() if first.startswith("#") else ""
        typer.echo(f"{name:{width}}  {about}".rstrip())
