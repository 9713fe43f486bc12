"""The canonical view: fused experts as slices, FP8 weights dequantised."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ktransformers.base import TensorInfo
from ktransformers.checkpoint import open_checkpoint
from ktransformers.checkpoint.canonical import CanonicalCheckpoint

FP8 = torch.float8_e4m3fn


class FakeSource:
    """Tensors in memory that count what is read of them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.bytes_read = 0

    def stored(self) -> Mapping[str, TensorInfo]:
        return {
            n: TensorInfo(tuple(t.shape), t.dtype, "f", t.nbytes) for n, t in self.tensors.items()
        }

    def read_range(self, name: str, start: int, count: int) -> torch.Tensor:
        part = self.tensors[name].reshape(-1)[start : start + count].clone()
        self.bytes_read += part.nbytes
        return part


def dequantise(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Dequantise a matrix, element by element."""
    real = torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            scale = scales[row // block[0], column // block[1]].float()
            real[row, column] = weight[row, column].float() * scale
    return real


def make_fp8(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a weight of every FP8 value but NaN, and scales."""
    torch.manual_seed(math.prod(shape))
    values = torch.arange(256, dtype=torch.uint8).view(FP8)
    values = values[~values.float().isnan()]
    weight = values.view(torch.uint8)[torch.randint(len(values), shape)].view(FP8)
    *lead, rows, columns = shape
    scales = torch.rand(*lead, math.ceil(rows / block[0]), math.ceil(columns / block[1])) + 0.1
    return weight, scales


def error_of(tensors: Mapping[str, torch.Tensor]) -> str:
    with pytest.raises(ValueError) as caught:
        CanonicalCheckpoint(FakeSource(tensors))
    return str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_fp8_is_dequantised_block_by_block(rows: int, columns: int, block: tuple[int, int]) -> None:
    weight, scales = make_fp8((rows, columns), block)
    source = FakeSource({"w": weight, "w_scale_inv": scales})
    checkpoint = CanonicalCheckpoint(source, block)
    read = checkpoint.read("w")
    assert read.dtype == torch.float32
    assert torch.equal(read, dequantise(weight, scales, block))
    assert checkpoint.infos().keys() == {"w"}
    info = checkpoint.infos()["w"]
    assert (info.shape, info.dtype, info.nbytes) == (
        (rows, columns),
        torch.float32,
        source.bytes_read,
    )


@settings(max_examples=60, deadline=None)
@given(
    num_experts=st.integers(1, 3),
    intermediate=st.integers(1, 9),
    hidden=st.integers(1, 9),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_fused_fp8_experts_are_dequantised(
    num_experts: int, intermediate: int, hidden: int, block: tuple[int, int]
) -> None:
    gate_up, gate_up_scales = make_fp8((num_experts, 2 * intermediate, hidden), block)
    down, down_scales = make_fp8((num_experts, hidden, intermediate), block)
    source = FakeSource(
        {
            "mlp.experts.gate_up_proj": gate_up,
            "mlp.experts.gate_up_proj_scale_inv": gate_up_scales,
            "mlp.experts.down_proj": down,
            "mlp.experts.down_proj_scale_inv": down_scales,
        }
    )
    checkpoint = CanonicalCheckpoint(source, block)
    for expert in range(num_experts):
        real = dequantise(gate_up[expert], gate_up_scales[expert], block)
        expected = {
            f"mlp.experts.{expert}.gate_proj.weight": real[:intermediate],
            f"mlp.experts.{expert}.up_proj.weight": real[intermediate:],
            f"mlp.experts.{expert}.down_proj.weight": dequantise(
                down[expert], down_scales[expert], block
            ),
        }
        for name, tensor in expected.items():
            source.bytes_read = 0
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.infos()[name].nbytes == source.bytes_read


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes_are_applied(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    weight, scales = make_fp8((129, 130), (128, 128))
    scales = scales.to(scale_dtype)
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    assert torch.equal(open_checkpoint(tmp_path).read("w"), dequantise(weight, scales, (128, 128)))


def test_fp8_file_uses_the_block_of_its_config(tmp_path: Path) -> None:
    weight, scales = make_fp8((10, 12), (4, 8))
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    config = '{"quantization_config": {"weight_block_size": [4, 8]}}'
    (tmp_path / "config.json").write_text(config)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert torch.equal(open_checkpoint(source).read("w"), dequantise(weight, scales, (4, 8)))


def test_fp8_tensor_without_elements_is_read() -> None:
    tensors = {"w": torch.empty(0, 4, dtype=FP8), "w_scale_inv": torch.empty(0, 1)}
    assert CanonicalCheckpoint(FakeSource(tensors)).read("w").shape == (0, 4)


def test_every_fp8_value_is_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(FP8)
    finite = values.view(torch.uint8)[~values.float().isnan()].view(1, -1).view(FP8)
    tensors = {"w": finite, "w_scale_inv": torch.ones(1, 2)}
    read = CanonicalCheckpoint(FakeSource(tensors)).read("w")
    assert read.shape == (1, 254)
    assert torch.equal(read, finite.float())
    assert torch.equal(read.signbit(), finite.float().signbit())


def test_nan_in_fp8_stays_nan() -> None:
    weight = torch.tensor([[0x7F, 0xFF, 0x38]], dtype=torch.uint8).view(FP8)
    tensors = {"w": weight, "w_scale_inv": torch.full((1, 1), 2.0)}
    read = CanonicalCheckpoint(FakeSource(tensors)).read("w")
    assert read.isnan().tolist() == [[True, True, False]]
    assert read[0, 2] == 2


def test_fp8_without_scales_is_an_error() -> None:
    weight, scales = make_fp8((130, 257), (128, 128))
    assert error_of({"a": weight, "b": weight, "b_scale": scales}).splitlines() == [
        f"f: {name}: FP8 without its scales; expected {name}_scale_inv of shape [2, 3]; "
        "block-scaled FP8 is the only FP8 format supported"
        for name in "ab"
    ]


def test_scales_of_the_wrong_shape_are_an_error() -> None:
    weight, scales = make_fp8((130, 257), (128, 128))
    assert error_of({"w": weight, "w_scale_inv": scales[:1]}) == (
        "f: w_scale_inv: shape [1, 3], expected [2, 3] for [130, 257] in blocks of 128 x 128 "
        "(quantization_config.weight_block_size in config.json)"
    )


def test_fp8_vector_is_an_error() -> None:
    tensors = {"w": torch.ones(3).to(FP8), "w_scale_inv": torch.ones(1)}
    assert error_of(tensors) == "f: w: FP8 of shape [3], expected a matrix"


def test_scale_of_a_weight_that_is_not_fp8_is_listed() -> None:
    tensors = {"w": torch.ones(3, 3), "w_scale_inv": torch.ones(1, 1)}
    assert CanonicalCheckpoint(FakeSource(tensors)).infos().keys() == tensors.keys()


def test_fused_experts_are_served_one_by_one(tmp_path: Path) -> None:
    prefix = "model.layers.1.mlp.experts"
    gate_up, down = torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    tensors = {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down, "a": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    expected = {"a": tensors["a"]}
    for expert in range(3):
        expected[f"{prefix}.{expert}.gate_proj.weight"] = gate_up[expert, :4]
        expected[f"{prefix}.{expert}.up_proj.weight"] = gate_up[expert, 4:]
        expected[f"{prefix}.{expert}.down_proj.weight"] = down[expert]
    assert checkpoint.infos().keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
        info = checkpoint.infos()[name]
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.numel() * 4)


def test_of_fused_experts_only_the_slice_is_read() -> None:
    source = FakeSource(
        {"experts.gate_up_proj": torch.ones(4, 6, 5), "experts.down_proj": torch.ones(4, 5, 3)}
    )
    CanonicalCheckpoint(source).read("experts.2.up_proj.weight")
    assert source.bytes_read == 3 * 5 * 4


def test_experts_fused_in_another_layout_keep_their_names() -> None:
    tensors = {  # GPT-OSS: transposed, D = F
        "experts.gate_up_proj": torch.ones(2, 4, 8),
        "experts.down_proj": torch.ones(2, 4, 4),
        "other.down_proj": torch.ones(2, 4, 4),
        "mlp.down_proj": torch.ones(3),
    }
    assert CanonicalCheckpoint(FakeSource(tensors)).infos().keys() == tensors.keys()


def test_expert_stored_twice_is_an_error() -> None:
    tensors = {
        "experts.gate_up_proj": torch.ones(1, 2, 3),
        "experts.down_proj": torch.ones(1, 3, 1),
        "experts.0.down_proj.weight": torch.ones(3, 1),
    }
    assert error_of(tensors) == (
        "f: experts.0.down_proj.weight is stored twice, as experts.down_proj and in "
        "experts.0.down_proj.weight; remove one"
    )


def test_many_errors_are_cut() -> None:
    weight, _ = make_fp8((2, 2), (1, 1))
    lines = error_of({f"w{i}": weight for i in range(30)}).splitlines()
    assert len(lines) == 21
    assert re.fullmatch(r"\(and 10 more errors\)", lines[-1])
