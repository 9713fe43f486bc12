"""CpuLinear alone and inside whole models, against products with dequantised weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from experts_reference import U, prepared, product_bound
from ktransformers import _native, optimize_and_load
from ktransformers.operators.linear import CpuLinear
from ktransformers.rules import RuleError
from native_variants import Variant, format_variants, variant
from packed_layer import FORMATS, dequantised, pack, same_bits
from tiny_models import quantised, random_model, rounded, v3_config

RULES: list[dict[str, Any]] = [
    {
        "match": {"name": r"_proj$|^lm_head$|_proj_with_mqa$", "class": "torch.nn.Linear"},
        "replace": {"class": "ktransformers.operators.linear.CpuLinear", "kwargs": {}},
    }
]
IDS = torch.arange(40).reshape(2, 20) % 90
SIZES = ((1, 1), (100, 50), (64, 576), (300, 129))


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Variant:
    return variant(request.param)


def project(
    native: Any, packed: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, n: int, **options: Any
) -> torch.Tensor:
    layer = native.Linear(
        *packed, in_features=x.shape[1], out_features=n, **{"threads": 2, **options}
    )
    out = torch.full((len(x), n), torch.nan, dtype=x.dtype)
    layer.forward(x, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize(("format", "kernels"), format_variants(*FORMATS), indirect=["kernels"])
def test_projection_is_within_the_derived_bound(
    format: str, kernels: Variant, n: int, k: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n)
    packed = pack(torch.randn(n, k, generator=generator), format)
    weight = dequantised(*packed, n, k, format)
    for T in (1, 3, 17, 65, 300, 1025):
        x = torch.randn(T, k, generator=generator).to(dtype)
        out = project(kernels.native, packed, x, n, format=format, isa=kernels.isa)
        seen = prepared(x, format)
        exact = seen @ weight.T
        bound = product_bound(seen, weight, format)
        bound += (2.0**-8 if dtype == torch.bfloat16 else U) * (exact.abs() + bound) + 1e-37
        assert ((out.double() - exact).abs() <= bound).all(), T


@pytest.mark.parametrize("format", FORMATS)
def test_bits_depend_neither_on_threads_nor_on_other_rows(format: str) -> None:
    packed = pack(torch.randn(200, 96), format)
    x = torch.randn(530, 96)
    together = project(_native, packed, x, 200, format=format)
    for threads in (1, 3):
        assert same_bits(project(_native, packed, x, 200, format=format, threads=threads), together)
    for rows in (slice(0, 1), slice(60, 70), slice(511, 530)):
        alone = project(_native, packed, x[rows].contiguous(), 200, format=format)
        assert same_bits(alone, together[rows])


@pytest.mark.parametrize("format", FORMATS)
def test_row_that_is_not_finite_spoils_only_itself(format: str) -> None:
    packed = pack(torch.randn(64, 96), format)
    x = torch.randn(5, 96)
    clean = project(_native, packed, x, 64, format=format)
    x[2, 5] = torch.nan
    out = project(_native, packed, x, 64, format=format)
    assert out[2].isnan().all()
    assert same_bits(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


class ReferenceLinear(nn.Module):
    """x @ W.T in fp32 from dequantised weights, with activations as kernels see them."""

    def __init__(self, operator: CpuLinear):
        super().__init__()
        n, k, name = operator.out_features, operator.in_features, operator.weight_format
        self.weight = dequantised(operator.packed, operator.scale, n, k, name).float()
        self.seen = rounded if name == "bf16" else quantised

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seen(x.float()) @ self.weight.T


@pytest.mark.parametrize(
    "kwargs", [{"weight": "int8"}, {"weight": "int4", "group_size": 32}, {"weight": "bf16"}]
)
def test_logits_equal_the_reference(
    config: PreTrainedConfig, save: Callable[..., Path], kwargs: dict[str, Any]
) -> None:
    folder = save(random_model(config))
    rules = copy.deepcopy(RULES)
    rules[0]["replace"]["kwargs"] = kwargs
    optimised = optimize_and_load(folder, rules, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    operators = [(n, m) for n, m in optimised.named_modules() if isinstance(m, CpuLinear)]
    assert any(name == "lm_head" for name, _ in operators)
    assert len(operators) > 4 * config.num_hidden_layers
    for name, operator in operators:
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, ReferenceLinear(operator))
    with torch.no_grad():
        got, want = optimised(IDS).logits, plain(IDS).logits
    # An activation on the other side of a rounding boundary moves by a step of amax / 127; through
    # some layers, and by way of the router, that is less than so much of a logit nearly always.
    assert (got - want).abs().median() <= want.abs().max() / 127


@pytest.mark.parametrize(
    ("pattern", "kwargs", "reason"),
    [
        (r"\.mlp\.experts$", {}, "takes the place of a torch.nn.Linear, not of DeepseekV3Experts"),
        ("^lm_head$", {"weight": "int2"}, "weight 'int2' is not supported (expected int8, "),
        ("^lm_head$", {"threads": 0}, "threads 0 is not 'auto' or a number from 1 to 1024"),
    ],
)
def test_what_the_operator_cannot_do_it_says(pattern: str, kwargs: Any, reason: str) -> None:
    rule = {"match": {"name": pattern}, "replace": {**RULES[0]["replace"], "kwargs": kwargs}}
    with pytest.raises(RuleError) as caught:
        optimize_and_load(random_model(v3_config()), [rule])
    assert reason in str(caught.value)


def test_a_bias_is_refused() -> None:
    model = random_model(v3_config())
    model.lm_head = nn.Linear(64, 100, bias=True)
    rule = {"match": {"name": "^lm_head$"}, "replace": RULES[0]["replace"]}
    with pytest.raises(RuleError, match="without bias"):
        optimize_and_load(model, [rule])


def test_footprint_is_what_the_buffers_take(save: Callable[..., Path]) -> None:
    model = optimize_and_load(save(random_model(v3_config())), RULES)
    operator = model.lm_head
    assert isinstance(operator, CpuLinear)
    footprint = operator.footprint()
    assert footprint.weight_bytes == operator.packed.nbytes + operator.scale.nbytes
    assert footprint.flops_per_token == 2 * operator.in_features * operator.out_features
