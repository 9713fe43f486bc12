"""What computes absorbed latent attention on a GPU: Triton, or a package that the user installed.

A rule names one, and nothing else takes its place: what it can't do it says before anything is
loaded, or, of a request, by an error. See `mla_keys` for the formula and the shape suffixes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import ClassVar

import torch

from ktransformers.cache import LatentPages
from ktransformers.gpu_options import triton_on


class MlaKernel:
    """Computes attention for all layers of a GPU that share it."""

    name: ClassVar[str]
    in_rows: ClassVar[bool] = False  # reads a latent and its rope part side by side
    takes_padding: ClassVar[bool] = True
    graph_obstacle: ClassVar[str | None] = None  # why a step with it can't be recorded

    def check_sizes(
        self, H: int, C: int, R: int, dtype: torch.dtype, cache_format: str | None
    ) -> None:
        """Raise ValueError, in a sentence, for what it does not compute; for `plan`.

        Args:
            H, C, R: heads, and widths of a latent and a rope part.
            dtype: of queries.
            cache_format: that was asked for.
        """

    def check_installed(self) -> None:
        """Raise ValueError, in a sentence, where it is not installed."""

    def check_machine(self, device: torch.device) -> None:
        """Raise ValueError, in a sentence, where it does not run on a GPU that is here."""

    def named(self, device: torch.device) -> str:
        """Say what computes, for a report."""
        raise NotImplementedError

    def attend(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        pages: LatentPages,
        *,
        scaling: float,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend with the last T tokens of each sequence; return [B, T, H, C].

        Args:
            q_latent: W_UK^T q_nope, [B, T, H, C], last dimension contiguous.
            q_rope: [B, T, H, R], likewise.
            pages: their lengths count the T tokens.
            scaling: of scores, YaRN's mscale included.
            valid: uint8 [B, >= L], 0 where a token is padding; None unless `takes_padding`.
        """
        raise NotImplementedError


class TritonMla(MlaKernel):
    """The kernels of this folder."""

    name = "triton"

    def named(self, device: torch.device) -> str:
        """See `MlaKernel`."""
        return triton_on(device)

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
        # Bring Triton, which packing and looking at plans do without.
        from ktransformers.operators.kernels.mla_decode import mla_decode
        from ktransformers.operators.kernels.mla_prefill import mla_prefill

        if q_latent.shape[1] > 1:
            return mla_prefill(q_latent, q_rope, pages, scaling=scaling, valid=valid)
        out = mla_decode(q_latent[:, 0], q_rope[:, 0], pages, scaling=scaling, valid=valid)
        return out[:, None]


class PackagedMla(MlaKernel):
    """A package that is installed apart; it takes bf16 and no padding."""

    package: ClassVar[str]  # what is imported
    install: ClassVar[str]  # how it is installed
    takes_padding = False

    def check_sizes(
        self, H: int, C: int, R: int, dtype: torch.dtype, cache_format: str | None
    ) -> None:
        """See `MlaKernel`."""
        if dtype != torch.bfloat16:
            raise ValueError(f"kernel {self.name} takes bfloat16, not {dtype}: take triton")
        if cache_format not in (None, "bf16"):
            raise ValueError(
                f"kernel {self.name} reads a cache in bf16, not in {cache_format} with a scale for "
                "each token: take triton, or cache_format bf16"
            )

    def check_installed(self) -> None:
        """See `MlaKernel`."""
        if find_spec(self.package) is None:
            raise ValueError(f"kernel {self.name} is not installed: {self.install}")

    def imported(self) -> ModuleType:
        """Return the package. Raises ValueError where it does not load."""
        try:
            return import_module(self.package)
        except (ImportError, OSError) as error:  # OSError: of its shared library
            raise ValueError(f"kernel {self.name} does not load: {error}") from error

    def refuse_capability(self, device: torch.device, wanted: str) -> ValueError:
        """Return the error for a GPU that it does not run on."""
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return ValueError(
            f"kernel {self.name} needs {wanted}, but {device} is a "
            f"{torch.cuda.get_device_name(device)} with {found}: take triton"
        )

    def check_pages(self, q_latent: torch.Tensor, pages: LatentPages) -> None:
        """Raise ValueError for a cache in another format than queries are."""
        if pages.latent.dtype != q_latent.dtype or pages.scale is not None:
            raise ValueError(
                f"kernel {self.name} reads a cache in {q_latent.dtype}, not in "
                f"{pages.latent.dtype}: make it by LatentCache.for_model without a format"
            )

    def on_device(self, device: torch.device) -> AbstractContextManager[object]:
        """Make the device current while the context lasts: packages look at that one."""
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def beside_triton(self, title: str, device: torch.device) -> str:
        """Name the package with its version, and Triton, which writes the cache."""
        return f"{title} {self.imported().__version__} beside {triton_on(device)}"
