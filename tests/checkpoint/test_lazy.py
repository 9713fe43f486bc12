"""Whole models through transformers' own conversion mapping, without transformers' file reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ktransformers.base import Checkpoint
from ktransformers.checkpoint import lazy_state_dict, open_checkpoint
from tiny_models import random_model, v2_config, v3_config

# More than one FP8 block, and no multiple of it.
SIZES = {"hidden_size": 160, "intermediate_size": 136}
configs = pytest.mark.parametrize(
    "config", [v3_config(**SIZES), v2_config(**SIZES, q_lora_rank=None)], ids=["v3", "v2"]
)
FP8 = torch.float8_e4m3fn


def load(config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model: PreTrainedModel = built
    load_config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]  # invariant
    )
    state = lazy_state_dict(checkpoint, checkpoint.infos())
    info, _ = convert_and_load_state_dict_in_model(model, state, load_config)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys
    assert not info.conversion_errors
    return model


def assert_equal_states(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@configs
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_model_equals_from_pretrained(
    save: Callable[..., Path], config: PreTrainedConfig, stored: torch.dtype, dtype: torch.dtype
) -> None:
    folder = save(random_model(config, dtype=stored), max_shard_size="300KB")
    checkpoint = open_checkpoint(folder)
    assert len({info.file for info in checkpoint.infos().values()}) > 1
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert_equal_states(load(config, checkpoint, dtype), reference)


@configs
def test_loaded_model_serves_another(config: PreTrainedConfig) -> None:
    reference = random_model(config, dtype=torch.bfloat16)
    assert_equal_states(load(config, open_checkpoint(reference), torch.bfloat16), reference)


@configs
def test_raw_state_dict_with_fused_experts_loads(tmp_path: Path, config: PreTrainedConfig) -> None:
    reference = random_model(config, dtype=torch.bfloat16)
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert "model.layers.1.mlp.experts.5.up_proj.weight" in checkpoint.infos()
    assert_equal_states(load(config, checkpoint, torch.bfloat16), reference)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a matrix in FP8, its scales of 128 x 128 blocks, and what the two mean."""
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(FP8).max
    quantised = (blocks / scales[:, None, :, None]).to(FP8)
    real = (quantised.float() * scales[:, None, :, None]).view_as(padded)[:rows, :columns]
    return quantised.view_as(padded)[:rows, :columns].contiguous(), scales, real.contiguous()


@configs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_checkpoint_loads_dequantised(
    tmp_path: Path, save: Callable[..., Path], config: PreTrainedConfig, dtype: torch.dtype
) -> None:
    real_folder, fp8_folder = save(random_model(config)), tmp_path / "fp8"
    fp8_folder.mkdir()
    fp8, real = {}, {}
    for name, tensor in load_file(real_folder / "model.safetensors").items():
        fp8[name] = real[name] = tensor
        if "_proj" in name:
            fp8[name], fp8[f"{name}_scale_inv"], real[name] = quantise(tensor)
    save_file(fp8, fp8_folder / "model.safetensors")
    save_file(real, real_folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    settings = json.loads((real_folder / "config.json").read_text())
    settings["quantization_config"] = quantization
    (fp8_folder / "config.json").write_text(json.dumps(settings))

    reference = AutoModelForCausalLM.from_pretrained(real_folder, dtype=dtype)
    assert_equal_states(load(config, open_checkpoint(fp8_folder), dtype), reference)


def test_names_that_the_checkpoint_lacks_are_listed() -> None:
    with pytest.raises(ValueError, match=r"^no such tensors in the checkpoint: wait, q$"):
        lazy_state_dict(open_checkpoint(nn.Linear(2, 2)), ["weight", "wait", "q"])


def test_lazy_tensor_reads_when_indexed() -> None:
    linear = nn.Linear(3, 2)
    lazy = lazy_state_dict(open_checkpoint(linear), ["weight"])["weight"]
    assert lazy.get_shape() == [2, 3]
    assert torch.equal(lazy[...], linear.weight)
    assert torch.equal(lazy[1:, 0], linear.weight[1:, 0])


def test_lazy_tensor_that_is_not_finite_is_an_error() -> None:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight[0, 1] = torch.nan
    lazy = lazy_state_dict(open_checkpoint(linear), ["weight"])["weight"]
    with pytest.raises(ValueError, match=r"^loaded Linear: weight: 1 of 6 values are NaN or Inf"):
        lazy[...]
