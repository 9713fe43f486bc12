"""The module in which transformers 5 keeps the fused weights of a layer's routed experts.

What operators that take its place ask of it. Letters in shapes: E experts, D hidden_size, F
moe_intermediate_size.
"""

from __future__ import annotations

from torch import nn
from transformers.integrations.moe import _default_apply_gate

from ktransformers.base import Site


def experts_sizes(module: nn.Module) -> tuple[int, int, int]:
    """Return E, D and F of a fused experts module. Raises ValueError where it is none."""
    weights = dict(module.named_parameters(recurse=False))
    if weights.keys() != {"gate_up_proj", "down_proj"}:
        raise ValueError(
            f"expected the parameters gate_up_proj and down_proj, found {sorted(weights)}"
        )
    E, two_F, D = weights["gate_up_proj"].shape
    if weights["down_proj"].shape != (E, D, two_F // 2):
        raise ValueError(
            f"down_proj is {tuple(weights['down_proj'].shape)}, expected {(E, D, two_F // 2)}"
        )
    return E, D, two_F // 2


def check_activation(module: nn.Module, site: Site) -> None:
    """Raise ValueError where a module does not compute silu(gate) * up."""
    activation = getattr(site.config, "hidden_act", None)
    if activation != "silu":
        raise ValueError(f"computes silu, but hidden_act is {activation!r}")
    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        raise ValueError(f"computes silu(gate) * up, but {type(module).__name__} gates its own way")
