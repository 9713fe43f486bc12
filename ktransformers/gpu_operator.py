"""What operators with packed weights on a GPU have in common.

Weights may be packed where there is no GPU: then they lie on the CPU until they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ktransformers.base import Checkpoint, PackedOperator
from ktransformers.checkpoint import check_finite, read_checked
from ktransformers.gpu_options import check_gpu, triton_on, within_reach


class GpuOperator(PackedOperator):
    """Packed weights on a GPU, where Triton computes with them."""

    device: torch.device

    def check_machine(self) -> None:
        """Refuse a machine without the GPU."""
        check_gpu(self.device)

    def computed_by(self) -> str:
        """Name Triton and the GPU."""
        return triton_on(self.device)

    def graph_obstacle(self) -> str | None:
        """Name none: kernels alone."""
        return None

    @contextmanager
    def filling_gpu(self) -> Iterator[torch.device]:
        """Yield where weights go. Raises MemoryError where it turns out to have no room."""
        try:
            yield within_reach(self.device)
        except torch.OutOfMemoryError as error:
            raise self.no_memory() from error

    def read_weights(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Read `weight_shapes`, to the CPU.

        Raises ValueError, naming file and tensor, for a wrong shape and for NaN or infinity.
        """
        read = {}
        for name, shape in self.weight_shapes().items():
            read[name] = read_checked(checkpoint, name, shape)
            check_finite(checkpoint, name, read[name])
        return read

    def bring(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Hold packed tensors, on the GPU, from now on; return them. Raises as `filling_gpu`."""
        with self.filling_gpu() as home:
            placed = {name: tensors[name].to(home).contiguous() for name in self.packed_layout()}
        for name, tensor in placed.items():
            setattr(self, name, tensor)
        return placed
