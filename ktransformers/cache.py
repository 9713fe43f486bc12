"""The cache of multi-head latent attention: 576 values per token and layer, in pages.

An ordinary transformers `Cache`: `generate` in all its modes takes it, with our attention, which
reads the pages in place, or with transformers' own, which gets the latents gathered. Values are
kept in bf16, in fp32, or the latent in int8, on a GPU in fp8, with a scale per token beside a rope
part in bf16.

A layer's pages lie on the device of the latents that come. Memory for the limit is reserved there:
on the CPU as addresses alone, which the system fills page by page, as tokens come; on a GPU at
once. Whoever asks for more than the limit is told so before any layer works.

Latents and rope parts lie apart, unless an operator makes room for rows of both: a layer is laid
out anew for whoever comes.

**CUDA graphs.** What attention reads, the pages, their table and the lengths, stays at its
addresses and is changed in place, while batch and limit stay. So a step that was recorded after
`make_room_in_all(B, T)` is replayed after another: nothing inside needs the host.

Shape suffixes: B sequences, T new tokens, L cached tokens, C kv_lora_rank, R qk_rope_head_dim, P
pages.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ktransformers.base import Operator
from ktransformers.cache_pages import PAGE_TOKENS, PageTable
from ktransformers.cache_rounding import check_format, quantised

__all__ = ["Format", "LatentCache", "LatentPages", "check_fits"]

Format = Literal["bf16", "fp32", "int8", "fp8"]
DTYPES = {  # of the latent, and of the rope part
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "int8": (torch.int8, torch.bfloat16),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
}
SCALED = ("int8", "fp8")
LayerTensors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]  # latent, scale, rope


@dataclass(frozen=True, slots=True)
class LatentPages:
    """What attention reads of one layer; token i of a sequence is row i % page of its page."""

    latent: torch.Tensor  # [P, page, C]
    scale: torch.Tensor | None  # fp32 [P, page], of an int8 or fp8 latent
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
                scale = torch.empty(shape, device=device)
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
            self.scale.view(-1).index_copy_(0, slots, scale)
        rows = rows.to(self.latent.dtype)
        _movable(self.latent.view(-1, C)).index_copy_(0, slots, _movable(rows))
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
            latent = latent.float() * self.scale.view(-1)[slots, None]
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


def _movable(values: torch.Tensor) -> torch.Tensor:
    """Return a view of what torch can move: it does not index all kinds of fp8 everywhere."""
    return values.view(torch.uint8) if values.itemsize == 1 else values


class LatentCache(Cache):
    """Keys and values of a model with latent attention, compressed, in pages."""

    layers: list[LatentLayer]  # type: ignore[assignment]  # Cache says what any may be

    def __init__(
        self, config: PreTrainedConfig, max_tokens: int, format: Format | None = None
    ) -> None:
        """Make an empty cache.

        Args:
            config: of the model; says how many layers there are and how wide their latents.
            max_tokens: that each sequence may grow to, prompt and answer together.
            format: of the values; without one bf16, or fp32 for a model of another dtype than bf16.

        Raises ValueError for a model without latent attention and for other values than these.
        """
        C = getattr(config, "kv_lora_rank", None)
        if not C:
            raise ValueError(
                f"a LatentCache is for models with latent attention, whose config has a "
                f"kv_lora_rank; {type(config).__name__} has none"
            )
        if type(max_tokens) is not int or max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens!r} is not a number of 1 or more")
        exact: Format = "bf16" if config.dtype == torch.bfloat16 else "fp32"
        self.format: Format = exact if format is None else format
        if self.format not in get_args(Format):
            raise ValueError(f"format {format!r} is not supported (expected bf16, fp32, int8, fp8)")
        self.max_tokens = max_tokens
        self.table = PageTable()
        self._token_ids = torch.empty(0, 0, dtype=torch.long)
        R = config.qk_rope_head_dim
        layers = [
            LatentLayer(self.table, C, R, max_tokens, self.format)
            for _ in range(config.num_hidden_layers)
        ]
        self._sizes = (len(layers), C, R)
        self._maker: weakref.ref[PreTrainedModel] | None = None
        super().__init__(layers=list(layers))

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, max_tokens: int, format: Format | None = None
    ) -> LatentCache:
        """Make a cache in the format given, or that its attention was planned for, or exact.

        Raises ValueError where layers were planned for different ones.
        """
        exact: Format = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        operators = (module for module in model.modules() if isinstance(module, Operator))
        planned = sorted({each.cache_format for each in operators if each.cache_format})
        if format is None and len(planned) > 1:
            raise ValueError(f"layers were planned for caches in {', '.join(planned)}: pass format")
        return cls(model.config, max_tokens, format or (planned[0] if planned else exact))  # type: ignore[arg-type]  # what is none, the next line refuses

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that have been in use."""
        return sum(
            tensor[: self.table.top].nbytes
            for layer in self.layers
            for tensor in layer.tensors().values()
        )

    @property
    def batch_size(self) -> int:
        """The number of sequences; -1 while there is none."""
        return self.table.batch or -1

    def append(self, latent: torch.Tensor, rope: torch.Tensor, layer_idx: int) -> LatentPages:
        """Cache new tokens of a layer, [B, T, C] and [B, T, R]; return what attention reads.

        Raises ValueError where they do not fit, come for another number of sequences, or are of
        another model.
        """
        self._prepare(layer_idx, latent.shape, rope.shape[-1], latent.device, in_rows=False)
        return self.layers[layer_idx].append(latent, rope)

    def make_room(
        self,
        layer_idx: int,
        B: int,
        T: int,
        C: int,
        R: int,
        device: torch.device | None = None,
        *,
        in_rows: bool | None = False,
    ) -> LatentPages:
        """Return where to write T new tokens of a layer: the last of each sequence.

        On a device, if one is given, or where the layer is, in rows of both parts or apart; None:
        as the layer is. They count as cached once `wrote` says so. Raises ValueError as `append`
        does.
        """
        self._prepare(layer_idx, (B, T, C), R, device, in_rows)
        return self.layers[layer_idx].pages(new=T)

    def wrote(self, layer_idx: int, T: int) -> None:
        """Count the tokens that a layer had room for and has written; below 0 take that back."""
        self.layers[layer_idx].length += T

    def make_room_in_all(self, B: int, T: int) -> tuple[list[LayerTensors], LatentPages]:
        """Do for all layers, which hold the same tokens, what `make_room` does for one.

        Returns the tensors of each, and the first one's pages. What `wrote` says of each layer is
        for the caller to say.
        """
        _, C, R = self._sizes
        first = self.make_room(0, B, T, C, R, in_rows=None)
        for layer in self.layers:
            assert layer.length == self.layers[0].length
            layer.reserve()
            if layer.device != first.latent.device:
                layer.pages(new=T)
        return [(layer.latent, layer.scale, layer.rope) for layer in self.layers], first

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache latents [B, 1, T, C] and rope parts [B, 1, T, R]; return all, contiguous."""
        B, _, T, C = key_states.shape
        self._prepare(layer_idx, (B, T, C), value_states.shape[-1], key_states.device)
        return super().update(key_states, value_states, layer_idx)

    def _prepare(
        self,
        layer_idx: int,
        latent: Sequence[int],
        R: int,
        device: torch.device | None,
        in_rows: bool | None = None,
    ) -> None:
        """Have pages for new tokens in every sequence, of shapes [B, T, C] and [B, T, R]."""
        B, T, C = latent
        self._check_sizes(max(layer_idx + 1, len(self.layers)), C, R)
        layer = self.layers[layer_idx]
        self.check_request(B, layer.length + T)
        if self.table.batch != B:
            self.table.start(B)
        layer.reserve(device, in_rows)
        copies = self.table.reserve(layer.length, layer.length + T)
        if copies:
            source, target = torch.tensor(copies).unbind(1)
            for each in self.layers:
                if each.is_initialized:
                    each.reserve()
                    for tensor in each.tensors().values():
                        _movable(tensor)[target] = _movable(tensor)[source]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out who filled this: a weak reference can't be pickled."""
        return {**vars(self), "_maker": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCache:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__ |= copy.deepcopy(vars(self), memo)
        return twin

    def claim(self, model: PreTrainedModel) -> None:
        """Note that a model is to fill this.

        Raises ValueError where it holds what another has computed, or is for one of other sizes.
        """
        self.check_model(model.config)
        if self._maker is not None and self.completed() and self._maker() is not model:
            raise ValueError(
                "this cache was filled by another model, or under other rules; reset it, or make "
                "one for each"
            )
        self._maker = weakref.ref(model)

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise ValueError where this cache was made for a model of other sizes."""
        sizes = (config.num_hidden_layers, config.kv_lora_rank, config.qk_rope_head_dim)
        self._check_sizes(*sizes)

    def _check_sizes(self, *theirs: int) -> None:
        if self._sizes != theirs:
            sizes = "{} layers of {} + {} values"
            raise ValueError(
                f"this cache was made for another model: it has {sizes.format(*self._sizes)}, and "
                f"{sizes.format(*theirs)} are to be cached"
            )

    def check_request(self, batch: int, length: int) -> None:
        """Raise ValueError where so many sequences can't grow to so many tokens here."""
        if batch != self.table.batch and any(layer.length for layer in self.layers):
            raise ValueError(
                f"the cache holds {self.table.batch:,} sequences, but {batch:,} came; reset it, or "
                "repeat or select its sequences first"
            )
        check_fits(length, self.max_tokens)

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens of every layer; repairs what an interrupt has left."""
        for layer in self.layers:
            layer.length = min(layer.length, length)
        self.table.cut(max(layer.length for layer in self.layers))
        self._token_ids = self._token_ids[:, :length]

    def completed(self) -> int:
        """Return how many tokens all layers have, also after a forward was interrupted."""
        return min(layer.length for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every sequence, their number given as 0 or less."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) would add tokens: pass a negative number to remove so "
                "many, or call cut(length)"
            )
        self.cut(max(0, self.get_seq_length() + tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens; memory that was in use is kept for the next."""
        self.cut(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let the sequences be copies of these."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences, given by number or by a mask of booleans."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, copies side by side."""
        self._select([index for index in range(self.table.batch) for _ in range(repeats)])

    def _select(self, sequences: Sequence[int]) -> None:
        self.table.select(sequences)
        if len(self._token_ids):
            self._token_ids = self._token_ids[list(sequences)]

    @property
    def token_ids(self) -> torch.Tensor:
        """The ids of the first cached tokens, [B, n], as far as they are known."""
        return self._token_ids

    def note_tokens(self, token_ids: torch.Tensor) -> None:
        """Say which tokens are cached, [B, n]; more than there are is ignored."""
        self._token_ids = token_ids[:, : self.completed()].to("cpu", copy=True)

    def keep_prefix(self, input_ids: torch.Tensor) -> int:
        """Keep what a prompt, [1, T], has in common with the cached tokens; return how much.

        At least one token of the prompt is left to compute, since its logits are wanted.
        """
        known = self._token_ids
        common = 0
        if len(known) == len(input_ids) == 1:
            n = min(known.shape[1], input_ids.shape[1] - 1)
            same = known[0, :n] == input_ids[0, :n].cpu()
            common = n if same.all() else int(same.int().argmin())
        self.cut(common)
        return common
