"""Decode with a token as one graph: the tokens are the same, and no Python runs in replays.

In Triton's interpreter on the CPU, whose stand-in replays; on a GPU, if there is one.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from graph_models import (
    GREEDY,
    IDS,
    TWO_LAYERS,
    answer,
    attention_in_torch,
    eager,
    load,
    near,
    places,
    rules,
    token_graph,
)
from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.cache_pages import PAGE_TOKENS
from ktransformers.decode import decode, plain_request
from ktransformers.generation import stream
from ktransformers.operators.gpu_attention import GpuMlaAttention
from ktransformers.prefill import prefill
from ktransformers.streams import CpuStream, Graph, recorded_graph, use
from ktransformers.token_graph import TokenGraph
from tiny_models import v2_config, v3_config

BUNDLED = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v3"


@pytest.fixture(autouse=True)
def host_calls() -> None:
    if torch.cuda.is_available():
        pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a test without a GPU Triton's interpreter."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(GpuMlaAttention, "compute", attention_in_torch)


@pytest.fixture
def model(quick: None, device: torch.device) -> Any:
    return load(device)


@contextmanager
def counted_forwards() -> Iterator[list[str]]:
    """Note every call of a module, of whatever model."""
    calls: list[str] = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: calls.append(type(module).__name__)
    )
    yield calls
    handle.remove()


@pytest.mark.skipif(
    not (BUNDLED / "model.safetensors").is_file(),
    reason="examples/tiny-deepseek-v3/model.safetensors is not here (an sdist leaves it out)",
)
def test_the_bundled_model_says_the_same_and_runs_no_python_in_replays(
    device: torch.device,
) -> None:
    bundled = optimize_and_load(BUNDLED, rules(device))
    tokenizer: Any = AutoTokenizer.from_pretrained(BUNDLED)
    prompt = tokenizer("one two three", return_tensors="pt").input_ids
    want = answer(bundled, LatentCache.for_model(bundled, 64), prompt, 4, graph=False)
    calls_by_token: list[int] = []
    with counted_forwards() as calls:

        def count() -> None:
            calls_by_token.append(len(calls))
            calls.clear()

        cache = LatentCache.for_model(bundled, 64)
        got = answer(bundled, cache, prompt, 4, graph=True, on_token=count)
    assert got == want
    assert cache.completed() == prompt.shape[1] + 3
    prompts, recording, *replays = calls_by_token
    assert recording == 2 * prompts > 0  # a first run, and the one that is recorded
    assert replays == [0] * 2


@pytest.mark.parametrize(("kind", "deferred"), [(v2_config, 0), (v3_config, 2)])
def test_tokens_are_those_without_a_graph(
    quick: None, device: torch.device, kind: Callable[..., Any], deferred: int
) -> None:
    model = load(device, kind(**TWO_LAYERS), deferred_experts=deferred)
    options: Any = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.3}
    got = []
    for graph in (False, True):
        torch.manual_seed(1)
        cache = LatentCache.for_model(model, 64)
        got.append(answer(model, cache, IDS, 8, graph=graph, **options))
    assert got[0] == got[1]


@torch.no_grad()
def test_whatever_happens_to_the_cache_between_two_tokens(model: Any) -> None:
    """What is cached ends before a page does: it grows into another, and loses it again."""
    cache = LatentCache.for_model(model, 2 * PAGE_TOKENS)
    latent, rope = (torch.randn(1, PAGE_TOKENS - 2, n, device=places(model)[0]) for n in (32, 8))
    cache.append(latent.bfloat16(), rope.bfloat16(), 0)
    caches = cache, copy.deepcopy(cache)
    graph = token_graph(model, cache)

    def both(ids: torch.Tensor) -> None:
        assert near(graph(ids), eager(model, caches[1], ids))
        assert caches[0].completed() == caches[1].completed()

    def on_both(change: Callable[[LatentCache], object]) -> None:
        for cache in caches:
            change(cache)

    for token in (5, 6, 7):  # the last is in another page
        both(torch.tensor([[token]]))
    recorded = graph._graph
    on_both(lambda cache: prefill(model, torch.tensor([[8, 9]]), cache))
    both(torch.tensor([[11]]))
    on_both(lambda cache: cache.crop(-6))
    both(torch.tensor([[12]]))
    assert graph._graph is recorded
    on_both(lambda cache: cache.reset())
    on_both(lambda cache: prefill(model, torch.tensor([[3, 4], [5, 6]]), cache))
    both(torch.tensor([[1], [2]]))
    assert graph._graph is not recorded  # the table of two sequences is another
    on_both(lambda cache: cache.batch_select_indices(torch.tensor([1])))
    both(torch.tensor([[3]]))
    on_both(lambda cache: cache.batch_repeat_interleave(2))  # sequences share pages
    both(torch.tensor([[3], [4]]))


class FlawedRouter(nn.Module):
    """A router that names experts that are not there, while it is told to."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        device = next(router.parameters()).device
        self.register_buffer("offset", torch.zeros(1, dtype=torch.long, device=device))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, index = self.router(hidden_states)
        return logits, weights, index + self.offset


@torch.no_grad()
def test_an_error_on_the_host_is_raised_and_the_cache_is_as_it_was(model: Any) -> None:
    router = FlawedRouter(model.model.layers[0].mlp.gate)
    model.model.layers[0].mlp.gate = router
    cache = LatentCache.for_model(model, 64)
    graph = token_graph(model, cache)
    prefill(model, IDS, cache)
    ids = torch.tensor([[3]])
    want = graph(ids).clone()
    for _ in range(2):
        router.offset.fill_(100)  # type: ignore[operator]  # a tensor
        cache.crop(-1)
        with pytest.raises(ValueError, match="names expert 10"):
            graph(ids)
        assert cache.completed() == cache.get_seq_length() == 12
        router.offset.zero_()  # type: ignore[operator]
        assert torch.equal(graph(ids), want)
    router.offset.fill_(100)  # type: ignore[operator]
    for _ in range(2):
        with pytest.raises(ValueError, match="names expert 10"):  # before it is recorded
            token_graph(model, cache)(ids)
        assert cache.completed() == cache.get_seq_length() == 13


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in, for want of a GPU")
@torch.no_grad()
@pytest.mark.parametrize("event", ["copy in", "submit", "join"])
@pytest.mark.parametrize("at", ["recording", "replay"])
def test_ctrl_c_leaves_the_cache_with_whole_tokens(model: Any, event: str, at: str) -> None:
    armed = False

    def note(seen: str) -> None:
        if armed and seen == event and (at == "replay" or recorded_graph() is not None):
            raise KeyboardInterrupt

    cache = LatentCache.for_model(model, 64)
    prefill(model, IDS, cache)
    ids = torch.tensor([[3]])
    with use(CpuStream(note)):
        graph = token_graph(model, cache)
        if at == "replay":
            graph(ids)
            cache.crop(-1)
        armed = True
        with pytest.raises(KeyboardInterrupt):
            graph(ids)
        armed = False
        assert recorded_graph() is None
        assert cache.completed() == cache.get_seq_length() == 12
        want = eager(model, cache, ids)
        cache.crop(-1)
        assert near(graph(ids), want)


def test_a_stream_of_text_is_the_same_and_its_check_is_heard(model: Any) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(BUNDLED)
    options = {**GREEDY, "min_new_tokens": 4, "max_new_tokens": 4}
    texts = ["".join(stream(model, tokenizer, IDS, graph=g, **options)) for g in (False, True)]
    assert texts[0] == texts[1] != ""
    with pytest.raises(ValueError, match="our own loop, which this request is not for"):
        list(stream(model, tokenizer, IDS, graph=True, num_beams=2, **options))
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 1 + 2 + 2:  # at the third token: each layer's check twice at the first
            raise InterruptedError

    cache = LatentCache.for_model(model, 64)
    request = plain_request(model, tokenizer, IDS, cache, {**options, "max_new_tokens": 9})
    assert request is not None
    logits = prefill(model, IDS, cache)
    with pytest.raises(InterruptedError):
        decode(model, request, cache, logits, lambda _: None, check, graph=True)
    assert cache.completed() == cache.get_seq_length() == 12 + 2


def graphs() -> int:
    """Count what there is of graphs, cycles that nobody has collected included."""
    kinds = {TokenGraph, Graph}
    return sum(not kinds.isdisjoint(type(each).__mro__) for each in gc.get_objects())


def test_graphs_live_no_longer_than_their_answers(quick: None, device: torch.device) -> None:
    model = load(device)
    cache = LatentCache.for_model(model, 128)
    gc.collect()
    gc.disable()  # nor does it take a collector
    try:
        for turn in range(20):
            ids = torch.cat([cache.token_ids[:1].view(1, -1), torch.tensor([[turn + 1]])], dim=1)
            found = answer(
                model,
                cache,
                ids,
                2,
                graph=True,
            )
            cache.note_tokens(torch.cat([ids, torch.tensor([found])], dim=1))
            assert cache.completed() == 2 * turn + 2
        assert graphs() == 0
    finally:
        gc.enable()
    held = [weakref.ref(model), weakref.ref(cache.layers[0].latent)]
    del cache, model
    gc.collect()
    assert [reference() for reference in held] == [None, None]
