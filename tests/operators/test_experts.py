"""CpuExperts inside whole models, against a reference that computes with dequantised weights."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ktransformers import optimize_and_load
from ktransformers.load import LoadError
from ktransformers.operators.experts import CpuExperts
from ktransformers.rules import RuleError
from packed_layer import dequantised
from tiny_models import ReferenceExperts, random_model, v3_config

RULES: list[dict[str, Any]] = [
    {
        "match": {"name": r"\.mlp\.experts$"},
        "replace": {"class": "ktransformers.operators.experts.CpuExperts", "kwargs": {}},
    }
]
IDS = torch.arange(40).reshape(2, 20) % 90


def reference_of(experts: CpuExperts) -> ReferenceExperts:
    D, F = experts.hidden_size, experts.moe_intermediate_size

    def matrix(packed: torch.Tensor, scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
        return dequantised(packed, scale, n, k, experts.weight_format).float()

    gate, up = (
        torch.stack(
            [
                matrix(packed.chunk(2)[i], experts.gate_up_scale[e, i], F, D)
                for e, packed in enumerate(experts.gate_up_packed)
            ]
        )
        for i in (0, 1)
    )
    down = torch.stack(
        [
            matrix(experts.down_packed[e], experts.down_scale[e], D, F)
            for e in range(experts.num_experts)
        ]
    )
    return ReferenceExperts(gate, up, down, experts.weight_format)


def with_reference_experts(plain: PreTrainedModel, optimised: PreTrainedModel) -> PreTrainedModel:
    """Put what the optimised model's experts should compute in a plain model."""
    for name, module in optimised.named_modules():
        if isinstance(module, CpuExperts):
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, reference_of(module))
    return plain


def rules_with(**kwargs: object) -> list[dict[str, Any]]:
    """Return the rules with these kwargs."""
    rules = copy.deepcopy(RULES)
    rules[0]["replace"]["kwargs"] = kwargs
    return rules


@pytest.fixture(
    params=[{"weight": "int8"}, {"weight": "int4", "group_size": 32}, {"weight": "bf16"}],
    ids=lambda kwargs: kwargs["weight"],
)
def pair(
    request: pytest.FixtureRequest, config: PreTrainedConfig, save: Callable[..., Path]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An optimised model, and HuggingFace's with the reference in place of its experts."""
    folder = save(random_model(config))
    optimised = optimize_and_load(folder, rules_with(**request.param), dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return optimised, with_reference_experts(plain, optimised)


# Both sides do the same arithmetic in fp32 in another order; an activation that falls on the other
# side of a rounding boundary moves by a step of amax / 127. One such step in one of 64 inputs moves
# an output by less than 1 / 127 of its size, and the logits here are of order 1.
STEP = 1 / 127


def test_logits_equal_the_reference_for_one_sequence(pair: Any) -> None:
    optimised, reference = pair
    with torch.no_grad():
        got, want = optimised(IDS[:1]).logits, reference(IDS[:1]).logits
    assert (got - want).abs().max() <= STEP * want.abs().max()
    assert (got - want).abs().median() <= 1e-5 * want.abs().max()


def test_logits_equal_the_reference_for_four_padded_sequences(pair: Any) -> None:
    optimised, reference = pair
    ids, mask = padded_batch()
    with torch.no_grad():
        got = optimised(ids, attention_mask=mask).logits[mask.bool()]
        want = reference(ids, attention_mask=mask).logits[mask.bool()]
    assert (got - want).abs().max() <= STEP * want.abs().max()
    assert (got - want).abs().median() <= 1e-5 * want.abs().max()


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four sequences of 5, 9, 12 and 17 tokens, padded on the left."""
    ids, mask = torch.full((4, 17), 2), torch.zeros(4, 17, dtype=torch.long)
    for row, length in enumerate((5, 9, 12, 17)):
        ids[row, -length:] = (torch.arange(length) * 7 + row) % 90 + 3
        mask[row, -length:] = 1
    return ids, mask


def test_greedy_text_equals_the_reference_batch_of_one_and_four(pair: Any) -> None:
    optimised, reference = pair
    ids, mask = padded_batch()
    for rows in (slice(3, 4), slice(0, 4)):
        options: dict[str, Any] = {
            "attention_mask": mask[rows],
            "max_new_tokens": 16,
            "do_sample": False,
        }
        got = optimised.generate(ids[rows], **options)
        assert torch.equal(got, reference.generate(ids[rows], **options))


def test_bf16_model_stays_near_its_fp32_self(
    config: PreTrainedConfig, save: Callable[..., Path]
) -> None:
    folder = save(random_model(config, dtype=torch.bfloat16))
    wide = optimize_and_load(folder, RULES, dtype=torch.float32)
    narrow = optimize_and_load(folder, RULES, dtype=torch.bfloat16)
    with torch.no_grad():
        want = wide(IDS).logits
        got = narrow(IDS).logits.float()
    assert narrow(IDS).logits.dtype == torch.bfloat16
    # Routing may flip on a near tie, so most of the tokens are compared, not all.
    close = ((got - want).norm(dim=-1) / want.norm(dim=-1)) < 0.1
    assert close.float().mean() > 0.8


def test_quantisation_costs_a_few_percent_of_a_layers_output() -> None:
    model = random_model(v3_config(hidden_size=256, moe_intermediate_size=128))
    plain = copy.deepcopy(model.model.layers[1].mlp.experts)
    optimize_and_load(model, RULES)
    experts = model.model.layers[1].mlp.experts
    x, index = torch.randn(64, 256), torch.randint(0, 8, (64, 4))
    weights = torch.rand(64, 4)
    with torch.no_grad():
        want, got = plain(x, index, weights), experts(x, index, weights)
    relative = float((got - want).norm() / want.norm())
    assert 0.001 < relative < 0.03  # int8 on Gaussian weights: about 1.5 %


def test_sizes_are_known_before_any_weight(config: PreTrainedConfig) -> None:
    model = random_model(config)
    from ktransformers.inject import plan
    from ktransformers.rules import load_rules

    planned = plan(model, load_rules(RULES))
    operators: Any = [r.operator for r in planned.replacements]
    promised = sum(operator.footprint().weight_bytes for operator in operators)
    optimize_and_load(model, RULES)
    experts = [m for m in model.modules() if isinstance(m, CpuExperts)]
    assert promised == sum(b.nbytes for m in experts for b in m.buffers())
    footprint = experts[0].footprint()
    assert footprint.flops_per_token == 4 * 3 * 2 * 64 * 32
    assert footprint.bytes_read_per_token == footprint.weight_bytes // 2  # 4 of 8 experts


@pytest.mark.parametrize(
    ("kwargs", "changes", "reason"),
    [
        ({"weight": "int3"}, {}, "weight 'int3' is not supported (expected int8, int4, bf16)"),
        ({"group_size": 64}, {}, "group_size 64 is for weight int4, not int8"),
        (
            {"weight": "int4", "group_size": 48},
            {},
            "group_size 48 is not supported (expected 32, 64, 128)",
        ),
        ({"threads": 0}, {}, "threads 0 is not 'auto' or a number from 1 to 1024"),
        ({"threads": 1025}, {}, "threads 1025 is not 'auto' or a number from 1 to 1024"),
        ({"threads": "many"}, {}, "threads 'many' is not 'auto' or a number from 1 to 1024"),
        ({}, {"hidden_act": "gelu"}, "computes silu, but hidden_act is 'gelu'"),
    ],
)
def test_what_the_operator_cannot_do_it_says(kwargs: Any, changes: Any, reason: str) -> None:
    model = random_model(v3_config(**changes))
    with pytest.raises(RuleError) as caught:
        optimize_and_load(model, rules_with(**kwargs))
    assert f"CpuExperts at model.layers.1.mlp.experts (and 1 more): {reason}" in str(caught.value)


def test_a_half_precision_model_is_refused() -> None:
    model = random_model(v3_config()).half()
    with pytest.raises(RuleError, match="takes bfloat16 or float32 activations"):
        optimize_and_load(model, RULES)


def test_another_module_than_fused_experts_is_refused() -> None:
    rules = copy.deepcopy(RULES)
    rules[0]["match"]["name"] = r"\.shared_experts$"
    reason = r"expected the parameters gate_up_proj and down_proj, found \[\]"
    with pytest.raises(RuleError, match=reason):
        optimize_and_load(random_model(v3_config()), rules)


def test_experts_that_gate_their_own_way_are_refused() -> None:
    model = random_model(v3_config())
    plain = type(model.model.layers[1].mlp.experts)

    def clamped(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.clamp(max=7.0)) * up

    for layer in (1, 2):
        own_class = type("ClampedExperts", (plain,), {"_apply_gate": clamped})
        model.model.layers[layer].mlp.experts.__class__ = own_class
    with pytest.raises(RuleError, match="but ClampedExperts gates its own way"):
        optimize_and_load(model, RULES)


@pytest.fixture
def loaded() -> Any:
    return optimize_and_load(random_model(v3_config()), RULES)


def test_what_packed_weights_cannot_do_raises_one_sentence(loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="an optimised model cannot be saved"):
        loaded.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="packed weights cannot be saved"):
        loaded.state_dict()
    with pytest.raises(RuntimeError, match=r"packed weights cannot be moved to torch\.float16"):
        loaded.half()
    with pytest.raises(TypeError, match="neither pickled nor copied"):
        copy.deepcopy(loaded)
    with pytest.raises(RuntimeError, match="use_mtp is not supported"):
        loaded.generate(IDS, use_mtp=True)
    with pytest.raises(RuntimeError, match="use_mtp is not supported"):
        loaded.generate(IDS, GenerationConfig(use_mtp=True))


def test_a_refused_conversion_leaves_the_whole_model_as_it_was(loaded: Any) -> None:
    with torch.no_grad():
        want = loaded(IDS).logits
        with pytest.raises(RuntimeError, match="cannot be moved"):
            loaded.half()
        assert torch.equal(loaded(IDS).logits, want)


def test_an_optimised_model_is_freed_when_it_is_dropped() -> None:
    model = optimize_and_load(random_model(v3_config()), RULES)
    packed = weakref.ref(model.model.layers[1].mlp.experts.gate_up_packed)
    gc.collect()
    gc.disable()
    try:
        del model
        assert packed() is None
    finally:
        gc.enable()


def test_an_optimised_model_is_not_optimised_again(loaded: Any) -> None:
    with pytest.raises(LoadError, match="this model is optimised already"):
        optimize_and_load(loaded, RULES)


def test_a_move_that_changes_nothing_is_let_pass(loaded: Any) -> None:
    assert loaded.to("cpu") is loaded
    assert loaded.float() is loaded


def test_a_gradient_is_refused_only_where_one_is_asked_for(loaded: Any) -> None:
    loaded(IDS)
    experts = loaded.model.layers[1].mlp.experts
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="packed weights have no gradient"):
        experts(x, torch.tensor([[0, 1]] * 3), torch.rand(3, 2))
    with pytest.raises(RuntimeError, match="packed weights have no gradient"):
        experts(x.detach(), torch.tensor([[0, 1]] * 3), torch.rand(3, 2, requires_grad=True))


def test_torch_compile_meets_a_graph_break_and_gives_the_same(loaded: Any) -> None:
    experts = loaded.model.layers[1].mlp.experts
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)

    def double(x: torch.Tensor) -> torch.Tensor:
        doubled: torch.Tensor = experts(x, index, weights) * 2
        return doubled

    compiled = torch.compile(double, backend="eager")
    assert torch.equal(compiled(x), double(x))
