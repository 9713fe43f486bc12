"""A dense projection on the CPU, with int8 (w8a8), int4 (w4a8) or bf16 weights.

Takes the place of a `torch.nn.Linear` without bias: the projections of attention, shared experts,
dense MLPs, or `lm_head`. Formats and arithmetic are those of `CpuExperts`:

    y = W @ x

with x quantised to int8 per row, or rounded to bf16 beside bf16 weights.

Shape suffixes: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from typing_extensions import Self

from ktransformers import _native
from ktransformers.base import Checkpoint, Footprint, Site
from ktransformers.cpu_options import (
    check_site,
    chunk_size,
    thread_count,
    weight_format,
)
from ktransformers.packed_weights import LinearWeights
from ktransformers.placement import (
    PackedMatrices,
    PlacedOperator,
    PlacedTensor,
    Placement,
    weight_placement,
)


class CpuLinear(PlacedOperator):
    """Compute a projection on the CPU from packed weights, which buffers hold."""

    packed: torch.Tensor  # these where weights are one part; see PlacedOperator
    scale: torch.Tensor

    def __init__(
        self,
        site: Site,
        *,
        in_features: int,
        out_features: int,
        weight_format: str,
        threads: int,
        placement: Placement,
        chunk_tokens: int | None = None,
    ):
        super().__init__()
        self.site = site
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = weight_format
        self.threads = threads
        self.chunk_tokens = chunk_tokens
        self.weights = LinearWeights(site.name, out_features, in_features, weight_format)
        self._layer: _native.Linear | None = None
        self.place(placement)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        site: Site,
        *,
        weight: Literal["int8", "int4", "bf16"] = "int8",
        group_size: Literal[32, 64, 128] | None = None,
        threads: int | Literal["auto"] = "auto",
        numa: Literal["interleave", "shard", "replicate"] | None = None,
        chunk_tokens: int | None = None,
    ) -> Self:
        """Build the operator for a linear layer.

        Args:
            weight: the format of the weights.
            group_size: inputs that share a scale, for int4 alone; 128 where it is not given.
            threads: how many to compute with; auto means every physical core that the process may
                run on, within its CPU quota.
            numa: where the weights lie on a machine of several nodes: their pages dealt to all in
                turn, a slice of every matrix on each, or a copy on each. Without it the classic
                switch decides: USE_NUMA=1 means replicate; else they are interleaved.
            chunk_tokens: how many to compute at a time, which bounds the memory for intermediates;
                1024 where it is not given.

        Raises ValueError where the module is no `torch.nn.Linear` without bias on the CPU.
        """
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"takes the place of a torch.nn.Linear, not of {type(module).__name__}"
            )
        if dict(module.named_parameters(recurse=False)).keys() != {"weight"}:
            raise ValueError("takes the place of a torch.nn.Linear without bias")
        N, K = module.weight.shape
        format_name = weight_format(weight, group_size)
        count = thread_count(threads)
        placement, chunk = weight_placement(numa), chunk_size(chunk_tokens)
        check_site(site)
        return cls(
            site,
            in_features=K,
            out_features=N,
            weight_format=format_name,
            threads=count,
            placement=placement,
            chunk_tokens=chunk,
        )

    def packed_matrices(self) -> dict[str, PackedMatrices]:
        """Name the packed weights and their scales."""
        return self.weights.matrices()

    def packed_format(self) -> str:
        """Say which of the formats of `csrc/` the bytes are in."""
        return self.weight_format

    def footprint(self) -> Footprint:
        """Say what the layer needs; a token reads all of it."""
        nbytes = self.packed_bytes()
        flops = 2 * self.in_features * self.out_features
        return Footprint(self.site.device, nbytes, flops, nbytes // self.placement.copies)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the one matrix."""
        return self.weights.shapes()

    def pack_into(self, memory: Mapping[str, PlacedTensor], checkpoint: Checkpoint) -> None:
        """Read, quantise and pack the one matrix."""
        self.weights.pack(memory, checkpoint)

    def compute_with(self, parts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Build the native layer on these tensors."""
        self._layer = self.weights.build(
            parts,
            threads=self.threads,
            chunk_tokens=self.chunk_tokens,
            numa=self.placement.mode,
            nodes=self.placement.nodes,
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # as nn.Linear names it
        """Return the projection, `[*, N]`, of `[*, K]` bf16 or fp32, in the same dtype.

        Raises ValueError for another shape or dtype, RuntimeError where weights are not loaded or
        a gradient is asked for.
        """
        if self._layer is None:
            raise RuntimeError(self._refusal("weights are not loaded"))
        self.check_no_gradient(input)
        rows = input.contiguous().view(-1, input.shape[-1])
        out = torch.empty(rows.shape[0], self.out_features, dtype=input.dtype)
        self._layer.forward(rows, out)
        return out.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Show sizes, format and threads where the module tree is printed."""
        return (
            f"{self.in_features} -> {self.out_features}, weight={self.weight_format}, "
            f"threads={self.threads}"
        )
