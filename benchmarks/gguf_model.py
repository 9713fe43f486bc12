"""A DeepSeek-V2 checkpoint of HuggingFace's as a GGUF file, for llama.cpp and its forks.

The tensors stay in bf16 (norms and router in fp32, as llama.cpp wants them); llama.cpp's own
quantiser makes the rest of it. Experts of a layer are stacked, and `kv_b_proj` is split into the
two halves that absorbed attention multiplies with, the one of the keys transposed. There is no
tokenizer in the file: benchmarks pass token ids.

llama.cpp and ik_llama.cpp take a model of 26 or 27 layers for V2-Lite, which has no `q_lora_rank`,
and want one of every other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig

from ktransformers.base import Checkpoint
from ktransformers.checkpoint import open_checkpoint

ARCHITECTURE = "deepseek2"
NO_TOKENIZER = "no_vocab"
KIND = gguf.GGMLQuantizationType

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Of what a layer has, after "model.layers.N."; experts and kv_b_proj are not one to one.
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
IN_FP32 = re.compile(r"norm\.weight$|ffn_gate_inp")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: its shape, rows last, and what makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def kind(self) -> gguf.GGMLQuantizationType:
        """Return how its values are stored."""
        return KIND.F32 if IN_FP32.search(self.name) else KIND.BF16

    def nbytes(self) -> int:
        """Return what it takes in the file."""
        return torch.Size(self.shape).numel() * (4 if self.kind == KIND.F32 else 2)

    def array(self) -> np.ndarray[Any, Any]:
        """Return the values; numpy has no bf16, so those are bytes."""
        tensor = self.make()
        assert tensor.shape == self.shape
        if self.kind == KIND.F32:
            return tensor.float().contiguous().numpy()
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()


def stored_tensors(checkpoint: Checkpoint, config: PreTrainedConfig) -> Iterator[Stored]:
    """Say what a checkpoint becomes. Raises ValueError for a tensor that has no counterpart."""
    for name, info in checkpoint.infos().items():
        layer, expert = LAYER.fullmatch(name), None
        if layer is not None:
            expert = EXPERT.fullmatch(layer[2])
        if expert is not None:
            if expert[1] == "0":  # stands for all of the layer
                yield _stacked(checkpoint, config.n_routed_experts, name, info.shape)
        elif layer is not None and layer[2] == "self_attn.kv_b_proj.weight":
            yield from _halves(checkpoint, config, name, f"blk.{layer[1]}")
        else:
            yield Stored(stored_name(name), info.shape, partial(checkpoint.read, name))


def stored_name(name: str) -> str:
    """Return what GGUF calls a tensor that is taken as it is. Raises ValueError for another."""
    layer = LAYER.fullmatch(name)
    known = LAYER_NAMES.get(layer[2]) if layer else NAMES.get(name)
    if known is None:
        raise ValueError(f"{name}: has no counterpart in llama.cpp's {ARCHITECTURE}")
    return f"blk.{layer[1]}.{known}" if layer else known


def _stacked(checkpoint: Checkpoint, experts: int, first: str, shape: tuple[int, ...]) -> Stored:
    layer, of = first.split(".")[2], first.split(".")[-2].removesuffix("_proj")
    before, after = first.split(".experts.0.")

    def make() -> torch.Tensor:
        names = (f"{before}.experts.{e}.{after}" for e in range(experts))
        return torch.stack([checkpoint.read(name) for name in names])

    return Stored(f"blk.{layer}.ffn_{of}_exps.weight", (experts, *shape), make)


def _halves(
    checkpoint: Checkpoint, config: PreTrainedConfig, name: str, block: str
) -> Iterator[Stored]:
    """Split kv_b_proj `[H * (Dn + Dv), C]` into `[H, C, Dn]` and `[H, Dv, C]`."""
    H, C = config.num_attention_heads, config.kv_lora_rank
    Dn, Dv = config.qk_nope_head_dim, config.v_head_dim

    def heads() -> torch.Tensor:
        return checkpoint.read(name).view(H, Dn + Dv, C)

    yield Stored(f"{block}.attn_k_b.weight", (H, C, Dn), lambda: heads()[:, :Dn].transpose(1, 2))
    yield Stored(f"{block}.attn_v_b.weight", (H, Dv, C), lambda: heads()[:, Dn:])


def add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    """Say what llama.cpp has to know of the model."""
    head, rope = config.qk_nope_head_dim + config.qk_rope_head_dim, config.rope_parameters
    writer.add_tokenizer_model(NO_TOKENIZER)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # Absorbed attention has one head of keys, the latent.
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(head)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])  # llama.cpp's 0.1 ln(x)


def write_gguf(folder: Path, path: Path) -> None:
    """Write the model in `folder` to one GGUF file in bf16, a tensor at a time."""
    config, checkpoint = AutoConfig.from_pretrained(folder), open_checkpoint(folder)
    tensors = list(stored_tensors(checkpoint, config))
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    add_metadata(writer, config)
    for tensor in tensors:
        unused = np.dtype(np.float32)  # where the kind is given
        writer.add_tensor_info(tensor.name, tensor.shape, unused, tensor.nbytes(), tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.array())
    writer.close()
