"""Which page of a cache holds which tokens of which sequence; sequences may share pages.

A page is a fixed number of tokens. Whoever holds one is counted, so that beams and copies of a
sequence cost nothing until they differ: a sequence that writes to a page that others hold too gets
its own copy first. One table serves all layers of a cache; it moves no memory itself.

Shape suffixes: B sequences, T new tokens of each.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import torch

PAGE_TOKENS = 64  # a tile of keys in csrc/mla; at 576 bf16 values it is 72 KiB of a layer


class TableCopy:
    """What kernels on one device read of a table, for so many pages of each sequence.

    It is changed in place, so that a CUDA graph that has recorded a call sees every change.
    """

    def __init__(self, batch: int, pages: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # it may outlive that mode, and be written to
            self.block_table = torch.zeros(batch, pages, dtype=torch.int32, device=device)
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.shown = (-1, -1)  # the table's version, and a length

    def show(self, table: PageTable, length: int) -> None:
        """Hold what the table says, and a length for every sequence; touch no more than differs."""
        version, old = self.shown
        if version != table.version:
            rows = table.tensor()
            self.block_table[:, : rows.shape[1]] = rows.to(self.block_table.device)
        if old != length:
            self.lengths.fill_(length)
        self.shown = table.version, length


class PageTable:
    """The pages of each sequence, in order."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.top = 0  # every page in use lies below
        self.version = 0  # counts changes
        self._holders: Counter[int] = Counter()
        self._free: list[int] = []  # a heap, of pages below top
        self._indexes: tuple[tuple[int, int], torch.Tensor] | None = None
        self._tensor: torch.Tensor | None = None
        self._copies: dict[torch.device, TableCopy] = {}

    @property
    def batch(self) -> int:
        """Return the number of sequences."""
        return len(self.rows)

    def start(self, batch: int) -> None:
        """Forget everything, and hold so many empty sequences."""
        self.__init__()  # type: ignore[misc]  # its state is what __init__ makes
        self.rows = [[] for _ in range(batch)]

    def reserve(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Give every sequence pages of its own for the tokens from `begin` to `end`.

        Returns the pages that have to be copied, as (from, to).
        """
        first, last = begin // PAGE_TOKENS, -(-end // PAGE_TOKENS)
        copies = []
        for row in self.rows:
            for index in range(first, last):
                if index == len(row):
                    row.append(self._take())
                elif self._holders[row[index]] > 1:
                    shared, row[index] = row[index], self._take()
                    self._holders[shared] -= 1
                    copies.append((shared, row[index]))
                else:
                    continue
                self._changed()
        return copies

    def cut(self, length: int) -> None:
        """Give back the pages beyond the first `length` tokens of every sequence."""
        keep = -(-length // PAGE_TOKENS)
        for row in self.rows:
            for page in row[keep:]:
                self._release(page)
            del row[keep:]
        self._changed()

    def select(self, sequences: Sequence[int]) -> None:
        """Let the sequences be copies of these, in this order."""
        old = self.rows
        self.rows = [list(old[index]) for index in sequences]
        self._holders.update(page for row in self.rows for page in row)
        for row in old:
            for page in row:
                self._release(page)
        self._changed()

    def tensor(self) -> torch.Tensor:
        """Return the pages, int32 [B, pages of a sequence]."""
        if self._tensor is None:
            self._tensor = torch.tensor(self.rows, dtype=torch.int32)
        return self._tensor

    def on(self, device: torch.device, pages: int, length: int) -> TableCopy:
        """Return the copy on a device, up to date; the same one while batch and `pages` stay."""
        copy = self._copies.get(device)
        if copy is None or copy.block_table.shape != (self.batch, pages):
            copy = self._copies[device] = TableCopy(self.batch, pages, device)
        copy.show(self, length)
        return copy

    def indexes(self, begin: int, end: int) -> torch.Tensor:
        """Return where tokens lie in the pool of all tokens, int64 [B * T]."""
        if self._indexes is None or self._indexes[0] != (begin, end):
            token = torch.arange(begin, end)
            page = self.tensor().long()[:, token // PAGE_TOKENS]
            found = (page * PAGE_TOKENS + token % PAGE_TOKENS).flatten()
            self._indexes = (begin, end), found
        return self._indexes[1]

    def _take(self) -> int:
        page = heapq.heappop(self._free) if self._free else self.top
        self.top = max(self.top, page + 1)
        self._holders[page] += 1
        return page

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            heapq.heappush(self._free, page)

    def _changed(self) -> None:
        self._tensor = self._indexes = None
        self.version += 1
