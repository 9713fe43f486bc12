"""A YAML file of rules swaps modules of a HuggingFace model for optimised operators.

from ktransformers import optimize_and_load
model = optimize_and_load("path/to/DeepSeek-V3", "deepseek-v3-cpu-int8.yaml")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktransformers.load import optimize_and_load

    __version__: str

__all__ = ["__version__", "optimize_and_load"]


def __getattr__(name: str) -> Any:
    """Import the loader, and with it torch and transformers, on first use only."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ktransformers")
    if name == "optimize_and_load":
        from ktransformers.load import optimize_and_load

        return optimize_and_load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
