"""A matrix in four bits, quantised in groups along its inputs and laid out for tensor cores.

    weight[n, k] = scale[n, g] * (q[n, k] - zero_point[n, g])        g = k // group_size

with q and zero_point in 0..15, zero_point 8 where the format is symmetric, and one group for the
whole of k where group_size is -1.

**Quantisation.** A group is divided by a unit: what makes its weight of largest magnitude -8
(symmetric; so scales may be negative), or 15 steps from its least to its greatest weight, zero
among them. Rounded integers are tried for nine shrinkings of that unit, which clip the largest
weights to round the others more finely; those of least squared error are taken, with the scale
that is the least squares for them. The symmetric search is that of `csrc/int4_quantize`.

**Layout.** `packed` is [panels, n, 32]: a panel is 128 inputs, and word w of an output in it holds
four of them, 32 apart, the first in the lowest bits:

    bits 4 s .. 4 s + 3 of packed[p, n, w]  =  q[n, 128 p + 32 s + w]

So the words are loaded, 16 bytes at a time, and dealt to the threads of a warp just like a matrix
of 16-bit floats that is a quarter as wide; there each register of two words becomes four of two
weights (`int4_unpack`), which are where a tensor core wants them: no weight moves again. A panel
of a group of 32, 64 or 128 inputs holds whole groups. Past k a panel is filled up with zeros whose
scale, too, is zero.

Scales are bf16, which moves them by less than any rounding of a weight does, whatever the dtype of
activations: so the bytes do not depend on that.

Shape suffixes: N outputs, K inputs, G groups, S inputs of a group, P panels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import Self

PANEL = 128  # inputs
WORDS = 32  # of 16 bits, for each output of a panel
GROUP_SIZES = (32, 64, 128, -1)
SYMMETRIC_ZERO = 8
# As in csrc/int4_quantize: (7 + i / 2) / 8.
SHRINKS = (0.875, 0.9375, 1.0, 1.0625, 1.125, 1.1875, 1.25, 1.3125, 1.375)
LEAST = 2.0**-100  # a group whose weights are all smaller is zero
ROWS_AT_A_TIME = 1 << 22  # weights: bounds what quantising takes besides to some 100 MB

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class Int4Format:
    """How a matrix is quantised."""

    group_size: int  # inputs that share a scale; -1: all of them
    symmetric: bool

    def __post_init__(self) -> None:
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size {self.group_size!r} is not supported (expected 32, 64, 128, or -1 for "
                "one group)"
            )
        if type(self.symmetric) is not bool:
            raise ValueError(f"symmetric {self.symmetric!r} is not true or false")

    def check(self, in_features: int) -> None:
        """Raise ValueError where groups do not divide so many inputs."""
        if self.group_size > 0 and in_features % self.group_size:
            raise ValueError(
                f"in_features {in_features} is not a multiple of group_size {self.group_size}"
            )

    def layout(self, n: int, k: int) -> Layout:
        """Name the tensors of an [n, k] matrix, with shapes and dtypes."""
        panels = -(-k // PANEL)
        groups = 1 if self.group_size < 0 else panels * (PANEL // self.group_size)
        named: Layout = {
            "packed": ((panels, n, WORDS), torch.int16),
            "scale": ((groups, n), torch.bfloat16),
        }
        if not self.symmetric:
            named["zero_point"] = ((groups, n), torch.uint8)
        return named

    def __str__(self) -> str:
        return f"int4-{self.group_size}" + ("" if self.symmetric else "-asymmetric")


def asked_format(
    group_size: int, symmetric: bool, in_features: Sequence[int], dtype: torch.dtype
) -> Int4Format:
    """Return the format that a rule asks for, for matrices of so many inputs.

    Raises ValueError where there is none such, groups do not divide the inputs, or activations are
    neither fp16 nor bf16.
    """
    asked = Int4Format(group_size, symmetric)
    for each in in_features:
        asked.check(each)
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"takes float16 or bfloat16 activations, not {dtype}")
    return asked


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A quantised [n, k] matrix, or several of one shape, whose tensors have a dimension more."""

    format: Int4Format
    in_features: int
    packed: torch.Tensor  # [P, N, 32] int16
    scale: torch.Tensor  # [G, N] bf16
    zero_point: torch.Tensor | None  # [G, N] uint8; None where the format is symmetric

    @classmethod
    def of(cls, format: Int4Format, in_features: int, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Take the tensors that `Int4Format.layout` names."""
        packed, scale = tensors["packed"], tensors["scale"]
        return cls(format, in_features, packed, scale, tensors.get("zero_point"))

    @property
    def out_features(self) -> int:
        """Return n."""
        return self.packed.shape[-2]

    @property
    def groups(self) -> int:
        """Return how many groups an output has, those that fill up the last panel included."""
        return self.scale.shape[-2]

    def __getitem__(self, index: int) -> Self:
        """Return one of several matrices."""
        tensors = {name: tensor[index] for name, tensor in self.tensors().items()}
        return self.of(self.format, self.in_features, tensors)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that `Int4Format.layout` names."""
        named = {"packed": self.packed, "scale": self.scale}
        return named if self.zero_point is None else {**named, "zero_point": self.zero_point}


def quantise(
    weight: torch.Tensor, format: Int4Format, device: torch.device | None = None
) -> Int4Weight:
    """Quantise a matrix [n, k] of finite floats, and pack it.

    On a device, which has some rows of the matrix at a time; where it lies if none is given.

    Raises ValueError where groups do not divide k.
    """
    N, K = weight.shape
    format.check(K)
    layout, home = format.layout(N, K), device or weight.device
    tensors = {
        name: torch.zeros(shape, dtype=dtype, device=home)
        for name, (shape, dtype) in layout.items()
    }
    groups = 1 if format.group_size < 0 else K // format.group_size
    step = max(ROWS_AT_A_TIME // K, 1)
    for begin in range(0, N, step):
        rows = slice(begin, begin + step)
        some = weight[rows].to(home).float().unflatten(1, (groups, -1))
        q, scale, zero = _quantise_groups(some, format)
        tensors["packed"][:, rows] = pack(q.flatten(1))
        tensors["scale"][:groups, rows] = scale.T
        if not format.symmetric:
            tensors["zero_point"][:groups, rows] = zero.T.to(torch.uint8)
    return Int4Weight.of(format, K, tensors)


def _quantise_groups(
    w_NGS: torch.Tensor, format: Int4Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q [N, G, S] as uint8, and scale and zero_point [N, G]."""
    if format.symmetric:
        unit = w_NGS.gather(-1, w_NGS.abs().argmax(-1, keepdim=True)) / -8
        zero = torch.full_like(unit, SYMMETRIC_ZERO)
    else:
        least, greatest = torch.aminmax(w_NGS, dim=-1, keepdim=True)
        unit = (greatest.clamp_min(0) - least.clamp_max(0)) / 15
        unit = unit.where(unit > 0, 1)  # all zeros
        zero = (least.clamp_max(0) / -unit).round()
    nothing = w_NGS.abs().amax(-1, keepdim=True) < LEAST
    ratio = (w_NGS / unit).masked_fill_(nothing, 0)
    best = torch.zeros_like(ratio)
    least_error = torch.full_like(unit, torch.inf)
    for shrink in SHRINKS:
        integers = (ratio * shrink).round_().clamp_(-zero, 15 - zero)
        error = (ratio - integers / shrink).square_().sum(-1, keepdim=True)
        best = integers.where(error < least_error, best)
        least_error = torch.minimum(error, least_error)
    squares = best.square().sum(-1, keepdim=True)
    scale = unit * (ratio * best).sum(-1, keepdim=True) / squares.clamp_min(1)
    scale = scale.masked_fill_(nothing, 0)
    return (best + zero).to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1)


def pack(q: torch.Tensor) -> torch.Tensor:
    """Lay out integers 0..15, uint8 [n, k], as [panels, n, 32] words of int16."""
    N, K = q.shape
    padded = torch.nn.functional.pad(q, (0, -K % PANEL))
    nibbles = padded.view(N, -1, 4, WORDS)
    low = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    high = nibbles[:, :, 2] | nibbles[:, :, 3] << 4
    words = torch.stack((low, high), dim=-1).view(torch.int16).squeeze(-1)
    return words.transpose(0, 1).contiguous()


def unpack(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Return the integers, uint8 [n, k], that `pack` laid out."""
    panels, N, _ = packed.shape
    words = packed.transpose(0, 1).int() & 0xFFFF
    nibbles = torch.stack([words >> 4 * s & 15 for s in range(4)], dim=2)  # [N, P, 4, 32]
    return nibbles.reshape(N, panels * PANEL)[:, :k].to(torch.uint8)


def dequantise(weight: Int4Weight) -> torch.Tensor:
    """Return the matrix, [n, k] in fp32, that a quantised one stands for."""
    K = weight.in_features
    size = K if weight.format.group_size < 0 else weight.format.group_size
    q = unpack(weight.packed, K).float()
    zero: torch.Tensor | float = float(SYMMETRIC_ZERO)
    if weight.zero_point is not None:
        zero = weight.zero_point.T.float().repeat_interleave(size, dim=1)[:, :K]
    return weight.scale.T.float().repeat_interleave(size, dim=1)[:, :K] * (q - zero)
