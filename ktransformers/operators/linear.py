"""A dense projection: on the CPU, or on a GPU with weights in four bits.

Both take the place of a `torch.nn.Linear`: the projections of attention, shared experts, dense
MLPs, or `lm_head`.

    y = W @ x

`CpuLinear` has int8 (w8a8), int4 (w4a8) or bf16 weights, in the formats and with the arithmetic of
`CpuExperts`: x is quantised to int8 per row, or rounded to bf16 beside bf16 weights. It takes no
bias. `Int4Linear` (w4a16) takes x as it comes, fp16 or bf16; `kernels/` has format and arithmetic.

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
from ktransformers.gpu_operator import GpuOperator
from ktransformers.gpu_options import gpu_device
from ktransformers.numa import Placement, weight_placement
from ktransformers.operators.kernels.int4_weight import (
    Int4Format,
    Int4Weight,
    asked_format,
    quantise,
)
from ktransformers.packed_weights import LinearWeights
from ktransformers.placement import PackedMatrices, PlacedOperator, PlacedTensor


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

    def native_linear(self) -> _native.Linear | None:
        """Return the native layer, once weights are loaded."""
        return self._layer if type(self) is CpuLinear else None  # a subclass may do more

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


class Int4Linear(GpuOperator):
    """Compute a projection on a GPU from weights in four bits, which buffers hold.

    Activations come to the weights, and results go back to where activations were: between
    neighbours on one GPU nothing moves.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor  # where the format is asymmetric
    bias: torch.Tensor  # where the layer has one

    def __init__(
        self,
        site: Site,
        *,
        in_features: int,
        out_features: int,
        format: Int4Format,
        has_bias: bool,
        device: torch.device,
    ):
        super().__init__()
        self.site = site
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.has_bias = has_bias
        self.device = device
        self._weight: Int4Weight | None = None
        self.register_packed()

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        site: Site,
        *,
        device: str = "cuda:0",
        group_size: Literal[32, 64, 128, -1] = 128,
        symmetric: bool = True,
    ) -> Self:
        """Build the operator for a linear layer.

        Args:
            device: the GPU; `cpu` only for tests, in Triton's interpreter (TRITON_INTERPRET=1).
            group_size: inputs that share a scale; -1: all of an output's.
            symmetric: whether the zero point is 8 throughout, or one is kept for each group.

        Raises ValueError where the module is no `torch.nn.Linear` that such groups divide, or
        activations are neither fp16 nor bf16.
        """
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"takes the place of a torch.nn.Linear, not of {type(module).__name__}"
            )
        parameters = dict(module.named_parameters(recurse=False)).keys()
        if not {"weight"} <= parameters <= {"weight", "bias"}:
            raise ValueError(f"expected the parameters weight and bias, found {sorted(parameters)}")
        (N, K), gpu = module.weight.shape, gpu_device(device)
        return cls(
            site,
            in_features=K,
            out_features=N,
            format=asked_format(group_size, symmetric, (K,), site.dtype),
            has_bias="bias" in parameters,
            device=gpu,
        )

    def packed_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name the packed integers, their scales and zero points, and the bias."""
        layout = self.format.layout(self.out_features, self.in_features)
        return (
            {**layout, "bias": ((self.out_features,), torch.float32)} if self.has_bias else layout
        )

    def packed_format(self) -> str:
        """Say what `kernels/int4_weight.py` makes the bytes mean."""
        return f"{self.format} in words of four inputs, 32 apart"

    def footprint(self) -> Footprint:
        """Say what the layer needs; a token reads all of it."""
        nbytes = self.packed_bytes()
        return Footprint(self.device, nbytes, 2 * self.in_features * self.out_features, nbytes)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the matrix and the bias."""
        N, K, name = self.out_features, self.in_features, self.site.name
        return {f"{name}.weight": (N, K), **({f"{name}.bias": (N,)} if self.has_bias else {})}

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read, quantise and pack the matrix, on the GPU if there is one.

        Raises ValueError, naming file and tensor, for a wrong shape and for NaN or infinity;
        MemoryError where the GPU has no room.
        """
        read = self.read_weights(checkpoint)
        with self.filling_gpu() as home:
            tensors = quantise(read[f"{self.site.name}.weight"], self.format, home).tensors()
        if self.has_bias:
            tensors["bias"] = read[f"{self.site.name}.bias"].float()
        self.use_packed(tensors)

    def use_packed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Bring the tensors to the GPU, if they are not there, and compute with them."""
        self._weight = Int4Weight.of(self.format, self.in_features, self.bring(tensors))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # as nn.Linear names it
        """Return the projection, `[*, N]`, of `[*, K]` fp16 or bf16, in the same dtype.

        Raises ValueError for another shape or dtype, RuntimeError where weights are not loaded or
        a gradient is asked for.
        """
        # Brings Triton, which packing and looking at plans do without.
        from ktransformers.operators.kernels.int4_linear import int4_linear

        if self._weight is None:
            raise RuntimeError(self._refusal("weights are not loaded"))
        self.check_no_gradient(input)
        bias = self.bias if self.has_bias else None
        return int4_linear(input.to(self.device), self._weight, bias).to(input.device)

    def extra_repr(self) -> str:
        """Show sizes, format and device where the module tree is printed."""
        return f"{self.in_features} -> {self.out_features}, {self.format}, device={self.device}"
