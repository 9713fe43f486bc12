"""Absorbed latent attention by FlashInfer.

Read in flashinfer-python 0.7.0 and 0.7.2.post1 (`flashinfer/mla`, and the C++ of fa2 and fa3), of
which `BatchMLAPagedAttentionWrapper` takes what is written here; before 0.7 there was no
`MLAPlanMetadata`.

* fa3 is for compute capability 9.0, fa2 for all others from 8.0 on. Both take bf16, and fp8 alone
  that is scaled by 128 values and has rope parts in fp8, which ours are not.
* Pages may be of any size and lie apart for latents and rope parts; their numbers come as one list
  for all sequences, as long as each has pages.
* `causal` has the queries be the last tokens of each sequence. Tiles are of 64 or 128 rows, queries
  times heads, and where the number of heads does not divide them, keys get lost at their ends.
* `plan` distributes the work on the host, for these lengths alone. A plan serves all layers of a
  step, so it is kept for those that come with the same table and lengths. But a CUDA graph would
  replay it for others: a step can't be recorded.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ktransformers.cache import LatentPages
from ktransformers.operators.kernels.mla_kernel import PackagedMla
from ktransformers.streams import recorded_graph

LEAST_VERSION = (0, 7)
MULTIPLES = (128, 64)  # of latents and rope parts, in values
TILE_ROWS = 128
WORKSPACE = 128 << 20  # bytes, as its documentation advises


@dataclass(frozen=True, slots=True)
class Planned:
    """What a plan is for."""

    block_table: torch.Tensor  # the same one: compared by `is`
    shown: tuple[int, int]
    shape: tuple[int, ...]
    scaling: float

    def serves(self, other: Planned) -> bool:
        """Tell whether this plan is one for other arguments as well."""
        mine, theirs = ((each.shown, each.shape, each.scaling) for each in (self, other))
        return self.block_table is other.block_table and mine == theirs


class FlashInferMla(PackagedMla):
    """`BatchMLAPagedAttentionWrapper`, planned once for all layers of a step."""

    name = "flashinfer"
    package = "flashinfer"
    install = "pip install flashinfer-python"
    graph_obstacle = "kernel flashinfer plans each step on the host: take triton or flashmla"

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()  # from a plan to what runs by it
        self._wrapper: Any = None  # the package's, made when a GPU is there
        self._planned: Planned | None = None

    def check_sizes(
        self, H: int, C: int, R: int, dtype: torch.dtype, cache_format: str | None
    ) -> None:
        """See `MlaKernel`."""
        super().check_sizes(H, C, R, dtype, cache_format)
        if C % MULTIPLES[0] or R % MULTIPLES[1]:
            raise ValueError(
                "kernel flashinfer takes latents of a multiple of 128 values and rope parts of a "
                f"multiple of 64, not {C} and {R}: take triton"
            )
        if TILE_ROWS % H:
            raise ValueError(
                f"kernel flashinfer takes a number of heads that divides 128, not {H}: take triton"
            )

    def check_machine(self, device: torch.device) -> None:
        """See `MlaKernel`."""
        found = self.imported().__version__
        if tuple(int(part) for part in found.split(".")[:2]) < LEAST_VERSION:
            least = ".".join(map(str, LEAST_VERSION))
            raise ValueError(
                f"kernel flashinfer needs {least} or later, not {found}: {self.install}"
            )

    def named(self, device: torch.device) -> str:
        """See `MlaKernel`."""
        return self.beside_triton(f"FlashInfer {_variant(device)}", device)

    def attend(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        pages: LatentPages,
        *,
        scaling: float,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `MlaKernel`."""
        self.check_pages(q_latent, pages)
        assert valid is None
        device = q_latent.device
        if recorded_graph() is not None or (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError(f"a CUDA graph can't hold this step: {self.graph_obstacle}")
        with self.on_device(device), self._one_at_a_time:
            self._plan(q_latent, q_rope, pages, scaling)
            out = self._wrapper.run(
                query=(q_latent.flatten(0, 1), q_rope.flatten(0, 1)),
                kv_cache=(pages.latent, pages.rope),
            )
        return out.unflatten(0, q_latent.shape[:2])  # type: ignore[no-any-return]  # the package's

    def _plan(
        self, q_latent: torch.Tensor, q_rope: torch.Tensor, pages: LatentPages, scaling: float
    ) -> None:
        """Plan, unless the last plan serves."""
        (B, T, H, C), R, device = q_latent.shape, q_rope.shape[-1], q_latent.device
        shape, shown = (B, T, H, C, R), pages.shown
        wanted = None if shown is None else Planned(pages.block_table, shown, shape, scaling)
        if wanted is not None and self._planned is not None and self._planned.serves(wanted):
            return
        mla = import_module("flashinfer.mla")
        if self._wrapper is None:
            workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
            self._wrapper = mla.BatchMLAPagedAttentionWrapper(workspace, backend=_variant(device))
        elif device.type == "cuda":
            # An earlier plan may still wait to be copied from pinned memory that this one gets.
            torch.cuda.current_stream(device).synchronize()
        lengths = pages.lengths.tolist() if shown is None else [shown[1]] * B  # no wait for those
        page = pages.latent.shape[1]
        counts = [-(-length // page) for length in lengths]
        listed = [pages.block_table[b, :count] for b, count in enumerate(counts)]
        self._planned = None
        self._wrapper.plan(
            metadata=mla.MLAPlanMetadata.csr(
                qo_indptr=torch.arange(0, B * T + 1, T, dtype=torch.int32),
                kv_indptr=torch.tensor([0, *counts]).cumsum(0).int(),
                kv_indices=torch.cat(listed),
                kv_len_arr=torch.tensor(lengths, dtype=torch.int32),
            ),
            num_heads=H,
            head_dim_ckv=C,
            head_dim_kpe=R,
            page_size=page,
            causal=True,
            sm_scale=scaling,
            q_data_type=q_latent.dtype,
            kv_data_type=pages.latent.dtype,
            query_layout="split",
            kv_cache_layout="split",
        )
        self._planned = wanted


def _variant(device: torch.device) -> str:
    """Return which of FlashInfer's implementations is for a GPU."""
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return "fa3" if on_hopper else "fa2"
