"""What operators in the place of DeepSeek's latent attention have in common, wherever they compute.

Such an operator takes the place of the whole attention module and consumes its `kv_b_proj` alone,
whose two halves are W_UK and W_UV. With a query q = [q_nope, q_rope] and the cached latent c and
rope part r of each token:

    score = scaling * (q_nope . (W_UK c) + q_rope . r)
          = scaling * ((W_UK^T q_nope) . c + q_rope . r)
    out   = W_UV (sum over tokens of softmax(score) * c)

so that the cache need not be expanded: it is read once for all heads. YaRN's mscale is part of
`scaling`. All other projections and norms stay modules, are called through their `forward`, and may
be claimed by other rules.

Shape suffixes: B sequences, T new tokens, L cached tokens with them, H heads, C kv_lora_rank,
Dn qk_nope_head_dim, R qk_rope_head_dim, Dv v_head_dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Cache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from ktransformers.base import Footprint, PackedOperator, Site
from ktransformers.last_position import only_last_position

Output = tuple[torch.Tensor, None]  # the second would be the attention weights


class LatentAttention(PackedOperator):
    """Queries, latents and rope parts from modules, attention from `compute`."""

    consumes: ClassVar[tuple[str, ...]] = ("kv_b_proj",)
    causal: ClassVar[bool] = True

    q_proj: nn.Module  # or, where there is a q_lora_rank, the three below
    q_a_proj: nn.Module
    q_a_layernorm: nn.Module
    q_b_proj: nn.Module
    kv_a_proj_with_mqa: nn.Module
    kv_a_layernorm: nn.Module
    o_proj: nn.Module

    def __init__(self, module: nn.Module, site: Site):
        super().__init__()
        self.site = site
        self.layer_idx: int = module.layer_idx  # type: ignore[assignment]  # what attention holds
        self.num_heads: int = module.num_heads  # type: ignore[assignment]
        self.kv_lora_rank: int = module.kv_lora_rank  # type: ignore[assignment]
        self.qk_nope_head_dim: int = module.qk_nope_head_dim  # type: ignore[assignment]
        self.qk_rope_head_dim: int = module.qk_rope_head_dim  # type: ignore[assignment]
        self.v_head_dim: int = module.v_head_dim  # type: ignore[assignment]
        self.scaling: float = module.scaling  # type: ignore[assignment]
        self.is_last = self.layer_idx == site.config.num_hidden_layers - 1
        self.has_q_lora = module.q_lora_rank is not None
        for name, child in module.named_children():
            if name not in self.consumes:
                setattr(self, name, child)

    def footprint_on(self, device: torch.device) -> Footprint:
        """Say what kv_b_proj needs; what attention itself needs depends on the context."""
        nbytes = self.packed_bytes()
        flops = 2 * self.num_heads * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        return Footprint(device, nbytes, flops, nbytes)

    def attend(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        output_attentions: bool | None,
    ) -> Output:
        """Return the attention's output, [B, T, hidden_size], in the input's dtype."""
        if output_attentions or (output_attentions is None and self.site.config.output_attentions):
            raise RuntimeError(self._refusal("keeps no attention weights: no output_attentions"))
        self.check_no_gradient(hidden_states)
        B, T = hidden_states.shape[:2]
        last_only = self.is_last and only_last_position()
        asking = hidden_states[:, -1:] if last_only else hidden_states
        q = self._queries(asking).view(B, asking.shape[1], self.num_heads, -1)
        widths = (self.kv_lora_rank, self.qk_rope_head_dim)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split(widths, dim=-1)
        latent = self.kv_a_layernorm(latent)
        q_rope = q[..., self.qk_nope_head_dim :]
        if last_only:
            rotated, _ = self.rotate(q_rope, k_rope[:, -1:], _last(position_embeddings))
            _, k_rope = self.rotate(k_rope[:, :, None], k_rope, position_embeddings)
        else:
            rotated, k_rope = self.rotate(q_rope, k_rope, position_embeddings)
        q_rope.copy_(rotated)
        out = self.compute(q, latent, k_rope, attention_mask, past_key_values)
        return self.o_proj(out).expand(B, T, -1), None  # nothing reads others than the last

    def compute(
        self,
        q: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """Cache new tokens and attend to all; return [B, *, H * Dv] in the queries' dtype.

        Args:
            q: of all new tokens, or of the last alone, [B, T or 1, H, Dn + R], rotated.
            latent: [B, T, C].
            k_rope: [B, T, R], rotated.
            attention_mask: as transformers hands it to attention.
            cache: is filled; without one the new tokens are all there are.
        """
        raise NotImplementedError

    def updated(
        self, latent: torch.Tensor, rope: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Cache new tokens in another cache than ours, or in none.

        Returns all, [B, >= L, C] and [B, >= L, R], and L: a static cache has room at its end.
        """
        if cache is None:
            return latent, rope, latent.shape[1]
        found = cache.update(latent[:, None], rope[:, None], self.layer_idx)
        latent, rope = (states[:, 0] for states in found)
        return latent, rope, int(cache.get_seq_length(self.layer_idx))

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the rope parts of queries [B, T, H, R] and keys [B, T, R]."""
        raise NotImplementedError

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.has_q_lora:
            return self.q_proj(hidden_states)  # type: ignore[no-any-return]  # what a module gives
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))  # type: ignore[no-any-return]  # likewise


def structure(module: nn.Module) -> type[LatentAttention]:
    """Return whose arguments and rotation a module has: `DeepseekV2` or `DeepseekV3`.

    Raises ValueError for a module that is none of their attention.
    """
    kinds = {v2.DeepseekV2Attention: DeepseekV2, v3.DeepseekV3Attention: DeepseekV3}
    kind = next((k for old, k in kinds.items() if isinstance(module, old)), None)
    if kind is None:
        raise ValueError(
            "takes the place of a DeepseekV2Attention or DeepseekV3Attention, not of "
            f"{type(module).__name__}"
        )
    if module.num_key_value_groups != 1:
        raise ValueError(f"num_key_value_heads must equal num_heads, {module.num_heads}")
    return kind


def _last(position_embeddings: Any) -> Any:
    """Return the last position's angles, complex or cosines and sines."""
    if isinstance(position_embeddings, torch.Tensor):
        return position_embeddings[:, -1:]
    return tuple(part[:, -1:] for part in position_embeddings)


class DeepseekV2(LatentAttention):
    """With DeepSeek-V2's order of arguments and its rotation, by complex numbers."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Output:
        """See `attend`."""
        asked = kwargs.get("output_attentions")
        return self.attend(
            hidden_states, position_embeddings, attention_mask, past_key_values, asked
        )

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate pairs of neighbours by the angles of `position_embeddings`, [B, T, R / 2]."""
        q, k = v2.apply_rotary_emb(q.transpose(1, 2), k[:, None], position_embeddings)
        return q.transpose(1, 2), k[:, 0]


class DeepseekV3(LatentAttention):
    """With DeepSeek-V3's order of arguments and its rotation, by cosines and sines."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Output:
        """See `attend`."""
        asked = kwargs.get("output_attentions")
        return self.attend(
            hidden_states, position_embeddings, attention_mask, past_key_values, asked
        )

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate by cosines and sines, [B, T, R] each; neighbours where the weights say so."""
        interleaved = self.site.config.rope_interleave
        rotate = v3.apply_rotary_pos_emb_interleave if interleaved else v3.apply_rotary_pos_emb
        cos, sin = position_embeddings
        q, k = rotate(q, k[:, :, None], cos, sin, unsqueeze_dim=2)
        return q, k[:, :, 0]
