"""One layer of a latent cache: how its pages lie in memory, and what attention reads of them.

Shape suffixes: those of `ktransformers.cache`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.cache_utils import CacheLayerMixin

from ktransformers.cache_pages import PAGE_TOKENS, PageTable
from ktransformers.cache_rounding import check_format, dequantised, quantised, scale_shape

Format = Literal["bf16", "fp32", "int8", "fp8"]
DTYPES = {  # of the latent, and of the rope part
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "int8": (torch.int8, torch.bfloat16),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
}
SCALED = ("int8", "fp8")


@dataclass(frozen=True, slots=True)
class LatentPages:
    """What attention reads of one layer; token i of a sequence is row i % page of its page."""

    latent: torch.Tensor  # [P, page, C]
    scale: torch.Tensor | None  # fp32 [P, page, G] of an int8 latent, [P, page] of an fp8 one
    rope: torch.Tensor  # [P, page, R]
    block_table: torch.Tensor  # int32 [B, pages of a sequence]
    lengths: torch.Tensor  # int32 [B]: cached tokens, the new ones included
    rows: torch.Tensor | None = None  # [P, page, C + R], where latent and rope are columns of one
    # The version of block_table, which is changed in place, and what all lengths are; None where
    # the host does not know.
    shown: tuple[int, int] | None = None

    @classmethod
    def of_sequences(
        cls,
        latent: torch.Tensor,
        rope: torch.Tensor,
        length: int,
        page: int | None = None,
        *,
        in_rows: bool = False,
    ) -> LatentPages:
        """Take the first `length` rows of [B, >= L, C] and [B, >= L, R].

        In one page per sequence, which is no copy, or in pages of so many tokens; `in_rows`: both
        side by side, which is one.
        """
        B, each, device = latent.shape[0], 1, latent.device
        if page is not None:
            each = -(-length // page)
            rest = (0, 0, 0, each * page - length)
            latent, rope = (
                torch.nn.functional.pad(rows[:, :length], rest).reshape(B * each, page, -1)
                for rows in (latent, rope)
            )
        table = torch.arange(B * each, dtype=torch.int32, device=device).view(B, each)
        lengths = torch.full((B,), length, dtype=torch.int32, device=device)
        rows = torch.cat((latent, rope), dim=-1) if in_rows else None
        if rows is None:
            latent, rope = latent.contiguous(), rope.contiguous()
        else:
            latent, rope = rows.split((latent.shape[-1], rope.shape[-1]), dim=-1)
        return cls(latent, None, rope, table, lengths, rows, (0, length))


class LatentLayer(CacheLayerMixin):
    """One layer's values; its pages are those of the whole cache."""

    is_croppable = True
    supports_early_init = False

    latent: torch.Tensor  # these as in LatentPages
    scale: torch.Tensor | None
    rope: torch.Tensor
    rows: torch.Tensor | None

    def __init__(self, table: PageTable, C: int, R: int, max_tokens: int, format: Format) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self.table = table
        self.format = format
        self.max_tokens = max_tokens
        self.length = 0
        self.reserved = 0  # pages
        self._widths = C, R
        self._lay_out(0, torch.device("cpu"), in_rows=False)

    def _lay_out(self, pages: int, device: torch.device, *, in_rows: bool) -> None:
        """Hold so many pages, uninitialised. Raises RuntimeError, as torch does, for no memory."""
        (C, R), (latent, rope) = self._widths, DTYPES[self.format]
        shape, scale, rows = (pages, PAGE_TOKENS), None, None
        with torch.inference_mode(False):  # they may outlive that mode, and be written to
            if in_rows:
                rows = torch.empty(*shape, C + R, dtype=latent, device=device)
                made = rows.split((C, R), dim=-1)
            else:
                made = (
                    torch.empty(*shape, C, dtype=latent, device=device),
                    torch.empty(*shape, R, dtype=rope, device=device),
                )
            if self.format in SCALED:
                groups = scale_shape(self.format, C)
                scale = torch.empty(*shape, *groups, dtype=torch.float32, device=device)
        (self.latent, self.rope), self.scale, self.rows = made, scale, rows

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what holds values, by name."""
        named = {"latent": self.latent, "rope": self.rope}
        return named if self.scale is None else {**named, "scale": self.scale}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve memory for the limit."""
        self.reserve(key_states.device)

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.latent.device

    def reserve(self, device: torch.device | None = None, in_rows: bool | None = None) -> None:
        """Have room for all sequences at the limit, on a device and in a layout if they are given.

        What was there stays, or moves. Raises ValueError where the format can't be on that
        device or in rows, MemoryError where there is no room.
        """
        pages = self.table.batch * self.pages_each()
        device = self.device if device is None else device
        in_rows = self.rows is not None if in_rows is None else in_rows
        here = (device, in_rows) == (self.device, self.rows is not None)
        if self.reserved >= pages and here:
            return
        check_format(self.format, device)
        if in_rows and self.format in SCALED:
            raise ValueError(f"{self.format} latents do not lie in rows with their rope parts")
        pages = max(pages, self.reserved)
        old = self.tensors()
        try:
            self._lay_out(pages, device, in_rows=in_rows)
        except RuntimeError as error:
            nbytes = sum(pages * math.prod(t.shape[1:]) * t.itemsize for t in old.values())
            raise MemoryError(
                f"{'the system' if device.type == 'cpu' else device} refuses {nbytes:,} bytes for "
                f"a layer of a cache of {self.table.batch:,} x {self.max_tokens:,} tokens; lower "
                "max_tokens (--cache_lens)"
            ) from error
        self._take_over(old)
        self.reserved = pages
        self.is_initialized = True

    def _take_over(self, old: dict[str, torch.Tensor]) -> None:
        """Copy the pages in use."""
        used = min(self.table.top, len(old["latent"]))
        for name, new in self.tensors().items():
            new[:used] = old[name][:used]

    def pages_each(self) -> int:
        """Return the pages of a sequence at the limit."""
        return -(-self.max_tokens // PAGE_TOKENS)

    def append(self, latent: torch.Tensor, rope: torch.Tensor) -> LatentPages:
        """Cache new tokens, latent [B, T, C] and rope [B, T, R], and return all there are.

        What is cached carries no gradient.
        """
        B, T, C = latent.shape
        begin, end = self.length, self.length + T
        slots = self.table.indexes(begin, end).to(self.device)
        rows = latent.detach().reshape(B * T, C)
        if self.scale is not None:
            rows, scale = quantised(rows, self.latent.dtype)
            self.scale.flatten(0, 1).index_copy_(0, slots, scale)
        rows = rows.to(self.latent.dtype)
        movable(self.latent.view(-1, C)).index_copy_(0, slots, movable(rows))
        rope_rows = rope.detach().reshape(B * T, rope.shape[-1]).to(self.rope.dtype)
        self.rope.view(-1, rope.shape[-1]).index_copy_(0, slots, rope_rows)
        self.length = end
        return self.pages()

    def pages(self, new: int = 0) -> LatentPages:
        """Return what attention reads, with room for new tokens that are reserved."""
        table = self.table.on(self.device, self.pages_each(), self.length + new)
        return LatentPages(
            self.latent,
            self.scale,
            self.rope,
            table.block_table,
            table.lengths,
            self.rows,
            table.shown,
        )

    def gather(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all cached tokens, latent [B, 1, L, C] and rope [B, 1, L, R]."""
        slots = self.table.indexes(0, self.length).to(self.device)
        shape = (self.table.batch, 1, self.length, -1)
        latent = self.latent.view(-1, self.latent.shape[-1])[slots]
        if self.scale is not None:
            latent = dequantised(latent, self.scale.flatten(0, 1)[slots])
        latent = latent.to(dtype)
        rope = self.rope.view(-1, self.rope.shape[-1])[slots].to(dtype)
        return latent.view(shape), rope.view(shape)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache latents [B, 1, T, C] and rope parts [B, 1, T, R]; return all, contiguous."""
        self.append(key_states[:, 0], value_states[:, 0])
        return self.gather(key_states.dtype)

    def get_seq_length(self) -> int:
        """Return the tokens cached of each sequence."""
        return self.length

    def get_max_length(self) -> int:
        """Return how many there can be."""
        return self.max_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the mask. Raises ValueError where the query can't fit."""
        check_fits(self.length + query_length, self.max_tokens)
        return self.length + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refuse: pages belong to all layers together."""
        raise NotImplementedError("layers of a LatentCache share pages: reorder the whole cache")

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentLayer:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.table = copy.deepcopy(self.table, memo)
        twin._lay_out(len(self.latent), self.device, in_rows=self.rows is not None)
        twin._take_over(self.tensors())  # what was never used has no memory yet
        return twin


def check_fits(length: int, max_tokens: int) -> None:
    """Raise ValueError where a cache can't hold so many tokens of a sequence."""
    if length > max_tokens:
        raise ValueError(
            f"{length:,} tokens, prompt and answer together, do not fit a cache of "
            f"{max_tokens:,}; shorten them, or raise max_tokens (--cache_lens)"
        )


def movable(values: torch.Tensor) -> torch.Tensor:
    """Return a view of what torch can move: it does not index all kinds of fp8 everywhere."""
    return values.view(torch.uint8) if values.itemsize == 1 else values
