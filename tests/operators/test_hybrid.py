"""HybridMoE beside models without it: same bits, order of events, errors, whole tokens as graphs.

The CPU stands in for the GPU. What of this needs a real one is in tests/gpu/test_hybrid.py.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from ktransformers import optimize_and_load
from ktransformers.decode_graph import DecodeGraph
from ktransformers.inject import plan
from ktransformers.machine import check_machine
from ktransformers.operators.hybrid import HybridMoE
from ktransformers.rules import RuleError, load_rules
from ktransformers.streams import CpuStream, use
from tiny_models import random_model, v2_config, v3_config

BUNDLED = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v3"
CPU = torch.device("cpu")
IDS = torch.arange(20).reshape(2, 10) * 7 % 90
LAYERS = "1-2"  # those with experts


def rule(name: str, operator: str, **kwargs: Any) -> dict[str, Any]:
    replace = {"class": f"ktransformers.operators.{operator}", "kwargs": kwargs}
    return {"match": {"name": name}, "replace": replace}


EXPERTS = [rule(r"\.mlp\.experts$", "experts.CpuExperts", threads=2)]


def hybrid(layers: str = LAYERS, **kwargs: Any) -> list[dict[str, Any]]:
    moe = rule(r"\.mlp$", "hybrid.HybridMoE", **kwargs)
    moe["match"]["layers"] = layers
    return [moe, *EXPERTS]


def pair(config: PreTrainedConfig, **kwargs: Any) -> tuple[Any, Any]:
    """Return a model with HybridMoE and one without, of the same weights."""
    return (
        optimize_and_load(random_model(config), hybrid(**kwargs)),
        optimize_and_load(random_model(config), EXPERTS),
    )


@pytest.fixture(params=[False, True], ids=["host function", "flag"])
def stream(request: pytest.FixtureRequest) -> Iterator[CpuStream]:
    """A stream of a device that is alone, and one of a device that has neighbours."""
    stream = CpuStream(by_flag=request.param)
    with use(stream):
        yield stream


def decoded(model: Any, ids: torch.Tensor, steps: int = 4) -> list[torch.Tensor]:
    """Return the logits of a prompt and of so many tokens after it, chosen greedily."""
    cache = DynamicCache(config=model.config)
    logits = []
    with torch.no_grad():
        for _ in range(steps + 1):
            logits.append(model(ids, past_key_values=cache, use_cache=True).logits)
            ids = logits[-1][:, -1:].argmax(-1)
    return logits


def equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# The same model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_and_decode_give_the_bits_of_the_plain_module(
    config: PreTrainedConfig, dtype: torch.dtype, stream: CpuStream
) -> None:
    model, plain = (
        optimize_and_load(random_model(config, dtype=dtype), rules) for rules in (hybrid(), EXPERTS)
    )
    assert isinstance(model.model.layers[1].mlp, HybridMoE)
    for rows in (slice(0, 1), slice(0, 2)):
        assert equal(decoded(model, IDS[rows]), decoded(plain, IDS[rows]))


@pytest.mark.skipif(
    not (BUNDLED / "model.safetensors").is_file(),
    reason="examples/tiny-deepseek-v3/model.safetensors is not here (an sdist leaves it out)",
)
def test_the_bundled_checkpoint_reads_and_writes_the_same() -> None:
    model: Any = optimize_and_load(BUNDLED, hybrid("1-3"))
    plain: Any = optimize_and_load(BUNDLED, EXPERTS)
    assert equal(decoded(model, IDS), decoded(plain, IDS))
    options: Any = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))


def test_other_rules_take_the_children(config: PreTrainedConfig) -> None:
    inner = [
        rule(r"\.shared_experts\.\w+_proj$", "linear.CpuLinear", threads=2),
        rule(r"\.mlp\.gate$", "router.ReducedTopK", top_k=2),
    ]
    model, plain = (
        optimize_and_load(random_model(config), [*rules, *inner]) for rules in (hybrid(), EXPERTS)
    )
    assert model.ktransformers_report.experts_per_token == 2
    assert equal(decoded(model, IDS), decoded(plain, IDS))


def test_threads_may_share_a_model() -> None:
    model = optimize_and_load(random_model(v3_config()), hybrid(deferred_experts=1))
    prompts = [(IDS + step) % 90 for step in range(4)]
    want, got = [decoded(model, ids) for ids in prompts], {}

    def work(number: int) -> None:
        got[number] = decoded(model, prompts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(got[number], want[number]) for number in range(4))


# In order, and at the same time


@contextmanager
def shared_noted(model: Any, note: Callable[[str], None]) -> Iterator[None]:
    """Note when the shared experts of a layer begin and end."""
    handles = []
    for layer in model.model.layers[1:]:
        shared = layer.mlp.shared_experts
        handles.append(shared.register_forward_pre_hook(lambda *_: note("shared begins")))
        handles.append(shared.register_forward_hook(lambda *_: note("shared ends")))
    yield
    for handle in handles:
        handle.remove()


BEGIN = ["copy in", "copy in", "copy in", "submit"]
SHARED = ["shared begins", "shared ends"]
END = ["join", "copy out"]


@pytest.mark.parametrize("by_flag", [False, True])
def test_shared_experts_run_between_submission_and_join(by_flag: bool) -> None:
    events: list[str] = []
    model, _ = pair(v3_config())
    with use(CpuStream(events.append, by_flag=by_flag)), shared_noted(model, events.append):
        decoded(model, IDS, steps=1)
    assert events == [*BEGIN, *SHARED, *END] * 4  # 2 layers, of a prompt and of a token


def test_deferred_experts_are_joined_one_layer_later() -> None:
    events: list[str] = []
    model, _ = pair(v3_config(num_hidden_layers=4), layers="1-3", deferred_experts=1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with use(CpuStream(events.append)), shared_noted(model, events.append):
            model(IDS[:, :1], past_key_values=cache)
    two = [*BEGIN, "copy in", "copy in", "submit", *SHARED, *END]
    assert events == [*two, *two, *END, *BEGIN, *SHARED, *END, *END]


def test_shared_experts_start_while_the_cpu_is_at_work() -> None:
    model, plain = pair(v3_config())
    moe, x = model.model.layers[1].mlp, torch.randn(1, 3, 64)
    begun, waited = threading.Event(), []
    moe.shared_experts.register_forward_pre_hook(lambda *_: begun.set())

    class Late(CpuStream):
        """Its engine gets to work only once the shared experts have begun."""

        def submit(self, function: Any) -> None:
            def work() -> None:
                waited.append(begun.wait(60))
                super(Late, self).submit(function)

            self.worker = threading.Thread(target=work)
            self.worker.start()

        def join(self, function: Any, done: torch.Tensor | None) -> None:
            self.worker.join()
            super().join(function, done)

    with use(Late()), torch.no_grad():
        assert torch.equal(moe(x), plain.model.layers[1].mlp(x))
    assert waited == [True]


# Errors


@contextmanager
def wrong_index(model: Any, layer: int, slot: int) -> Iterator[None]:
    """Let a layer's router name an expert that is not there, in its heaviest or lightest slot."""

    def change(_: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, index = output
        order = weights.argsort(dim=-1, descending=True, stable=True)
        return logits, weights, index.scatter(1, order[:, slot : slot + 1 or None], 99)

    handle = model.model.layers[layer].mlp.gate.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


WRONG = r"^top_k_index: token 0, slot \d names expert 99, expected 0 to 7, or 8 to skip the slot$"


def test_error_of_the_engine_is_raised_and_the_next_forward_is_right(stream: CpuStream) -> None:
    model, _ = pair(v3_config())
    want = decoded(model, IDS)
    for layer in (1, 2):
        with wrong_index(model, layer, 0), pytest.raises(ValueError, match=WRONG):
            decoded(model, IDS)
        assert equal(decoded(model, IDS), want)


def test_error_in_deferred_experts_is_raised_one_layer_later(stream: CpuStream) -> None:
    model, _ = pair(v3_config(), deferred_experts=1)
    want = decoded(model, IDS)
    reached: list[int] = []
    model.model.layers[2].mlp.shared_experts.register_forward_hook(lambda *_: reached.append(2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with wrong_index(model, 1, -1), pytest.raises(ValueError, match=WRONG):
            model(IDS[:, :1], past_key_values=cache)
    assert reached == [2, 2]  # of the prompt, and of the token
    assert equal(decoded(model, IDS), want)


def test_what_a_failed_forward_left_to_the_next_layer_is_forgotten() -> None:
    model, _ = pair(v3_config(), deferred_experts=1)
    want = decoded(model, IDS)

    def fail(*_: Any) -> None:
        raise RuntimeError("between the layers")

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="between the layers"):
            model(IDS[:, :1], past_key_values=cache)
        handle.remove()
    assert equal(decoded(model, IDS), want)


def test_call_that_nobody_joins_is_freed_once_the_stream_has_passed_it() -> None:
    model, _ = pair(v3_config())
    moe, x = model.model.layers[1].mlp, torch.randn(1, 1, 64)
    events: list[str] = []

    class Slow(CpuStream):
        """Comes to a submission only when somebody waits for it."""

        def submit(self, function: Any) -> None:
            addresses = {"submit": function.submit, "arguments": function.arguments}
            self.pending: Any = SimpleNamespace(**addresses)  # as a driver: holds no reference

        def synchronize(self) -> None:
            super().submit(self.pending)
            events.append("waited")

    def fail(*_: Any) -> None:
        raise RuntimeError("in the shared experts")

    handle = moe.shared_experts.register_forward_hook(fail)
    with torch.no_grad():
        want = moe.experts(x[0], *reversed(moe.gate(x)[1:]))
        with use(Slow()), pytest.raises(RuntimeError, match="in the shared experts"):
            moe(x)
        gc.collect()  # the error held the frames
        assert events == ["waited"]
        handle.remove()
        assert torch.equal(moe(x), want.view_as(x) + moe.shared_experts(x))


def test_deferred_experts_of_a_graph_live_as_long_as_it_also_where_nobody_joins_them() -> None:
    model, _ = pair(v3_config(), deferred_experts=1)
    moe, x = model.model.layers[1].mlp, torch.randn(2, 1, 64)
    graph = DecodeGraph(moe, CPU)
    with torch.no_grad():
        want = moe(x)
    for _ in range(3):
        assert torch.equal(graph(x), want)
        moe._leaving.call = None
        gc.collect()


def test_gradients_and_missing_weights_are_refused() -> None:
    model, _ = pair(v3_config())
    moe = model.model.layers[1].mlp
    with pytest.raises(RuntimeError, match="packed weights have no gradient"):
        moe(torch.randn(1, 1, 64, requires_grad=True))
    moe.experts._layer = None
    with torch.no_grad(), pytest.raises(RuntimeError, match="weights are not loaded"):
        moe(torch.randn(1, 1, 64))


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (
            hybrid()[:1],
            "HybridMoE at model.layers.1.mlp (and 1 more): its experts are a DeepseekV3Experts, "
            "expected an operator on the CPU: add a rule for them, such as to ktransformers."
            "operators.experts.CpuExperts",
        ),
        (
            hybrid("0-2"),
            "HybridMoE at model.layers.0.mlp: takes the place of a DeepseekV2Moe or DeepseekV3MoE, "
            "not of DeepseekV3MLP",
        ),
        (hybrid(deferred_experts=-1), "deferred_experts -1 is not a number of 0 or more"),
        (hybrid(deferred_experts=True), "deferred_experts True is not a number of 0 or more"),
        (
            hybrid(deferred_experts=4),
            "deferred_experts 4 leaves none to be awaited: a token gets 4",
        ),
        (
            [*hybrid(deferred_experts=2), rule(r"\.gate$", "router.ReducedTopK", top_k=2)],
            "deferred_experts 2 leaves none to be awaited: a token gets 2",
        ),
    ],
)
def test_what_the_operator_cannot_do_it_says(rules: Any, reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        optimize_and_load(random_model(v3_config()), rules)
    assert reason in str(caught.value)


def test_experts_of_a_model_on_another_device_need_the_operator_around_them() -> None:
    model, gpu = random_model(v2_config()), torch.device("cuda:0")
    plan(model, load_rules(hybrid()), device=gpu)
    with pytest.raises(RuleError, match="computes on the CPU, but stands on cuda:0"):
        plan(model, load_rules(EXPERTS), device=gpu)


def test_cuda_bindings_that_are_missing_are_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", missing)
    planned = plan(random_model(v3_config()), load_rules(hybrid()), device=torch.device("cuda:0"))
    with pytest.raises(RuleError) as caught:
        check_machine(planned)
    assert str(caught.value) == (
        "rules[0]: HybridMoE at model.layers.1.mlp (and 1 more): calls to the host in a stream of "
        "cuda:0 need cuda-bindings: pip install 'ktransformers[gpu]'"
    )
    check_machine(plan(random_model(v3_config()), load_rules(hybrid())))


# Deferral


class ReferenceDeferral(torch.nn.Module):
    """Deferral token by token, written to be obvious; with a model's own router and experts."""

    def __init__(self, moe: Any, deferred: int, carried: dict[str, torch.Tensor], last: bool):
        super().__init__()
        self.moe, self.deferred, self.carried, self.last = moe, deferred, carried, last

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.moe.gate(hidden_states)
        x = hidden_states.view(-1, hidden_states.shape[-1])
        now, later = torch.zeros_like(x), torch.zeros_like(x)
        is_decode = hidden_states.shape[1] == 1
        for token in range(len(x)):
            slots = sorted(range(index.shape[1]), key=lambda s: -float(weights[token, s]))
            count = self.deferred if is_decode and not self.last else 0
            awaited, rest = slots[: len(slots) - count], slots[len(slots) - count :]
            for out, chosen in ((now, awaited), (later, rest)):
                if chosen:
                    one = slice(token, token + 1)
                    out[one] = self.moe.experts(
                        x[one], index[one][:, chosen], weights[one][:, chosen]
                    )
        out = now.view_as(hidden_states) + self.moe.shared_experts(hidden_states)
        if is_decode and "later" in self.carried:
            out = out + self.carried.pop("later").view_as(hidden_states)
        if is_decode and not self.last:
            self.carried["later"] = later
        return out


@pytest.mark.parametrize("deferred", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deferral_is_that_of_an_obvious_implementation(
    config: PreTrainedConfig, deferred: int, dtype: torch.dtype, stream: CpuStream
) -> None:
    config.num_hidden_layers = 4
    rules = hybrid("1-3", deferred_experts=deferred)
    model, plain = (
        optimize_and_load(random_model(config, dtype=dtype), r) for r in (rules, EXPERTS)
    )
    undeferred = decoded(plain, IDS)
    carried: dict[str, torch.Tensor] = {}
    for number in (1, 2, 3):
        layer = plain.model.layers[number]
        layer.mlp = ReferenceDeferral(layer.mlp, deferred, carried, last=number == 3)
    for rows in (slice(0, 1), slice(0, 2)):
        got = decoded(model, IDS[rows])
        assert equal(got, decoded(plain, IDS[rows]))
    assert torch.equal(got[0], undeferred[0])  # the prompt's
    assert not torch.equal(got[1], undeferred[1])


@pytest.mark.parametrize("layers", ["1", "2", "1,3"])
def test_a_layer_that_none_follows_defers_nothing(layers: str) -> None:
    model, plain = pair(v3_config(num_hidden_layers=4), layers=layers, deferred_experts=2)
    assert equal(decoded(model, IDS), decoded(plain, IDS))


# Whole tokens as graphs


class Step:
    """A token of each sequence, written to a cache of fixed size where it is told."""

    def __init__(self, model: PreTrainedModel, prompt: torch.Tensor):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(prompt, past_key_values=self.cache)

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(positions[0])
        with torch.no_grad():
            logits: torch.Tensor = self.model(
                token_ids, position_ids=positions[:, None], past_key_values=self.cache
            ).logits
        return logits


def answer(step: Callable[..., torch.Tensor], prompt: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits of some tokens after a prompt."""
    logits, ids = [], prompt[:, -1:] + 1
    for position in range(prompt.shape[1], prompt.shape[1] + 6):
        logits.append(step(ids, torch.full((len(ids),), position)).clone())
        ids = logits[-1][:, -1:].argmax(-1)
    return logits


@pytest.mark.parametrize("deferred", [0, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_replay_of_a_whole_token_equals_the_eager_one(
    config: PreTrainedConfig, deferred: int, batch: int, stream: CpuStream
) -> None:
    model = optimize_and_load(random_model(config), hybrid(deferred_experts=deferred))
    prompt = IDS[:batch]
    want = answer(Step(model, prompt), prompt)
    calls: list[int] = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    step = Step(model, prompt)
    calls.clear()
    graph = DecodeGraph(step, CPU)
    assert equal(answer(graph, prompt), want)
    assert len(calls) == 2  # no Python runs in a replay
    handle.remove()


def test_order_within_a_replay_is_that_of_an_eager_token() -> None:
    events: list[str] = []
    model = optimize_and_load(random_model(v3_config()), hybrid(deferred_experts=1))
    step = Step(model, IDS)
    inputs = IDS[:, :1], torch.tensor([10, 10])
    with use(CpuStream(events.append)):
        step(*inputs)
        eager = list(events)
        graph = DecodeGraph(step, CPU)
        graph(*inputs)
        events.clear()
        graph(*inputs)
    assert events == eager
    assert events.count("submit") == 3


def test_error_within_a_replay_is_raised_after_it_and_the_next_is_right(stream: CpuStream) -> None:
    model = optimize_and_load(random_model(v3_config()), hybrid(deferred_experts=1))
    offset = torch.zeros(1, dtype=torch.long)  # the graph reads it in each replay
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda _, args, out: (*out[:2], out[2] + offset))
    step = Step(model, IDS)
    graph = DecodeGraph(step, CPU)
    inputs = IDS[:, :1], torch.tensor([10, 10])
    want = graph(*inputs).clone()
    for _ in range(2):
        offset.fill_(100)
        with pytest.raises(ValueError, match="names expert 10"):
            graph(*inputs)
        offset.zero_()
        assert torch.equal(graph(*inputs), want)
