"""oneDNN through torch: one prepacked int8 product per expert and projection, u8 x s8.

Activations are quantised as ours are: symmetrically per token, shifted to unsigned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_layer import Sizes, Weights
from peer_layer import Call, PeerLayer, Variant

# Without VNNI it adds pairs of products in 16 bits, which saturate: some 3 % on real layers, where
# exact int8 is 2.8 % off, and more on small ones.
MAX_ERROR = {"int8": 0.1}
SHIFT = 128  # makes int8 unsigned

onednn = torch.ops.onednn


def variants(weight_format: str, threads: int) -> list[Variant]:
    """List the one way, for int8."""
    return [Variant("int8", threads)] if weight_format == "int8" else []


def make_layer(sizes: Sizes, experts: list[Weights], variant: Variant) -> PeerLayer:
    """Prepack every expert."""
    torch.set_num_threads(variant.threads)
    packed = []
    for e in range(sizes.num_experts):
        weights = experts[e % len(experts)]
        gate_up = torch.cat([weights.gate, weights.up])
        packed.append((Product.of(gate_up), Product.of(weights.down)))
    return OneDnnExperts(packed)


@dataclass(frozen=True, slots=True)
class Product:
    """A prepacked matrix `[n, k]` with a scale for each output."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Product:
        """Quantise symmetrically per output, and prepack."""
        scale = weight.float().abs().amax(dim=1) / 127
        q = (weight.float() / scale[:, None]).round().to(torch.int8)
        zero_point = torch.zeros(len(scale), dtype=torch.int64)
        return cls(onednn.qlinear_prepack(q, None), scale, zero_point)

    def __call__(self, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Multiply rows of shifted integers; the row's scale is applied after."""
        product: torch.Tensor = onednn.qlinear_pointwise(
            q, 1.0, SHIFT, self.packed, self.scale, self.zero_point, None, 1.0, 0,
            torch.float32, "none", [], "",
        )  # fmt: skip
        return product.mul_(scale)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows symmetrically; integers are shifted to unsigned."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return (x / scale).round_().add_(SHIFT).to(torch.uint8), scale


@dataclass(frozen=True, slots=True)
class OneDnnExperts:
    """Gate with up, and down, of every expert."""

    experts: list[tuple[Product, Product]]

    def prepare(self, x: torch.Tensor, weights: torch.Tensor) -> Call:
        """Return the call: quantise once, then expert by expert."""

        def call(index: torch.Tensor) -> torch.Tensor:
            y = torch.zeros(x.shape)
            q, scale = quantised(x.float())
            flat = index.flatten()
            order = flat.argsort()
            counts = torch.bincount(flat, minlength=len(self.experts)).tolist()
            for e, slots in enumerate(order.split(counts)):
                if not len(slots):
                    continue
                token = slots // index.shape[1]
                gate_up, down = self.experts[e]
                gate, up = gate_up(q[token], scale[token]).chunk(2, dim=1)
                hidden = torch.nn.functional.silu(gate) * up
                product = down(*quantised(hidden))
                y.index_add_(0, token, product * weights.flatten()[slots, None])
            return y.to(x.dtype)

        return call
