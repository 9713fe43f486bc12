"""The canonical view of stored tensors: one tensor per expert, FP8 scales applied.

A source may hold all experts of a layer fused, as transformers' modules do:

    {prefix}.gate_up_proj [E, 2F, D]    gate_proj above up_proj
    {prefix}.down_proj    [E, D, F]

Here they are `{prefix}.{e}.gate_proj.weight` and so on. Each is a run of consecutive elements, so
that a source reads no more than that.

Shape suffixes: E experts, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ktransformers.base import TensorInfo
from ktransformers.checkpoint.fp8 import (
    DEFAULT_BLOCK,
    SCALE_SUFFIX,
    Row,
    apply_scales,
    scale_row,
    scale_shape,
)
from ktransformers.checkpoint.messages import joined, missing_tensor

FP8 = torch.float8_e4m3fn


class Source(Protocol):
    """Tensors under the names and in the dtypes that they are stored in.

    Both methods are safe to call from several threads at once.
    """

    def stored(self) -> Mapping[str, TensorInfo]:
        """Return every stored tensor, scales included."""

    def read_range(self, name: str, start: int, count: int) -> torch.Tensor:
        """Read `count` elements from `start` on, in row-major order, to the CPU, 1-D.

        The caller owns the memory. Raises ValueError naming file and tensor.
        """


@dataclass(frozen=True, slots=True)
class Part:
    """A run of consecutive elements of a stored tensor."""

    stored: str
    start: int  # the first element, in row-major order
    shape: tuple[int, ...]


def canonical_parts(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Part]]:
    """Yield a canonical name and its part for all that is stored under names with `shapes`.

    A pair whose shapes are not those above is another layout, and keeps its names.
    """
    for name, shape in shapes.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj") or not _is_fused(prefix, shapes):
            yield name, Part(name, 0, shape)
            continue
        experts, rows, columns = shape
        projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        part_shape = (rows // len(projections), columns)
        for index in range(experts * len(projections)):
            expert, which = divmod(index, len(projections))
            part = Part(name, index * math.prod(part_shape), part_shape)
            yield f"{prefix}.{expert}.{projections[which]}.weight", part


def _is_fused(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    gate_up = shapes.get(f"{prefix}.gate_up_proj", ())
    down = shapes.get(f"{prefix}.down_proj", ())
    if len(gate_up) != 3 or len(down) != 3:
        return False
    num_experts, hidden_size, intermediate_size = down
    return gate_up == (num_experts, 2 * intermediate_size, hidden_size)


class CanonicalCheckpoint:
    """A `Checkpoint` over a source."""

    def __init__(self, source: Source, fp8_block: tuple[int, int] = DEFAULT_BLOCK) -> None:
        """Check what is stored, and name it canonically.

        `fp8_block` is how many rows and columns of an FP8 weight share a scale.

        Raises ValueError listing every FP8 weight whose scales are missing or of a wrong shape,
        and every name that is stored both fused and for itself.
        """
        self._source = source
        self._block = fp8_block
        stored = source.stored()
        quantised = {name for name, info in stored.items() if info.dtype == FP8}
        errors = [error for name in quantised if (error := self._scale_error(name))]
        scales = {name + SCALE_SUFFIX for name in quantised}
        shapes = {name: info.shape for name, info in stored.items() if name not in scales}
        self._parts: dict[str, Part] = {}
        for name, part in canonical_parts(shapes):
            other = self._parts.setdefault(name, part)
            if other is not part:
                errors.append(
                    f"{stored[part.stored].file}: {name} is stored twice, as {other.stored} and "
                    f"in {part.stored}; remove one"
                )
        if errors:
            raise ValueError(joined(sorted(errors)))
        self._infos = {name: self._info(part) for name, part in self._parts.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by canonical name."""
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU, contiguous: FP8 as float32, others as stored.

        Raises ValueError, naming file and tensor, where it is missing or cannot be read.
        """
        if name not in self._parts:
            raise ValueError(missing_tensor(name, self._infos))
        part = self._parts[name]
        values = self._source.read_range(part.stored, part.start, math.prod(part.shape))
        if values.dtype != FP8:
            return values.view(part.shape)
        if not values.numel():
            return torch.empty(part.shape)
        weight = values.view(-1, part.shape[-1])
        return apply_scales(weight, self._row_scales(part), self._block[1]).view(part.shape)

    def _row_scales(self, part: Part) -> torch.Tensor:
        """Read the scales of a part: one row for each of its rows, in float32."""
        scales = part.stored + SCALE_SUFFIX
        first, stop = self._scale_rows(part)
        columns = self._source.stored()[scales].shape[-1]
        read = self._source.read_range(scales, first * columns, (stop - first) * columns)
        rows = self._scale_row(part, torch.arange(_rows(part))) - first
        return read.view(-1, columns).to(torch.float32)[rows]

    def _scale_rows(self, part: Part) -> tuple[int, int]:
        """Return the range of the scales' rows that a part's rows take."""
        return self._scale_row(part, 0), self._scale_row(part, _rows(part) - 1) + 1

    def _scale_row(self, part: Part, row: Row) -> Row:
        first_row = part.start // part.shape[-1]
        rows = self._source.stored()[part.stored].shape[-2]
        return scale_row(first_row + row, rows, self._block[0])

    def _info(self, part: Part) -> TensorInfo:
        info = self._source.stored()[part.stored]
        count = math.prod(part.shape)
        if info.dtype != FP8:
            return replace(info, shape=part.shape, nbytes=count * info.dtype.itemsize)
        nbytes = count
        if count:
            first, stop = self._scale_rows(part)
            scales = self._source.stored()[part.stored + SCALE_SUFFIX]
            nbytes += (stop - first) * scales.shape[-1] * scales.dtype.itemsize
        return TensorInfo(part.shape, torch.float32, info.file, nbytes)

    def _scale_error(self, name: str) -> str | None:
        stored = self._source.stored()
        weight = stored[name]
        if len(weight.shape) < 2:
            return f"{weight.file}: {name}: FP8 of shape {list(weight.shape)}, expected a matrix"
        expected = list(scale_shape(weight.shape, self._block))
        scales = stored.get(name + SCALE_SUFFIX)
        if scales is None:
            return (
                f"{weight.file}: {name}: FP8 without its scales; expected {name}{SCALE_SUFFIX} of "
                f"shape {expected}; block-scaled FP8 is the only FP8 format supported"
            )
        if list(scales.shape) != expected:
            return (
                f"{scales.file}: {name}{SCALE_SUFFIX}: shape {list(scales.shape)}, expected "
                f"{expected} for {list(weight.shape)} in blocks of {self._block[0]} x "
                f"{self._block[1]} (quantization_config.weight_block_size in config.json)"
            )
        return None


def _rows(part: Part) -> int:
    return math.prod(part.shape[:-1])
