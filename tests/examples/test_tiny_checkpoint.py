"""The shipped checkpoint as the measuring instrument that it is meant to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktransformers import optimize_and_load
from ktransformers.report import count_experts
from ktransformers.research.measure import perplexity

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v3"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(),
    reason="examples/tiny-deepseek-v3/model.safetensors is not here (an sdist leaves it out)",
)
TOKENS, WINDOW = 4096, 512


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    text = (FOLDER / "held_out.txt").read_text("utf-8")
    return torch.tensor(AutoTokenizer.from_pretrained(FOLDER)(text)["input_ids"][:TOKENS])


@pytest.fixture(scope="module")
def plain_perplexity(token_ids: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return perplexity(model, token_ids, window=WINDOW)


def reduced(top_k: int) -> list[dict[str, Any]]:
    operator = "ktransformers.operators.router.ReducedTopK"
    replace = {"class": operator, "kwargs": {"top_k": top_k}}
    return [{"match": {"name": r"\.mlp\.gate$"}, "replace": replace}]


def test_int8_costs_less_than_a_percent_of_perplexity(
    token_ids: torch.Tensor, plain_perplexity: float
) -> None:
    model = optimize_and_load(FOLDER, "tiny-cpu-int8", dtype=torch.float32)
    assert perplexity(model, token_ids, window=WINDOW) == pytest.approx(plain_perplexity, rel=0.01)


def test_one_expert_per_token_costs_at_least_a_tenth(
    token_ids: torch.Tensor, plain_perplexity: float
) -> None:
    model = optimize_and_load(FOLDER, reduced(1), dtype=torch.float32)
    with count_experts(model) as counter:
        assert perplexity(model, token_ids, window=WINDOW) >= 1.1 * plain_perplexity
    assert counter.mean == 1


def test_every_expert_of_every_layer_is_used(token_ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    seen: dict[str, set[int]] = {}

    def watch(name: str) -> Any:
        def before(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(name, set()).update(args[1].flatten().tolist())

        return before

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(watch(name))
    perplexity(model, token_ids, window=WINDOW)
    assert [len(experts) for experts in seen.values()] == [32, 32, 32]


def test_the_folder_is_at_most_16_mib() -> None:
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
