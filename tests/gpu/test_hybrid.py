"""HybridMoE on a GPU, as tests/operators/test_hybrid.py has it on the CPU that stands in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ktransformers import optimize_and_load
from ktransformers.cuda_stream import CudaStream
from ktransformers.decode_graph import DecodeGraph
from ktransformers.streams import use
from tiny_models import random_model, v3_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda:0")
IDS = torch.arange(20).reshape(2, 10) * 7 % 90
# Products with weights are torch's on both sides, in another order: eps of bf16, times some for the
# layers; most values differ by less than one rounding.
TOLERANCE = 16 * 2**-8


def load(device: torch.device, **kwargs: Any) -> Any:
    operators = "ktransformers.operators"
    moe = {"class": f"{operators}.hybrid.HybridMoE", "kwargs": kwargs}
    experts = {"class": f"{operators}.experts.CpuExperts", "kwargs": {"threads": 2}}
    rules: list[Any] = [
        {"match": {"class": "DeepseekV3MoE"}, "replace": moe},
        {"match": {"name": r"\.mlp\.experts$"}, "replace": experts},
    ]
    model: Any = random_model(v3_config(), dtype=torch.bfloat16)
    return optimize_and_load(model.to(device), rules)


@pytest.fixture(params=[False, True], ids=["host function", "flag"])
def stream(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    stream = CudaStream(GPU)
    stream.by_flag = request.param
    with use(stream):
        yield stream


def decoded(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits of a prompt and of the same tokens again."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        more = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
    return [first, *more]


@pytest.mark.parametrize("deferred", [0, 2])
def test_logits_are_near_those_of_the_cpu(stream: CudaStream, deferred: int) -> None:
    got = decoded(load(GPU, deferred_experts=deferred), IDS.to(GPU))
    want = decoded(load(torch.device("cpu"), deferred_experts=deferred), IDS)
    for a, b in zip(got, want, strict=True):
        assert a.device == GPU
        # A router's near tie may fall to the other side: most of the tokens are compared.
        apart = (a.cpu() - b).float().norm(dim=-1) / b.float().norm(dim=-1)
        assert (apart < TOLERANCE).float().mean() >= 0.8


@pytest.mark.parametrize("deferred", [0, 2])
def test_replay_equals_the_eager_token(stream: CudaStream, deferred: int) -> None:
    model, ids = load(GPU, deferred_experts=deferred), IDS.to(GPU)
    cache = StaticCache(config=model.config, max_cache_len=32)

    def step(token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.copy_(positions[0])
        logits: torch.Tensor = model(
            token_ids, position_ids=positions[:, None], past_key_values=cache
        ).logits
        return logits

    with torch.no_grad():
        model(ids, past_key_values=cache)
        graph = DecodeGraph(step, GPU)
        for position in range(10, 14):
            inputs = ids[:, position - 10 : position - 9], torch.full((2,), position, device=GPU)
            assert torch.equal(graph(*inputs), step(*inputs))
    assert graph.batch_sizes() == [2]


def test_error_of_the_engine_is_raised_eager_and_replayed(stream: CudaStream) -> None:
    model, x = load(GPU), torch.randn(2, 1, 64, device=GPU, dtype=torch.bfloat16)
    moe, offset = model.model.layers[1].mlp, torch.zeros(1, dtype=torch.long, device=GPU)
    moe.gate.register_forward_hook(lambda _, args, out: (*out[:2], out[2] + offset))
    graph = DecodeGraph(moe, GPU)
    with torch.no_grad():
        want = graph(x).clone()
        for call in (graph, moe):
            offset.fill_(100)
            with pytest.raises(ValueError, match="names expert 10"):
                call(x)
            offset.zero_()
            assert torch.equal(call(x), want)
