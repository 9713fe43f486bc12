"""transformers as it is, with a whole model in bf16 and the experts that it takes by default."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from whole_model import Ids, ModelVariant

EXPERTS = "grouped_mm"


def variants(weight: str, threads: int) -> list[ModelVariant]:
    """List the one way, whatever our format is."""
    return [ModelVariant("bf16", threads)]


def load(folder: Path, variant: ModelVariant, max_tokens: int) -> TransformersEngine:
    """Load the model."""
    torch.set_num_threads(variant.threads)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation=EXPERTS
    )
    return TransformersEngine(model)


class TransformersEngine:
    """A model, called without `generate`, which would only take time from it."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.cache = DynamicCache()

    def prefill(self, ids: Ids) -> torch.Tensor:
        """Read a prompt into an empty cache; return the logits of its last position."""
        self.cache = DynamicCache()
        return self._logits(ids)

    def step(self, token: int) -> torch.Tensor:
        """Read one more token; return its logits."""
        return self._logits([token])

    @torch.inference_mode()
    def _logits(self, ids: Ids) -> torch.Tensor:
        output = self.model(
            torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits
