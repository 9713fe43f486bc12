"""A tiny random model with a tokenizer of bytes, on disk, and rules for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tiny_models import random_model, v3_config

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
CONTEXT = 256

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "assistant: "
)

RULES = r"""# Routed experts in int8.
vars: {threads: 1}
rules:
  - match: {name: '\.mlp\.experts$'}
    replace:
      class: ktransformers.operators.experts.CpuExperts
      kwargs: {weight: int8, threads: '${threads}'}
"""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are bytes, so that a character may be several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, PAD, *alphabet])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model that never ends an answer by itself when decoding greedily."""
    model = random_model(
        v3_config(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, rope_parameters=None)
    )
    with torch.no_grad():
        model.lm_head.weight[:3] = 0  # bos, eos and pad never have the highest logit
    path = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def rule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(RULES)
    return path
