"""Streamed prefill on a GPU, as tests/operators/test_streamed_prefill.py has it on a stand-in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expert_bounds import experts_and_bound
from ktransformers import optimize_and_load
from ktransformers.cuda_stream import CudaStream
from ktransformers.operators.kernels.packed_matrices import PackedMatrices, dequantise
from ktransformers.streams import use
from tiny_models import random_model, v3_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda:0")


def load(weight: str, **kwargs: Any) -> Any:
    operators = "ktransformers.operators"
    moe = {"class": f"{operators}.hybrid.HybridMoE", "kwargs": kwargs}
    experts = {
        "class": f"{operators}.experts.CpuExperts",
        "kwargs": {"threads": 2, "weight": weight},
    }
    rules: list[Any] = [
        {"match": {"class": "DeepseekV3MoE"}, "replace": moe},
        {"match": {"name": r"\.mlp\.experts$"}, "replace": experts},
    ]
    model: Any = random_model(v3_config(num_hidden_layers=5), dtype=torch.bfloat16)
    return optimize_and_load(model.to(GPU), rules)


@pytest.mark.parametrize("gib", [4, 5.5e-5], ids=["whole", "pieces"])
@pytest.mark.parametrize("weight", ["int8", "bf16", "int4"])
def test_layers_are_within_the_derived_bound(weight: str, gib: float) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    model = load(weight, stream_prefill="always", stream_gib=gib)
    x = torch.randn(1, 200, 64, device=GPU).bfloat16()
    for layer in [*model.model.layers[1:]] * 2:  # twice: buffers are filled anew
        moe, seen = layer.mlp, list[Any]()
        hooks = [
            moe.gate.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out)),
            moe.shared_experts.register_forward_hook(lambda _, args, out: torch.zeros_like(out)),
        ]
        with use(CudaStream(GPU)), torch.no_grad():
            got = moe(x)[0].cpu().double()
        for hook in hooks:
            hook.remove()
        experts = moe.experts
        D, F, kind = experts.hidden_size, experts.moe_intermediate_size, experts.weight_format
        both = PackedMatrices(
            kind, F, D, 2, experts.gate_up_packed.flatten(), experts.gate_up_scale.flatten()
        )
        down = PackedMatrices(
            kind, D, F, 1, experts.down_packed.flatten(), experts.down_scale.flatten()
        )
        gate, up = dequantise(both).unbind(1)
        _, weights, index = (tensor.cpu() for tensor in seen[0])
        exact, bound = experts_and_bound(
            x[0].cpu(), index, weights, gate, up, dequantise(down)[:, 0],
            hidden=torch.bfloat16, weight_rounding=2.0**-8 if weight == "int4" else 0,
        )  # fmt: skip
        assert ((got - exact).abs() <= bound).all()


def test_rates_of_a_gpu_are_measured() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    model = load("int8", stream_prefill="auto")
    rates = model.model.layers[1].mlp.streamed._rates()
    assert rates.host_to_device > 1e9
    assert rates.gpu_operations > 1e12
