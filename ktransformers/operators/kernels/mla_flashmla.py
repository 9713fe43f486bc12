"""Absorbed latent attention by DeepSeek's FlashMLA, on Hopper.

Read in FlashMLA 1.0.0 (Python and C++ of its dense kernel for decode):

* `get_mla_metadata` once took lengths and heads and returned two tensors; now it takes and ignores
  them, and the first call of `flash_mla_with_kvcache` plans, by a kernel that reads lengths on the
  device. Both take what is written here. A plan holds for these lengths alone, so each call has
  one of its own: recorded in a CUDA graph it is made anew by every replay.
* compute capability 9.0 alone; bf16; pages of 64 tokens whose rows are 512 + 64 values wide, the
  latent before the rope part; any number of heads.
* `causal` has the queries be the last tokens of each sequence, of which the kernel takes tiles of
  64 rows, queries times heads. It works in fp32 sums of all rows for every part of the keys and
  every sequence, some gigabytes for a long chunk: so chunks are cut.
"""

from __future__ import annotations

import torch

from ktransformers.cache import LatentPages
from ktransformers.cache_pages import PAGE_TOKENS
from ktransformers.operators.kernels.mla_kernel import PackagedMla

WIDTHS = (512, 64)
PAGE = 64
CAPABILITY = (9, 0)
ROWS = 8192  # queries times heads at a time: tiles for about the 132 processors of an H100


class FlashMla(PackagedMla):
    """`flash_mla_with_kvcache`, for decode and chunks alike."""

    name = "flashmla"
    in_rows = True
    package = "flash_mla"
    install = "pip install git+https://github.com/deepseek-ai/FlashMLA"

    def check_sizes(
        self, H: int, C: int, R: int, dtype: torch.dtype, cache_format: str | None
    ) -> None:
        """See `MlaKernel`."""
        super().check_sizes(H, C, R, dtype, cache_format)
        if (C, R) != WIDTHS:
            raise ValueError(
                f"kernel flashmla takes latents of 512 and rope parts of 64 values, not "
                f"{C} and {R}: take triton"
            )
        assert PAGE_TOKENS == PAGE

    def check_machine(self, device: torch.device) -> None:
        """See `MlaKernel`."""
        if device.type == "cuda" and torch.cuda.get_device_capability(device) != CAPABILITY:
            raise self.refuse_capability(device, "a GPU of compute capability 9.0 (H100, H200)")
        self.imported()

    def named(self, device: torch.device) -> str:
        """See `MlaKernel`."""
        return self.beside_triton("FlashMLA", device)

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
        assert pages.rows is not None
        assert valid is None
        T, H = q_latent.shape[1:3]
        q, each = torch.cat((q_latent, q_rope), dim=-1), max(1, ROWS // H)
        outputs = [
            self._of_last(some, pages.rows, pages.block_table, lengths, scaling)
            for some, lengths in (
                (q[:, begin : begin + each], pages.lengths - max(0, T - begin - each))
                for begin in range(0, T, each)
            )
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _of_last(
        self,
        q: torch.Tensor,
        rows: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend with the last tokens of sequences of these lengths."""
        package = self.imported()
        with self.on_device(q.device):
            plan, splits = package.get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)
            out, _ = package.flash_mla_with_kvcache(
                q,
                rows[:, :, None],  # of one head
                block_table,
                lengths,
                WIDTHS[0],
                plan,
                splits,
                softmax_scale=scaling,
                causal=True,
            )
        return out  # type: ignore[no-any-return]  # the package's
