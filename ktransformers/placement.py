"""Packed weights in parts, one or one for each NUMA node, and operators that place theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.dlpack import from_dlpack

from ktransformers import _native
from ktransformers.base import Checkpoint, PackedOperator
from ktransformers.numa import PANEL, Placement


@dataclass(frozen=True, slots=True)
class PackedMatrices:
    """A packed tensor: so many matrices of one shape, back to back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    matrices: int
    n: int  # outputs of each
    in_one_part: bool = False  # in every mode: what reads it knows no nodes

    @property
    def outputs(self) -> int:
        """Outputs of each matrix, as padded."""
        return -(-self.n // PANEL) * PANEL

    @property
    def per_output(self) -> int:
        """Elements of one output."""
        return torch.Size(self.shape).numel() // (self.matrices * self.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of one copy."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def plan(self, placement: Placement) -> list[_native.NumaPart]:
        """Return the parts that a placement cuts the tensor into."""
        return _native.numa_plan(
            "interleave" if self.in_one_part else placement.mode,
            matrices=self.matrices,
            outputs=self.outputs,
            output_bytes=max(self.per_output * self.dtype.itemsize, 1),  # bf16 has no scales
            nodes=placement.nodes,
        )

    def part_shape(self, part: _native.NumaPart) -> tuple[int, ...]:
        """Return the shape of a part's tensor: the last dimension is what is cut."""
        return (*self.shape[:-1], self.shape[-1] // self.outputs * part.outputs)


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """Memory for a packed tensor: the whole of it, or what lies on each node."""

    of: PackedMatrices
    parts: tuple[torch.Tensor, ...]
    outputs: tuple[range, ...]  # of every matrix, that each part holds

    @classmethod
    def allocate(cls, of: PackedMatrices, placement: Placement) -> PlacedTensor:
        """Return zeros where a placement wants them."""
        plan = of.plan(placement)
        parts = tuple(
            from_dlpack(part.allocate(bind=placement.binding))
            .view(of.dtype)
            .view(of.part_shape(part))
            if of.per_output
            else torch.empty(of.part_shape(part), dtype=of.dtype)
            for part in plan
        )
        outputs = tuple(range(p.first_output, p.first_output + p.outputs) for p in plan)
        return cls(of, parts, outputs)

    @classmethod
    def whole(cls, of: PackedMatrices, tensor: torch.Tensor) -> PlacedTensor:
        """Take a tensor that lies anywhere."""
        return cls(of, (tensor,), (range(of.outputs),))

    @contextmanager
    def matrix(self, index: int) -> Iterator[torch.Tensor]:
        """Yield a matrix to be written whole, flat; what was written is then where it belongs."""
        if len(self.parts) == 1:
            yield self._rows(0)[index].view(-1)
            return
        written = torch.empty(self.of.outputs, self.of.per_output, dtype=self.of.dtype)
        yield written.view(-1)
        for part, outputs in enumerate(self.outputs):
            self._rows(part)[index].copy_(written[outputs.start : outputs.stop])

    def _rows(self, part: int) -> torch.Tensor:
        rows = len(self.outputs[part])
        return self.parts[part].view(self.of.matrices, rows, self.of.per_output)

    def ranges(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield memory, flat uint8, and which byte of the whole tensor is its first."""
        size = self.of.per_output * self.of.dtype.itemsize
        for index, outputs in enumerate(self.outputs):
            flat = self.parts[index].view(-1).view(torch.uint8)
            if len(outputs) == self.of.outputs:
                yield 0, flat
                continue
            for matrix, rows in enumerate(flat.view(self.of.matrices, len(outputs) * size)):
                yield (matrix * self.of.outputs + outputs.start) * size, rows


class PlacedOperator(PackedOperator):
    """An operator whose packed weights are matrices, and lie where a `Placement` says.

    In several parts a tensor of the layout is as many buffers, named after their nodes. Packed
    tensors for another device than the CPU are beside them: `elsewhere`.
    """

    weight_format: str
    placement: Placement
    is_bound = False  # to the placement's nodes; a mapped file is not

    def packed_matrices(self) -> Mapping[str, PackedMatrices]:
        """Name the packed tensors, as `packed_layout` does."""
        raise NotImplementedError(f"{type(self).__name__} does not define packed_matrices")

    def pack_into(self, memory: Mapping[str, PlacedTensor], checkpoint: Checkpoint) -> None:
        """Read, quantise and pack one matrix at a time. Raises as `load_weights` does."""
        raise NotImplementedError(f"{type(self).__name__} does not define pack_into")

    def compute_with(self, parts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Compute with these tensors, as many for each name as there are parts, from now on."""
        raise NotImplementedError(f"{type(self).__name__} does not define compute_with")

    def elsewhere(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name the packed tensors that no placement concerns, with shapes and dtypes; here none."""
        return {}

    def use_elsewhere(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compute with these tensors, one for each name of `elsewhere`, from now on."""

    def packed_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name the packed tensors; nothing here depends on the placement."""
        placed = {name: (of.shape, of.dtype) for name, of in self.packed_matrices().items()}
        return {**placed, **self.elsewhere()}

    def packed_bytes(self) -> int:
        """Return the bytes of what is placed, copies included."""
        return sum(
            of.nbytes * (1 if of.in_one_part else self.placement.copies)
            for of in self.packed_matrices().values()
        )

    def buffer_names(self, tensor: str) -> list[str]:
        """Name the buffers that hold a tensor of the layout, one for each part."""
        if not self.placement.in_parts or self.packed_matrices()[tensor].in_one_part:
            return [tensor]
        return [f"{tensor}_node{node}" for node in self.placement.nodes]

    def place(self, placement: Placement) -> None:
        """Say where the weights are to lie, and register their buffers, on the meta device."""
        for name in dict(self.named_buffers(recurse=False)):
            delattr(self, name)
        self.placement = placement
        for tensor, of in self.packed_matrices().items():
            for name, part in zip(self.buffer_names(tensor), of.plan(placement), strict=True):
                meta = torch.empty(of.part_shape(part), dtype=of.dtype, device="meta")
                self.register_buffer(name, meta, persistent=False)
        for name, (shape, dtype) in self.elsewhere().items():
            meta = torch.empty(shape, dtype=dtype, device="meta")
            self.register_buffer(name, meta, persistent=False)

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read, quantise and pack one matrix at a time.

        Raises ValueError, naming file and tensor, for a wrong shape and for NaN or infinity.
        """
        memory = self.placed_memory()
        self.pack_into(memory, checkpoint)
        self.use_placed(memory)

    def placed_memory(self) -> dict[str, PlacedTensor]:
        """Return memory for all packed tensors, bound to the placement's nodes.

        Raises MemoryError where there is none.
        """
        try:
            return {
                name: PlacedTensor.allocate(of, self.placement)
                for name, of in self.packed_matrices().items()
            }
        except MemoryError as error:
            raise self.no_memory() from error

    def use_placed(self, memory: Mapping[str, PlacedTensor]) -> None:
        """Compute with what `placed_memory` returned, now that it is filled."""
        self._adopt(memory)
        self.is_bound = True

    def use_packed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compute with whole tensors; for an operator whose weights are one part.

        Raises ValueError where one has not the layout's shape.
        """
        assert not self.placement.in_parts
        matrices = self.packed_matrices()
        self._adopt({name: PlacedTensor.whole(matrices[name], tensors[name]) for name in matrices})
        self.use_elsewhere({name: tensors[name] for name in self.elsewhere()})

    def _adopt(self, memory: Mapping[str, PlacedTensor]) -> None:
        for tensor, placed in memory.items():
            for name, part in zip(self.buffer_names(tensor), placed.parts, strict=True):
                setattr(self, name, part)
        self.compute_with({name: placed.parts for name, placed in memory.items()})
