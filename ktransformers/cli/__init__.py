"""The command line: one file per verb, each of which imports torch when it runs and no sooner."""

from __future__ import annotations

from typing import Annotated

import typer

from ktransformers.cli.chat import chat
from ktransformers.cli.common import errors_for_users
from ktransformers.cli.explain import explain
from ktransformers.cli.generate import generate
from ktransformers.cli.pack import pack
from ktransformers.cli.plan import plan
from ktransformers.cli.rules import rules

__all__ = ["main"]

EPILOG = """\b
Examples:
  ktransformers rules
  ktransformers plan deepseek-ai/DeepSeek-V2-Lite --gpu 12 --memory 32 --out my-rules.yaml
  ktransformers explain deepseek-ai/DeepSeek-V2-Lite --rules deepseek-v2-cpu-int8
  ktransformers pack path/to/DeepSeek-V2-Lite --rules my-rules.yaml
  ktransformers chat path/to/DeepSeek-V2-Lite --rules my-rules.yaml --set threads=16

What a verb takes: ktransformers VERB --help
"""

main = typer.Typer(
    name="ktransformers",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@errors_for_users
def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        from ktransformers import _native

        isa = _native.isa()
    except ImportError:
        isa = "not built"
    names = ("ktransformers", "torch", "transformers")
    typer.echo(f"{', '.join(f'{name} {_version(name)}' for name in names)}, CPU kernels {isa}")
    raise typer.Exit


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@main.callback()
def _options(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show versions and leave."
        ),
    ] = False,
) -> None:
    """Run a HuggingFace MoE model on the hardware that you have.

    A rule file says which modules of the model give way to which operators; everything else stays
    as HuggingFace made it.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for verb in (chat, generate, explain, plan, pack, rules):
    main.command()(errors_for_users(verb))
