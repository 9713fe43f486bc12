"""Int4Linear in whole models: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ktransformers.gpu_options
from ktransformers import optimize_and_load
from ktransformers.base import Site
from ktransformers.checkpoint import open_checkpoint
from ktransformers.inject import plan
from ktransformers.load import build_on_meta
from ktransformers.operators.kernels.int4_weight import dequantise
from ktransformers.operators.linear import Int4Linear
from ktransformers.packing import pack
from ktransformers.rules import RuleError, load_rules
from tiny_models import random_model, v3_config

IDS = torch.arange(6).reshape(1, 6)


def rules(pattern: str = r"\.1\.self_attn\.o_proj$|^lm_head$", **kwargs: Any) -> list[Any]:
    operator = "ktransformers.operators.linear.Int4Linear"
    return [{"match": {"name": pattern}, "replace": {"class": operator, "kwargs": kwargs}}]


@pytest.fixture
def placed(device: torch.device) -> dict[str, Any]:
    """Return kwargs for this machine and the tiny models' sizes."""
    return {"device": str(device), "group_size": 32}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let torch find GPUs of a capability, or none, and Triton compile."""

    def pretended(count: int, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")

    return pretended


def operators(model: nn.Module) -> dict[str, Int4Linear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("symmetric", [True, False])
def test_logits_are_those_of_dequantised_weights(placed: dict[str, Any], symmetric: bool) -> None:
    model = random_model(v3_config(), dtype=torch.bfloat16)
    plain = random_model(v3_config(), dtype=torch.bfloat16)
    optimised = optimize_and_load(model, rules(**placed, symmetric=symmetric))
    found = operators(optimised)
    assert set(found) == {"model.layers.1.self_attn.o_proj", "lm_head"}
    for name, operator in found.items():
        assert operator._weight is not None
        matrix = dequantise(operator._weight)
        quantised = plain.get_submodule(name)
        assert isinstance(quantised, nn.Linear)
        assert 0 < (quantised.weight - matrix.cpu()).norm() < 0.1 * matrix.norm()
        # In fp32, as the kernel: a bf16 matrix would round what no kernel rounds.
        wide = nn.Linear(operator.in_features, operator.out_features, bias=False)
        wide.weight.data = matrix.cpu()
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, _InFp32(wide))
    got, want = logits(optimised), logits(plain)
    # What differs is the order of sums, and so now and then the last place of a bf16.
    assert (got - want).abs().max() <= 2.0**-5 * want.abs().max()
    assert (got - want).abs().median() <= 2.0**-9 * want.abs().max()


class _InFp32(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.float()).to(x.dtype)


def test_report_names_what_computes(placed: dict[str, Any], device: torch.device) -> None:
    model = optimize_and_load(random_model(v3_config(), dtype=torch.float16), rules(**placed))
    report = str(model.ktransformers_report)
    where = "Triton " if device.type == "cuda" else "'s interpreter on cpu: for tests, and slow"
    assert "other kernels: Triton " in report
    assert where in report
    operator = model.lm_head
    assert operator.footprint().device == operator.packed.device
    assert operator.footprint().weight_bytes == operator.packed.nbytes + operator.scale.nbytes


def test_packed_cache_gives_the_same_logits(
    placed: dict[str, Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save(random_model(v3_config(), dtype=torch.bfloat16))
    asymmetric = rules(**placed, symmetric=False)
    expected = logits(optimize_and_load(folder, asymmetric, cache=None))
    assert pack(folder, asymmetric, tmp_path / "packed").written == 2
    mapped = optimize_and_load(folder, asymmetric, cache=tmp_path / "packed")
    assert "of 2 operators mapped" in str(mapped.ktransformers_report)
    assert torch.equal(logits(mapped), expected)


def test_packing_needs_no_gpu_and_loading_then_says_that_it_does(
    save: Callable[..., Path], tmp_path: Path, pretend: Callable[..., None]
) -> None:
    pretend(0)
    folder = save(random_model(v3_config(), dtype=torch.bfloat16))
    assert pack(folder, rules(group_size=32), tmp_path / "packed").written == 2
    with pytest.raises(RuleError) as caught:
        optimize_and_load(folder, rules(group_size=32), cache=tmp_path / "packed")
    assert str(caught.value) == (
        "rules[0]: Int4Linear at model.layers.1.self_attn.o_proj (and 1 more): needs a GPU, "
        f"cuda:0, and torch {torch.__version__} finds none here"
    )


@pytest.mark.parametrize(
    ("count", "capability", "reason"),
    [
        (1, (9, 0), "needs cuda:3, but the last GPU here is cuda:0"),
        (4, (7, 5), "needs a GPU of compute capability 8.0 or later, but cuda:3 is a Tesla T4 "),
    ],
)
def test_machine_with_other_gpus_is_refused_before_weights_are_read(
    count: int, capability: tuple[int, int], reason: str, pretend: Callable[..., None]
) -> None:
    model = random_model(v3_config(), dtype=torch.bfloat16)
    pretend(count, capability)
    with pytest.raises(RuleError, match=reason):
        optimize_and_load(model, rules(device="cuda:3", group_size=32))
    assert isinstance(model.lm_head, nn.Linear)


def test_machine_without_triton_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, pretend: Callable[..., None]
) -> None:
    pretend(1)
    monkeypatch.setattr(ktransformers.gpu_options, "find_spec", lambda _: None)
    with pytest.raises(RuleError, match=r"needs Triton.*: pip install 'ktransformers\[gpu\]'"):
        optimize_and_load(random_model(v3_config(), dtype=torch.bfloat16), rules(group_size=32))


def test_plan_for_another_machine_is_made_without_its_gpu(pretend: Callable[..., None]) -> None:
    pretend(0)
    skeleton = build_on_meta(v3_config(), torch.bfloat16)
    planned = plan(skeleton, load_rules(rules(device="cuda:1", group_size=32)))
    needs = [item.operator.footprint() for item in planned.replacements if item.operator]
    assert [need.device for need in needs] == [torch.device("cuda:1")] * 2


@pytest.mark.parametrize(
    ("pattern", "dtype", "kwargs", "reason"),
    [
        (r"\.mlp\.experts$", torch.bfloat16, {}, "not of DeepseekV3Experts"),
        ("^lm_head$", torch.bfloat16, {}, "in_features 64 is not a multiple of group_size 128"),
        ("^lm_head$", torch.float32, {"group_size": 32}, "float16 or bfloat16 activations, not"),
        ("^lm_head$", torch.bfloat16, {"group_size": 48}, "group_size 48 is not supported"),
        ("^lm_head$", torch.bfloat16, {"device": "gpu"}, "device 'gpu' is not a GPU: expected"),
        ("^lm_head$", torch.bfloat16, {"device": "meta"}, "device 'meta' is not a GPU: expected"),
    ],
)
def test_what_the_operator_cannot_do_it_says(
    pattern: str, dtype: torch.dtype, kwargs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RuleError) as caught:
        plan(build_on_meta(v3_config(), dtype), load_rules(rules(pattern, **kwargs)))
    assert reason in str(caught.value)


def test_cpu_is_refused_where_triton_does_not_interpret(pretend: Callable[..., None]) -> None:
    pretend(0)
    with pytest.raises(RuleError, match="device 'cpu' is not a GPU: expected such as cuda:0"):
        plan(build_on_meta(v3_config(), torch.bfloat16), load_rules(rules(device="cpu")))


def linear(device: torch.device, dtype: torch.dtype) -> Int4Linear:
    """Return an operator, without weights, for a layer with a bias."""
    with torch.device("meta"):
        module = nn.Linear(64, 10)
        site = Site("proj", None, None, dtype, torch.device("cpu"), "rule")
        return Int4Linear.from_module(module, site, device=str(device), group_size=64)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_bias_is_kept_and_results_return_to_where_activations_were(
    stored: torch.dtype, device: torch.device
) -> None:
    holder = nn.Module()
    holder.proj = nn.Linear(64, 10).to(stored)
    operator = linear(device, torch.float16)
    operator.load_weights(open_checkpoint(holder))
    x = torch.randn(2, 3, 64, dtype=torch.float16)
    with torch.no_grad():
        y = operator(x)
    assert operator._weight is not None
    want = x.float() @ dequantise(operator._weight).cpu().T + holder.proj.bias.float()
    assert y.device == x.device
    assert y.dtype == torch.float16
    assert torch.allclose(y.float(), want, rtol=2.0**-10, atol=2.0**-10)


def test_operator_without_weights_or_with_a_gradient_to_give_refuses(device: torch.device) -> None:
    operator = linear(device, torch.float16)
    with pytest.raises(RuntimeError, match="Int4Linear at proj: weights are not loaded"):
        operator(torch.randn(1, 64, dtype=torch.float16))
    layout = operator.packed_layout().items()
    operator.use_packed({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout})
    with pytest.raises(RuntimeError, match="packed weights have no gradient"):
        operator(torch.randn(1, 64, dtype=torch.float16, requires_grad=True))
