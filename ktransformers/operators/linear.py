"""A dense projection on the CPU, with int8 (w8a8), int4 (w4a8) or bf16 weights.

Takes the place of a `torch.nn.Linear` without bias: the projections of attention, shared experts,
dense MLPs, or `lm_head`. Formats and arithmetic are those of `CpuExperts`:

    y = W @ x

with x quantised to int8 per row, or rounded to bf16 beside bf16 weights.

Shape suffixes: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from typing_extensions import Self

from ktransformers import _native
from ktransformers.base import Checkpoint, Footprint, PackedOperator, Site
from ktransformers.checkpoint import read_checked
from ktransformers.cpu_options import check_site, scale_dtype, thread_count, weight_format


class CpuLinear(PackedOperator):
    """Compute a projection on the CPU from packed weights, which buffers hold."""

    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, site: Site, *, in_features: int, out_features: int, weight_format: str, threads: int
    ):
        super().__init__()
        self.site = site
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = weight_format
        self.threads = threads
        self._layer: _native.Linear | None = None
        self.register_packed()

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        site: Site,
        *,
        weight: Literal["int8", "int4", "bf16"] = "int8",
        group_size: Literal[32, 64, 128] | None = None,
        threads: int | Literal["auto"] = "auto",
    ) -> Self:
        """Build the operator for a linear layer.

        Args:
            weight: the format of the weights.
            group_size: inputs that share a scale, for int4 alone; 128 where it is not given.
            threads: how many to compute with; auto means every physical core that the process may
                run on, within its CPU quota.

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
        check_site(site)
        return cls(site, in_features=K, out_features=N, weight_format=format_name, threads=count)

    def packed_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name the packed weights and their scales."""
        N, K, name = self.out_features, self.in_features, self.weight_format
        return {
            "packed": ((_native.packed_bytes(N, K, name),), torch.uint8),
            "scale": ((_native.scale_count(N, K, name),), scale_dtype(name)),
        }

    def packed_format(self) -> str:
        """Say which of the formats of `csrc/` the bytes are in."""
        return self.weight_format

    def footprint(self) -> Footprint:
        """Say what the layer needs; a token reads all of it."""
        nbytes = self.packed_bytes()
        flops = 2 * self.in_features * self.out_features
        return Footprint(self.site.device, nbytes, flops, nbytes)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the one matrix."""
        return {f"{self.site.name}.weight": (self.out_features, self.in_features)}

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read, quantise and pack.

        Raises ValueError, naming file and tensor, for a wrong shape and for NaN or infinity.
        """
        tensors = self.empty_packed()
        ((name, shape),) = self.weight_shapes().items()
        weight = read_checked(checkpoint, name, shape)
        try:
            _native.pack(weight, tensors["packed"], tensors["scale"], self.weight_format)
        except ValueError as error:
            raise ValueError(f"{checkpoint.infos()[name].file}: {name}: {error}") from None
        self.use_packed(tensors)

    def use_packed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Adopt the packed weights. Raises ValueError where one has not the layout's shape."""
        for name in self.packed_layout():
            setattr(self, name, tensors[name])
        self._layer = _native.Linear(
            self.packed,
            self.scale,
            format=self.weight_format,
            in_features=self.in_features,
            out_features=self.out_features,
            threads=self.threads,
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
