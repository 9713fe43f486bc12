"""LatentCache under transformers' own attention, which must not notice which cache it uses."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ktransformers.cache import GPU_TOKENS, LatentCache, default_limit
from ktransformers.cache_pages import PAGE_TOKENS, PageTable
from ktransformers.prefill import prefill
from tiny_models import random_model, v3_config

IDS = torch.randint(3, 96, (3, 58), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :7] = 0
MASK[2, :30] = 0
DENSE = {"first_k_dense_replace": 3}  # experts are of no interest to a cache
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 0},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "chunks": {"do_sample": False, "prefill_chunk_size": 16},
}


@pytest.fixture(scope="module")
def v3() -> PreTrainedModel:
    return random_model(v3_config(**DENSE), dtype=torch.bfloat16)


def states(
    B: int, T: int, C: int = 32, R: int = 8, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw latents and rope parts of some tokens, as attention hands them to a cache."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(B, 1, T, C, generator=generator)
    return latent.bfloat16(), torch.randn(B, 1, T, R, generator=generator).bfloat16()


def filled(B: int = 2, T: int = 100, **options: Any) -> tuple[LatentCache, DynamicCache]:
    """Return a cache of three layers, and transformers' own, with the same tokens."""
    mine = LatentCache(v3_config(), **{"max_tokens": 300, "format": "bf16", **options})
    theirs = DynamicCache()
    for layer in range(3):
        for cache in (mine, theirs):
            cache.update(*states(B, T, seed=layer), layer)
    return mine, theirs


def assert_same(mine: LatentCache, theirs: DynamicCache, B: int, T: int = 3) -> None:
    """Add tokens to both, and compare all that they hold then."""
    for layer in range(3):
        new = states(B, T, seed=9 + layer)
        got, want = (cache.update(*new, layer) for cache in (mine, theirs))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous()
    assert mine.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_same_tokens(config: PreTrainedConfig, way: str) -> None:
    config.update(DENSE)
    model = random_model(config, dtype=torch.bfloat16)
    answers = []
    for cache in (DynamicCache(config=config), LatentCache.for_model(model, 200)):
        torch.manual_seed(5)
        answer = model.generate(  # type: ignore[operator]  # typed for GenerationMixin alone
            IDS, attention_mask=MASK, max_new_tokens=12, past_key_values=cache, **WAYS[way]
        )
        answers.append(answer)
    assert torch.equal(*answers)


@pytest.mark.filterwarnings("ignore:.*generation_config.*:UserWarning")
def test_assisted_generation_gives_the_same_tokens_and_crops(v3: PreTrainedModel) -> None:
    assistant = random_model(v3_config(**DENSE), dtype=torch.bfloat16)
    with torch.no_grad():
        assistant.lm_head.weight[::7] = 0  # so that it is wrong at times
    cache = LatentCache.for_model(v3, 200)
    cropped: list[int] = []
    crop = cache.crop

    def recorded(tokens_to_remove: int) -> None:
        cropped.append(tokens_to_remove)
        crop(tokens_to_remove)

    cache.crop = recorded  # type: ignore[method-assign]  # to watch it
    plain = v3.generate(IDS[:1], max_new_tokens=20, do_sample=False)  # type: ignore[operator]  # as above
    assisted = v3.generate(  # type: ignore[operator]  # as above
        IDS[:1],
        assistant_model=assistant,
        max_new_tokens=20,
        do_sample=False,
        past_key_values=cache,
    )
    assert torch.equal(plain, assisted)
    assert min(cropped) < 0
    assert cache.get_seq_length() == assisted.shape[1] - 1


def test_every_change_of_a_batch_is_what_transformers_does() -> None:
    changes: list[tuple[str, Any, int]] = [
        ("crop", -37, 2),
        ("batch_repeat_interleave", 3, 6),
        ("reorder_cache", torch.tensor([5, 0, 0, 3, 1, 1]), 6),
        ("crop", -1, 6),
        ("reorder_cache", torch.tensor([1, 1, 1, 1, 1, 1]), 6),
        ("batch_select_indices", torch.tensor([4, 0, 2]), 3),
        ("batch_select_indices", torch.tensor([True, False, True]), 2),
        ("crop", 0, 2),
    ]
    mine, theirs = filled()
    for step, (method, argument, B) in enumerate(changes):
        for cache in (mine, theirs):
            getattr(cache, method)(argument)
        assert_same(mine, theirs, B, T=1 + 40 * (step % 2))


def test_a_reset_cache_serves_another_batch_in_the_same_memory() -> None:
    mine, theirs = filled(B=4)
    used, memory = mine.table.top, mine.layers[0].latent.data_ptr()
    mine.reset()
    theirs.reset()
    assert mine.get_seq_length() == 0
    assert_same(mine, theirs, 2, T=100)
    assert mine.table.top <= used
    assert mine.layers[0].latent.data_ptr() == memory


def test_a_copy_is_independent() -> None:
    mine, theirs = filled()
    twin, reference = copy.deepcopy(mine), copy.deepcopy(theirs)
    mine.crop(-50)
    assert_same(twin, reference, 2)


def test_a_cache_that_a_model_has_filled_is_pickled_without_it(v3: PreTrainedModel) -> None:
    cache = LatentCache.for_model(v3, 100)
    prefill(v3, IDS, cache)
    twin = pickle.loads(pickle.dumps(cache))
    assert torch.equal(prefill(v3, IDS[:, :3], twin), prefill(v3, IDS[:, :3], cache))


def test_a_copy_knows_which_model_has_filled_it(v3: PreTrainedModel) -> None:
    cache = LatentCache.for_model(v3, 100)
    prefill(v3, IDS, cache)
    with pytest.raises(ValueError, match="this cache was filled by another model"):
        copy.deepcopy(cache).claim(copy.deepcopy(v3))


def test_a_cache_serves_inference_mode_and_others_in_turn(v3: PreTrainedModel) -> None:
    cache = LatentCache.for_model(v3, 100)
    with torch.inference_mode():
        v3(IDS, past_key_values=cache)
    logits = v3(IDS[:, :3], past_key_values=cache).logits
    assert logits.requires_grad
    assert not any(layer.latent.requires_grad for layer in cache.layers)


def test_beams_share_the_pages_of_their_prompt() -> None:
    mine, _ = filled(B=1, T=3 * PAGE_TOKENS)
    mine.batch_repeat_interleave(8)
    for layer in range(3):
        mine.update(*states(8, 1), layer)
    assert mine.table.top == 3 + 8


def wide(T: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens of two sequences whose latents are two groups of int8 and the rest."""
    return states(2, T, 300, seed=seed)


def test_int8_rounds_128_values_of_a_token_on_a_scale_of_their_own() -> None:
    mine = LatentCache(v3_config(kv_lora_rank=300), 300, "int8")
    mine.update(*wide(100), 0)
    latent, rope = wide(1, seed=7)
    got_latent, got_rope = mine.update(latent * 100, rope, 0)
    want = torch.cat([wide(100)[0], latent * 100], dim=2).float()
    parts = want.split(128, dim=-1)
    # The kernel divides as it is written, torch by a reciprocal: half a step and a little.
    step = torch.cat([p.abs().amax(-1, keepdim=True).expand_as(p) for p in parts], dim=-1) / 127
    error = (got_latent.float() - want).abs()
    assert (error <= 0.502 * step + 2.0**-8 * want.abs()).all()
    assert not torch.equal(got_latent.float(), want)
    assert torch.equal(got_rope, torch.cat([wide(100)[1], rope], dim=2))


@pytest.mark.parametrize("outlier", [3, 130, 299])
def test_an_outlier_among_int8_latents_costs_its_own_group_alone(outlier: int) -> None:
    latent, rope = wide(5)
    spiked = latent.clone()
    spiked[..., outlier] = 1e4
    plain, got = (
        LatentCache(v3_config(kv_lora_rank=300), 10, "int8").update(each, rope, 0)[0]
        for each in (latent, spiked)
    )
    hit = torch.arange(300) // 128 == outlier // 128
    assert torch.equal(got[..., ~hit], plain[..., ~hit])
    assert (got[..., hit] == 0).sum() == 2 * 5 * (hit.sum() - 1)  # the step is 79


def test_int8_latents_may_lie_in_any_order_in_memory() -> None:
    latent, rope = states(1, 5, 256)  # whole groups, which need no padding
    turned = latent.transpose(2, 3).contiguous().transpose(2, 3)
    got, want = (
        LatentCache(v3_config(kv_lora_rank=256), 10, "int8").update(each, rope, 0)[0]
        for each in (turned, latent)
    )
    assert torch.equal(got, want)


def test_scales_are_fp32_whatever_torch_makes_tensors_in() -> None:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        cache = LatentCache(v3_config(kv_lora_rank=300), 10, "int8")
        cache.update(*wide(5), 0)
    finally:
        torch.set_default_dtype(usual)
    assert cache.layers[0].tensors()["scale"].dtype == torch.float32


@pytest.mark.parametrize(("format", "nbytes"), [("bf16", 576 * 2), ("int8", 512 + 16 + 64 * 2)])
def test_a_token_takes_576_values_of_a_layer(format: Any, nbytes: int) -> None:
    config = v3_config(kv_lora_rank=512, qk_rope_head_dim=64)
    cache = LatentCache(config, 100_000, format)
    for layer in range(3):
        cache.update(*states(1, PAGE_TOKENS, 512, 64), layer)
    assert cache.nbytes == 3 * PAGE_TOKENS * nbytes


def test_memory_is_taken_as_tokens_come() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    config = v3_config(kv_lora_rank=512, qk_rope_head_dim=64)
    cache = LatentCache(config, 1_000_000, "bf16")  # 3.5 GB in the end
    before = resident()
    for layer in range(3):
        cache.update(*states(1, 4 * PAGE_TOKENS, 512, 64), layer)
    assert cache.layers[0].latent.nbytes > 1_000_000_000
    assert resident() - before < 100_000_000


@pytest.mark.parametrize(("cached", "new"), [(0, 201), (100, 101)])
def test_what_does_not_fit_is_refused_before_any_layer_works(
    v3: PreTrainedModel, cached: int, new: int
) -> None:
    cache = LatentCache.for_model(v3, 200)
    ids = torch.full((2, 201), 5)
    if cached:
        v3(ids[:, :cached], past_key_values=cache)
    ran: list[int] = []
    hook = v3.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError) as caught:
        v3(ids[:, :new], past_key_values=cache)
    hook.remove()
    assert str(caught.value) == (
        "201 tokens, prompt and answer together, do not fit a cache of 200; shorten them, or raise "
        "max_tokens (--cache_lens)"
    )
    assert ran == []
    v3(ids[:, : 200 - cached], past_key_values=cache)
    assert cache.get_seq_length() == 200


def test_another_number_of_sequences_is_refused() -> None:
    mine, _ = filled()
    with pytest.raises(ValueError, match="holds 2 sequences, but 3 came"):
        mine.update(*states(3, 1), 0)


@pytest.mark.parametrize(
    "other",
    [
        v3_config(num_hidden_layers=2),
        v3_config(num_hidden_layers=4),
        v3_config(kv_lora_rank=16),
        v3_config(qk_rope_head_dim=16),
    ],
)
def test_a_cache_for_a_model_of_other_sizes_is_refused(
    v3: PreTrainedModel, other: PreTrainedConfig
) -> None:
    reason = r"made for another model: it has .* values, and 3 layers of 32 \+ 8 values are to be"
    with pytest.raises(ValueError, match=reason):
        prefill(v3, IDS, LatentCache(other, 100))
    if other.num_hidden_layers <= 3:
        with pytest.raises(ValueError, match="made for another model"):
            v3(IDS, past_key_values=LatentCache(other, 100))


def test_what_an_interrupt_has_left_is_cut_to_what_all_layers_have() -> None:
    mine, theirs = filled()
    mine.update(*states(2, 70), 0)
    mine.update(*states(2, 70), 1)
    assert mine.completed() == 100
    mine.cut(mine.completed())
    assert_same(mine, theirs, 2)


@pytest.mark.parametrize(
    ("config", "arguments", "reason"),
    [
        (PreTrainedConfig(), (10,), "kv_lora_rank; PreTrainedConfig has none"),
        (v3_config(), (0,), "max_tokens 0 is not a number of 1 or more"),
        (v3_config(), (10, "int4"), r"format 'int4' is not supported \(expected bf16, .*, fp8\)"),
    ],
)
def test_what_can_be_no_cache_is_refused(
    config: PreTrainedConfig, arguments: tuple[Any, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        LatentCache(config, *arguments)


def test_a_cache_can_only_be_cropped_to_less() -> None:
    mine, _ = filled()
    with pytest.raises(ValueError, match="would add tokens"):
        mine.crop(3)


@pytest.mark.parametrize(
    ("prompt", "common"),
    [([4, 5, 6, 7, 8], 3), ([4, 9, 6, 7], 1), ([3, 3], 0), ([4, 5], 1), ([4, 5, 6, 1], 3)],
)
def test_what_a_prompt_has_in_common_with_the_cache_is_kept(prompt: Any, common: int) -> None:
    mine, _ = filled(B=1, T=3)
    mine.note_tokens(torch.tensor([[4, 5, 6, 7, 8]]))  # two of which are not cached yet
    assert mine.keep_prefix(torch.tensor([prompt])) == common
    assert mine.get_seq_length() == common
    assert mine.token_ids.tolist() == [prompt[:common]]


def test_of_tokens_that_nobody_named_nothing_is_kept() -> None:
    mine, _ = filled(B=1, T=3)
    assert mine.keep_prefix(torch.tensor([[4, 5]])) == 0
    assert mine.get_seq_length() == 0


def test_pages_given_back_are_used_again_and_a_shared_one_only_when_none_holds_it() -> None:
    table = PageTable()
    table.start(2)
    table.reserve(0, 2 * PAGE_TOKENS)
    table.select([0, 0])  # pages 2 and 3 of sequence 1 are free
    assert table.reserve(PAGE_TOKENS, 2 * PAGE_TOKENS) == [(1, 2)]
    assert table.tensor().tolist() == [[0, 2], [0, 1]]
    table.cut(PAGE_TOKENS)
    table.reserve(PAGE_TOKENS, PAGE_TOKENS + 1)
    assert table.tensor().tolist() == [[0, 1], [0, 2]]


def test_a_cache_that_a_gpu_takes_at_once_is_no_longer_than_a_plan_has_room_for() -> None:
    model = random_model(v3_config(max_position_embeddings=163840))
    assert default_limit(model) == 163840  # on the CPU these are addresses
    weight = model.lm_head.weight
    on_gpu: Any = SimpleNamespace(
        config=model.config,
        parameters=lambda: iter([SimpleNamespace(is_cuda=True)]),
        buffers=lambda: iter([weight]),
    )
    assert default_limit(on_gpu) == GPU_TOKENS
    assert default_limit(on_gpu, 20000) == 20000
