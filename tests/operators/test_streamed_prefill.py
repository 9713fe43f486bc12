"""Prefill whose experts a device computes from streamed weights; the CPU and Triton's interpreter
stand in for the GPU. What of this needs a real one is in tests/gpu/test_streamed_prefill.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from expert_bounds import experts_and_bound
from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.inject import plan
from ktransformers.machine import check_machine
from ktransformers.machine_rates import measured_rates
from ktransformers.operators.kernels.packed_experts import SortedTokens
from ktransformers.phase import phase
from ktransformers.prefill import chunk_tokens, prefill
from ktransformers.prefill_cost import Rates, hiding_tokens, least_tokens
from ktransformers.rules import RuleError, load_rules
from ktransformers.streamed_experts import Piece, TwoBuffers
from ktransformers.streams import CpuStream, use
from packed_layer import dequantised
from tiny_models import random_model, v3_config

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is off: tests/gpu/ has these for a GPU"
)
IDS = torch.arange(20).reshape(2, 10) * 7 % 90
GPU = torch.device("cuda:0")
# Streaming pays from some 40 tokens on with this model: the CPU is slow, and so is the link.
RATES = Rates(1e8, 1e12, 1e12, 4e9, 1e9)


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure nothing: products of a GPU's size take the CPU minutes."""
    monkeypatch.setattr("ktransformers.streamed_experts.measured_rates", lambda *_: RATES)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpret no kernels, where what counts is who is called."""
    monkeypatch.setattr(SortedTokens, "add", lambda *_: None)


def rules(layers: str = "1-2", weight: str = "int8", **kwargs: Any) -> list[Any]:
    def rule(name: str, operator: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        replace = {"class": f"ktransformers.operators.{operator}", "kwargs": kwargs}
        return {"match": {"name": name}, "replace": replace}

    moe = rule(r"\.mlp$", "hybrid.HybridMoE", kwargs)
    moe["match"]["layers"] = layers
    return [moe, rule(r"\.mlp\.experts$", "experts.CpuExperts", {"threads": 1, "weight": weight})]


def load(config: PreTrainedConfig | None = None, *args: str, **kwargs: Any) -> Any:
    model = random_model(config or v3_config(), dtype=torch.bfloat16)
    return optimize_and_load(model, rules(*args, **{"stream_prefill": "always", **kwargs}))


def matrices(experts: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what gate, up and down of all experts stand for."""
    E, D, F = experts.num_experts, experts.hidden_size, experts.moe_intermediate_size
    gate_up = experts.gate_up_packed.view(2 * E, -1), experts.gate_up_scale.view(2 * E, -1)
    down = experts.down_packed.view(E, -1), experts.down_scale.view(E, -1)
    both, last = (
        torch.stack(
            [dequantised(p, s, n, k, experts.weight_format) for p, s in zip(*t, strict=True)]
        )
        for t, n, k in ((gate_up, F, D), (down, D, F))
    )
    return both[0::2], both[1::2], last


# The same layer


@pytest.mark.parametrize(
    ("weight", "gib"), [("int8", 6.6e-5), ("bf16", 4), ("int4", 4)], ids=["int8", "bf16", "int4"]
)
def test_streamed_experts_and_the_cpu_s_are_near_the_same_weights(weight: str, gib: float) -> None:
    moe = load(None, "1-2", weight, stream_gib=gib).model.layers[1].mlp
    x, seen = torch.randn(1, 5, 64).bfloat16(), []
    moe.gate.register_forward_hook(lambda _, args, out: seen.append(out))
    moe.shared_experts.register_forward_hook(lambda _, args, out: torch.zeros_like(out))
    with torch.no_grad():
        streamed = moe(x)[0].double()
        moe.streamed = None
        cpu = moe(x)[0].double()
    _, weights, index = seen[0]
    exact, bound = experts_and_bound(
        x[0], index, weights, *matrices(moe.experts), hidden=torch.bfloat16
    )
    hidden = torch.bfloat16 if weight == "bf16" else torch.float32
    _, more = experts_and_bound(
        x[0], index, weights, *matrices(moe.experts), hidden=hidden, quantised=weight != "bf16"
    )
    assert ((streamed - exact).abs() <= bound).all()
    assert ((cpu - exact).abs() <= more).all()
    assert not torch.equal(streamed, cpu)
    assert bound.median() < 0.1 * exact.abs().median()


def test_prompt_is_read_by_streaming_and_tokens_are_written_on_the_cpu() -> None:
    events: list[str] = []
    model, plain = load(), load(stream_prefill="never")
    logits = []
    for each in (model, plain):
        cache = LatentCache(each.config, 64)
        with use(CpuStream(events.append)), torch.no_grad():
            logits.append(prefill(each, IDS[:1, :6], cache))
            read, events[:] = list(events), []
            each(IDS[:1, :1], past_key_values=cache)
            assert events.count("fill") == 0
            assert events.count("submit") == 2
            events.clear()
        # The last layer computes one position, for which it is not worth all its weights.
        assert read.count("submit") == (1 if each is model else 2)
    # Nobody's near tie in a router falls to the other side here.
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[1].abs().max()


# In order


def copies_and_computations(monkeypatch: pytest.MonkeyPatch, model: Any) -> str:
    """Return what a forward hands in, layer and first expert of each."""
    events: list[str] = []
    buffers = model.model.layers[1].mlp.streamed._shared.buffers
    buffers.two = TwoBuffers(buffers._copy)  # those that loading's probe has filled are no longer
    fill = Piece.fill
    layers = {id(layer.mlp.experts): n for n, layer in enumerate(model.model.layers) if n}
    now: list[int] = []

    def noted_fill(self: Piece, *args: Any) -> None:
        events.append(f"copy {layers[id(self._layer)]}:{self.experts.start}")
        fill(self, *args)

    def noted_add(self: SortedTokens, experts: range, *args: Any) -> None:
        events.append(f"compute {now[-1]}:{experts.start}")  # and no more: the order is what counts

    monkeypatch.setattr(Piece, "fill", noted_fill)
    monkeypatch.setattr(SortedTokens, "add", noted_add)
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: now.append(number))
    with torch.no_grad():
        model(IDS)
    return " ".join(events)


@pytest.mark.usefixtures("no_kernels")
def test_next_layers_are_copied_while_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(v3_config(num_hidden_layers=5), "1-4")
    # The last layer is not loaded ahead: a prompt's is computed for one position.
    assert copies_and_computations(monkeypatch, model) == (
        "copy 1:0 copy 2:0 compute 1:0 copy 3:0 compute 2:0 compute 3:0 copy 4:0 compute 4:0"
    )


@pytest.mark.usefixtures("no_kernels")
def test_pieces_are_copied_two_ahead_across_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(v3_config(num_hidden_layers=4), "1-3", stream_gib=6.6e-5)
    assert copies_and_computations(monkeypatch, model) == (
        "copy 1:0 copy 1:4 compute 1:0 copy 2:0 compute 1:4 copy 2:4 "
        "compute 2:0 compute 2:4 copy 3:0 copy 3:4 compute 3:0 compute 3:4"
    )


# The choice


def on_auto(model: Any) -> Any:
    """Let a model decide as it would with a GPU."""
    for layer in model.model.layers[1:]:
        layer.mlp.streamed._mode = "auto"
    return model


@pytest.mark.usefixtures("no_kernels")
def test_chunk_is_streamed_where_the_cost_model_says_so() -> None:
    model = on_auto(load())
    least = least_tokens(RATES, model.model.layers[1].mlp.streamed._sizes)
    assert least is not None
    assert 20 < least < 60
    for tokens, streamed in ((least - 1, False), (least, True)):
        events: list[str] = []
        with use(CpuStream(events.append)), torch.no_grad():
            model(torch.arange(tokens)[None] % 90)
        assert ("fill" in events) == streamed
        assert ("submit" in events) != streamed


@pytest.mark.usefixtures("no_kernels")
def test_last_layer_s_one_position_stays_on_the_cpu() -> None:
    model = on_auto(load())
    events: list[str] = []
    with use(CpuStream(events.append)):
        prefill(model, torch.arange(60)[None] % 90, LatentCache(model.config, 256))
    assert events.count("submit") == 1
    assert "fill" in events


@pytest.mark.usefixtures("no_kernels")
def test_decode_and_graphs_are_never_streamed() -> None:
    model, events = load(), list[str]()
    moe, x = model.model.layers[1].mlp, torch.randn(2, 2, 64).bfloat16()
    stream = CpuStream(events.append)
    with use(stream), torch.no_grad(), phase("decode"):
        moe(x)
    with stream.capture():
        moe(x)
    assert events.count("submit") == 2
    assert events.count("fill") == 0


@pytest.mark.usefixtures("no_kernels")
def test_chunk_of_prefill_is_one_that_hides_the_copies() -> None:
    model = load(stream_prefill="never")
    usual = chunk_tokens(model)
    model = on_auto(load())
    hiding = hiding_tokens(RATES, model.model.layers[1].mlp.streamed._sizes)
    assert hiding > usual
    assert hiding - 64 < chunk_tokens(model) <= hiding
    assert chunk_tokens(model, 1 << 18) < hiding - 64  # memory bounds it all the same


@pytest.mark.usefixtures("no_kernels")
def test_rates_of_this_machine_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("COPIED", 1 << 20), ("READ", 1 << 20), ("MATRIX", 64)):
        monkeypatch.setattr(f"ktransformers.machine_rates.{name}", small)
    model = load()
    layers = [layer.mlp for layer in model.model.layers[1:]]
    rates = measured_rates(CpuStream(), layers[0].experts)
    assert min(rates.host_to_device, rates.gpu_operations, rates.cpu_operations) > 0
    assert min(rates.gpu_attention, rates.cpu_bandwidth) > 0
    calls: list[int] = []

    def counted(*_: object) -> Rates:
        calls.append(1)
        return rates

    monkeypatch.setattr("ktransformers.streamed_experts.measured_rates", counted)
    for moe in layers:
        moe.prefill_tokens()
    assert calls == [1]


# What it needs, and what it can't do


def test_buffers_are_counted_once_and_hold_no_more_than_asked_for() -> None:
    model = random_model(v3_config(), dtype=torch.bfloat16)
    for gib in (4, 3e-5):
        planned = plan(model, load_rules(rules(stream_gib=gib)), device=GPU)
        found = {item.name: item.operator.footprint() for item in planned.replacements}
        sizes = [found[f"model.layers.{layer}.mlp"].weight_bytes for layer in (1, 2)]
        experts = found["model.layers.1.mlp.experts"].weight_bytes
        assert 0 < sizes[0] <= gib * 2**30
        assert sizes[1] == 0
        assert found["model.layers.1.mlp"].device == GPU
        if gib == 4:  # no more than two layers
            assert 2 * experts <= sizes[0] < 2.1 * experts


def test_gpu_that_is_not_here_is_refused_unless_prefill_is_never_streamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(v3_config(), dtype=torch.bfloat16)
    monkeypatch.setattr("ktransformers.operators.hybrid.stream_of", lambda _: CpuStream())
    with pytest.raises(RuleError, match=r"needs a GPU, cuda:0, and torch .* finds none here"):
        check_machine(plan(model, load_rules(rules()), device=GPU))
    check_machine(plan(model, load_rules(rules(stream_prefill="never")), device=GPU))


@pytest.mark.parametrize(
    ("dtype", "kwargs", "reason"),
    [
        ("bfloat16", {"stream_prefill": "often"}, "stream_prefill 'often' is not auto, never or"),
        ("bfloat16", {"stream_gib": 0}, "stream_gib 0 is not a number above 0"),
        ("bfloat16", {"stream_gib": math.inf}, "stream_gib inf is not a number above 0"),
        ("bfloat16", {"stream_gib": "4"}, "stream_gib '4' is not a number above 0"),
        (
            "float32",
            {"stream_prefill": "always"},
            "stream_prefill always: takes float16 or bfloat16 activations, not torch.float32",
        ),
        (
            "bfloat16",
            {"stream_prefill": "always", "stream_gib": 1e-6},
            "half of 1,072 bytes holds no expert, which has",
        ),
    ],
)
def test_what_can_t_be_streamed_is_said(dtype: str, kwargs: Any, reason: str) -> None:
    model = random_model(v3_config(), dtype=getattr(torch, dtype))
    with pytest.raises(RuleError) as caught:
        plan(model, load_rules(rules(**kwargs)))
    assert reason in str(caught.value)


def test_device_that_is_no_gpu_is_refused_unless_kernels_are_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(v3_config(), dtype=torch.bfloat16)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuleError, match="stream_prefill always: cpu is no GPU"):
        plan(model, load_rules(rules(stream_prefill="always")))


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_experts_that_are_not_all_on_the_host_stay_where_they_are(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    model = random_model(v3_config(), dtype=torch.bfloat16)
    planned = plan(model, load_rules(rules(stream_prefill=mode)), device=GPU)
    moe: Any
    experts: Any
    moe, experts = (
        next(i.operator for i in planned.replacements if i.name == f"model.layers.1.mlp{end}")
        for end in ("", ".experts")
    )
    experts.num_experts = 9
    others = [moe.streamed]
    moe.streamed._pieces = []
    if mode == "always":
        with pytest.raises(ValueError, match="the host has 8 of 9 experts, and all of them are"):
            moe.streamed.connect(experts, others)
    else:
        moe.streamed.connect(experts, others)
    assert not moe.streamed.chosen(10**6)
    assert moe.prefill_tokens() is None
