"""Plans for machines: what is predicted is what is there, and what is refused says why."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from ktransformers.cache import LatentCache
from ktransformers.inject import Plan, plan
from ktransformers.load import build_on_meta
from ktransformers.research.device_memory import (
    Machine,
    activation_bytes,
    cache_bytes,
    predict,
)
from ktransformers.research.machine_plan import Planned, Planner, check_request
from ktransformers.rules import load_rules
from shipped_files import SMALL as SIZES
from tiny_models import v2_config, v3_config

CONTEXT = 4096


def meta(config: Any, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return build_on_meta(config, dtype)


@pytest.fixture(scope="module")
def v3() -> PreTrainedModel:
    return meta(v3_config(**SIZES))


@pytest.fixture(scope="module")
def planner(v3: PreTrainedModel) -> Planner:
    return Planner(v3)


@pytest.fixture
def planned_again(tmp_path: Path) -> Callable[[PreTrainedModel, Planned], Plan]:
    """Return a function that plans what a file says."""

    def again(model: PreTrainedModel, planned: Planned) -> Plan:
        path = tmp_path / "rules.yaml"
        path.write_text(planned.file("A model", "some/model"))
        return plan(model, load_rules(path))

    return again


@pytest.mark.parametrize("weight", ["int8", "int4"])
@pytest.mark.parametrize("kind", [v2_config, v3_config])
def test_a_file_needs_what_its_head_says(
    kind: Callable[..., Any],
    weight: str,
    planned_again: Callable[[PreTrainedModel, Planned], Plan],
) -> None:
    model = meta(kind(**SIZES))
    planner = Planner(model)
    for gpus in ((1.3,), (1.5,), (2.0, 1.7), (3.1,)):
        planned = planner.plan(Machine(gpus, 4, CONTEXT), weight)
        assert predict(model, planned_again(model, planned), CONTEXT) == planned.needs


def test_a_cache_needs_what_it_reserves() -> None:
    config = v3_config(max_position_embeddings=256, dtype="bfloat16", kv_lora_rank=160)
    for tokens in (1, 64, 65, 200):
        for form in ("bf16", "fp32", "int8"):
            cache = LatentCache(config, tokens, form)
            for layer in range(config.num_hidden_layers):
                cache.append(torch.zeros(1, 1, 160), torch.zeros(1, 1, 8), layer)
            reserved = sum(tensor.nbytes for tensor in cache.layers[0].tensors().values())
            assert cache_bytes(config, tokens, form) == reserved, (tokens, form)


def test_weights_cache_and_activations_stand_where_modules_do(
    v3: PreTrainedModel, planner: Planner
) -> None:
    one = cache_bytes(v3.config, CONTEXT)
    full = planner.plan(Machine((2,), 4, CONTEXT), "int8")
    needs = full.needs
    split = planner.plan(Machine((1.3,), 4, CONTEXT), "int8")
    assert (needs["cpu"].cache, needs["cuda:0"].cache) == (0, 5 * one)
    assert split.deal.cpu_layers == 2
    assert (split.needs["cpu"].cache, split.needs["cuda:0"].cache) == (2 * one, 3 * one)
    experts, embedding = 64 * 3 * 1408 * 2048, 102400 * 2048 * 2
    (some,) = full.deal.partly_resident.values()
    left = (4 - some / 64) * experts
    assert 0 <= needs["cpu"].weights / left - 1 < 0.01  # and scales
    assert split.needs["cpu"].weights > 4 * experts + embedding
    assert needs["cuda:0"].activations == split.needs["cuda:0"].activations > 0
    assert needs["cpu"].fixed == needs["cpu"].activations == 0


def test_larger_machines_hold_more_experts_of_layers(planner: Planner) -> None:
    sizes = (1.5, 1.8, 2.2, 2.5, 2.8, 3.1)
    plans = [planner.plan(Machine((size,), 4, CONTEXT), "int8") for size in sizes]
    assert [len(planned.deal.resident) for planned in plans] == [0, 0, 1, 2, 3, 4]
    assert plans[-1].needs["cpu"].total == 0
    assert "Cpu" not in plans[-1].file("A model", "some/model")


def test_threads_are_those_that_were_asked_for(planner: Planner) -> None:
    some = planner.plan(Machine((1.5,), 4, CONTEXT, cores=7), "int8")
    assert "threads: 7" in some.file("A model", "some/model")


# What is refused


@pytest.mark.parametrize(
    ("memory", "weight", "message"),
    [
        (
            2,
            "int8",
            "memory: 0.5 GB are missing: weights that no GPU has room for take 2.2 GB in int8, and "
            "of 2 GB 1.8 may be used; what would do: --memory 3, or --weight int4, or 1 more "
            "--gpu 1.8",
        ),
        (
            0.5,
            "int4",
            "memory: 0.7 GB are missing: weights that no GPU has room for take 1.1 GB in int4, and "
            "of 0.5 GB 0.5 may be used; what would do: --memory 2, or 2 more --gpu 1.8",
        ),
    ],
)
def test_memory_that_is_short_says_by_how_much_and_what_would_do(
    planner: Planner, memory: float, weight: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        planner.plan(Machine((1.8,), memory, CONTEXT), weight)


def test_less_context_is_named_where_it_would_do() -> None:
    model = meta(v3_config(**{**SIZES, "max_position_embeddings": 163840}))
    # 0.94 GB of cache are what it takes to hold the experts of three layers.
    machine = Machine((2.9,), 1, 163840)
    with pytest.raises(ValueError, match=r", or --context 4096$"):
        Planner(model).plan(machine, "int8")


def test_a_gpu_that_is_too_small_says_by_how_much(planner: Planner) -> None:
    message = (
        "GPU: 0.2 GB are missing: one layer and the head take 1.3 GB (0.1 weights, 0.0 latent "
        "cache, 0.1 activations, 1.0 driver and kernels), and the largest GPU has 1.1; take a "
        "larger one, or less than --context 4096, or a rule file for the CPU alone: "
        "`ktransformers rules`"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        planner.plan(Machine((1.1, 0.5), 4, CONTEXT), "int8")


def test_everything_that_is_wrong_is_said_at_once() -> None:
    llama = meta(
        LlamaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=8, num_attention_heads=1)
    )
    sentences = check_request(llama, Machine((0.0, -3.0), -1.0, 10**6, 0))
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "--gpu 0",
        "--gpu -3",
        "--memory -1",
        "--cores 0",
        "--context 1000000",
        "model_type llama",
    ]
    assert "(known: deepseek_v2, deepseek_v3)" in sentences[-1]
    assert check_request(meta(v3_config()), Machine((1,), 1, 100)) == []
    assert check_request(meta(v3_config(), torch.float32), Machine((1,), 1, 100)) == [
        "dtype float32: plans are for bfloat16; say --dtype bfloat16"
    ]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(v3: PreTrainedModel, number: float) -> None:
    wrong = check_request(v3, Machine((number,), number, CONTEXT))
    assert len(wrong) == 2


def test_a_machine_without_gpus_is_told_what_to_do(v3: PreTrainedModel) -> None:
    (sentence,) = check_request(v3, Machine((), 4, CONTEXT))
    assert sentence.startswith("no GPU: torch finds none here; say what the machine has, such as")


def test_inputs_that_no_group_divides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^projections of 40 inputs: weights in four bits"):
        Planner(meta(v3_config(moe_intermediate_size=40)))


def test_what_operators_refuse_is_said() -> None:
    planner = Planner(meta(v3_config(), torch.float32))
    with pytest.raises(ValueError, match=r"the plan's line \d+: Int4Linear at .* activations"):
        planner.plan(Machine((2,), 4, 128), "int8")


def test_activations_grow_with_the_chunk_and_not_beyond(v3: PreTrainedModel) -> None:
    def needed(context: int) -> int:
        return activation_bytes(v3, context, with_experts=True)

    assert needed(32) * 2 == needed(64)
    assert needed(1536) == needed(4096)  # 96 tokens for each of 64 experts; each token has 4
