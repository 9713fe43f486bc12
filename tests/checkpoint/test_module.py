"""An already loaded module as its own checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ktransformers.checkpoint import open_checkpoint


class Experts(nn.Module):
    """Two fused experts, as transformers has them: D = 3, F = 2."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 3))
        self.down_proj = nn.Parameter(torch.randn(2, 3, 2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.linear = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("dropped", torch.arange(3), persistent=False)


def test_parameters_and_persistent_buffers_are_served_by_canonical_name() -> None:
    block = Block()
    checkpoint = open_checkpoint(block)
    expected = {"linear.weight": block.linear.weight, "linear.bias": block.linear.bias}
    expected["kept"] = block.get_buffer("kept")
    for expert in range(2):
        gate_up = block.experts.gate_up_proj[expert]
        expected[f"experts.{expert}.gate_proj.weight"] = gate_up[:2]
        expected[f"experts.{expert}.up_proj.weight"] = gate_up[2:]
        expected[f"experts.{expert}.down_proj.weight"] = block.experts.down_proj[expert]
    assert checkpoint.infos().keys() == expected.keys()
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert torch.equal(read, tensor)
        assert not read.requires_grad
        assert read.is_contiguous()
        info = checkpoint.infos()[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert (info.nbytes, info.file) == (tensor.numel() * tensor.itemsize, "loaded Block")


def test_what_is_read_is_a_copy() -> None:
    linear = nn.Linear(2, 2)
    open_checkpoint(linear).read("weight").fill_(7)
    assert not (linear.weight == 7).any()


def test_transposed_parameter_is_read_in_its_own_order() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3, 4).t())
    assert torch.equal(open_checkpoint(module).read("weight"), module.weight)


def test_tied_parameter_is_served_by_both_names() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    assert open_checkpoint(module).infos().keys() == {"0.weight", "1.weight"}


def test_tensors_on_meta_are_an_error() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError) as caught:
        open_checkpoint(module)
    assert str(caught.value) == (
        "loaded Sequential: 1.weight, 1.bias: on the meta device, without values; load the module "
        "first, or name a checkpoint"
    )


def test_missing_tensor_names_the_module() -> None:
    with pytest.raises(ValueError) as caught:
        open_checkpoint(nn.Linear(2, 2)).read("weights")
    assert str(caught.value) == "loaded Linear: no tensor weights\n  nearest: weight"
