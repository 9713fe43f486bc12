"""GpuMlaAttention, on a GPU or in Triton's interpreter, against HuggingFace's eager attention."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from ktransformers import gpu_options, optimize_and_load
from ktransformers.base import Operator
from ktransformers.cache import LatentCache, LatentPages
from ktransformers.cache_file import load_cache, save_cache
from ktransformers.cache_pages import PAGE_TOKENS as PAGE
from ktransformers.inject import plan
from ktransformers.load import build_on_meta
from ktransformers.operators import gpu_attention
from ktransformers.operators.gpu_attention import GpuMlaAttention
from ktransformers.operators.kernels.mla_append import mla_append
from ktransformers.operators.kernels.mla_decode import mla_decode
from ktransformers.packing import pack
from ktransformers.rules import RuleError, load_rules
from tiny_models import random_model, v2_config, v3_config

SMALL = {"num_hidden_layers": 2, "first_k_dense_replace": 2}  # a router makes jumps of differences
IDS = torch.randint(3, 96, (2, 22), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, :9] = 0
# Both compute in fp32: products of up to 96 terms, of which there are some 20 on a token's way
# through two layers, each off by its length times half a step.
SHARE = 20 * 96 * 2.0**-24
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "v2": lambda: v2_config(**SMALL),
    "v2 without q_lora": lambda: v2_config(**SMALL, q_lora_rank=None),
    "v3": lambda: v3_config(**SMALL),
    "v3 without q_lora": lambda: v3_config(**SMALL, q_lora_rank=None),
    "v3 not interleaved": lambda: v3_config(**SMALL, rope_interleave=False),
}


def rules(device: object, **kwargs: Any) -> list[dict[str, Any]]:
    operator = "ktransformers.operators.gpu_attention.GpuMlaAttention"
    replace = {"class": operator, "kwargs": {"device": str(device), **kwargs}}
    return [{"match": {"name": r"\.self_attn$"}, "replace": replace}]


def pair(
    config: PreTrainedConfig, device: torch.device, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model with attention on the GPU, and a plain one of the same weights."""
    plain = random_model(config)
    plain.set_attn_implementation("eager")
    return optimize_and_load(random_model(config), rules(device, **kwargs)), plain


def assert_close(got: torch.Tensor, want: torch.Tensor, share: float = SHARE) -> None:
    assert (got - want).abs().max() <= share * want.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_eager_attention(name: str, device: torch.device) -> None:
    optimised, plain = pair(CONFIGS[name](), device)
    with torch.no_grad():
        assert_close(optimised(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("kind", ["latent", "dynamic", "static"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(kind: str, device: torch.device) -> None:
    config = v3_config(**SMALL)
    optimised, plain = pair(config, device)
    caches: dict[str, Callable[[], Any]] = {
        "latent": lambda: LatentCache.for_model(optimised, 100),
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=50),
    }
    cache, pieces = caches[kind](), []
    with torch.no_grad():
        for begin, end in ((0, 9), (9, 21), (21, 22)):
            ids, mask = IDS[:, begin:end], LEFT[:, :end]
            pieces.append(optimised(ids, attention_mask=mask, past_key_values=cache).logits)
        want = plain(IDS, attention_mask=LEFT).logits
    # Nobody reads the outputs of padding.
    assert_close(torch.cat(pieces, dim=1)[LEFT != 0], want[LEFT != 0])


def test_generate_gives_the_tokens_of_the_plain_model(device: torch.device) -> None:
    optimised, plain = pair(v2_config(**SMALL), device)
    options = dict(attention_mask=LEFT, max_new_tokens=4, do_sample=False)
    want = plain.generate(IDS, **options)  # type: ignore[operator]  # typed for GenerationMixin alone
    cache = LatentCache.for_model(optimised, 100)
    got = optimised.generate(IDS, past_key_values=cache, **options)  # type: ignore[operator]  # as above
    assert torch.equal(got, want)


def test_the_cpu_operator_computes_the_same_in_bf16(device: torch.device) -> None:
    config = v3_config(**SMALL)
    optimised, _ = pair(config, device)
    cpu = {"class": "ktransformers.operators.attention.MlaAttention", "kwargs": {"weight": "bf16"}}
    rule = {"match": {"name": r"\.self_attn$"}, "replace": cpu}
    other = optimize_and_load(random_model(config), [rule])
    with torch.no_grad():
        got, want = (model(IDS).logits for model in (optimised, other))
    assert (got - want).abs().median() <= 2 * 2.0**-8 * want.abs().max()


def test_changes_of_the_batch_are_what_transformers_does(device: torch.device) -> None:
    optimised, plain = pair(v3_config(**SMALL), device)
    ids = torch.randint(3, 96, (2, PAGE + 3), generator=torch.Generator().manual_seed(1))
    mine, theirs = LatentCache.for_model(optimised, 2 * PAGE), DynamicCache(config=plain.config)
    with torch.no_grad():
        for model, cache in ((optimised, mine), (plain, theirs)):
            model(ids, past_key_values=cache)
        changes: list[tuple[str, Any, int]] = [
            ("batch_repeat_interleave", 2, 4),
            ("reorder_cache", torch.tensor([3, 0, 0, 1]), 4),
            ("crop", -5, 4),
            ("batch_select_indices", torch.tensor([1, 3]), 2),
        ]
        for step, (method, argument, B) in enumerate(changes):
            for cache in (mine, theirs):
                getattr(cache, method)(argument)
            new = torch.arange(5, 5 + B)[:, None] + 7 * step
            got = optimised(new, past_key_values=mine).logits
            assert_close(got, plain(new, past_key_values=theirs).logits)


def test_a_cache_is_saved_and_restored(tmp_path: Path, device: torch.device) -> None:
    optimised, _ = pair(v3_config(**SMALL), device)
    cache = LatentCache.for_model(optimised, 100)
    with torch.no_grad():
        optimised(IDS, past_key_values=cache)
        save_cache(cache, tmp_path / "cache", optimised)
        restored = load_cache(tmp_path / "cache", optimised, 100)
        outputs = [optimised(IDS[:, :1], past_key_values=each).logits for each in (cache, restored)]
    assert torch.equal(*outputs)
    assert restored.layers[1].device == cache.layers[1].device


def test_what_a_recorded_step_reads_is_changed_in_place(device: torch.device) -> None:
    """As a CUDA graph replays: with the tensors of an earlier step, and no word from the host."""
    optimised, _ = pair(v3_config(**SMALL), device)
    recorded_cache, cache = (LatentCache.for_model(optimised, 2 * PAGE) for _ in range(2))
    attention = optimised.model.layers[0].self_attn
    assert isinstance(attention, GpuMlaAttention)
    generator = torch.Generator().manual_seed(2)

    def step(T: int) -> list[Any]:
        shapes = ((2, T, 2, 24), (2, T, 32), (2, T, 8))
        return [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    prompt = step(PAGE - 1)
    for each in (recorded_cache, cache):
        for layer in optimised.model.layers:
            layer.self_attn.compute(*(x.clone() for x in prompt), None, each)
    # Steps on both sides of a page's border.
    _, recorded = recorded_cache.make_room_in_all(2, 1)
    addresses = recorded.block_table.data_ptr(), recorded.lengths.data_ptr()
    for count in range(3):
        q, latent, rope = step(1)
        _, pages = recorded_cache.make_room_in_all(2, 1)
        assert (pages.block_table.data_ptr(), pages.lengths.data_ptr()) == addresses
        assert pages.latent.data_ptr() == recorded.latent.data_ptr()
        assert recorded.lengths.tolist() == [PAGE + count] * 2
        got = replayed(attention, q, latent, rope, recorded)
        for layer in range(2):
            recorded_cache.wrote(layer, 1)
        want = attention.compute(q, latent, rope, None, cache)
        assert torch.equal(got, want)


def replayed(
    attention: GpuMlaAttention,
    q: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
    pages: LatentPages,
) -> torch.Tensor:
    """Do on pages at hand what `compute` does on the device."""
    mla_append(latent, rope, pages)
    q_nope, q_rope = q[:, 0].split((16, 8), dim=-1)
    q_latent = torch.bmm(q_nope.transpose(0, 1), attention.uk).transpose(0, 1)
    out = mla_decode(q_latent, q_rope, pages, scaling=attention.scaling)
    return torch.bmm(out.transpose(0, 1), attention.uv).transpose(0, 1).reshape(2, 1, -1)


def test_a_decode_step_is_recorded_in_a_graph(device: torch.device) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    optimised, _ = pair(v3_config(**SMALL), device)
    attention: Any = optimised.model.layers[0].self_attn
    caches = [LatentCache.for_model(optimised, 2 * PAGE) for _ in range(2)]
    prompt, new = (
        tuple(torch.randn(2, T, *rest, device=device) for rest in ((2, 24), (32,), (8,)))
        for T in (PAGE - 2, 1)
    )
    for cache in caches:
        for layer in optimised.model.layers:
            layer.self_attn.compute(*(x.clone() for x in (*prompt,)), None, cache)
        cache.make_room_in_all(2, 1)
    attention.compute(*(x.clone() for x in new), None, caches[0])  # warm
    caches[0].layers[0].length -= 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.compute(*new, None, caches[0])
    caches[0].layers[0].length -= 1  # what was recorded has not run
    for _ in range(4):
        caches[0].make_room_in_all(2, 1)
        graph.replay()
        want = attention.compute(*(x.clone() for x in new), None, caches[1])
        assert torch.equal(out, want)
        for layer in range(2):
            caches[0].wrote(layer, 1)


def test_the_cache_is_made_in_the_format_that_the_rule_asks_for(device: torch.device) -> None:
    optimised, plain = pair(v3_config(**SMALL), device, cache_format="fp8")
    cache = LatentCache.for_model(optimised, 100)
    assert cache.format == "fp8"
    with torch.no_grad():
        optimised(IDS[:, :-1], past_key_values=cache)
        got, want = optimised(IDS[:, -1:], past_key_values=cache).logits, plain(IDS).logits[:, -1:]
    assert cache.layers[0].latent.dtype == torch.float8_e4m3fn
    # A latent is off by a 32nd of itself on average, which scores feel as well as outputs.
    assert 1e-4 * want.abs().max() < (got - want).abs().max() < 0.2 * want.abs().max()


def test_packed_weights_are_loaded_from_a_cache(
    save: Callable[..., Path], device: torch.device
) -> None:
    folder = save(random_model(v3_config(**SMALL)))
    pack(folder, rules(device))
    cached, read = (optimize_and_load(folder, rules(device), cache=c) for c in ("auto", None))
    assert "packed" in str(cached.ktransformers_report.cache)
    with torch.no_grad():
        assert torch.equal(cached(IDS[:, :3]).logits, read(IDS[:, :3]).logits)


def test_modules_inside_that_no_rule_takes_go_with_it(device: torch.device) -> None:
    optimised, _ = pair(v3_config(**SMALL), device)
    attention = optimised.model.layers[0].self_attn
    assert isinstance(attention, GpuMlaAttention)
    assert {p.device for p in attention.parameters()} == {attention.device}
    names = {name for name, _ in attention.named_children()}
    assert "kv_b_proj" not in names
    assert {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"} <= names


def test_a_machine_without_a_gpu_is_told_so_before_anything_is_loaded() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    config = v3_config(**SMALL)
    made = load_rules(rules("cuda:0"))
    planned = plan(build_on_meta(config), made)  # for another machine
    assert all(str(item.site.device) == "cpu" for item in planned.replacements)
    operators = [item.operator for item in planned.replacements]
    assert all(isinstance(each, Operator) for each in operators)
    assert {str(each.footprint().device) for each in operators if each} == {"cuda:0"}
    with pytest.raises(RuleError) as caught:
        optimize_and_load(config, rules("cuda:0"), checkpoint="/nowhere")
    assert "GpuMlaAttentionV3 at model.layers.0.self_attn (and 1 more): needs a GPU, cuda:0" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"kernel": "flashinfer"}, "kernel flashinfer takes bfloat16, not torch.float32"),
        ({"kernel": "flashmla"}, "kernel flashmla takes bfloat16, not torch.float32"),
        ({"kernel": "cuda"}, "kernel 'cuda' is not supported (expected triton, flashinfer, flash"),
        ({"cache_format": "int8"}, "cache_format 'int8' is not supported (expected bf16, fp8)"),
        ({"device": "gpu"}, "device 'gpu' is not a GPU: expected such as cuda:0"),
    ],
)
def test_what_the_operator_cannot_do_it_says(
    kwargs: Any, reason: str, device: torch.device
) -> None:
    with pytest.raises(RuleError) as caught:
        optimize_and_load(random_model(v3_config(**SMALL)), rules(**{"device": device, **kwargs}))
    assert reason in str(caught.value)


def test_fp8_is_refused_where_the_gpu_has_none(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A10")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = v3_config(**SMALL)
    with pytest.raises(RuleError, match=r"fp8 latents need .* 8\.9 or later, and cuda:0 is a A10"):
        optimize_and_load(config, rules("cuda:0", cache_format="fp8"), checkpoint="/nowhere")
    assert gpu_options.interpreting() or device.type == "cuda"


def test_a_gpu_of_amd_is_refused(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(RuleError, match="latent attention has no tiles for AMD's GPUs"):
        optimize_and_load(random_model(v3_config(**SMALL)), rules(device))


def test_importing_the_operator_loads_no_kernels() -> None:
    """They bring Triton: they are imported where they are called."""
    tree = ast.parse(inspect.getsource(gpu_attention))
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [node.lineno for node in imports if "kernels" in ast.unparse(node)] == []
