"""What the checkpoint is worth: perplexity, what fewer experts cost, who works, and samples.

Perplexity is exp of the mean cross entropy per token over back-to-back windows of one stream of
held-out documents, each `<|bos|> document <|eos|>`; a window's first token is not predicted, and
nothing before the window is seen. Bits per byte of text do not depend on the tokenizer.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from tiny_corpus import BOS, EOS, split_documents
from tiny_model import LoadCounter, routers

TOKENS_PER_FORWARD = 8192
TEMPERATURE = 0.7  # of the samples


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out stream `[tokens]` and the bytes of text behind it."""

    ids: Tensor
    text_bytes: int


def load_tokenizer(folder: Path) -> Fast:
    """Load the tokenizer as any user would."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, Fast)
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype) -> DeepseekV3ForCausalLM:
    """Load the model as any user would, in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert isinstance(model, DeepseekV3ForCausalLM)
    model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    return model


def read_held_out(path: Path, tokenizer: Fast) -> HeldOut:
    """Read and encode the shipped held-out text."""
    text = path.read_text(encoding="utf-8")
    stream = "".join(f"{BOS}{document}{EOS}" for document in split_documents(text))
    # Not verbose: the stream is cut into windows before any model sees it.
    ids = tokenizer(stream, add_special_tokens=False, verbose=False)["input_ids"]
    return HeldOut(torch.tensor(ids), len(text.encode()))


@torch.no_grad()
def nats_per_token(model: DeepseekV3ForCausalLM, ids: Tensor, *, window: int = 512) -> float:
    """Return the mean cross entropy of the stream `ids`, read in windows of `window` tokens."""
    assert 1 < window <= TOKENS_PER_FORWARD, "a window is one row of a batch"
    total, count = 0.0, 0
    # Whole windows in batches, then the shorter rest, so that every token counts.
    whole = len(ids) // window * window
    batches = [*torch.split(ids[:whole].view(-1, window), TOKENS_PER_FORWARD // window)]
    if len(ids) - whole > 1:
        batches.append(ids[whole:][None])
    for batch in batches:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        targets = batch[:, 1:]
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ).item()
        count += targets.numel()
    return total / count


@contextmanager
def experts_per_token(model: DeepseekV3ForCausalLM, top_k: int) -> Iterator[None]:
    """Let every router choose `top_k` experts for the length of a `with` block."""
    before = [router.top_k for router in routers(model)]
    for router in routers(model):
        router.top_k = top_k
    try:
        yield
    finally:
        for router, value in zip(routers(model), before, strict=True):
            router.top_k = value


def expert_curve(model: DeepseekV3ForCausalLM, ids: Tensor) -> dict[int, float]:
    """Return the perplexity for every number of experts per token from 1 to the model's own."""
    curve = {}
    for top_k in range(1, (model.config.num_experts_per_tok or 0) + 1):
        with experts_per_token(model, top_k):
            curve[top_k] = math.exp(nats_per_token(model, ids))
    return curve


def expert_shares(model: DeepseekV3ForCausalLM, ids: Tensor) -> Tensor:
    """Return each expert's share of its layer's choices: `[MoE layers, E]`, rows sum to 1."""
    counter = LoadCounter(model)
    nats_per_token(model, ids)
    loads_LE = counter.take()
    counter.close()
    return loads_LE / loads_LE.sum(1, keepdim=True)


@torch.no_grad()
def complete(
    model: DeepseekV3ForCausalLM, tokenizer: Fast, prompt: str, *, seed: int | None
) -> str:
    """Return the prompt with its continuation, greedy without a seed, special tokens shown."""
    if seed is not None:
        torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    # The two hints of transformers for `generate` do not fit its own models: hence no checking.
    generate: Any = model.generate  # type: ignore[misc]
    ids = generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=160,
        do_sample=seed is not None,
        temperature=None if seed is None else TEMPERATURE,
    )
    text = tokenizer.decode(ids[0])
    assert isinstance(text, str)
    return text


def chat_prompt(tokenizer: Fast, question: str) -> str:
    """Return a question through the chat template, ready for the assistant's answer."""
    messages: Sequence[dict[str, str]] = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    assert isinstance(prompt, str)
    return prompt
