"""The model's one configuration, and how a trained model becomes a HuggingFace folder."""

import json
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from tiny_corpus import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS, USER, VOCAB_SIZE

MAX_POSITIONS = 2048


def tiny_config() -> DeepseekV3Config:
    """Return DeepSeek-V3's architecture in 7.2 M parameters, every mechanism of it switched on."""
    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=8,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        num_mtp_layers=0,  # saved under its DeepSeek name, num_nextn_predict_layers
        tie_word_embeddings=False,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )


def routers(model: nn.Module) -> list[DeepseekV3TopkRouter]:
    """Return the routers of the MoE layers, first layer first."""
    return [m for m in model.modules() if isinstance(m, DeepseekV3TopkRouter)]


class LoadCounter:
    """Counts the tokens that each router sends to each expert, until it is closed."""

    def __init__(self, model: nn.Module) -> None:
        """Listen to every router of the model."""
        listened = routers(model)
        self._handles = [
            router.register_forward_hook(partial(self._count, layer))
            for layer, router in enumerate(listened)
        ]
        self._loads_LE = torch.zeros(len(listened), listened[0].num_experts)

    def _count(
        self,
        layer: int,
        _router: nn.Module,
        _inputs: tuple[Tensor, ...],
        output: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        top_k_index = output[2]
        self._loads_LE[layer] += torch.bincount(
            top_k_index.reshape(-1), minlength=self._loads_LE.shape[1]
        )

    def take(self) -> Tensor:
        """Return the counts `[MoE layers, E]` since the last call, and start again at zero."""
        loads_LE, self._loads_LE = self._loads_LE, torch.zeros_like(self._loads_LE)
        return loads_LE

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json in the form that transformers 4 reads too.

    As DeepSeek's own, it puts the token of a document's beginning before a text.
    """
    begin = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def save_model(state: dict[str, Tensor], folder: Path) -> None:
    """Write a state dict as a bf16 checkpoint; the routers' correction bias stays in fp32."""
    config = tiny_config()
    model = DeepseekV3ForCausalLM(config)
    model.load_state_dict(state)
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers decorates `to` loosely
    model.config.dtype = torch.bfloat16
    for name, module in model.named_modules():
        if isinstance(module, DeepseekV3TopkRouter):
            module.e_score_correction_bias.data = state[f"{name}.e_score_correction_bias"].float()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    # The writer leaves the weights readable by their owner alone.
    (folder / "model.safetensors").chmod(0o644)
