"""The small steps of a decoder layer: the same bits everywhere, and what transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from ktransformers import _native
from packed_layer import same_bits
from tiny_models import v2_config, v3_config

SIZES = [1, 7, 8, 9, 15, 64, 100, 515]
DTYPES = [torch.float32, torch.bfloat16]
ISAS = [isa for isa in ("avx2", "portable") if isa in _native.isas()]
EPS = 1e-6
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # half a step, relative

every_isa = pytest.mark.parametrize("isa", ISAS)
every_size = pytest.mark.parametrize("n", SIZES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, isa: str) -> torch.Tensor:
    out = torch.full_like(x, torch.nan)
    _native.rms_norm(x, weight, EPS, out, isa=isa)
    return out


@every_isa
@every_dtype
@every_size
def test_norm_is_exact_but_for_its_roundings(n: int, dtype: torch.dtype, isa: str) -> None:
    x, weight = drawn(5, n, dtype=dtype), drawn(n, dtype=dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    got = rms_norm(x, weight, isa)
    # Two roundings to the type; in fp32 n + 6 before, of the sum, the mean, the root, a product.
    bound = (2.1 * UNIT[dtype] + (n + 6) * 2.0**-24) * exact.abs()
    assert ((got.double() - exact).abs() <= bound).all()
    norm = v3.DeepseekV3RMSNorm(n, EPS)
    norm.weight.data = weight
    assert torch.allclose(got, norm(x), rtol=4 * UNIT[dtype] + n * 2.0**-24, atol=0)


@every_isa
@every_dtype
@every_size
def test_bits_are_the_portable_ones(n: int, dtype: torch.dtype, isa: str) -> None:
    x, weight = drawn(3, n, dtype=dtype), drawn(6, n, dtype=dtype)
    x[1, n // 2] = torch.nan
    assert same_bits(rms_norm(x, weight[0], isa), rms_norm(x, weight[0], "portable"))
    assert rms_norm(x, weight[0], isa).isnan().any(1).tolist() == [False, True, False]
    logits = [torch.empty(3, 6) for _ in range(2)]
    for name, out in zip((isa, "portable"), logits, strict=True):
        _native.router_logits(x, weight, out, isa=name)
    assert same_bits(logits[0][::2], logits[1][::2])
    assert logits[0][1].isnan().all()


@every_isa
@every_dtype
@every_size
def test_logits_are_exact_but_for_fp32_sums(n: int, dtype: torch.dtype, isa: str) -> None:
    x, weight = drawn(3, n, dtype=dtype), drawn(6, n, dtype=dtype)
    out = torch.full((3, 6), torch.nan)
    _native.router_logits(x, weight, out, isa=isa)
    exact = x.double() @ weight.double().T
    bound = (n + 1) * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert ((out - exact).abs() <= bound).all()


@every_isa
@every_dtype
@every_size
def test_sums_are_those_of_torch(n: int, dtype: torch.dtype, isa: str) -> None:
    a, b = drawn(n, dtype=dtype), drawn(n, dtype=dtype) * 1.37
    out = torch.full_like(a, torch.nan)
    _native.add_rows(a, b, out, isa=isa)
    assert torch.equal(out, a + b)
    _native.add_rows(a, b, a, isa=isa)
    assert torch.equal(out, a)


@every_dtype
def test_rotary_is_that_of_transformers(dtype: torch.dtype) -> None:
    T, H, R = 5, 3, 16
    x, angle = drawn(T, H, R, dtype=dtype), drawn(T, R // 2)
    cos, sin = (torch.cat([f(angle)] * 2, dim=-1)[None].to(dtype) for f in (torch.cos, torch.sin))
    pairs = torch.polar(torch.ones_like(angle), angle)[None]
    q = x.transpose(0, 1)[None]
    want = {
        "halves": v3.apply_rotary_pos_emb(q, q, cos, sin)[0],
        "neighbours_to_halves": v3.apply_rotary_pos_emb_interleave(q, q, cos, sin)[0],
        "neighbours": v2.apply_rotary_emb(q, q, pairs)[0],
    }
    for rotary, expected in want.items():
        out = x.clone()  # in place
        if rotary == "neighbours":
            _native.rotate(out, pairs, None, out, rotary)
        else:
            _native.rotate(out, cos, sin, out, rotary)
        # Each of two products, and their sum, may be rounded to the type there and not here.
        error = (out.transpose(0, 1)[None] - expected).abs()
        assert (error <= 4 * UNIT[dtype] * x.abs().max()).all(), rotary


def choose(
    logits: torch.Tensor, top_k: int, bias: torch.Tensor | None, **rule: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.full((len(logits), top_k), -1, dtype=torch.int32)
    weight = torch.full((len(logits), top_k), torch.nan)
    _native.choose_experts(logits, bias, index, weight, **rule)
    return index, weight


def by_expert(index: torch.Tensor, weight: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(len(index), experts).scatter_(1, index.long(), weight)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (4, 4), (8, 3)])
def test_experts_are_those_of_v3(groups: int, top_groups: int, normalise: bool) -> None:
    config = v3_config(
        n_routed_experts=32, n_group=groups, topk_group=top_groups, norm_topk_prob=normalise
    )
    router = v3.DeepseekV3TopkRouter(config)
    router.weight.data = drawn(32, config.hidden_size)
    router.e_score_correction_bias.data = drawn(32) * 0.3
    with torch.no_grad():
        logits, weight, index = router(drawn(200, config.hidden_size) * 0.2)
    got = choose(
        logits.contiguous(),
        4,
        router.e_score_correction_bias,
        groups=groups,
        top_groups=top_groups,
        normalise=normalise,
        routed_scaling=config.routed_scaling_factor,
    )
    assert torch.allclose(by_expert(*got, 32), by_expert(index, weight, 32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_experts_are_those_of_v2(method: str) -> None:
    config = v2_config(n_routed_experts=32, topk_method=method, n_group=4, topk_group=2)
    router = v2.DeepseekV2TopkRouter(config)
    router.weight.data = drawn(32, config.hidden_size)
    with torch.no_grad():
        logits, weight, index = router(drawn(200, config.hidden_size) * 0.2)
    groups = {"groups": 4, "top_groups": 2} if method == "group_limited_greedy" else {}
    got = choose(logits, 4, None, routed_scaling=config.routed_scaling_factor, **groups)
    assert torch.allclose(by_expert(*got, 32), by_expert(index, weight, 32), rtol=1e-5, atol=0)


def test_of_equal_experts_and_groups_the_first_are_chosen() -> None:
    index, _ = choose(torch.zeros(1, 16), 3, torch.zeros(16), groups=4, top_groups=2)
    assert index.tolist() == [[0, 1, 2]]
    index, _ = choose(torch.zeros(1, 16), 16, None)
    assert index.tolist() == [list(range(16))]


def test_a_token_with_nan_gets_experts_that_exist_and_weights_that_say_so() -> None:
    logits = drawn(2, 16)
    logits[0, 3] = torch.nan
    logits[1] = torch.nan
    for bias in (torch.zeros(16), None):
        index, weight = choose(logits, 4, bias, groups=4, top_groups=2, normalise=bias is not None)
        assert ((index >= 0) & (index < 16)).all()
        assert all(len(set(row)) == 4 for row in index.tolist())
        assert weight.isnan().all()


def test_what_can_not_be_chosen_is_refused() -> None:
    logits = torch.zeros(1, 16)
    with pytest.raises(ValueError, match="top_k=17: expected 1 to 16"):
        choose(logits, 17, None)
    with pytest.raises(ValueError, match="16 experts can't be cut into 3 equal groups"):
        choose(logits, 4, None, groups=3)
    with pytest.raises(ValueError, match="top_groups=5: expected 1 to 4"):
        choose(logits, 4, None, groups=4, top_groups=5)
    with pytest.raises(ValueError, match="rotary='both': expected neighbours, "):
        _native.rotate(
            torch.zeros(1, 1, 8), torch.zeros(1, 1, 4) + 0j, None, torch.zeros(1, 1, 8), "both"
        )
