"""Matrices as the CPU's kernels read them, seen from a GPU.

`csrc/` packs a matrix in panels of 16 outputs, so that of each output some inputs that
follow one another are a word of 32 bits: `words` is [N / 16, K / P, 16], with P inputs a word, 2 in
bf16, 4 in int8, 8 in int4. A load of neighbouring words is contiguous; plane p of a tile of words
is inputs P q + p, so that activations are put in that order first, [P, K / P], and each plane meets
a matrix of them. Nothing is repacked: integers and bf16 become the activations' dtype in registers.

Shape suffixes: E experts, N outputs, K inputs, P planes, Q words of an output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

PANEL = 16  # outputs
PADDED = 32  # outputs, that matrices are filled up to


@dataclass(frozen=True, slots=True)
class PackedMatrices:
    """Matrices [n, k] of some experts, so many for each, as `csrc/` packs them."""

    format: str  # int8, int4-32, int4-64, int4-128 or bf16
    n: int
    k: int
    each: int  # matrices of an expert: 2 for gate and up
    packed: torch.Tensor  # bytes, flat
    scale: torch.Tensor  # fp32; bf16 in int4; empty in bf16

    @property
    def planes(self) -> int:
        """Inputs that share a word."""
        return {"int8": 4, "bf16": 2}.get(self.format, 8)

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 where all of an output's do, or there is none."""
        return int(self.format.partition("-")[2] or 0)

    @property
    def padded_n(self) -> int:
        """Outputs, as they are filled up."""
        return -(-self.n // PADDED) * PADDED

    @property
    def words(self) -> int:
        """Words of an output."""
        inputs = 32 if self.format == "bf16" else max(64, self.group)
        return -(-self.k // inputs) * inputs // self.planes

    @property
    def experts(self) -> int:
        """Return how many experts there are."""
        return self.packed.numel() // (4 * self.padded_n * self.words * self.each)

    def check(self, name: str, experts: int) -> None:
        """Raise ValueError where the bytes are no such matrices of so many experts."""
        if self.format not in ("int8", "int4-32", "int4-64", "int4-128", "bf16"):
            raise ValueError(f"{name}: format {self.format!r} is none of csrc/weights/format.h")
        outputs = experts * self.each * self.padded_n
        groups = self.words * self.planes // self.group if self.group else 1
        want = 4 * outputs * self.words, 0 if self.format == "bf16" else outputs * groups
        if (self.packed.numel(), self.scale.numel()) != want:
            raise ValueError(
                f"{name}: {self.packed.numel()} bytes and {self.scale.numel()} scales, expected "
                f"{want[0]} and {want[1]} for {experts} x {self.each} of [{self.n}, {self.k}] in "
                f"{self.format}"
            )


def in_planes(x: torch.Tensor, planes: int, words: int) -> torch.Tensor:
    """Return rows [.., K] as [.., P * Q], the first input of all words first, filled up with 0."""
    padded = torch.nn.functional.pad(x, (0, planes * words - x.shape[-1]))
    by_word: torch.Tensor = padded.unflatten(-1, (words, planes))
    return by_word.transpose(-1, -2).flatten(-2)


def dequantise(matrices: PackedMatrices) -> torch.Tensor:
    """Return what packed bytes stand for, [E, each, n, k] in fp32."""
    E, each, n, k = matrices.experts, matrices.each, matrices.n, matrices.k
    P, Q, group = matrices.planes, matrices.words, matrices.group
    words = matrices.packed.view(torch.int32).view(E, each, -1, Q, PANEL)
    values = torch.stack(list(_planes_of(words, P)), dim=-1)  # [.., panel, Q, 16, P]
    values = values.transpose(-3, -2).reshape(E, each, -1, Q * P)[..., :n, :k]
    if group:
        scale = matrices.scale.float().view(E, each, -1, Q * P // group, PANEL)
        scale = scale.transpose(-1, -2).reshape(E, each, -1, Q * P // group)
        return values * scale.repeat_interleave(group, dim=-1)[..., :n, :k]
    if matrices.scale.numel():
        return values * matrices.scale.view(E, each, -1)[..., :n, None]
    return values


def _planes_of(words: torch.Tensor, planes: int) -> Iterator[torch.Tensor]:
    """Yield the inputs of words, one after the other, in fp32."""
    for j in range(planes):
        if planes == 4:
            yield (words << (24 - 8 * j) >> 24).float()
        elif planes == 8:
            yield ((words >> (8 * (j % 4) + 4 * (j // 4)) & 15) - 8).float()
        else:
            yield (words & -65536 if j else words << 16).view(torch.float32)
