"""LatentCache where kernels for a GPU run, which is the CPU where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ktransformers import cache_rounding
from ktransformers.cache import LatentCache
from ktransformers.cache_pages import PAGE_TOKENS as PAGE
from ktransformers.cache_pages import PageTable
from ktransformers.cache_rounding import check_format
from tiny_models import v3_config


def states(B: int, T: int, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(B, 1, T, 32, generator=generator).bfloat16()
    return latent.to(device), torch.randn(B, 1, T, 8, generator=generator).bfloat16().to(device)


def test_every_change_of_a_batch_is_what_transformers_does(device: torch.device) -> None:
    mine, theirs = LatentCache(v3_config(), 300, "bf16"), DynamicCache()
    steps = [
        ("crop", 0, 2, 100),
        ("batch_repeat_interleave", 3, 6, 1),
        ("reorder_cache", torch.tensor([5, 0, 0, 3, 1, 1]), 6, 41),
        ("crop", -17, 6, 1),
        ("batch_select_indices", torch.tensor([4, 0, 2]), 3, 70),
    ]
    for seed, (method, argument, B, T) in enumerate(steps):
        for cache in (mine, theirs):
            if seed:
                getattr(cache, method)(argument)
        for layer in range(3):
            new = states(B, T, device, 3 * seed + layer)
            got, want = (cache.update(*new, layer) for cache in (mine, theirs))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert {layer.device.type for layer in mine.layers} == {device.type}


def test_fp8_keeps_each_token_on_a_scale_of_its_own(device: torch.device) -> None:
    cache = LatentCache(v3_config(), 2 * PAGE, "fp8")
    latent, rope = states(2, PAGE + 5, device, 0)
    latent[:, :, 3] *= 1000
    got, got_rope = cache.update(latent, rope, 0)
    assert torch.equal(got_rope, rope)
    step = latent.float().abs().amax(-1, keepdim=True) / 448 / 1024
    # A 16th of a value, or half of fp8's least step; then the result is rounded to bf16.
    limit = torch.maximum(latent.float().abs() * (2.0**-4 + 2.0**-7), 1.01 * step)
    assert ((got.float() - latent.float()).abs() <= limit).all()
    cache.batch_repeat_interleave(2)
    cache.update(*states(4, 1, device, 1), 0)  # copies the shared page first
    again, _ = cache.layers[0].gather(torch.float32)
    assert torch.equal(again[::2, :, :-1].to(got.dtype), got)


def test_a_copy_of_the_table_is_changed_in_place_while_batch_and_limit_stay() -> None:
    cpu, table = torch.device("cpu"), PageTable()
    table.start(2)
    table.reserve(0, 1)
    first = table.on(cpu, pages=4, length=1)
    block_table, lengths = first.block_table, first.lengths
    table.reserve(1, PAGE + 1)
    assert table.on(cpu, pages=4, length=PAGE + 1) is first
    assert block_table[:, :2].tolist() == table.tensor().tolist()
    assert lengths.tolist() == [PAGE + 1, PAGE + 1]
    table.select([1, 0])
    table.on(cpu, pages=4, length=PAGE + 1)
    assert block_table[:, :2].tolist() == table.tensor().tolist()
    table.select([0])
    assert table.on(cpu, pages=4, length=1) is not first


def test_values_move_to_where_the_next_ones_come_from(device: torch.device) -> None:
    cache = LatentCache(v3_config(), 2 * PAGE, "bf16")
    first, second = (states(2, 5, torch.device("cpu"), seed) for seed in (0, 1))
    cache.update(*first, 0)
    got, _ = cache.update(second[0].to(device), second[1].to(device), 0)
    assert torch.equal(got.cpu(), torch.cat([first[0], second[0]], dim=2))


def test_formats_are_refused_where_they_can_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"on cuda:0 take fp8, bf16 or fp32 \(cache_format of"):
        check_format("int8", torch.device("cuda:0"))
    monkeypatch.setattr(cache_rounding, "interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"on the CPU take int8, bf16 or fp32 \(cache_format of"):
        LatentCache(v3_config(), 100, "fp8").update(*states(1, 1, torch.device("cpu"), 0), 0)
