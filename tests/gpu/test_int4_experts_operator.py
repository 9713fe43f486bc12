"""Int4Experts in whole models: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ktransformers import optimize_and_load
from ktransformers.inject import plan
from ktransformers.load import build_on_meta
from ktransformers.operators.experts import Int4Experts
from ktransformers.operators.kernels.int4_weight import dequantise
from ktransformers.packing import pack
from ktransformers.rules import RuleError, load_rules
from tiny_models import random_model, v3_config

IDS = torch.arange(4).reshape(1, 4)
SMALL: dict[str, Any] = {"num_hidden_layers": 2}


def rules(**kwargs: Any) -> list[Any]:
    operator = "ktransformers.operators.experts.Int4Experts"
    pattern = r"\.mlp\.experts$"
    return [{"match": {"name": pattern}, "replace": {"class": operator, "kwargs": kwargs}}]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_logits_are_those_of_dequantised_weights(device: torch.device) -> None:
    config = v3_config(**SMALL)
    placed = rules(device=str(device), group_size=32, symmetric=False)
    optimised = optimize_and_load(random_model(config, dtype=torch.float16), placed)
    plain = random_model(config, dtype=torch.float16)
    operator = optimised.model.layers[1].mlp.experts
    assert isinstance(operator, Int4Experts)
    assert operator._weights is not None
    gate_up, down = operator._weights
    fused: Any = plain.model.layers[1].mlp.experts
    original = fused.gate_up_proj.clone()
    for expert in range(operator.num_experts):
        fused.gate_up_proj.data[expert] = dequantise(gate_up[expert]).cpu()
        fused.down_proj.data[expert] = dequantise(down[expert]).cpu()
    assert 0 < (fused.gate_up_proj - original).norm() < 0.1 * original.norm()
    got, want = logits(optimised), logits(plain)
    # The plain model rounds its weights and between its steps to fp16.
    assert (got - want).abs().max() <= 2.0**-7 * want.abs().max()
    assert optimised.ktransformers_report.experts_per_token == 4
    need = operator.footprint()
    assert need.weight_bytes == sum(buffer.nbytes for buffer in operator.buffers())
    assert need.bytes_read_per_token == need.weight_bytes // 8 * 4


def test_packed_cache_gives_the_same_logits(
    device: torch.device, save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save(random_model(v3_config(**SMALL), dtype=torch.float16))
    placed = rules(device=str(device), group_size=32)
    expected = logits(optimize_and_load(folder, placed, cache=None))
    assert pack(folder, placed, tmp_path / "packed").written == 1
    mapped = optimize_and_load(folder, placed, cache=tmp_path / "packed")
    assert "of 1 operators mapped" in str(mapped.ktransformers_report)
    assert torch.equal(logits(mapped), expected)


@pytest.mark.parametrize(
    ("dtype", "kwargs", "reason"),
    [
        (torch.bfloat16, {}, "in_features 64 is not a multiple of group_size 128"),
        (torch.bfloat16, {"group_size": 64}, "in_features 32 is not a multiple of group_size 64"),
        (torch.float32, {"group_size": 32}, "takes float16 or bfloat16 activations, not"),
        (torch.bfloat16, {"device": "gpu"}, "device 'gpu' is not a GPU: expected"),
    ],
)
def test_what_the_operator_cannot_do_it_says(
    dtype: torch.dtype, kwargs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RuleError) as caught:
        plan(build_on_meta(v3_config(), dtype), load_rules(rules(**kwargs)))
    assert reason in str(caught.value)


def test_machine_without_its_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(v3_config(**SMALL), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuleError, match=r"Int4Experts at .*: needs a GPU, cuda:0, and torch"):
        optimize_and_load(model, rules(group_size=32))
    assert isinstance(model.model.layers[1].mlp.experts.gate_up_proj, nn.Parameter)


def test_operator_without_weights_says_so(device: torch.device) -> None:
    skeleton = build_on_meta(v3_config(), torch.bfloat16)
    planned = plan(skeleton, load_rules(rules(device=str(device), group_size=32)))
    operator = planned.replacements[0].operator
    assert operator is not None
    with pytest.raises(RuntimeError, match=r"Int4Experts at .*: weights are not loaded"):
        operator(torch.zeros(1, 64), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4))
