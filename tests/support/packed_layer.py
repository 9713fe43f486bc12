"""Random layers of experts, packed in any format, with the matrices that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from experts_reference import DequantisedExperts
from ktransformers import _native

FORMATS = ("int8", "int4-32", "int4-64", "int4-128", "bf16")


def padded(value: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-value // multiple) * multiple


def group_size(format: str) -> int | None:
    """Return the weights that share a scale along k; None where the format has no groups."""
    return int(format.partition("-")[2]) if format.startswith("int4") else None


def k_multiple(format: str) -> int:
    """Return what k is padded to."""
    return 32 if format == "bf16" else max(64, group_size(format) or 0)


def pack(
    weight: torch.Tensor, format: str = "int8", native: Any = _native, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack one matrix `[n, k]`: bytes, and scales with their padding."""
    n, k = weight.shape
    packed = torch.full((native.packed_bytes(n, k, format),), 99, dtype=torch.uint8)
    dtype = torch.bfloat16 if group_size(format) else torch.float32
    scale = torch.full((native.scale_count(n, k, format),), torch.nan, dtype=dtype)
    native.pack(weight, packed, scale, format, **options)
    return packed, scale


def unpack(packed: torch.Tensor, n: int, k: int, format: str = "int8") -> torch.Tensor:
    """Return the integers `[n, k]`, or the bf16 weights."""
    q = torch.empty(n, k, dtype=torch.bfloat16 if format == "bf16" else torch.int8)
    _native.unpack(packed, q, format)
    return q


def scales(scale: torch.Tensor, n: int, k: int, format: str = "int8") -> torch.Tensor:
    """Return the scale of each weight `[n, k]`, fp32; ones where the format has none."""
    if format == "bf16":
        return torch.ones(n, k)
    size = group_size(format)
    if size is None:
        return scale[:n, None].expand(n, k)
    groups = padded(k, max(64, size)) // size
    by_output = scale.float().reshape(-1, groups, 16).transpose(1, 2).reshape(-1, groups)
    return by_output.repeat_interleave(size, dim=1)[:n, :k]


def dequantised(
    packed: torch.Tensor, scale: torch.Tensor, n: int, k: int, format: str
) -> torch.Tensor:
    """Return the matrix `[n, k]` that packed weights stand for, in float64."""
    return unpack(packed, n, k, format).double() * scales(scale, n, k, format).double()


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """What `Experts` takes, and the same as matrices."""

    format: str
    num_experts: int
    hidden_size: int
    moe_intermediate_size: int
    tensors: tuple[torch.Tensor, ...]
    dequantised: DequantisedExperts

    def native(self, native: Any = _native, *, threads: int = 2, isa: str | None = None) -> Any:
        """Make the native layer."""
        return native.Experts(
            *self.tensors,
            format=self.format,
            hidden_size=self.hidden_size,
            moe_intermediate_size=self.moe_intermediate_size,
            threads=threads,
            isa=isa,
        )


def random_layer(E: int, D: int, F: int, seed: int = 0, format: str = "int8") -> PackedLayer:
    """Draw normal weights for E experts and pack them."""
    generator = torch.Generator().manual_seed(seed)
    stacks: dict[str, list[torch.Tensor]] = {}
    for _ in range(E):
        for name, n, k in (("gate", F, D), ("up", F, D), ("down", D, F)):
            packed, scale = pack(torch.randn(n, k, generator=generator) / k**0.5, format)
            stacks.setdefault(f"{name}_packed", []).append(packed)
            stacks.setdefault(f"{name}_scale", []).append(scale)
            matrix = dequantised(packed, scale, n, k, format)
            stacks.setdefault(name, []).append(matrix)
    t = {name: torch.stack(tensors) for name, tensors in stacks.items()}
    return PackedLayer(
        format,
        E,
        D,
        F,
        (
            torch.cat([t["gate_packed"], t["up_packed"]], dim=1),
            torch.stack([t["gate_scale"], t["up_scale"]], dim=1),
            t["down_packed"],
            t["down_scale"],
        ),
        DequantisedExperts(t["gate"], t["up"], t["down"], format),
    )


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one call."""

    hidden_states: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor


def random_request(
    layer: PackedLayer, T: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Request:
    """Draw T tokens; about one slot in E + 1 is skipped, and some experts repeat in a row."""
    generator = torch.Generator().manual_seed(seed)
    return Request(
        torch.randn(T, layer.hidden_size, generator=generator).to(dtype),
        torch.randint(0, layer.num_experts + 1, (T, K), generator=generator),
        torch.rand(T, K, generator=generator),
    )


def forward(native_layer: Any, request: Request) -> torch.Tensor:
    """Call the layer and return its output."""
    out = torch.full_like(request.hidden_states, torch.nan)
    native_layer.forward(request.hidden_states, request.top_k_index, request.top_k_weights, out)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bit patterns: NaN equals the same NaN, and 0 is not -0."""
    as_integers = {2: torch.int16, 4: torch.int32}
    kind = as_integers[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))
