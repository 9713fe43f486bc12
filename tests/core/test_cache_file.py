"""A cache on disk, and the files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.cache_file import load_cache, save_cache
from ktransformers.prefill import prefill
from tiny_models import random_model, v2_config, v3_config

IDS = torch.arange(3, 83)[None]


def optimised(weight: str = "int8", **config: Any) -> PreTrainedModel:
    kwargs = {"weight": weight, "threads": 1}
    rule = {
        "match": {"name": r"\.mlp\.experts$"},
        "replace": {"class": "ktransformers.operators.experts.CpuExperts", "kwargs": kwargs},
    }
    return optimize_and_load(random_model(v3_config(**config)), [rule])


def saved(model: PreTrainedModel, path: Path, **options: Any) -> LatentCache:
    cache = LatentCache.for_model(model, 100, **options)
    prefill(model, IDS[:, :70], cache)
    save_cache(cache, path, model)
    return cache


@pytest.mark.parametrize(("format", "rank"), [("fp32", 32), ("bf16", 32), ("int8", 160)])
def test_a_restored_cache_goes_on_where_it_was(tmp_path: Path, format: Any, rank: int) -> None:
    model = optimised(kv_lora_rank=rank)
    cache = saved(model, tmp_path / "a.safetensors", format=format)
    again = optimised(kv_lora_rank=rank)
    restored = load_cache(tmp_path / "a.safetensors", again, 90)
    assert (restored.format, restored.max_tokens) == (format, 90)
    assert restored.keep_prefix(IDS) == 70
    assert torch.equal(prefill(model, IDS[:, 70:], cache), prefill(again, IDS[:, 70:], restored))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_a_batch_that_shares_pages_is_restored(tmp_path: Path) -> None:
    model = random_model(v2_config())
    cache = saved(model, tmp_path / "a.safetensors")
    cache.batch_repeat_interleave(3)
    save_cache(cache, tmp_path / "a.safetensors", model)
    restored = load_cache(tmp_path / "a.safetensors", model, 100)
    assert restored.batch_size == 3
    ids = IDS[:, 70:].expand(3, -1)
    assert torch.equal(prefill(model, ids, cache), prefill(model, ids, restored))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: optimised(rope_interleave=False), "made by another model; fill it anew"),
        (lambda: optimised("bf16"), "made by another checkpoint, or weights packed in another way"),
        (lambda: random_model(v3_config(), seed=1), "made by another checkpoint, or weights"),
    ],
)
def test_a_cache_of_another_model_or_other_weights_is_refused(
    tmp_path: Path, other: Any, reason: str
) -> None:
    path = tmp_path / "a.safetensors"
    saved(optimised(), path)
    with pytest.raises(ValueError) as caught:
        load_cache(path, other(), 100)
    assert str(caught.value).startswith(f"{path}: this cache was {reason}")


def test_a_cache_of_other_rules_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = optimised()
    saved(model, path)
    report: Any = model.ktransformers_report
    (line,) = report.replacements
    object.__setattr__(report, "replacements", (line.replace("threads=1", "threads=2"),))
    with pytest.raises(ValueError, match=r"made by other rules: .*threads=1\), not .*threads=2\)"):
        load_cache(path, model, 100)


def test_an_empty_cache_is_not_saved(tmp_path: Path) -> None:
    model = random_model(v3_config())
    with pytest.raises(ValueError, match="the cache is empty"):
        save_cache(LatentCache.for_model(model, 10), tmp_path / "a.safetensors", model)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_longer_than_the_limit_is_refused(tmp_path: Path) -> None:
    model = random_model(v3_config())
    saved(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"holds 70 tokens of a sequence, but max_tokens .* is 69"):
        load_cache(tmp_path / "a.safetensors", model, 69)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model = random_model(v3_config())
    path = tmp_path / "a.safetensors"
    saved(model, path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    whole = path.read_bytes()

    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_cache(path, model, 100)
    save_file(tensors, path, {**header, "layout": "ktransformers latent cache 1"})
    with pytest.raises(ValueError, match="'ktransformers latent cache 1' is not a layout"):
        load_cache(path, model, 100)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="'no layout' is not a layout"):
        load_cache(path, model, 100)
    save_file({**tensors, "1.rope": tensors["1.rope"][:, :69].contiguous()}, path, header)
    with pytest.raises(ValueError, match=r"1\.rope: found torch\.float32 \[1, 69, 8\], expected"):
        load_cache(path, model, 100)
    save_file({"token_ids": tensors["token_ids"]}, path, header)
    with pytest.raises(ValueError, match="no latent of layer 0"):
        load_cache(path, model, 100)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_cache(path, model, 100)
