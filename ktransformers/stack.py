"""From token ids to the logits of each sequence's last position, which is all generation wants.

A model that we know is taken apart: its embedding, decoder layers, norm and head are called one
after the other, without what transformers does around them at every forward (0.5 ms a token, and a
causal mask of queries x keys, where attention that is causal by itself needs none). Any other is
called as it is. Either way the last layer's MLP or experts, the queries of our attention there, and
the head are computed for the last position alone; a plain `forward` computes everything.

Shape suffixes: B sequences, T new tokens, L cached tokens with them, V vocab_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from ktransformers.base import Chain, ChainEnds, Operator
from ktransformers.cache import LatentCache
from ktransformers.last_position import FULL_OUTPUTS, last_position_of, last_position_only

KNOWN = (  # forwards of a causal language model and of its base, which `DecoderStack` does alike
    (v2.DeepseekV2ForCausalLM.forward, v2.DeepseekV2Model.forward),
    (v3.DeepseekV3ForCausalLM.forward, v3.DeepseekV3Model.forward),
)
NORMS = (v2.DeepseekV2RMSNorm, v3.DeepseekV3RMSNorm)
FIXED_ROPE = ("default", "linear", "yarn", "llama3")  # others turn by the length so far, too
BLOCK = 64  # positions whose angles are computed together: one costs as much


class LastLogits(Protocol):
    """What reads tokens into a cache."""

    def __call__(
        self,
        token_ids: torch.Tensor,
        cache: LatentCache,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read new tokens [B, T] into a cache; return the logits of the last of each, [B, V].

        Args:
            token_ids: come after what the cache holds.
            cache: is filled.
            attention_mask: 0 for padding, [B, L].
            position_ids: [B, T]; where there is no padding, those in the cache.
        """


def last_logits_of(model: PreTrainedModel) -> LastLogits:
    """Return the fastest way that is right for a model as it is now."""
    if DecoderStack.fits(model):
        return DecoderStack(model).last_logits
    return functools.partial(_whole_forward, model)


class DecoderStack:
    """The parts of a DeepSeek-V2 or V3 model, whatever operators stand among them."""

    def __init__(self, model: PreTrainedModel, check: Callable[[], object] | None = None):
        """Take a model that `fits` apart; `check` is called before each layer."""
        base: Any = model.base_model
        self.check = check
        self.config = model.config
        self.embedding: nn.Module = base.embed_tokens
        self.rotary: nn.Module = base.rotary_emb
        self.layers: list[nn.Module] = list(base.layers[: model.config.num_hidden_layers])
        self.norm: nn.Module = base.norm
        self.head: nn.Module = model.lm_head
        self.needs_mask = not all(_is_causal(layer) for layer in self.layers)
        self.has_fixed_angles = base.rotary_emb.rope_type in FIXED_ROPE
        self._ends = self._chain_ends()
        self.chain = None if self._ends is None else _chain_of(self.layers, self._ends)
        self._angles: tuple[int, list[Any]] | None = None  # from a position on

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Return whether the model's forward does what this does, and nobody would miss it."""
        base = model.base_model
        if (type(model).forward, type(base).forward) not in KNOWN:
            return False
        changed = _is_changed(model) or _is_changed(base)
        recorded = (*FULL_OUTPUTS, "output_attentions")
        return not changed and not any(getattr(model.config, name, None) for name in recorded)

    def last_logits(
        self,
        token_ids: torch.Tensor,
        cache: LatentCache,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `LastLogits`."""
        T, past = token_ids.shape[1], cache.get_seq_length()
        is_next = T == 1 and attention_mask is None and position_ids is None
        if is_next and self.chain is not None and self._ends is not None:
            angles = self._next_angles(self._ends.embedding, past)
            out = self.chain(token_ids, angles, cache, self.check)
            return out if self._ends.head is not None else self._logits(out[:, None])
        x = self.embedding(token_ids)
        mask: Any = attention_mask
        if is_next:
            angles = self._next_angles(x, past)
        else:
            if position_ids is None:
                position_ids = torch.arange(past, past + T, device=x.device)[None]
            angles = self.rotary(x, position_ids)
            if self.needs_mask:
                mask = create_causal_mask(self.config, x, mask, cache, position_ids)
        for layer in self.layers:
            if self.check is not None:
                self.check()
            narrow = T > 1 and layer is self.layers[-1]
            with last_position_of(layer) if narrow else nullcontext():
                x = layer(
                    x,
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    position_embeddings=angles,
                )
        return self._logits(self.norm(x[:, -1:]))

    def logits_device(self) -> torch.device:
        """Return where logits come from; an operator brings them back to where its input was."""
        head = self.norm if isinstance(self.head, Operator) else self.head
        return next((tensor.device for tensor in head.parameters()), torch.device("cpu"))

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(normed)[:, -1]
        return logits

    def _chain_ends(self) -> ChainEnds | None:
        """Return what stands around the layers; None where that is not what a chain can do."""
        embedding, head = self.embedding, self.head
        norm: Any = self.norm
        if type(embedding) is not nn.Embedding or type(norm) not in NORMS:
            return None
        if embedding.max_norm is not None or (
            torch.is_grad_enabled() and embedding.weight.requires_grad
        ):
            return None
        tensors = embedding.weight.detach(), norm.weight.detach()
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        if tensors[0].dtype != tensors[1].dtype or _is_changed(embedding) or _is_changed(norm):
            return None
        linear = None
        if isinstance(head, Operator) and not _is_changed(head):
            linear = head.native_linear()
        return ChainEnds(*tensors, norm.variance_epsilon, linear)

    def _next_angles(self, x: torch.Tensor, past: int) -> Any:
        """Return the angles of the next position, out of those of some together.

        Of `x` dtype and device count.
        """
        if not self.has_fixed_angles:
            return self.rotary(x, torch.tensor([[past]], device=x.device))
        first = past // BLOCK * BLOCK
        if self._angles is None or self._angles[0] != first:
            position_ids = torch.arange(first, first + BLOCK, device=x.device)[None]
            self._angles = first, _of_each(self.rotary(x, position_ids))
        return self._angles[1][past - first]


def _of_each(angles: Any) -> list[Any]:
    """Return the angles of each position, out of those of some."""
    if isinstance(angles, torch.Tensor):  # complex, of V2
        return list(angles.split(1, dim=1))
    return list(zip(*(part.split(1, dim=1) for part in angles), strict=True))  # cosines and sines


def _is_changed(module: nn.Module) -> bool:
    """Return whether somebody put a forward or a hook of their own on it."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _chain_of(layers: Sequence[nn.Module], ends: ChainEnds) -> Chain | None:
    first = layers[0]
    if not isinstance(first, Operator) or any(
        type(layer) is not type(first) or _is_changed(layer) for layer in layers
    ):
        return None
    return first.chained(layers, ends)


def _is_causal(layer: nn.Module) -> bool:
    attention = layer if isinstance(layer, Operator) else layer.self_attn
    return isinstance(attention, Operator) and attention.causal


def _whole_forward(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    cache: LatentCache,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `LastLogits`."""
    with last_position_only(model):
        logits: torch.Tensor = model(
            input_ids=token_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
    return logits[:, -1]
