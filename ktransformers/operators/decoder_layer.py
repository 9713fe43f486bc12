"""A whole decoder layer of DeepSeek-V2 or V3 on the CPU, in one native call.

Takes the place of the layer and consumes all of it: norms, attention, router, experts, MLP. What
each step computes is what `CpuLinear`, `MlaAttention` and `CpuExperts` compute in its place, from
weights in the same formats; between them nothing returns to Python, and nothing is allocated or
copied. `csrc/decoder/decoder.h` has the formula, and says where values are rounded.

The new tokens go straight into the pages of a `LatentCache`; any other cache is updated between
two calls.

Shape suffixes: B sequences, T new tokens, D hidden_size, H heads, C kv_lora_rank, R
qk_rope_head_dim, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import Cache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.utils.output_capturing import _active_collector
from typing_extensions import Self

from ktransformers import _native
from ktransformers.attention_mask import valid_keys
from ktransformers.base import Chain, ChainEnds, Checkpoint, Footprint, Site
from ktransformers.cache import LatentCache, LatentPages
from ktransformers.cpu_options import (
    check_cache_format,
    check_site,
    chunk_size,
    thread_count,
    weight_format,
)
from ktransformers.decoder_weights import weights_of_layer
from ktransformers.last_position import only_last_position
from ktransformers.numa import Placement, weight_placement
from ktransformers.packed_weights import ExpertsWeights, LatentWeights, PlainWeight
from ktransformers.placement import PackedMatrices, PlacedOperator, PlacedTensor
from ktransformers.rules import top_k_of_layer

UNKEPT = ("attentions", "router_logits")  # of what transformers records
DENSE_CHUNK = 256  # tokens: all of them share a dense MLP's weights, no more are needed
V2_METHODS = ("greedy", "group_limited_greedy")


class CpuDecoderLayer(PlacedOperator):
    """Compute a decoder layer of DeepSeek-V2 or V3 on the CPU from packed weights."""

    causal: ClassVar[bool] = True

    def __init__(
        self,
        module: nn.Module,
        site: Site,
        *,
        weight_format: str,
        threads: int,
        placement: Placement,
        chunk_tokens: int | None,
        top_k: int | None,
        cache_format: str | None,
    ):
        nn.Module.__init__(self)  # what transformers' layer would make, V2 and V3 below have not
        attention: Any = module.self_attn
        self.site = site
        self.weight_format = weight_format
        self.threads = threads
        self.chunk_tokens = chunk_tokens
        self.cache_format = cache_format
        self.layer_idx: int = attention.layer_idx
        self.kv_lora_rank: int = attention.kv_lora_rank
        self.qk_rope_head_dim: int = attention.qk_rope_head_dim
        self.q_shape: tuple[int, int] = (attention.num_heads, attention.qk_head_dim)
        self.scaling: float = attention.scaling
        self.reduced_top_k = top_k
        self.is_last = self.layer_idx == site.config.num_hidden_layers - 1
        self.weights = weights_of_layer(module, site, weight_format)
        self.num_experts = len(self._routed.modules) if self._routed else 0
        self.top_k = (top_k or site.config.num_experts_per_tok) if self.num_experts else 0
        self.eps: float = module.input_layernorm.variance_epsilon  # type: ignore[assignment, union-attr]  # a norm's
        self.latent_eps: float = attention.kv_a_layernorm.variance_epsilon
        self._layer: _native.DecoderLayer | None = None
        self._record: Callable[[int, torch.Tensor], None] | None = None
        self.place(placement)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        site: Site,
        *,
        weight: Literal["int8", "int4", "bf16"] = "int8",
        group_size: Literal[32, 64, 128] | None = None,
        threads: int | Literal["auto"] = "auto",
        numa: Literal["interleave", "shard", "replicate"] | None = None,
        chunk_tokens: int | None = None,
        top_k: int | Mapping[str, int] | None = None,
        cache_format: Literal["bf16", "fp32", "int8"] | None = None,
    ) -> Self:
        """Build the operator for a decoder layer of DeepSeek-V2 or V3.

        Args:
            weight: the format of all matrices but the router, which is computed in fp32.
            group_size: inputs that share a scale, for int4 alone; 128 where it is not given.
            threads: how many to compute with; auto means every physical core that the process may
                run on, within its CPU quota.
            numa: where the weights of projections and experts lie on a machine of several nodes, as
                CpuExperts says; those of kv_b_proj, norms and router are dealt to all in turn.
            chunk_tokens: how many to compute at a time, which bounds the memory for intermediates;
                where it is not given 1024, or 256 in a layer without experts, whose MLP is wide.
            top_k: experts per token, fewer than configured, or a mapping from layer ranges to
                that, such as {'1-3': 4, '4-60': 6}; layers without experts take no notice.
            cache_format: what `LatentCache.for_model` shall keep latents in; without it the model's
                precision.

        Raises ValueError for another module, and for what is not computed here.
        """
        kinds = {
            v2.DeepseekV2DecoderLayer: CpuDecoderLayerV2,
            v3.DeepseekV3DecoderLayer: CpuDecoderLayerV3,
        }
        kind = next((k for old, k in kinds.items() if isinstance(module, old)), None)
        if kind is None:
            raise ValueError(
                "takes the place of a DeepseekV2DecoderLayer or DeepseekV3DecoderLayer, not of "
                f"{type(module).__name__}"
            )
        _check_config(site.config, kind)
        format_name = weight_format(weight, group_size)
        count, chunk = thread_count(threads), chunk_size(chunk_tokens)
        placement = weight_placement(numa)
        check_cache_format(cache_format)
        check_site(site)
        return kind(  # type: ignore[return-value]  # a subclass
            module,
            site,
            weight_format=format_name,
            threads=count,
            placement=placement,
            chunk_tokens=chunk,
            top_k=_top_k(top_k, module, site),
            cache_format=cache_format,
        )

    @property
    def _routed(self) -> ExpertsWeights | None:
        routed = self.weights.get("experts")
        assert routed is None or isinstance(routed, ExpertsWeights)
        return routed

    def packed_matrices(self) -> dict[str, PackedMatrices]:
        """Name all packed tensors of the layer."""
        return {
            name: of for weights in self.weights.values() for name, of in weights.matrices().items()
        }

    def packed_format(self) -> str:
        """Say which of the formats of `csrc/` the bytes are in."""
        return f"{self.weight_format}, a whole layer"

    def footprint(self) -> Footprint:
        """Say what the layer needs beside its cache; a token reads the experts that it takes."""
        flops = nbytes = 0
        for weights in self.weights.values():
            is_routed = weights is self._routed
            share = self.top_k / self.num_experts if is_routed else 1.0
            values = sum(torch.Size(shape).numel() for shape in weights.shapes().values())
            sizes = weights.matrices().values()
            nbytes += int(
                share * sum(torch.Size(m.shape).numel() * m.dtype.itemsize for m in sizes)
            )
            flops += int(share * 2 * values)
        return Footprint(self.site.device, self.packed_bytes(), flops, nbytes)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name every tensor of the layer."""
        return {name: shape for w in self.weights.values() for name, shape in w.shapes().items()}

    def pack_into(self, memory: Mapping[str, PlacedTensor], checkpoint: Checkpoint) -> None:
        """Read, quantise and pack one matrix at a time."""
        for weights in self.weights.values():
            weights.pack(memory, checkpoint)

    def compute_with(self, parts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Build the native layer on these tensors."""
        built: dict[str, Any] = {}
        for name, weights in self.weights.items():
            if isinstance(weights, PlainWeight):
                built[name] = weights.build(parts)
            elif isinstance(weights, LatentWeights):
                how = {"qk_rope_head_dim": self.qk_rope_head_dim, "scaling": self.scaling}
                built[name] = weights.build(parts, threads=self.threads, **how)
            else:
                built[name] = weights.build(
                    parts,
                    threads=self.threads,
                    numa=self.placement.mode,
                    nodes=self.placement.nodes,
                )
        absent = ("q_a", "query_norm", "experts", "router", "router_bias")
        self._layer = _native.DecoderLayer(
            **{**dict.fromkeys(absent), **built},
            **(self.routing() if self.num_experts else {}),
            rotary=self.rotary(),
            scaling=self.scaling,
            eps=self.eps,
            latent_eps=self.latent_eps,
            threads=self.threads,
            chunk_tokens=self.chunk_tokens or (None if self.num_experts else DENSE_CHUNK),
        )

    def experts_per_token(self) -> int | None:
        """Return the number that the probe must find, where it was reduced."""
        return self.reduced_top_k

    def watch_routing(self, record: Callable[[int, torch.Tensor], None] | None) -> None:
        """Report the experts that the native layer chooses."""
        self._record = record if self.num_experts else None

    @classmethod
    def chained(cls, layers: Sequence[Any], ends: ChainEnds) -> Chain | None:
        """Return one native call for all layers and what stands around them."""
        if cls not in (CpuDecoderLayerV2, CpuDecoderLayerV3):  # another may have its own forward
            return None
        natives = [layer._layer for layer in layers]
        if None in natives or any(layer._record for layer in layers):
            return None
        first: CpuDecoderLayer = layers[0]
        dtype = first.site.dtype
        if ends.embedding.dtype != dtype:  # somebody has converted it
            return None
        weights = natives, ends.embedding, ends.norm, ends.eps, ends.head
        width = ends.embedding.shape[1] if ends.head is None else ends.head.out_features

        def chain(
            token_ids: torch.Tensor,
            position_embeddings: Any,
            cache: LatentCache,
            check: Callable[[], object] | None,
        ) -> torch.Tensor:
            ids = token_ids.long().contiguous()
            caches, pages = cache.make_room_in_all(len(ids), 1)
            table, lengths = pages.block_table, pages.lengths
            cos, sin = first.angles(position_embeddings)
            out = torch.empty(len(ids), width, dtype=dtype)
            _native.decode_token(*weights, ids, cos, sin, caches, table, lengths, out, check)
            cache.wrote_in_all(1)
            return out

        return chain

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the layer's output, [B, T, D], in the input's dtype.

        Raises RuntimeError for outputs that are not kept, for a gradient, and where weights are
        not loaded; ValueError for masks that are not causal with padding.
        """
        layer = self._layer
        if layer is None:
            raise RuntimeError(self._refusal("weights are not loaded"))
        recorded = _active_collector.get() or ()
        for output in UNKEPT:
            if kwargs.get(f"output_{output}") or output in recorded:
                raise RuntimeError(self._refusal(f"keeps no {output}: no output_{output}"))
        self.check_no_gradient(hidden_states)
        x = hidden_states.contiguous()
        B, T, _ = x.shape
        cos, sin = self.angles(position_embeddings)
        last_only = self.is_last and only_last_position()
        out, chosen = torch.empty_like(x), None
        if self._record is not None:
            chosen = torch.empty(B * (1 if last_only else T), self.top_k, dtype=torch.int32)
        C, R = self.kv_lora_rank, self.qk_rope_head_dim
        if isinstance(past_key_values, LatentCache):
            pages = past_key_values.make_room(self.layer_idx, B, T, C, R)
            L = past_key_values.get_seq_length(self.layer_idx) + T
        else:
            pages, L = LatentPages.of_sequences(x.new_empty(B, T, C), x.new_empty(B, T, R), T), T
        if past_key_values is None or isinstance(past_key_values, LatentCache):
            valid = valid_keys(attention_mask, T, L)
            layer.forward(x, cos, sin, *_arguments(pages), valid, out, chosen, last_only)
        else:
            q = x.new_empty(B, T, *self.q_shape)
            latent, _, rope, table, lengths = _arguments(pages)
            layer.project(x, cos, sin, latent, rope, table, lengths, q)
            found = past_key_values.update(latent[:, None], rope[:, None], self.layer_idx)
            L = int(past_key_values.get_seq_length(self.layer_idx))
            pages = LatentPages.of_sequences(found[0][:, 0], found[1][:, 0], L)
            latent, _, rope, table, lengths = _arguments(pages)
            valid = valid_keys(attention_mask, T, L)
            layer.finish(x, q, latent, rope, table, lengths, valid, out, chosen, last_only)
        if isinstance(past_key_values, LatentCache):
            past_key_values.wrote(self.layer_idx, T)
        if self._record is not None and chosen is not None:
            self._record(self.num_experts, chosen)
        return out

    def angles(self, position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return cosines and sines as the native layer takes them."""
        raise NotImplementedError

    def rotary(self) -> str:
        """Say which values of a row the native layer turns together."""
        raise NotImplementedError

    def routing(self) -> dict[str, Any]:
        """Return how the native layer chooses experts."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show sizes, format and threads where the module tree is printed."""
        mlp = f"{self.top_k} of {self.num_experts} experts" if self.num_experts else "dense"
        sizes = f"num_heads={self.q_shape[0]}, {mlp}"
        return f"{sizes}, weight={self.weight_format}, threads={self.threads}"


# Subclasses of transformers' layers, which is what it records `hidden_states` of.


class CpuDecoderLayerV2(CpuDecoderLayer, v2.DeepseekV2DecoderLayer):
    """With DeepSeek-V2's rotation, by complex numbers, and its router."""

    def angles(self, position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return [B, T, R / 2]: the cosine and the sine of each pair, as a complex number."""
        return position_embeddings, None

    def rotary(self) -> str:
        """Say that neighbours are turned, and stay."""
        return "neighbours"

    def routing(self) -> dict[str, Any]:
        """Return the rule of DeepSeek-V2's router."""
        config = self.site.config
        grouped = config.topk_method == "group_limited_greedy"
        return {
            "top_k": self.top_k,
            "groups": config.n_group if grouped else 1,
            "top_groups": config.topk_group if grouped else 1,
            "routed_scaling": config.routed_scaling_factor,
        }


class CpuDecoderLayerV3(CpuDecoderLayer, v3.DeepseekV3DecoderLayer):
    """With DeepSeek-V3's rotation, by cosines and sines, and its router."""

    def angles(self, position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return [B, T, R] of each; the halves of a row are the same."""
        cos, sin = position_embeddings
        return cos, sin

    def rotary(self) -> str:
        """Say which values are turned; they become halves."""
        return "neighbours_to_halves" if self.site.config.rope_interleave else "halves"

    def routing(self) -> dict[str, Any]:
        """Return the rule of DeepSeek-V3's router."""
        config = self.site.config
        return {
            "top_k": self.top_k,
            "groups": config.n_group,
            "top_groups": config.topk_group,
            "normalise": config.norm_topk_prob,
            "routed_scaling": config.routed_scaling_factor,
        }


def _arguments(
    pages: LatentPages,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    return pages.latent, pages.scale, pages.rope, pages.block_table, pages.lengths


def _check_config(config: Any, kind: type) -> None:
    if config.attention_bias:
        raise ValueError("attention_bias is not supported: projections have no bias here")
    if config.hidden_act != "silu":
        raise ValueError(f"computes silu, but hidden_act is {config.hidden_act!r}")
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(f"num_key_value_heads must equal num_heads, {config.num_attention_heads}")
    if kind is CpuDecoderLayerV2 and config.topk_method not in V2_METHODS:
        raise ValueError(
            f"topk_method {config.topk_method!r} is not supported (expected "
            f"{', '.join(V2_METHODS)})"
        )


def _top_k(top_k: int | Mapping[str, int] | None, module: nn.Module, site: Site) -> int | None:
    """Return the number for a layer; None where it has no experts, or as many as configured."""
    gate = getattr(module.mlp, "gate", None)
    if top_k is None or gate is None:
        return None
    chosen = top_k
    if isinstance(top_k, Mapping):
        chosen = top_k_of_layer(top_k, site.layer, site.config.num_hidden_layers)
    if type(chosen) is not int or not 1 <= chosen <= gate.top_k:
        raise ValueError(f"top_k {chosen!r} is not an integer from 1 to {gate.top_k}")
    return chosen
