"""Checks for operators that read weights, near names, and counted reads."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ktransformers.base import Checkpoint
from ktransformers.checkpoint import (
    CountingCheckpoint,
    check_finite,
    nearest_names,
    open_checkpoint,
    read_checked,
)


def test_tensor_of_the_expected_shape_is_read() -> None:
    linear = nn.Linear(3, 2)
    assert torch.equal(read_checked(open_checkpoint(linear), "weight", (2, 3)), linear.weight)


def test_tensor_of_another_shape_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3)}, path)
    with pytest.raises(ValueError) as caught:
        read_checked(open_checkpoint(path), "a", (3, 2))
    assert str(caught.value) == (
        f"{path}: a: shape [2, 3], expected [3, 2]; config and weights are of different models"
    )


def test_missing_tensor_is_an_error(tmp_path: Path) -> None:
    for shard in "12":
        save_file({f"layers.{shard}.up": torch.ones(1)}, tmp_path / f"{shard}.safetensors")
    index = '{"weight_map": {"layers.1.up": "1.safetensors", "layers.2.up": "2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError) as caught:
        read_checked(open_checkpoint(tmp_path), "layers.3.up", (1,))
    assert str(caught.value) == (
        f"{tmp_path}/1.safetensors and 1 more: no tensor layers.3.up\n  nearest: layers.1.up"
    )


def test_missing_tensor_of_an_empty_checkpoint_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^empty checkpoint: no tensor a$"):
        read_checked(open_checkpoint(nn.Module()), "a", ())


def make_checkpoint(tensor: torch.Tensor) -> Checkpoint:
    module = nn.Module()
    module.register_buffer("w", tensor)
    return open_checkpoint(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_an_error(dtype: torch.dtype, value: float) -> None:
    tensor = torch.zeros(40, 50, dtype=dtype)
    tensor[7, 9] = tensor[39, 49] = value
    with pytest.raises(ValueError) as caught:
        check_finite(make_checkpoint(tensor), "w", tensor)
    assert str(caught.value) == (
        "loaded Module: w: 2 of 2,000 values are NaN or Inf, the first at [7, 9]; the file is "
        "damaged: download or convert it again"
    )


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((100,), torch.finfo(torch.float16).max, dtype=torch.float16),
        torch.full((100,), torch.finfo(torch.float32).min),
        torch.empty(0),
        torch.tensor(1.0),
        torch.ones(3, dtype=torch.int64),
    ],
)
def test_weight_of_extreme_values_is_finite(tensor: torch.Tensor) -> None:
    check_finite(make_checkpoint(tensor), "w", tensor)


def test_nearest_name_differs_in_as_few_numbers_as_possible() -> None:
    names = [f"layers.{i}.experts.{e}.up.weight" for i in range(3) for e in range(4)]
    assert nearest_names("layers.2.experts.9.up.weight", names) == ["layers.2.experts.0.up.weight"]
    assert nearest_names("layers.9.experts.3.up.weigth", names) == ["layers.0.experts.3.up.weight"]
    assert nearest_names("something.else", names) == []


def test_every_byte_read_is_counted_once_from_many_threads() -> None:
    module = nn.Sequential(*(nn.Linear(n, 1, bias=False) for n in range(1, 33)))
    inside = 0
    total = 0

    def on_read(nbytes: int) -> None:
        nonlocal inside, total
        inside += 1
        assert inside == 1
        total += nbytes
        inside -= 1

    checkpoint = CountingCheckpoint(open_checkpoint(module), on_read)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(checkpoint.read, checkpoint.infos()))
    assert total == sum(tensor.nbytes for tensor in read) == 4 * sum(range(1, 33))


def test_what_on_read_raises_ends_the_read() -> None:
    def on_read(_: int) -> None:
        raise InterruptedError("loading was stopped")

    checkpoint = CountingCheckpoint(open_checkpoint(nn.Linear(1, 1)), on_read)
    with pytest.raises(InterruptedError, match=re.escape("loading was stopped")):
        checkpoint.read("weight")
