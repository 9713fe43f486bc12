"""What keeps a token from being one graph, and on which devices it is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, LogitsProcessorList

from graph_models import (
    IDS,
    ONE_LAYER,
    OPERATORS,
    TWO_LAYERS,
    answer,
    attention_in_torch,
    eager,
    load,
    near,
    rules,
)
from ktransformers import optimize_and_load, streams
from ktransformers.base import Operator
from ktransformers.cache import LatentCache
from ktransformers.devices import Bring, keep_on
from ktransformers.inject import apply, plan
from ktransformers.load import build_on_meta
from ktransformers.operators.gpu_attention import GpuMlaAttention
from ktransformers.prefill import prefill
from ktransformers.report import count_experts
from ktransformers.rules import load_rules
from ktransformers.stack import DecoderStack
from ktransformers.streams import CpuStream, Stream, stream_of, use
from ktransformers.token_graph import TokenGraph, graph_line, graph_obstacle
from tiny_models import random_model, v3_config

CPU, META = torch.device("cpu"), torch.device("meta")
SHIPPED = [
    ("deepseek-v3-1x24gb-cpu-int8", DeepseekV3Config(num_hidden_layers=6)),
    (
        "deepseek-v2-1x12gb-cpu-int8",
        DeepseekV2Config(
            num_hidden_layers=3,
            first_k_dense_replace=1,
            moe_intermediate_size=1408,
            num_experts_per_tok=6,
        ),
    ),
]
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in, for want of a GPU")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare tests without a GPU Triton's interpreter; with one they need calls to the host."""
    if torch.cuda.is_available():
        pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    else:
        monkeypatch.setattr(GpuMlaAttention, "compute", attention_in_torch)


@pytest.fixture
def model(device: torch.device) -> Any:
    return load(device)


def only(config: Any, device: torch.device, *which: int) -> Any:
    """Load a model with some of the rules."""
    chosen = [rules(device)[each] for each in which]
    return optimize_and_load(random_model(config, dtype=torch.bfloat16), chosen)


def test_what_keeps_a_token_from_being_one_graph_is_named(model: Any, device: torch.device) -> None:
    layer, config = model.model.layers[0], v3_config(**ONE_LAYER)
    assert graph_obstacle(model) is None

    handle = layer.mlp.gate.register_forward_hook(lambda *_: None)
    own = "a forward or a hook of somebody's own would not run in replays"
    assert graph_obstacle(model) == f"DeepseekV3TopkRouter at model.layers.0.mlp.gate: {own}"
    handle.remove()
    layer.input_layernorm.forward = lambda x: x
    assert graph_obstacle(model) == f"DeepseekV3RMSNorm at model.layers.0.input_layernorm: {own}"
    del layer.input_layernorm.forward
    with count_experts(model):
        obstacle = "HybridMoE at model.layers.0.mlp: its routing is watched"
        assert graph_obstacle(model) == obstacle
        cache = LatentCache.for_model(model, 64)
        with pytest.raises(ValueError, match=f"this model can't be one graph: {obstacle}"):
            answer(model, cache, IDS, 2, graph=True)
    handle = model.register_forward_hook(lambda *_: None)
    assert graph_obstacle(model) == (
        "DeepseekV3ForCausalLM is no model that is known, or somebody has changed it"
    )
    handle.remove()
    assert graph_obstacle(model) is None

    plain = random_model(config)
    assert (
        graph_obstacle(plain) == "attention of transformers gathers the cache anew for each token"
    )
    if device.type == "cpu":  # on a GPU the plan refuses it
        assert graph_obstacle(only(config, device, 1, 3)) == (
            "CpuExperts at model.layers.0.mlp.experts: is not made for graphs"
        )
    attention = only(config, device, 0, 1)
    assert graph_obstacle(attention) is None
    attention.config._experts_implementation = "eager"
    assert graph_obstacle(attention) == (
        "DeepseekV3Experts at model.layers.0.mlp.experts: eager experts ask the host which were "
        "chosen"
    )
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert graph_obstacle(only(config, device, 0, 1)) == (
        "the host looks at positions for its rotary embedding"
    )


def test_operators_of_a_gpu_alone_are_one_graph(device: torch.device) -> None:
    place = {"device": str(device)}
    in_four_bits = {**place, "group_size": 32}
    taken = {
        r"shared_experts\.\w+_proj$": ("linear.Int4Linear", in_four_bits),
        r"\.mlp\.experts$": ("experts.Int4Experts", in_four_bits),
        r"\.mlp\.gate$": ("router.ReducedTopK", {"top_k": 2}),
    }
    more = [
        {"match": {"name": name}, "replace": {"class": f"{OPERATORS}.{path}", "kwargs": kwargs}}
        for name, (path, kwargs) in taken.items()
    ]
    model = random_model(v3_config(**ONE_LAYER), dtype=torch.bfloat16)
    model = optimize_and_load(model, [*rules(device)[:2], *more])
    got = [
        answer(model, LatentCache.for_model(model, 64), IDS[:, :2], 4, graph=graph)
        for graph in (False, True)
    ]
    assert got[0] == got[1]


@on_the_cpu
@pytest.mark.parametrize(("name", "config"), SHIPPED)
def test_a_shipped_file_makes_a_token_one_graph(
    name: str, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktransformers.token_graph.stream_of", lambda _: CpuStream())
    model = build_on_meta(config, torch.bfloat16)
    apply(model, plan(model, load_rules(name), dtype=torch.bfloat16))
    assert graph_obstacle(model) is None


@on_the_cpu
def test_what_lies_on_the_cpu_beside_a_gpu_is_named_and_the_report_says_so() -> None:
    model = load(CPU)
    assert model.ktransformers_report.decode is None
    keep_on(model, {"model.norm": META})
    obstacle = "model.embed_tokens lies on the CPU: keep it on a GPU"
    line = f"layers are called one by one, a token is no graph: {obstacle}"
    assert graph_line(model) == line
    assert f"\ndecode: {line}" in str(replace(model.ktransformers_report, decode=line))


@on_the_cpu
def test_cuda_bindings_that_are_missing_are_named(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: torch.device) -> Stream:
        raise ImportError("needs cuda-bindings")

    monkeypatch.setattr("ktransformers.token_graph.stream_of", missing)
    assert graph_obstacle(model) == "needs cuda-bindings"


@on_the_cpu
def test_a_model_on_the_cpu_gets_a_graph_only_where_it_is_asked_for(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ktransformers.decode")
    for graph, line in ((None, None), (False, None), (True, "each token is one graph on cpu")):
        caplog.clear()
        cache = LatentCache.for_model(model, 64)
        answer(model, cache, IDS, 1, graph=graph)
        assert [record.message for record in caplog.records] == ([line] if line else [])


def test_ids_are_where_logits_are(model: Any, device: torch.device) -> None:
    """So that what transformers makes of a request finds both, and special tokens, together."""
    seen: list[torch.device] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.extend((ids.device, scores.device))
        return scores.scatter(1, ids, -torch.inf)

    cache = LatentCache.for_model(model, 64)
    options: Any = {"logits_processor": LogitsProcessorList([look]), "eos_token_id": 3}
    found = answer(model, cache, IDS, 3, graph=True, **options)
    assert len({*found, *range(12)}) == 15
    assert {each.type for each in seen} == {device.type}


@on_the_cpu
def test_a_request_is_made_on_the_device_of_the_head() -> None:
    model = random_model(v3_config(**ONE_LAYER))
    keep_on(model, {"lm_head": META})
    assert DecoderStack(model).logits_device() == META
    model.lm_head = LinearOperator()
    assert DecoderStack(model).logits_device() == CPU
    keep_on(model, {"model.norm": META})
    assert DecoderStack(model).logits_device() == META


# Several devices


class Border(Bring):
    """Lets a module, and what comes after it, work in another stream.

    That waits for the one before, as what torch copies from GPU to GPU does.
    """

    def __init__(self, stream: Stream, *, waits: bool = True):
        super().__init__(CPU)
        self.stream = stream
        self.waits = waits

    def __call__(self, _: nn.Module, args: Any, kwargs: Any = None) -> Any:  # or an output
        before = stream_of(CPU)
        if before is not self.stream and self.waits:
            self.stream.wait(before.record())
        streams._here.stream = self.stream


@contextmanager
def on_two_devices(model: Any, first: Stream, second: Stream, **options: Any) -> Iterator[None]:
    """Have layers from the second on compute in another stream, and all that comes after them."""
    with use(first):
        base = model.model
        handles = [
            base.embed_tokens.register_forward_pre_hook(Border(first, waits=False)),
            base.layers[1].register_forward_pre_hook(Border(second, **options)),
            model.lm_head.register_forward_hook(Border(first, waits=False)),
        ]
        yield
        for handle in handles:
            handle.remove()


BEGIN, BORDER, END = ["copy in"] * 3 + ["submit"], ["record", "wait"], ["join", "copy out"]
DEFERRED = ["copy in", "copy in", "submit"]


@on_the_cpu
@torch.no_grad()
@pytest.mark.parametrize("deferred", [0, 1])
def test_layers_on_two_devices_are_one_graph(deferred: int) -> None:
    model = load(CPU, v3_config(**TWO_LAYERS), deferred_experts=deferred)
    events: dict[str, list[str]] = {"first": [], "second": []}
    first, second = (CpuStream(events[name].append, by_flag=True) for name in events)
    caches = [LatentCache.for_model(model, 64) for _ in range(2)]
    for cache in caches:
        prefill(model, IDS, cache)
    with on_two_devices(model, first, second):
        assert graph_obstacle(model) is None
        graph = TokenGraph(DecoderStack(model), caches[0], CPU, [second])
        for token in (3, 4, 5):
            for each in events.values():
                each.clear()
            got = graph(torch.tensor([[token]])).clone()
            if token > 3:
                replayed = {name: list(each) for name, each in events.items()}
                later = DEFERRED if deferred else []
                assert replayed["first"] == [
                    *["record", *BEGIN, *later, *END, "record", "wait"],
                ]
                assert replayed["second"] == [
                    *["wait", "wait", *BEGIN, *END, *(END if deferred else []), "record"],
                ]
            want = eager(model, caches[1], torch.tensor([[token]]))
            assert near(got, want)


@on_the_cpu
@torch.no_grad()
def test_a_device_that_did_not_wait_at_the_border_would_show() -> None:
    model = load(CPU, v3_config(**TWO_LAYERS))
    first, second = CpuStream(), CpuStream()
    caches = [LatentCache.for_model(model, 64) for _ in range(2)]
    for cache in caches:
        prefill(model, IDS, cache)
    apart = []
    with on_two_devices(model, first, second, waits=False):
        graph = TokenGraph(DecoderStack(model), caches[0], CPU, [second])
        for token in (3, 40, 50):
            got = graph(torch.tensor([[token]])).clone()
            want = eager(model, caches[1], torch.tensor([[token]]))
            apart.append(float((got - want).abs().max() / want.abs().max()))
    assert max(apart) > 2**-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("deferred", [0, 1])
def test_layers_on_two_gpus_say_what_they_do_without_a_graph(deferred: int) -> None:
    """The other layers' rules come first: their GPU is the second."""
    there, here = (rules(torch.device("cuda", n), deferred_experts=deferred) for n in (1, 0))
    there[0]["match"]["name"] = r"^model\.(layers\.1|norm)$|^lm_head$"
    there[1]["match"]["layers"] = "1"
    wanted = [*there[:2], *here]
    model: Any = optimize_and_load(
        random_model(v3_config(**TWO_LAYERS), dtype=torch.bfloat16), wanted
    )
    assert model.ktransformers_report.decode == "a token is one graph on cuda:0, cuda:1"
    answers = [
        answer(model, LatentCache.for_model(model, 64), IDS, 12, graph=graph)
        for graph in (False, True)
    ]
    assert answers[0] == answers[1]


class LinearOperator(Operator):
    """An operator without parameters."""
