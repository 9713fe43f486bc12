"""Safetensors files as a source: what is found, what is read, and every error by its text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ktransformers.base import Checkpoint
from ktransformers.checkpoint import open_checkpoint
from ktransformers.checkpoint.safetensors_files import fp8_block


def write_sharded(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard)
    write_index(folder, {name: shard for shard, tensors in shards.items() for name in tensors})


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def error_of(source: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_checkpoint(source)
    return str(caught.value)


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.infos()}


def make_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"matrix": (5, 7), "vector": (3,), "scalar": (), "empty": (0, 4)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_read_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = make_tensors(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.infos().keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = checkpoint.infos()[name]
        assert info.shape == tuple(tensor.shape)
        assert info.dtype == dtype
        assert info.nbytes == tensor.nbytes
        assert info.file == str(tmp_path / "model.safetensors")
        read = checkpoint.read(name)
        assert read.dtype == dtype
        assert read.is_contiguous()
        assert torch.equal(read, tensor)


def test_what_is_read_belongs_to_the_caller(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read("a").fill_(1)
    assert torch.equal(checkpoint.read("a"), torch.zeros(4))


def test_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert torch.equal(open_checkpoint(tmp_path / "weights.safetensors").read("a"), torch.ones(2))
    assert open_checkpoint(str(tmp_path / "weights.safetensors")).infos().keys() == {"a"}


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    first, second = {"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.full((1,), 2.0)}
    write_sharded(tmp_path, {"1.safetensors": first, "2.safetensors": second})
    read = read_all(open_checkpoint(tmp_path))
    assert read.keys() == {"a", "b", "c"}
    assert all(torch.equal(read[name], tensor) for name, tensor in (first | second).items())


def test_tensor_that_the_index_leaves_out_is_served(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"1.safetensors": {"a": torch.ones(2), "b": torch.ones(1)}})
    write_index(tmp_path, {"a": "1.safetensors"})
    assert open_checkpoint(tmp_path).infos().keys() == {"a", "b"}


def test_threads_read_at_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"layers.{i}": torch.randn(257, 33) for i in range(64)}
    half = dict(list(tensors.items())[:32]), dict(list(tensors.items())[32:])
    write_sharded(tmp_path, {"1.safetensors": half[0], "2.safetensors": half[1]})
    checkpoint = open_checkpoint(tmp_path)
    names = list(tensors) * 8
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(checkpoint.read, names))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in zip(names, read, strict=True))


def test_missing_tensor_names_the_nearest(tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.gate.weight", "model.layers.12.mlp.gate.weight", "lm_head.weight"]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        open_checkpoint(tmp_path).read("model.layers.12.mlp.gate.weigth")
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors: no tensor model.layers.12.mlp.gate.weigth\n"
        "  nearest: model.layers.12.mlp.gate.weight"
    )


def test_folder_of_other_formats_says_what_is_supported(tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin", "v3-Q4_K_M.gguf"):
        (tmp_path / name).touch()
    assert error_of(tmp_path) == (
        f"{tmp_path}: holds pytorch_model.bin, v3-Q4_K_M.gguf; supported are model.safetensors, "
        "model.safetensors.index.json with its shards, or a single .safetensors file"
    )


def test_folder_without_weights_says_what_is_supported(tmp_path: Path) -> None:
    assert error_of(tmp_path).startswith(f"{tmp_path}: holds no weights; supported are ")


def test_file_of_another_format_says_what_is_supported(tmp_path: Path) -> None:
    path = tmp_path / "v3.gguf"
    path.touch()
    assert error_of(path).startswith(f"{path}: not a safetensors file; supported are ")


def test_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    assert error_of(tmp_path / "v3") == f"{tmp_path}/v3: no such file or folder"


def test_file_of_other_bytes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    assert error_of(tmp_path) == (
        f"{path}: 108 bytes that are cut short or no safetensors file (Error while deserializing "
        "header: header too large); download it again"
    )


@pytest.mark.parametrize("kept", [0, 4, 8, 20, 300, -1])
def test_truncated_file_is_an_error(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(make_tensors(torch.float32), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    expected = rf"{len(whole[:kept])} bytes that are cut short or no safetensors file \(.+\); "
    assert re.fullmatch(re.escape(f"{path}: ") + expected + "download it again", error_of(tmp_path))


def test_file_cut_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    checkpoint = open_checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError) as caught:
        checkpoint.read("a")
    assert str(caught.value) == (
        f"{path}: a: the file ends 10 bytes too soon; it was cut short after it was opened: "
        "download it again"
    )


def test_file_removed_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, path)
    checkpoint = open_checkpoint(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{path}: a: No such file or directory")):
        checkpoint.read("a")


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    shards = [f"model-{i}-of-5.safetensors" for i in range(1, 6)]
    save_file({"a0": torch.ones(1)}, tmp_path / shards[0])
    write_index(tmp_path, {f"a{i}": shard for i, shard in enumerate(shards)})
    assert error_of(tmp_path) == (
        f"{tmp_path}/model.safetensors.index.json: 4 of 5 shards are not in the folder: "
        "model-2-of-5.safetensors, model-3-of-5.safetensors, model-4-of-5.safetensors and 1 more; "
        "download them"
    )


def test_damaged_shard_and_tensor_missing_from_its_shard_are_both_named(tmp_path: Path) -> None:
    shards = {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}}
    write_sharded(tmp_path, shards)
    write_index(tmp_path, {"a": "1.safetensors", "c": "1.safetensors", "b": "2.safetensors"})
    (tmp_path / "2.safetensors").write_bytes(b"")
    first, second = error_of(tmp_path).splitlines()
    assert first == (
        f"{tmp_path}/model.safetensors.index.json: 1.safetensors lacks c; download both again"
    )
    assert second.startswith(f"{tmp_path}/2.safetensors: 0 bytes that are cut short or ")


def test_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1)}
    save_file(tensors, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(1)} | tensors, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert error_of(tmp_path) == (
        f"{tmp_path}/2.safetensors: a: also in {tmp_path}/1.safetensors; remove one"
    )


def test_index_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {')
    assert re.fullmatch(
        re.escape(f"{path}: invalid JSON (Expecting ") + r".+\); download it again",
        error_of(tmp_path),
    )
    path.write_text("[]")
    assert error_of(tmp_path) == f"{path}: expected a JSON object, found list"


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_index_without_a_weight_map_is_an_error(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    assert error_of(tmp_path) == (
        f"{tmp_path}/model.safetensors.index.json: weight_map: expected an object of tensor name "
        "to file name"
    )


def test_unsupported_dtypes_are_named_with_the_supported(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {f"layers.{i}.qweight": torch.ones(1, dtype=torch.int32) for i in range(5)}
    save_file(tensors | {"a": torch.ones(1, dtype=torch.float8_e5m2)}, path)
    end = (
        "is not supported (supported: BF16, F16, F32, F8_E4M3 with block scales); use the "
        "checkpoint in one of these"
    )
    assert sorted(error_of(tmp_path).splitlines()) == [
        f"{path}: a: dtype F8_E5M2 {end}",
        f"{path}: layers.0.qweight, layers.1.qweight, layers.2.qweight and 2 more: dtype I32 {end}",
    ]


def test_fp8_block_comes_from_the_config(tmp_path: Path) -> None:
    assert fp8_block(tmp_path) == (128, 128)
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "deepseek_v3"}')
    assert fp8_block(tmp_path) == (128, 128)
    config.write_text('{"quantization_config": {"weight_block_size": [64, 32]}}')
    assert fp8_block(tmp_path) == (64, 32)


@pytest.mark.parametrize("block", ["128", [128], [128, 0], [1.5, 1]])
def test_invalid_fp8_block_is_an_error(tmp_path: Path, block: Any) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"weight_block_size": block}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert error_of(tmp_path) == (
        f"{tmp_path}/config.json: quantization_config.weight_block_size: {block}, expected two "
        "positive integers"
    )
