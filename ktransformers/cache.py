"""The cache of multi-head latent attention: 576 values per token and layer, in pages.

An ordinary transformers `Cache`: `generate` in all its modes takes it, with our attention, which
reads the pages in place, or with transformers' own, which gets the latents gathered. Values are
kept in bf16, in fp32, or the latent in int8, with a scale for 128 of a token's values, on a GPU in
fp8, with one for each token, beside a rope part in bf16.

A layer's pages lie on the device of the latents that come. Memory for the limit is reserved there:
on the CPU as addresses alone, which the system fills page by page, as tokens come; on a GPU at
once. Whoever asks for more than the limit is told so before any layer works.

Latents and rope parts lie apart, unless an operator makes room for rows of both: a layer is laid
out anew for whoever comes.

**CUDA graphs.** What attention reads, the pages, their table and the lengths, stays at its
addresses and is changed in place, while batch and limit stay. So a step that was recorded after
`make_room_in_all(B, T)` is replayed after another: nothing inside needs the host.

Shape suffixes: B sequences, T new tokens, L cached tokens, C kv_lora_rank, R qk_rope_head_dim, P
pages, G groups of latents that share a scale.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, get_args

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ktransformers.base import Operator
from ktransformers.cache_layer import (
    DTYPES,
    SCALED,
    Format,
    LatentLayer,
    LatentPages,
    check_fits,
    movable,
)
from ktransformers.cache_pages import PageTable

__all__ = [
    "DTYPES",
    "SCALED",
    "Format",
    "LatentCache",
    "LatentPages",
    "check_fits",
    "default_limit",
]

GPU_TOKENS = 16384  # what `ktransformers plan` leaves room for, where nobody says
LayerTensors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]  # latent, scale, rope


def default_limit(model: PreTrainedModel, wanted: int = 0) -> int:
    """Return for how many tokens a cache is made where nobody says.

    On the CPU memory is taken as tokens come, and a model gets what it was made for; on a GPU it is
    taken at once, and there it gets `GPU_TOKENS` at most, or as many as are `wanted`.
    """
    limit: int = model.config.max_position_embeddings
    if any(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers())):
        limit = min(limit, GPU_TOKENS)
    return max(limit, wanted)


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
            raise ValueError(
                f"layers were planned for caches in {', '.join(planned)}: give all rules one "
                "cache_format, or pass format (--cache-format)"
            )
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

    def wrote_in_all(self, T: int) -> None:
        """Do for all layers what `wrote` does for one."""
        for layer in self.layers:
            layer.length += T

    def make_room_in_all(self, B: int, T: int) -> tuple[list[LayerTensors], LatentPages]:
        """Do for all layers, which hold the same tokens, what `make_room` does for one.

        Returns the tensors of each, and the first one's pages. They count as cached once
        `wrote_in_all` says so.
        """
        _, C, R = self._sizes
        first = self.make_room(0, B, T, C, R, in_rows=None)
        length, pages = self.layers[0].length, self.layers[0].reserved
        device = first.latent.device
        for layer in self.layers:
            assert layer.length == length
            if layer.reserved < pages:
                layer.reserve()
            if layer.latent.device != device:
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
                        movable(tensor)[target] = movable(tensor)[source]

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
