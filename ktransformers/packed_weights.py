"""The weights of native layers: which packed tensors they are, how those are filled and used.

Each class describes the weights of one layer; an operator that computes several of them has
several, told apart by a prefix of their tensors' names.

Shape suffixes: N out_features, K in_features, E experts, D hidden_size, F intermediate_size, H
heads, C kv_lora_rank, Dn qk_nope_head_dim, Dv v_head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ktransformers import _native
from ktransformers.base import Checkpoint
from ktransformers.checkpoint import check_finite, read_checked
from ktransformers.cpu_options import scale_dtype
from ktransformers.numa import PANEL
from ktransformers.placement import PackedMatrices, PlacedTensor

Memory = Mapping[str, PlacedTensor]
Parts = Mapping[str, Sequence[torch.Tensor]]  # of each tensor

PROJECTIONS = 3  # of an expert, in the order of a checkpoint: gate, up, down


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """A dense projection, [N, K]."""

    module: str  # whose weight it is
    out_features: int
    in_features: int
    format: str
    prefix: str = ""

    def matrices(self) -> dict[str, PackedMatrices]:
        """Name the packed weights and their scales."""
        N, K = self.out_features, self.in_features
        packed = _native.packed_bytes(N, K, self.format)
        scales = _native.scale_count(N, K, self.format)
        return {
            f"{self.prefix}packed": PackedMatrices((packed,), torch.uint8, 1, N),
            f"{self.prefix}scale": PackedMatrices((scales,), scale_dtype(self.format), 1, N),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the one matrix."""
        return {f"{self.module}.weight": (self.out_features, self.in_features)}

    def pack(self, memory: Memory, checkpoint: Checkpoint) -> None:
        """Read, quantise and pack it."""
        packed, scale = memory[f"{self.prefix}packed"], memory[f"{self.prefix}scale"]
        ((name, shape),) = self.shapes().items()
        weight = read_checked(checkpoint, name, shape)
        _pack(checkpoint, name, weight, self.format, packed, scale, 0)

    def build(self, parts: Parts, **how: Any) -> _native.Linear:
        """Build the native layer; `how` it computes is what that takes."""
        return _native.Linear(
            parts[f"{self.prefix}packed"],
            parts[f"{self.prefix}scale"],
            format=self.format,
            in_features=self.in_features,
            out_features=self.out_features,
            **how,
        )


@dataclass(frozen=True, slots=True)
class ExpertsWeights:
    """Gated MLPs of one shape, [F, D], [F, D] and [D, F]: routed experts, or one dense MLP."""

    modules: tuple[str, ...]  # one for each expert
    hidden_size: int
    width: int
    format: str
    prefix: str = ""

    def matrices(self) -> dict[str, PackedMatrices]:
        """Name the packed weights and their scales, gate before up."""
        E, D, F, name = len(self.modules), self.hidden_size, self.width, self.format
        gate_up, down = _native.packed_bytes(F, D, name), _native.packed_bytes(D, F, name)
        gate_up_scales = _native.scale_count(F, D, name)
        down_scales = _native.scale_count(D, F, name)
        scale = scale_dtype(name)
        named = {
            "gate_up_packed": PackedMatrices((E, 2 * gate_up), torch.uint8, 2 * E, F),
            "gate_up_scale": PackedMatrices((E, 2, gate_up_scales), scale, 2 * E, F),
            "down_packed": PackedMatrices((E, down), torch.uint8, E, D),
            "down_scale": PackedMatrices((E, down_scales), scale, E, D),
        }
        return {self.prefix + tensor: of for tensor, of in named.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name three matrices per expert."""
        D, F = self.hidden_size, self.width
        return {
            f"{module}.{projection}.weight": shape
            for module in self.modules
            for projection, shape in (
                ("gate_proj", (F, D)),
                ("up_proj", (F, D)),
                ("down_proj", (D, F)),
            )
        }

    def pack(self, memory: Memory, checkpoint: Checkpoint) -> None:
        """Read, quantise and pack one matrix at a time."""
        for index, (name, shape) in enumerate(self.shapes().items()):
            weight = read_checked(checkpoint, name, shape)
            self.put(memory, *divmod(index, PROJECTIONS), weight, checkpoint, name)

    def put(
        self,
        memory: Memory,
        expert: int,
        projection: int,
        weight: torch.Tensor,
        checkpoint: Checkpoint,
        name: str,
    ) -> None:
        """Quantise and pack a matrix of an expert (0 gate, 1 up, 2 down), which was read as `name`.

        Raises ValueError, naming file and tensor, for NaN or infinity.
        """
        gated = projection < 2
        index = 2 * expert + projection if gated else expert
        matrix = self.prefix + ("gate_up" if gated else "down")
        packed, scale = memory[f"{matrix}_packed"], memory[f"{matrix}_scale"]
        _pack(checkpoint, name, weight, self.format, packed, scale, index)

    def build(self, parts: Parts, **how: Any) -> _native.Experts:
        """Build the native layer; `how` it computes is what that takes."""
        return _native.Experts(
            *(parts[name] for name in self.matrices()),
            format=self.format,
            hidden_size=self.hidden_size,
            moe_intermediate_size=self.width,
            **how,
        )


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """Both halves of kv_b_proj, [H * (Dn + Dv), C], per head: W_UK transposed and W_UV."""

    module: str
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    format: str

    def matrices(self) -> dict[str, PackedMatrices]:
        """Name the packed halves and their scales."""
        H, C, name = self.num_heads, self.kv_lora_rank, self.format
        named = {}
        halves = (("uk", C, self.qk_nope_head_dim), ("uv", self.v_head_dim, C))
        for half, n, k in halves:
            packed, scales = _native.packed_bytes(n, k, name), _native.scale_count(n, k, name)
            for tensor, size, dtype in (
                ("packed", packed, torch.uint8),
                ("scale", scales, scale_dtype(name)),
            ):
                of = PackedMatrices((H, size), dtype, H, n, in_one_part=True)
                named[f"{half}_{tensor}"] = of
        return named

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the one matrix."""
        rows = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return {f"{self.module}.weight": (rows, self.kv_lora_rank)}

    def pack(self, memory: Memory, checkpoint: Checkpoint) -> None:
        """Read, quantise and pack, head by head."""
        ((name, shape),) = self.shapes().items()
        heads = read_checked(checkpoint, name, shape).unflatten(0, (self.num_heads, -1))
        for head, weight in enumerate(heads):
            uk, uv = weight.split((self.qk_nope_head_dim, self.v_head_dim))
            for half, matrix in (("uk", uk.T.contiguous()), ("uv", uv)):
                packed, scale = memory[f"{half}_packed"], memory[f"{half}_scale"]
                _pack(checkpoint, name, matrix, self.format, packed, scale, head)

    def build(self, parts: Parts, **how: Any) -> _native.MlaAttention:
        """Build the native layer; `how` it computes is what that takes."""
        return _native.MlaAttention(
            *(parts[name][0] for name in self.matrices()),
            format=self.format,
            num_heads=self.num_heads,
            qk_nope_head_dim=self.qk_nope_head_dim,
            v_head_dim=self.v_head_dim,
            kv_lora_rank=self.kv_lora_rank,
            **how,
        )


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """A tensor as it is, such as a norm's weight, its rows padded to a whole panel."""

    source: str  # in the checkpoint
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str

    def matrices(self) -> dict[str, PackedMatrices]:
        """Name the one tensor."""
        rows = self.shape[0]
        size = torch.Size(self.shape).numel() // rows * (-(-rows // PANEL) * PANEL)
        return {self.name: PackedMatrices((size,), self.dtype, 1, rows, in_one_part=True)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the one tensor."""
        return {self.source: self.shape}

    def pack(self, memory: Memory, checkpoint: Checkpoint) -> None:
        """Read it."""
        weight = read_checked(checkpoint, self.source, self.shape)
        check_finite(checkpoint, self.source, weight)
        with memory[self.name].matrix(0) as flat:
            flat.zero_()
            flat[: weight.numel()] = weight.flatten()

    def build(self, parts: Parts) -> torch.Tensor:
        """Return it in its shape."""
        return parts[self.name][0][: torch.Size(self.shape).numel()].view(self.shape)


AnyWeights = LinearWeights | ExpertsWeights | LatentWeights | PlainWeight


def _pack(
    checkpoint: Checkpoint,
    name: str,
    weight: torch.Tensor,
    format: str,
    packed: PlacedTensor,
    scale: PlacedTensor,
    index: int,
) -> None:
    try:
        with packed.matrix(index) as bytes_of_it, scale.matrix(index) as scale_of_it:
            _native.pack(weight, bytes_of_it, scale_of_it, format)
    except ValueError as error:
        raise ValueError(f"{checkpoint.infos()[name].file}: {name}: {error}") from None
