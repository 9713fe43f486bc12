"""The weights of a layer's routed experts in four bits: which tensors they are, filled and used.

Of each expert [2 F, D], gate before up, and [D, F], as `int4_weight` lays them out; the tensors of
several experts have a dimension more, in front. No kernel is needed to fill them, nor Triton.

Shape suffixes: D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ktransformers.operators.kernels.int4_weight import Int4Format, Int4Weight, Layout, quantise

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Int4ExpertWeights:
    """Gated MLPs of one shape, all in one format."""

    format: Int4Format
    hidden_size: int
    width: int

    def layout(self, count: int) -> Layout:
        """Name the tensors of so many experts, with shapes and dtypes."""
        return {
            f"{matrix}_{name}": ((count, *shape), dtype)
            for matrix, (n, k) in self._matrices().items()
            for name, (shape, dtype) in self.format.layout(n, k).items()
        }

    def nbytes(self, count: int) -> int:
        """Return the bytes of so many experts."""
        layout = self.layout(count).values()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout)

    def put(self, tensors: Tensors, expert: int, projection: int, weight: torch.Tensor) -> None:
        """Quantise a matrix where it lies, and put it in its place among an expert's.

        Args:
            tensors: those of `layout`.
            expert: its place there.
            projection: 0 gate, 1 up, 2 down: in the order in which a checkpoint is read.
            weight: [F, D], or [D, F] for down, of finite floats.
        """
        F = self.width
        places = (("gate_up", slice(F)), ("gate_up", slice(F, None)), ("down", slice(None)))
        matrix, outputs = places[projection]
        for name, packed in quantise(weight, self.format).tensors().items():
            tensors[f"{matrix}_{name}"][expert][:, outputs] = packed

    def weights(self, tensors: Tensors) -> tuple[Int4Weight, Int4Weight]:
        """Take the tensors of `layout` as gate_up and down, to compute with."""
        gate_up, down = (
            Int4Weight.of(
                self.format,
                k,
                {name: tensors[f"{matrix}_{name}"] for name in self.format.layout(n, k)},
            )
            for matrix, (n, k) in self._matrices().items()
        )
        return gate_up, down

    def _matrices(self) -> dict[str, tuple[int, int]]:
        """Return the two matrices of an expert, [n, k]."""
        D, F = self.hidden_size, self.width
        return {"gate_up": (2 * F, D), "down": (D, F)}

    def __str__(self) -> str:
        return f"{self.format} in words of four inputs, 32 apart, gate before up"
