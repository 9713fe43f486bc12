"""CpuDecoderLayer in whole models, beside transformers' layers and our operators for parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from ktransformers import _native, optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.last_position import last_position_only
from ktransformers.numa import Placement
from ktransformers.packing import pack
from ktransformers.report import count_experts
from ktransformers.rules import RuleError
from ktransformers.stack import DecoderStack
from ktransformers.weights import LoadError
from tiny_models import random_model, v2_config, v3_config

U16 = 2.0**-8  # half a step of bf16, relative
# Every expert is chosen: a small difference before a router would make a jump of it.
ALL = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
KWARGS: list[dict[str, Any]] = [
    {"weight": "bf16"},
    {"weight": "int8"},
    {"weight": "int4", "group_size": 32},
]
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "v2": lambda: v2_config(**ALL),
    "v2 without q_lora, greedy": lambda: v2_config(**ALL, q_lora_rank=None, topk_method="greedy"),
    "v3": lambda: v3_config(**ALL),
    "v3 without q_lora, not interleaved": lambda: v3_config(
        **ALL, q_lora_rank=None, rope_interleave=False
    ),
}
IDS = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(0))
LEFT, RIGHT = torch.ones_like(IDS), torch.ones_like(IDS)
LEFT[0, :9] = LEFT[2, :25] = 0
RIGHT[0, 31:] = RIGHT[2, 15:] = 0
every_kwargs = pytest.mark.parametrize("kwargs", KWARGS)
every_config = pytest.mark.parametrize("name", CONFIGS)


def rules(pattern: str = r"^model\.layers\.\d+$", **kwargs: Any) -> list[dict[str, Any]]:
    operator = "ktransformers.operators.decoder_layer.CpuDecoderLayer"
    replace = {"class": operator, "kwargs": {"weight": "bf16", "threads": 2, **kwargs}}
    return [{"match": {"name": pattern}, "replace": replace}]


def rules_for_parts(**kwargs: Any) -> list[dict[str, Any]]:
    """Take the same matrices with the operators for a layer's parts."""
    return [
        {
            "match": {"name": pattern, "class": module},
            "replace": {
                "class": f"ktransformers.operators.{operator}",
                "kwargs": {"weight": "bf16", "threads": 2, **kwargs},
            },
        }
        for pattern, module, operator in (
            (r"self_attn$", "torch.nn.Module", "attention.MlaAttention"),
            (r"mlp\.experts$", "torch.nn.Module", "experts.CpuExperts"),
            (r"layers\..*(?<!kv_b)_proj(_with_mqa)?$", "torch.nn.Linear", "linear.CpuLinear"),
        )
    ]


def layer_calls(model: PreTrainedModel, mask: torch.Tensor | None) -> list[tuple[Any, ...]]:
    """Run a model; return input, keyword arguments and output of each layer."""
    calls: list[tuple[Any, ...]] = []
    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output: calls.append((args[0], kwargs, output)),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(IDS, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def errors(
    fused: PreTrainedModel, calls: list[tuple[Any, ...]], mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """Return how far each layer is from what another's made of the same, over the largest value.

    Of the layer's own part: the residual is the same on both sides.
    """
    found = []
    for layer, (x, kwargs, want) in zip(fused.model.layers, calls, strict=True):
        with torch.no_grad():
            got = layer(x, **kwargs)
        error = (got - want).abs().float()
        if mask is not None:
            error[mask == 0] = 0  # nobody reads the outputs of padding
        found.append(error / (want - x).abs().max().float())
    return found


@every_config
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT])
def test_a_layer_in_fp32_equals_that_of_transformers(name: str, mask: torch.Tensor | None) -> None:
    """The weights are rounded on both sides; what the products take is here, nine times over."""
    plain = random_model(CONFIGS[name]())
    fused = optimize_and_load(random_model(CONFIGS[name]()), rules())
    for weight in plain.model.layers.parameters():
        if weight.ndim > 1:
            weight.data = weight.data.bfloat16().float()
    for layer, router in zip(
        plain.model.layers, random_model(CONFIGS[name]()).model.layers, strict=True
    ):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.weight.data = router.mlp.gate.weight.data  # stays in fp32
    plain.set_attn_implementation("eager")
    for error in errors(fused, layer_calls(plain, mask), mask):
        assert error.max() <= 9 * U16
        assert error.median() <= U16


@every_config
@every_kwargs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_equals_the_operators_for_its_parts(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    """Steps between them are rounded alike, but for the MLP's fp32 and, in bf16, for rotary."""
    parts = optimize_and_load(random_model(CONFIGS[name](), dtype=dtype), rules_for_parts(**kwargs))
    fused = optimize_and_load(random_model(CONFIGS[name](), dtype=dtype), rules(**kwargs))
    exact = dtype == torch.float32
    # A value that lies between two steps of int8 or bf16 may fall to either side of it.
    step = U16 if kwargs["weight"] == "bf16" else 1 / 127
    for error in errors(fused, layer_calls(parts, None), None):
        assert error.max() <= (2 * step if exact else 2 * step + 8 * U16)
        assert error.median() <= (2**-18 if exact else 2 * U16)


@pytest.mark.parametrize("padding", [None, LEFT, RIGHT])
@pytest.mark.parametrize("kind", ["latent", "int8", "dynamic", "static", "none"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(
    config: PreTrainedConfig, kind: str, padding: torch.Tensor | None
) -> None:
    config.update(ALL)
    model = optimize_and_load(random_model(config), rules())
    caches: dict[str, Any] = {
        "latent": lambda: LatentCache.for_model(model, 100),
        "int8": lambda: LatentCache.for_model(model, 100, "int8"),
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=50),
        "none": lambda: None,
    }
    cache, logits = caches[kind](), []
    with torch.no_grad():
        want = model(IDS, attention_mask=padding, use_cache=False).logits
        for begin, end in ((0, 11), (11, 39), (39, 40)):
            first = 0 if cache is None else begin
            mask = None if padding is None else padding[:, :end]
            piece = model(
                IDS[:, first:end],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits
            logits.append(piece[:, begin - first :])
    error = (torch.cat(logits, dim=1) - want).abs()
    if padding is not None:
        error[padding == 0] = 0
    # Pieces differ in the order of additions and in the form, int8 by a step of the latent.
    assert error.max() <= (0.3 if kind == "int8" else 0.1) * want.abs().max()
    assert error.median() <= (2**-5 if kind == "int8" else 2**-7) * want.abs().max()


@pytest.mark.parametrize("padding", [None, LEFT])
def test_chunks_inside_a_call_change_nothing_but_the_form(
    config: PreTrainedConfig, padding: torch.Tensor | None
) -> None:
    config.update(ALL)
    whole = optimize_and_load(random_model(config), rules())
    logits, caches = [], []
    for chunk in (7, 40, 64):
        cut = optimize_and_load(random_model(config), rules(chunk_tokens=chunk))
        caches.append(LatentCache.for_model(cut, 50))
        with torch.no_grad():
            logits.append(cut(IDS, attention_mask=padding, past_key_values=caches[-1]).logits)
    with torch.no_grad():
        want = whole(IDS, attention_mask=padding, use_cache=False).logits
    assert torch.equal(
        caches[0].layers[0].gather(torch.float32)[0], caches[2].layers[0].gather(torch.float32)[0]
    )
    for got in logits:
        error = (got - want).abs()
        if padding is not None:
            error[padding == 0] = 0
        assert error.max() <= 0.1 * want.abs().max()
        assert error.median() <= 2**-7 * want.abs().max()


def test_fewer_rows_than_the_batch_are_computed_for_the_last_position(
    config: PreTrainedConfig,
) -> None:
    model = optimize_and_load(random_model(config), rules())
    with torch.no_grad(), count_experts(model) as counter, last_position_only(model):
        got = model(IDS, logits_to_keep=1).logits
        assert counter._tokens == {"model.layers.1": 120, "model.layers.2": 3}
        whole = model(IDS).logits
    with torch.no_grad():
        want = model(IDS, logits_to_keep=1).logits
    assert torch.equal(got, want)
    assert torch.allclose(got[:, 0], whole[:, -1], rtol=0, atol=1e-5)  # torch's head, other shapes


def test_fewer_experts_are_live_and_measured(config: PreTrainedConfig) -> None:
    config.update({"n_group": 1})
    model = optimize_and_load(random_model(config), rules(top_k=2))
    assert model.ktransformers_report.experts_per_token == 2
    mapped = optimize_and_load(random_model(config), rules(top_k={"0-1": 3, "2": 1}))
    assert mapped.ktransformers_report.experts_per_token == 2
    fewer = random_model(config)
    for layer in fewer.model.layers[1:]:
        layer.mlp.gate.top_k = 2
    assert [len(call) for call in layer_calls(fewer, None)] == [3, 3, 3]
    for error in errors(model, layer_calls(fewer, None), None):
        assert error.median() <= 4 * U16


def test_a_reduction_that_is_not_live_is_an_error(
    config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "ktransformers.operators.decoder_layer.CpuDecoderLayer.watch_routing"
    monkeypatch.setattr(path, lambda *_: None)
    with pytest.raises(LoadError, match="reduction to 2 experts per token is not live"):
        optimize_and_load(random_model(config), rules(top_k=2))


def test_text_is_generated_with_every_cache(config: PreTrainedConfig) -> None:
    model = optimize_and_load(random_model(config), rules())
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    texts = [
        model.generate(  # type: ignore[operator]  # typed for GenerationMixin alone
            IDS,
            attention_mask=LEFT,
            max_new_tokens=8,
            do_sample=False,
            past_key_values=cache,
            **more,
        )
        for cache, more in (
            (LatentCache.for_model(model, 100), {}),
            (DynamicCache(config=config), {}),
            (LatentCache.for_model(model, 100), {"num_beams": 3}),
        )
    ]
    assert torch.equal(texts[0], texts[1])
    assert texts[2].shape == texts[0].shape


def test_hidden_states_are_recorded(config: PreTrainedConfig) -> None:
    model = optimize_and_load(random_model(config), rules())
    calls = layer_calls(model, None)
    with torch.no_grad():
        recorded = model(IDS, output_hidden_states=True).hidden_states
    assert len(recorded) == 4
    for (x, _, _), state in zip(calls, recorded, strict=False):
        assert torch.equal(x, state)


@pytest.mark.parametrize("output", ["attentions", "router_logits"])
def test_outputs_that_are_not_kept_are_refused(config: PreTrainedConfig, output: str) -> None:
    model = optimize_and_load(random_model(config), rules())
    model.set_attn_implementation("eager")  # else transformers refuses sooner
    reason = rf"CpuDecoderLayerV\d at model.layers.0: keeps no {output}"
    with pytest.raises(RuntimeError, match=reason):
        model(IDS, **{f"output_{output}": True})
    setattr(model.config, f"output_{output}", True)
    with pytest.raises(RuntimeError, match=reason):
        model(IDS)
    setattr(model.config, f"output_{output}", False)
    model(IDS)


def test_what_a_failed_call_reserved_is_not_cached(config: PreTrainedConfig) -> None:
    model = optimize_and_load(random_model(config), rules())
    cache = LatentCache.for_model(model, 100)
    with pytest.raises(ValueError, match="is not causal with padding"):
        model(IDS, attention_mask=torch.ones(3, 1, 40, 40, dtype=torch.bool), past_key_values=cache)
    assert cache.completed() == 0
    with torch.no_grad():
        got = model(IDS, past_key_values=cache).logits
        assert torch.equal(got, model(IDS, use_cache=False).logits)


def test_a_gradient_is_refused(config: PreTrainedConfig) -> None:
    model = optimize_and_load(random_model(config), rules())
    embedded = model.model.embed_tokens(IDS).requires_grad_()
    with pytest.raises(RuntimeError, match="packed weights have no gradient"):
        model(inputs_embeds=embedded)


@every_kwargs
def test_packed_weights_are_loaded_from_a_cache(
    config: PreTrainedConfig, kwargs: dict[str, Any], save: Callable[..., Path]
) -> None:
    folder = save(random_model(config))
    pack(folder, rules(**kwargs))
    cached, read = (
        optimize_and_load(folder, rules(**kwargs), cache=cache) for cache in ("auto", None)
    )
    assert "packed" in str(cached.ktransformers_report.cache)
    with torch.no_grad():
        assert torch.equal(cached(IDS).logits, read(IDS).logits)


@every_config
@every_kwargs
def test_the_footprint_is_what_the_layer_holds(name: str, kwargs: dict[str, Any]) -> None:
    model = optimize_and_load(random_model(CONFIGS[name]()), rules(**kwargs))
    for layer in model.model.layers:
        footprint = layer.footprint()
        assert footprint.weight_bytes == sum(buffer.nbytes for buffer in layer.buffers())
        assert 0 < footprint.bytes_read_per_token <= footprint.weight_bytes
        assert footprint.flops_per_token > 0


@pytest.mark.parametrize(
    ("pattern", "changes", "kwargs", "reason"),
    [
        (r"\.mlp$", {}, {}, "place of a DeepseekV2DecoderLayer or DeepseekV3DecoderLayer, not of"),
        (r"layers\.\d$", {}, {"weight": "int2"}, "weight 'int2' is not supported"),
        (r"layers\.\d$", {}, {"threads": 0}, "threads 0 is not 'auto' or a number"),
        (r"layers\.\d$", {}, {"cache_format": "fp8"}, "cache_format 'fp8' is not supported (exp"),
        (r"layers\.\d$", {}, {"top_k": 5}, "top_k 5 is not an integer from 1 to 4"),
        (r"layers\.\d$", {}, {"top_k": {"0-1": 2}}, "top_k gives no number for layer 2"),
        (r"layers\.\d$", {"attention_bias": True}, {}, "attention_bias is not supported"),
        (r"layers\.\d$", {"hidden_act": "gelu"}, {}, "computes silu, but hidden_act is 'gelu'"),
    ],
)
def test_what_the_operator_cannot_do_it_says(
    pattern: str, changes: Any, kwargs: Any, reason: str
) -> None:
    with pytest.raises(RuleError) as caught:
        optimize_and_load(random_model(v3_config(**changes)), rules(pattern, **kwargs))
    assert reason in str(caught.value)


def test_another_routing_method_is_refused() -> None:
    with pytest.raises(RuleError, match="topk_method 'noaux_tc' is not supported"):
        optimize_and_load(random_model(v2_config(topk_method="noaux_tc")), rules())


@pytest.mark.parametrize("mode", ["interleave", "shard", "replicate"])
@every_kwargs
def test_weights_on_several_nodes_give_the_same_bits(
    config: PreTrainedConfig,
    mode: str,
    kwargs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = optimize_and_load(random_model(config), rules(**kwargs))
    several = Placement(mode, (0, 1), unbound="a pretended machine")
    path = "ktransformers.operators.decoder_layer.weight_placement"
    monkeypatch.setattr(path, lambda _: several)
    model = optimize_and_load(random_model(config), rules(**kwargs))
    for layer in model.model.layers:
        assert len(layer.buffer_names("o_proj_packed")) == (1 if mode == "interleave" else 2)
        assert layer.footprint().weight_bytes == sum(buffer.nbytes for buffer in layer.buffers())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)


def with_head(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose token is one call from its id to the logits."""
    head = {
        "match": {"name": "^lm_head$"},
        "replace": {"class": "ktransformers.operators.linear.CpuLinear", "kwargs": {"threads": 2}},
    }
    return optimize_and_load(random_model(config, dtype=dtype), [*rules(weight="int8"), head])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_in_one_call_has_the_bits_that_layers_norm_and_head_give(
    config: PreTrainedConfig, dtype: torch.dtype
) -> None:
    model = with_head(config, dtype)
    stack = DecoderStack(model)
    one, each = (LatentCache.for_model(model, 50) for _ in range(2))
    for position in range(3):  # into an empty cache, too
        ids = IDS[:, position : position + 1].int()
        with torch.no_grad():
            got = stack.last_logits(ids, one)
            x = model.model.embed_tokens(ids)
            angles = model.model.rotary_emb(x, torch.tensor([[position]]))
            for layer in model.model.layers:
                x = layer(x, past_key_values=each, position_embeddings=angles)
            normed = torch.empty_like(x[:, 0])
            norm = model.model.norm
            _native.rms_norm(x[:, 0], norm.weight, norm.variance_epsilon, normed)
            want = model.lm_head(normed)
        assert got.dtype == dtype
        assert torch.equal(got, want)
    assert one.get_seq_length() == one.completed() == 3


def test_a_token_in_one_call_ends_in_the_norm_where_the_head_is_no_operator(
    config: PreTrainedConfig,
) -> None:
    """The mean's order of additions may turn a rounding, and the norm's product another one."""
    model = optimize_and_load(random_model(config, dtype=torch.bfloat16), rules())
    outputs: list[torch.Tensor] = []
    last = model.model.layers[-1]
    handle = last.register_forward_hook(lambda _, args, out: outputs.append(out))
    cache = LatentCache.for_model(model, 50)
    with torch.no_grad():
        DecoderStack(model).last_logits(IDS[:, :1], cache)
        handle.remove()
        cache.reset()
        heard: list[torch.Tensor] = []
        model.lm_head.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
        DecoderStack(model).last_logits(IDS[:, :1], cache)
        want = model.model.norm(outputs[0])
    torch.testing.assert_close(heard[0], want, rtol=2 * 2 * U16, atol=0)


def token_call(model: PreTrainedModel, **changes: Any) -> None:
    """Call the native function with what a model has, or something else."""
    layers = [layer._layer for layer in model.model.layers]
    cache = LatentCache.for_model(model, 50)
    caches, pages = cache.make_room_in_all(3, 1)
    ids = IDS[:, :1].contiguous()
    angles = model.model.rotary_emb(model.model.norm.weight, torch.zeros(1, 1))
    cos, sin = model.model.layers[0].angles(angles)
    arguments = {
        "layers": layers,
        "embedding": model.model.embed_tokens.weight,
        "norm": model.model.norm.weight,
        "eps": 1e-6,
        "head": model.lm_head._layer,
        "token_ids": ids,
        "cos": cos,
        "sin": sin,
        "caches": caches,
        "block_table": pages.block_table,
        "lengths": pages.lengths,
        "out": torch.empty(3, 96),
    }
    with torch.no_grad():
        _native.decode_token(**{**arguments, **changes})


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layers": []}, ValueError, "caches: 3, expected one for each of 0 layers, of which there"),
    ({"caches": []}, ValueError, "caches: 0, expected one for each of 3 layers"),
    ({"layers": [None] * 3}, TypeError, "layer 0: expected a DecoderLayer"),
    ({"caches": [None] * 3}, ValueError, "layer 0: expected rows as of layer 0, and latent, scale"),
    ({"head": object()}, TypeError, "head: expected a Linear"),
    ({"token_ids": torch.tensor([[0], [96], [1]])}, ValueError, "token_ids: 96, expected 0 to 95"),
    ({"token_ids": torch.tensor([[0], [-1], [1]])}, ValueError, "token_ids: -1, expected 0 to 95"),
    ({"token_ids": IDS[:, :2].contiguous()}, ValueError, r"token_ids: expected shape \[\*, 1\]"),
    ({"embedding": torch.zeros(96, 63)}, ValueError, r"embedding: expected shape \[\*, 64\]"),
    ({"norm": torch.zeros(64, dtype=torch.bfloat16)}, TypeError, "norm: expected float32"),
    ({"out": torch.empty(3, 64)}, ValueError, r"out: expected shape \[3, 96\]"),
    ({"out": torch.empty(3, 96), "head": None}, ValueError, r"out: expected shape \[3, 64\]"),
]


def test_a_token_in_one_call_says_what_does_not_fit() -> None:
    model = with_head(v3_config(), torch.float32)
    token_call(model)
    for changes, error, reason in WRONG:
        with pytest.raises(error, match=reason):
            token_call(model, **changes)


def test_layers_and_a_head_of_other_sizes_are_no_token_in_one_call() -> None:
    model = with_head(v3_config(), torch.float32)
    narrow = with_head(v3_config(hidden_size=32), torch.float32)
    layers = [model.model.layers[0]._layer, *(layer._layer for layer in narrow.model.layers[1:])]
    with pytest.raises(ValueError, match="layer 1: expected rows as of layer 0"):
        token_call(model, layers=layers)
    with pytest.raises(ValueError, match="in_features of head: 32, expected 64"):
        token_call(model, head=narrow.lm_head._layer)


@pytest.mark.parametrize("padding", [None, LEFT])
@pytest.mark.parametrize("kind", ["latent", "int8", "dynamic"])
@pytest.mark.parametrize("chunk_tokens", [7, 40, None])
def test_the_last_position_alone_has_the_output_that_it_has_among_others(
    config: PreTrainedConfig, kind: str, padding: torch.Tensor | None, chunk_tokens: int | None
) -> None:
    """What the other positions cache is the same; one query may be computed in another form."""
    config.update(ALL)
    model = optimize_and_load(random_model(config), rules(chunk_tokens=chunk_tokens))

    def cache() -> Any:
        if kind == "dynamic":
            return DynamicCache(config=config)
        return LatentCache.for_model(model, 50, "int8" if kind == "int8" else None)

    caches = cache(), cache()
    options: dict[str, Any] = {"attention_mask": padding, "logits_to_keep": 1}
    with torch.no_grad():
        want = model(IDS, past_key_values=caches[0], **options).logits
        with last_position_only(model):
            got = model(IDS, past_key_values=caches[1], **options).logits
        assert (got - want).abs().max() <= 4 * U16 * want.abs().max()
        more = torch.full((3, 1), 5)
        mask = None if padding is None else torch.nn.functional.pad(padding, (0, 1), value=1)
        want, got = (model(more, mask, past_key_values=each).logits for each in caches)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("format", "rank"), [("bf16", 32), ("fp32", 32), ("int8", 32), ("int8", 160)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_caches_has_the_bits_that_a_cache_makes_itself(
    config: PreTrainedConfig, dtype: torch.dtype, format: Any, rank: int
) -> None:
    config.update({**ALL, "kv_lora_rank": rank})
    model = optimize_and_load(random_model(config, dtype=dtype), rules(cache_format=format))
    exact = LatentCache(config, 50, "fp32")
    native, own = (LatentCache.for_model(model, 50) for _ in range(2))
    with torch.no_grad():
        for cache in (exact, native):
            model(IDS, past_key_values=cache)
    latent, rope = exact.layers[0].gather(dtype)  # of later layers they depend on attention
    own.append(latent[:, 0], rope[:, 0], 0)
    slots = own.table.indexes(0, 40)
    got, want = (cache.layers[0].tensors() for cache in (native, own))
    assert native.format == format
    for name, tensor in want.items():
        assert torch.equal(got[name].flatten(0, 1)[slots], tensor.flatten(0, 1)[slots]), name


def test_scratch_does_not_grow_from_call_to_call() -> None:
    model = random_model(v3_config(**ALL))
    optimize_and_load(model, rules())
    ids = torch.randint(3, 96, (1, 900), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids)
        first = _native.scratch_bytes()
        for _ in range(3):
            model(ids)
    assert _native.scratch_bytes() == first
