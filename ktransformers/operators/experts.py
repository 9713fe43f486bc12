"""Routed experts: on the CPU, or all of a layer's on a GPU with weights in four bits.

Both take the place of `mlp.experts`, the module in which transformers 5 keeps the fused weights of
all routed experts of a layer. For a token x with experts e and weights w:

    y = sum over e of w_e * down_e @ (silu(gate_e @ x) * (up_e @ x))

`CpuExperts` has int8 (w8a8), int4 (w4a8) or bf16 weights. They are quantised once, while they load:
int8 symmetrically per output channel, int4 in groups along the inputs whose scale is searched for
the least squared error. Activations are quantised to int8 dynamically, per token, before gate/up
and again before down; beside bf16 weights they are rounded to bf16. The arithmetic, which with
integer weights is the same to the bit on every ISA, is defined in `csrc/`. `Int4Experts` (w4a16)
takes activations as they come, fp16 or bf16; `kernels/` has format and arithmetic.

Shape suffixes: T tokens, D hidden_size, E experts, K top_k, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from typing_extensions import Self

from ktransformers.base import Checkpoint, Footprint, Operator, Site
from ktransformers.checkpoint import check_finite, read_checked
from ktransformers.cpu_options import (
    check_device,
    check_dtype,
    chunk_size,
    thread_count,
    weight_format,
)
from ktransformers.fused_experts import check_activation, experts_sizes
from ktransformers.gpu_operator import GpuOperator
from ktransformers.gpu_options import gpu_device
from ktransformers.host_experts import HostExperts
from ktransformers.numa import weight_placement
from ktransformers.operators.kernels.int4_expert_weights import Int4ExpertWeights
from ktransformers.operators.kernels.int4_weight import Int4Weight, Layout, asked_format
from ktransformers.packed_weights import PROJECTIONS, ExpertsWeights


class CpuExperts(HostExperts):
    """Compute a layer's routed experts on the CPU."""

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
        """Build the operator for a fused experts module.

        Args:
            weight: the format of the weights.
            group_size: inputs that share a scale, for int4 alone; 128 where it is not given.
            threads: how many to compute with; auto means every physical core that the process may
                run on, within its CPU quota.
            numa: where the weights lie on a machine of several nodes: their pages dealt to all in
                turn, a slice of every matrix on each, or a copy on each. Without it the classic
                switch decides: USE_NUMA=1 means replicate; else they are interleaved.
            chunk_tokens: how many to compute at a time, which bounds the memory for intermediates;
                1024 where it is not given, fewer where a token has more than 8 experts.

        Raises ValueError where the module is no gated SiLU experts module on the CPU.
        """
        E, D, F = experts_sizes(module)
        format_name = weight_format(weight, group_size)
        count = thread_count(threads)
        placement, chunk = weight_placement(numa), chunk_size(chunk_tokens)
        check_dtype(site)
        check_activation(module, site)
        return cls(
            site,
            num_experts=E,
            hidden_size=D,
            width=F,
            weight_format=format_name,
            threads=count,
            placement=placement,
            chunk_tokens=chunk,
        )

    def connect(self, operators: Mapping[str, Operator]) -> None:
        """Refuse another device than the CPU, unless what stands around brings tensors here."""
        parent, _, child = self.site.name.rpartition(".")
        around = operators.get(parent)
        if around is None or child not in around.host_children:
            check_device(self.site)

    def footprint(self) -> Footprint:
        """Say what the layer needs; bytes read are those of the experts that one token takes."""
        D, F = self.hidden_size, self.moe_intermediate_size
        weight_bytes = self.packed_bytes()
        active = min(self.site.config.num_experts_per_tok, self.num_experts)
        return Footprint(
            device=torch.device("cpu"),
            weight_bytes=weight_bytes,
            flops_per_token=active * 3 * 2 * D * F,
            bytes_read_per_token=weight_bytes // self.placement.copies // self.num_experts * active,
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name three matrices per expert."""
        return self.weights.shapes()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, [T, D], in the input's dtype.

        Args:
            hidden_states: [T, D], bf16 or fp32.
            top_k_index: [T, K], integers; the number of experts means "skip this slot".
            top_k_weights: [T, K], floating point.

        Raises ValueError for wrong shapes, dtypes or indices, RuntimeError where weights are not
        loaded or a gradient is asked for.
        """
        layer = self.native_layer()
        self.check_no_gradient(hidden_states, top_k_weights)
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        layer.forward(
            hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous(), out
        )
        return out

    def extra_repr(self) -> str:
        """Show sizes, format and threads where the module tree is printed."""
        E, D, F = self.num_experts, self.hidden_size, self.moe_intermediate_size
        shape = f"num_experts={E}, {D} -> {F} -> {D}"
        return f"{shape}, weight={self.weight_format}, threads={self.threads}"


class Int4Experts(GpuOperator):
    """Compute a layer's routed experts on a GPU from weights in four bits, which buffers hold.

    Activations come to the weights, and results go back to where activations were.
    """

    def __init__(
        self,
        site: Site,
        *,
        num_experts: int,
        int4: Int4ExpertWeights,
        device: torch.device,
    ):
        super().__init__()
        self.site = site
        self.num_experts = num_experts
        self.int4 = int4
        self.device = device
        self._weights: tuple[Int4Weight, Int4Weight] | None = None
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
        """Build the operator for a fused experts module.

        Args:
            device: the GPU; `cpu` only for tests, in Triton's interpreter (TRITON_INTERPRET=1).
            group_size: inputs that share a scale; -1: all of an output's.
            symmetric: whether the zero point is 8 throughout, or one is kept for each group.

        Raises ValueError where the module is no gated SiLU experts module that such groups divide,
        or activations are neither fp16 nor bf16.
        """
        E, D, F = experts_sizes(module)
        gpu = gpu_device(device)
        weight_format = asked_format(group_size, symmetric, (D, F), site.dtype)
        check_activation(module, site)
        return cls(site, num_experts=E, int4=Int4ExpertWeights(weight_format, D, F), device=gpu)

    def packed_layout(self) -> Layout:
        """Name the packed integers, their scales and zero points."""
        return self.int4.layout(self.num_experts)

    def packed_format(self) -> str:
        """Say what `kernels/int4_weight.py` makes the bytes mean."""
        return str(self.int4)

    def footprint(self) -> Footprint:
        """Say what the layer needs; bytes read are those of the experts that one token takes."""
        D, F, nbytes = self.int4.hidden_size, self.int4.width, self.packed_bytes()
        active = min(self.site.config.num_experts_per_tok, self.num_experts)
        read = nbytes // self.num_experts * active
        return Footprint(self.device, nbytes, active * 3 * 2 * D * F, read)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name three matrices per expert."""
        modules = tuple(f"{self.site.name}.{expert}" for expert in range(self.num_experts))
        return ExpertsWeights(modules, self.int4.hidden_size, self.int4.width, "").shapes()

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read, quantise and pack one matrix at a time, on the GPU if there is one.

        Raises ValueError, naming file and tensor, for a wrong shape and for NaN or infinity;
        MemoryError where the GPU has no room.
        """
        with self.filling_gpu() as home:
            tensors = {
                name: torch.empty(shape, dtype=dtype, device=home)
                for name, (shape, dtype) in self.packed_layout().items()
            }
            for index, (name, shape) in enumerate(self.weight_shapes().items()):
                weight = read_checked(checkpoint, name, shape)
                check_finite(checkpoint, name, weight)
                self.int4.put(tensors, *divmod(index, PROJECTIONS), weight.to(home))
        self.use_packed(tensors)

    def use_packed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Bring the tensors to the GPU, if they are not there, and compute with them."""
        self._weights = self.int4.weights(self.bring(tensors))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, [T, D], in the input's dtype.

        Args:
            hidden_states: [T, D], fp16 or bf16.
            top_k_index: [T, K], integers; the number of experts means "skip this slot".
            top_k_weights: [T, K], floating point.

        Raises ValueError for wrong shapes or dtypes, RuntimeError where weights are not loaded or
        a gradient is asked for.
        """
        # Brings Triton, which packing and looking at plans do without.
        from ktransformers.operators.kernels.int4_experts import int4_experts

        if self._weights is None:
            raise RuntimeError(self._refusal("weights are not loaded"))
        self.check_no_gradient(hidden_states, top_k_weights)
        x, index = hidden_states.to(self.device), top_k_index.to(self.device)
        weights = top_k_weights.to(self.device)
        return int4_experts(x, index, weights, *self._weights).to(hidden_states.device)

    def extra_repr(self) -> str:
        """Show sizes, format and device where the module tree is printed."""
        E, D, F = self.num_experts, self.int4.hidden_size, self.int4.width
        return f"num_experts={E}, {D} -> {F} -> {D}, {self.int4.format}, device={self.device}"
