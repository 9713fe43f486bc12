"""plan and apply: who takes what, every error by its exact text, and that plan touches nothing."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import Self

from ktransformers.base import Operator, Site
from ktransformers.expert_profile import write_profile
from ktransformers.inject import Plan, apply, format_replacements, plan
from ktransformers.rules import Rule, RuleError, load_rules
from tiny_models import v2_config, v3_config

DOCS = Path(__file__).parents[2] / "docs"


# Operators that rules of these tests name


class Whole(Operator):
    """Consumes all; may refuse."""

    def __init__(self, site: Site, size: int, options: Any) -> None:
        super().__init__()
        self.site = site
        self.options = options
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    @classmethod
    def from_module(
        cls, module: nn.Module, site: Site, *, size: int = 1, options: Any = None
    ) -> Self:
        if size < 0:
            raise ValueError(f"size {size} is negative")
        if size == 13:
            raise ValueError(f"{site.name} is unlucky")
        if isinstance(options, list):
            options.append(site.name)
        return cls(site, size, options)


class Needy(Whole):
    """Has a kwarg without a default."""

    @classmethod
    def from_module(cls, module: nn.Module, site: Site, *, bits: int) -> Self:  # type: ignore[override]
        return cls(site, bits, None)


class Shell(Operator):
    """Consumes no child: keeps them all under their names."""

    consumes: ClassVar[Collection[str]] = ()

    @classmethod
    def from_module(cls, module: nn.Module, site: Site) -> Self:
        operator = cls()
        for name, child in module.named_children():
            operator.add_module(name, child)
        return operator


class Attention(Operator):
    """Consumes one child, as absorbed attention does."""

    consumes = ("kv_b_proj",)

    @classmethod
    def from_module(cls, module: nn.Module, site: Site) -> Self:
        operator = cls()
        for name, child in module.named_children():
            if name not in cls.consumes:
                operator.add_module(name, child)
        return operator


class Forgetful(Operator):
    """Consumes nothing and keeps nothing."""

    consumes = ()

    @classmethod
    def from_module(cls, module: nn.Module, site: Site) -> Self:
        return cls()


class Sociable(Shell):
    """Works with an operator at lm_head."""

    met: tuple[str, ...] = ()

    def connect(self, operators: Mapping[str, Operator]) -> None:
        if "lm_head" not in operators:
            raise ValueError("no operator at lm_head")
        if isinstance(operators["lm_head"], Forgetful):
            raise KeyError("it forgot")
        self.met = tuple(operators)


class Spelled(Shell):
    """Its `consumes` is one name, not a collection of names."""

    consumes = "kv_b_proj"


class Abstract(Operator):
    """Can't be built."""


class Foreign(Operator):
    """Builds something else."""

    @classmethod
    def from_module(cls, module: nn.Module, site: Site) -> Self:
        return nn.Identity()  # type: ignore[return-value]


class Heavy(Operator):
    """Allocates."""

    @classmethod
    def from_module(cls, module: nn.Module, site: Site) -> Self:
        operator = cls()
        operator.register_buffer("packed", torch.zeros(2, device="cpu"))
        return operator


class Buggy(Operator):
    """Fails in a way that is no refusal."""

    @classmethod
    def from_module(cls, module: nn.Module, site: Site) -> Self:
        raise KeyError("weight")


def refuses_to_be_called(*_: object, **__: object) -> None:
    raise AssertionError("a rule file made a call")


class NotAnOperator:
    """A class that must not be instantiated."""

    __init__ = refuses_to_be_called
    from_module = refuses_to_be_called


class Sly(type):
    """Claims to be everything."""

    def __subclasscheck__(cls, subclass: type) -> bool:
        return True

    def mro(cls) -> list[type]:
        return super().mro()


class SlyClass(metaclass=Sly):
    """Isn't an operator either."""


# Models


@pytest.fixture(scope="module")
def v3() -> PreTrainedModel:
    return meta_model(v3_config())


def meta_model(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def rule(match: str | dict[str, Any], to: type | str = "default", /, **rest: Any) -> dict[str, Any]:
    """Write a rule: of a name or of all parts, to an operator of this file or a class path."""
    class_path = to if isinstance(to, str) else f"{__name__}.{to.__name__}"
    replace: dict[str, Any] = {"class": class_path}
    if "kwargs" in rest:
        replace["kwargs"] = rest.pop("kwargs")
    return {
        "match": {"name": match} if isinstance(match, str) else match,
        "replace": replace,
        **rest,
    }


def planned(model: nn.Module, *rules: dict[str, Any]) -> Plan:
    return plan(model, load_rules(rules))


def error_of(model: nn.Module, *rules: dict[str, Any]) -> str:
    before = snapshot(model)
    with pytest.raises(RuleError) as caught:
        planned(model, *rules)
    assert snapshot(model) == before
    return str(caught.value)


def taken(result: Plan, index: int = 1) -> list[str]:
    return result.names(result.rules[index - 1])


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that a plan could change: the tree, every attribute, tensors' versions."""
    state: list[Any] = [repr(model)]
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = dict(vars(module))
        for key in ("_modules", "_parameters", "_buffers"):
            attributes |= {f"{key}.{item}": value for item, value in attributes.pop(key).items()}
        tensors = [v._version for v in attributes.values() if isinstance(v, torch.Tensor)]
        state.append((name, module, list(attributes), list(map(id, attributes.values())), tensors))
    return state


# Which rule takes what


def test_the_first_rule_that_matches_takes_the_module(v3: PreTrainedModel) -> None:
    result = planned(v3, rule(r"layers\.1\.mlp\.experts$"), rule(r"\.experts$", Whole))
    assert taken(result, 1) == ["model.layers.1.mlp.experts"]
    assert taken(result, 2) == ["model.layers.2.mlp.experts"]
    assert {name: found.index for name, found in result.rule_of().items()} == {
        "model.layers.1.mlp.experts": 1,
        "model.layers.2.mlp.experts": 2,
    }


def test_a_name_is_searched_and_not_anchored() -> None:
    model = meta_model(v3_config(num_hidden_layers=12))
    assert taken(planned(model, rule(r"layers\.1\.mlp$|layers\.1.\.mlp$"))) == [
        f"model.layers.{layer}.mlp" for layer in (1, 10, 11)
    ]
    assert (
        taken(planned(model, rule(r"(?<!shared_)experts(?=$)")))[0] == "model.layers.1.mlp.experts"
    )


@pytest.mark.parametrize(
    ("class_path", "names"),
    [
        ("torch.nn.Embedding", ["model.embed_tokens"]),
        ("Embedding", ["model.embed_tokens"]),
        ("DeepseekV3Experts", ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]),
        (
            "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MLP",
            ["model.layers.0.mlp", *(f"model.layers.{n}.mlp.shared_experts" for n in (1, 2))],
        ),
        ("GradientCheckpointingLayer", [f"model.layers.{n}" for n in range(3)]),
        (
            "transformers.modeling_layers.GradientCheckpointingLayer",
            [f"model.layers.{n}" for n in range(3)],
        ),
    ],
)
def test_a_class_takes_its_modules_and_those_of_its_subclasses(
    v3: PreTrainedModel, class_path: str, names: list[str]
) -> None:
    assert taken(planned(v3, rule({"class": class_path}))) == names


def test_layers_take_what_lies_in_them_and_nothing_outside(v3: PreTrainedModel) -> None:
    result = planned(v3, rule({"layers": "0,2-9", "class": "torch.nn.Linear", "name": "o_proj"}))
    assert taken(result) == ["model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.o_proj"]
    result = planned(v3, rule({"layers": "0-"}))
    assert not {"model.norm", "lm_head", "model.layers"} & set(taken(result))
    assert {item.site.layer for item in result.replacements} == {0, 1, 2}


def test_the_model_itself_is_never_taken(v3: PreTrainedModel) -> None:
    assert "" not in taken(planned(v3, rule({"class": "torch.nn.Module"})))
    assert error_of(v3, rule({"class": "DeepseekV3ForCausalLM"})).startswith(
        "rules[0]: rule 1 matches no module: class DeepseekV3ForCausalLM"
    )


def test_default_keeps_the_module_and_protects_it_from_later_rules(v3: PreTrainedModel) -> None:
    result = planned(v3, rule(r"layers\.1\.mlp\.experts$"), rule(r"\.experts$", Whole))
    kept, replaced = result.replacements
    assert (kept.operator_class, kept.operator) == (None, None)
    assert (kept.name, kept.module_class) == ("model.layers.1.mlp.experts", "DeepseekV3Experts")
    assert replaced.operator_class is Whole
    assert isinstance(replaced.operator, Whole)


def test_recursive_false_shuts_out_every_rule_below(v3: PreTrainedModel) -> None:
    linear = rule({"class": "torch.nn.Linear"})
    result = planned(v3, linear, rule(r"^model\.layers\.[01]$", recursive=False))
    assert [name for name in taken(result) if "layers" in name] == [
        name for name in taken(planned(v3, linear)) if "layers.2" in name
    ]


def test_equal_plans_come_of_equal_rules(v3: PreTrainedModel) -> None:
    rules = load_rules(
        [rule(r"\.mlp$", Shell), rule({"class": "Linear"}, Whole, kwargs={"size": 3})]
    )
    first, second = plan(v3, rules), plan(v3, rules)
    assert format_replacements(first) == format_replacements(second)
    assert [item.name for item in first.replacements] == [item.name for item in second.replacements]


# What operators are told


def test_an_operator_knows_its_site(v3: PreTrainedModel) -> None:
    (item,) = planned(v3, rule(r"layers\.2\.mlp\.experts$", Whole)).replacements
    assert isinstance(item.operator, Whole)
    site = item.operator.site
    assert site is item.site
    assert (site.name, site.layer, site.config) == ("model.layers.2.mlp.experts", 2, v3.config)
    assert (site.dtype, site.device) == (torch.float32, torch.device("cpu"))
    assert site.rule == "rules[0]: rule 1"
    assert item.operator.weight.is_meta


def test_dtype_and_device_are_the_caller_s_or_the_model_s() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta", dtype=torch.bfloat16), nn.ReLU())
    rules = load_rules([rule("1", Whole)])
    site = plan(model, rules).replacements[0].site
    assert (site.dtype, site.device, site.config) == (torch.bfloat16, torch.device("cpu"), None)
    site = (
        plan(model, rules, dtype=torch.float16, device=torch.device("cuda:1")).replacements[0].site
    )
    assert (site.dtype, site.device) == (torch.float16, torch.device("cuda:1"))
    assert (
        plan(nn.Sequential(nn.ReLU(), nn.ReLU()), rules).replacements[0].site.dtype == torch.float32
    )


def test_every_operator_gets_kwargs_of_its_own(v3: PreTrainedModel) -> None:
    result = planned(v3, rule(r"\.experts$", Whole, kwargs={"options": ["x"], "size": 2}))
    operators = [item.operator for item in result.replacements]
    assert [getattr(operator, "options", None) for operator in operators] == [
        ["x", "model.layers.1.mlp.experts"],
        ["x", "model.layers.2.mlp.experts"],
    ]
    assert result.rules[0].kwargs == {"options": ["x"], "size": 2}


def test_an_operator_is_in_the_mode_of_its_module() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].eval()
    modes = [
        item.operator
        for item in planned(model, rule("", Whole) | {"match": {"class": "Linear"}}).replacements
    ]
    assert [operator is not None and operator.training for operator in modes] == [False, True]


# apply


def test_apply_sets_operators_and_nothing_else() -> None:
    model = meta_model(v3_config())
    before = dict(model.named_modules())
    result = planned(model, rule(r"layers\.0$"), rule(r"\.experts$", Whole))
    apply(model, result)
    after = dict(model.named_modules())
    for item in result.replacements:
        assert after.pop(item.name) is (item.operator or before[item.name])
        before.pop(item.name)
    gone = {f"model.layers.{layer}.mlp.experts.act_fn" for layer in (1, 2)}
    assert after == {name: module for name, module in before.items() if name not in gone}


def test_nested_claims_end_up_inside_the_outer_operator() -> None:
    model = meta_model(v3_config())
    result = planned(
        model,
        rule(r"\.mlp$", Shell),
        rule(r"\.(experts|self_attn\.o_proj|gate_proj)$", Whole),
        rule(r"self_attn$", Attention),
        rule(r"^model\.layers$", Shell),
    )
    apply(model, result)
    for item in result.replacements:
        assert model.get_submodule(item.name) is item.operator
    attention = model.get_submodule("model.layers.0.self_attn")
    assert isinstance(attention.o_proj, Whole)
    assert [name for name, _ in attention.named_children()].count("kv_b_proj") == 0


def test_a_plan_is_for_one_model_as_it_was(v3: PreTrainedModel) -> None:
    model = meta_model(v3_config())
    result = planned(model, rule(r"\.experts$", Whole))
    before = snapshot(v3)
    with pytest.raises(ValueError, match=r"^this plan was made for another model$"):
        apply(v3, result)
    assert snapshot(v3) == before
    apply(model, result)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts has changed since"):
        apply(model, result)
    assert snapshot(model) == before


def test_a_model_computes_as_before_with_operators_that_change_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    expected = model(x)
    apply(model, planned(model, rule("^0$", PassThrough), rule("^0.1$", Rectify)))
    assert torch.equal(model(x), expected)


class PassThrough(Shell):
    """Calls its children in turn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


class Rectify(Operator):
    """A ReLU."""

    @classmethod
    def from_module(cls, module: nn.Module, site: Site) -> Self:
        return cls()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp_min(0)


# Errors of matching


def test_a_rule_that_matches_nothing_names_the_nearest(v3: PreTrainedModel) -> None:
    assert error_of(
        v3,
        rule(r"^model\.layers\.\d+\.mpl$", Whole),
        rule(r"mlp\.expert$"),
        rule({"class": "DeepseekV3Expert"}),
        rule({"class": "torch.nn.Conv2d"}),
        rule({"class": "torch.nn.Linear", "name": "experts$", "layers": "1-2"}),
        rule("zzz"),
    ) == (
        r"rules[0]: rule 1 matches no module: name '^model\.layers\.\d+\.mpl$'"
        "\n"
        "  nearest: model.layers.0.mlp, model.layers.1.mlp\n"
        r"rules[1]: rule 2 matches no module: name 'mlp\.expert$'"
        "\n"
        "  nearest: model.layers.1.mlp.experts, model.layers.2.mlp.experts\n"
        "rules[2]: rule 3 matches no module: class DeepseekV3Expert\n"
        "  nearest: DeepseekV3Experts\n"
        "rules[3]: rule 4 matches no module: class torch.nn.Conv2d\n"
        "rules[4]: rule 5 matches no module: "
        "name 'experts$' and class torch.nn.Linear and layers 1-2\n"
        "  modules that each part alone matches: name 4, class 25, layers 40\n"
        "rules[5]: rule 6 matches no module: name 'zzz'"
    )


def test_a_rule_that_is_shadowed_names_the_rule_that_does_it(v3: PreTrainedModel) -> None:
    assert error_of(
        v3,
        rule(r"layers\.1\.mlp\.experts$"),
        rule(r"layers\.2\.mlp\.experts$"),
        rule(r"mlp\.experts$", Whole),
        rule(r"self_attn\.o_proj$"),
        rule("self_attn$", recursive=False),
    ) == (
        "rules[2]: rule 3 takes nothing: all that it matches belongs to "
        "rule 1 (rules[0]), rule 2 (rules[1])\n"
        "  put the specific rule first\n"
        "rules[3]: rule 4 takes nothing: all that it matches belongs to rule 5 (rules[4])\n"
        "  its recursive: false shuts out others"
    )


def test_expect_counts_what_the_rule_takes(v3: PreTrainedModel) -> None:
    assert len(planned(v3, rule(r"\.experts$", Whole, expect=2)).replacements) == 2
    assert error_of(
        v3, rule(r"\.1\.mlp\.experts$"), rule(r"\.experts$", Whole, expect=2), rule("zz", expect=1)
    ) == (
        "rules[1].expect: rule 2 takes 1 module, expected 2\n"
        "rules[2]: rule 3 matches no module: name 'zz'"
    )


def test_expect_any_allows_a_rule_to_take_nothing(v3: PreTrainedModel) -> None:
    result = planned(
        v3,
        rule(r"\.experts$"),
        rule(r"\.experts$", Whole, expect="any"),
        rule("zzz", expect="any"),
        rule({"layers": "70-80"}, expect="any"),
    )
    assert [len(taken(result, index)) for index in (1, 2, 3, 4)] == [2, 0, 0, 0]


def test_layers_that_the_model_has_not_are_an_error(v3: PreTrainedModel) -> None:
    assert error_of(v3, rule({"layers": "2-9,70-80,90"})) == (
        "rules[0].match.layers: no layer 70-80,90: the model has 3 layers, 0 to 2"
    )
    assert error_of(nn.Sequential(nn.ReLU()), rule({"layers": 0})) == (
        "rules[0].match.layers: no layer 0: the model has no layers"
    )


@pytest.mark.parametrize(
    ("class_path", "error"),
    [
        (
            "ktransformers.models.deepseek.DeepseekV3Experts",
            "no module ktransformers.models\n"
            "  nearest: transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Experts",
        ),
        (
            "torch.nn.modules.linear.Linaer",
            "torch.nn.modules.linear has no Linaer\n  nearest: torch.nn.modules.linear.Linear",
        ),
        ("os.system", "os.system is a builtin_function_or_method, not a class"),
        (f"{__name__}.DOCS", f"{__name__}.DOCS is a {type(DOCS).__name__}, not a class"),
    ],
)
def test_a_class_to_match_that_is_none_is_an_error(
    v3: PreTrainedModel, class_path: str, error: str
) -> None:
    assert error_of(v3, rule({"class": class_path})) == f"rules[0].match.class: {error}"


def test_a_regex_that_backtracks_for_ever_ends_in_an_error(v3: PreTrainedModel) -> None:
    error = error_of(v3, rule(r"experts$", Whole), rule(r"(.*){1,20}[^\w.]"), rule("os.x", "os.x"))
    first, *rest = error.splitlines()
    assert first.startswith(
        "rules[1].match.name: takes too long: all names together get 1 s (stopped at model."
    )
    assert rest == [
        "  a repeat inside a repeat, such as (a+)+, tries every way to split the name",
        "rules[2].replace.class: os has no x",
    ]


# Errors of what rules put in place


AN_OPERATOR = "expected an Operator (a subclass of ktransformers.base.Operator)"


@pytest.mark.parametrize(
    ("class_path", "error"),
    [
        ("os.system", f"os.system is a builtin_function_or_method; {AN_OPERATOR}"),
        ("subprocess.Popen", f"subprocess.Popen is a class; {AN_OPERATOR}"),
        ("builtins.eval", f"builtins.eval is a builtin_function_or_method; {AN_OPERATOR}"),
        ("torch.nn.Linear", f"torch.nn.Linear is a class; {AN_OPERATOR}"),
        (
            f"{__name__}.refuses_to_be_called",
            f"{__name__}.refuses_to_be_called is a function; {AN_OPERATOR}",
        ),
        (f"{__name__}.NotAnOperator", f"{__name__}.NotAnOperator is a class; {AN_OPERATOR}"),
        (f"{__name__}.SlyClass", f"{__name__}.SlyClass is a class; {AN_OPERATOR}"),
        (f"{__name__}.Wohle", f"{__name__} has no Wohle\n  nearest: Whole"),
        (f"{__name__}.Abstract", "Abstract does not define from_module"),
        (f"{__name__}.Spelled", "Spelled.consumes is a string; expected a collection of names"),
        ("nowhere.at.all", "no module nowhere"),
        (
            "ktransformers.bsae.Operator",
            "no module ktransformers.bsae\n  nearest: ktransformers.base",
        ),
    ],
)
def test_what_is_no_operator_is_an_error_and_never_called(
    v3: PreTrainedModel, class_path: str, error: str
) -> None:
    assert error_of(v3, rule("experts$", class_path)) == f"rules[0].replace.class: {error}"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (
            "import nowhere_at_all",
            "can't import broken_package: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        (
            "import os; os.nothing",
            "can't import broken_package: AttributeError: module 'os' has no attribute 'nothing'",
        ),
        ("1 / 0", "can't import broken_package: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "can't import broken_package: SystemExit: 3"),
        (
            "x =",
            "can't import broken_package: SyntaxError: invalid syntax (broken_package.py, line 1)",
        ),
    ],
)
def test_a_module_that_does_not_import_is_an_error(
    v3: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: str
) -> None:
    (tmp_path / "broken_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = error_of(v3, rule("experts$", "broken_package.Operator"))
    assert found == f"rules[0].replace.class: {error}"


def test_kwargs_are_checked_against_the_signature(v3: PreTrainedModel) -> None:
    assert error_of(
        v3,
        rule("experts$", Whole, kwargs={"sizes": 3, "module": 1}),
        rule("o_proj$", Needy),
        rule("q_a_proj$", Needy, kwargs={"bit": 3}),
        rule("self_attn$", Attention, kwargs={"x": 3}),
    ) == (
        "rules[0].replace.kwargs.sizes: unknown kwarg (Whole takes size, options)\n"
        "  nearest: size\n"
        "rules[0].replace.kwargs.module: unknown kwarg (Whole takes size, options)\n"
        "rules[1].replace.class: Needy needs bits\n"
        "rules[2].replace.kwargs.bit: unknown kwarg (Needy takes bits)\n"
        "  nearest: bits\n"
        "rules[2].replace.kwargs: Needy needs bits\n"
        "rules[3].replace.kwargs.x: unknown kwarg (Attention takes none)"
    )


def test_what_an_operator_refuses_is_an_error_of_the_rule(v3: PreTrainedModel) -> None:
    with pytest.raises(RuleError) as caught:
        planned(
            v3,
            rule("o_proj$", Whole, kwargs={"size": -3}),
            rule("[^d]_experts$", Whole, kwargs={"size": 13}, expect="any"),
            rule(r"\.experts$", Whole, kwargs={"size": 13}),
            rule("q_a_proj$", Whole, kwargs={"size": "2"}),
        )
    assert str(caught.value) == (
        "rules[0]: Whole at model.layers.0.self_attn.o_proj (and 2 more): size -3 is negative\n"
        "rules[2]: Whole at model.layers.1.mlp.experts: model.layers.1.mlp.experts is unlucky\n"
        "rules[2]: Whole at model.layers.2.mlp.experts: model.layers.2.mlp.experts is unlucky\n"
        "rules[3]: Whole at model.layers.0.self_attn.q_a_proj (and 2 more): "
        "'<' not supported between instances of 'str' and 'int'"
    )
    # An author of an operator wants to see the line that raised.
    assert str(caught.value.__cause__).startswith("'<' not supported")


@pytest.mark.parametrize(
    ("operator", "error"),
    [
        (Forgetful, "child {} is not consumed, so the operator must keep it as is"),
        (Foreign, "from_module returned a Identity"),
        (Heavy, "from_module puts packed on cpu, not on the meta device"),
    ],
)
def test_an_operator_that_breaks_the_contract_is_an_error(
    v3: PreTrainedModel, operator: type, error: str
) -> None:
    assert error_of(v3, rule("self_attn$", operator)) == (
        f"rules[0]: {operator.__name__} at model.layers.0.self_attn (and 2 more): "
        + error.format("q_a_proj")
    )


def test_a_bug_of_an_operator_keeps_its_traceback(v3: PreTrainedModel) -> None:
    before = snapshot(v3)
    with pytest.raises(RuntimeError, match=r"^rules\[0\]: Buggy at lm_head failed$") as caught:
        planned(v3, rule("lm_head", Buggy))
    assert isinstance(caught.value.__cause__, KeyError)
    assert snapshot(v3) == before


def test_operators_find_one_another_at_the_end(v3: PreTrainedModel) -> None:
    attention = rule({"name": "self_attn$", "layers": "1-2"}, Sociable)
    names = ["model.layers.1.self_attn", "model.layers.2.self_attn", "lm_head"]
    for rules in ([attention, rule("lm_head", Whole)], [rule("lm_head", Whole), attention]):
        result = planned(v3, *rules, rule("norm$"))  # kept as they are: no operators
        first = result.replacements[[item.name for item in result.replacements].index(names[0])]
        assert isinstance(first.operator, Sociable)
        assert list(first.operator.met) == names


def test_operators_that_do_not_find_one_another_are_an_error(v3: PreTrainedModel) -> None:
    attention = rule("self_attn$", Sociable)
    assert error_of(v3, attention) == (
        "rules[0]: Sociable at model.layers.0.self_attn (and 2 more): no operator at lm_head"
    )
    refusing = rule("lm_head", Whole, kwargs={"size": -1})
    assert error_of(v3, attention, refusing) == "rules[1]: Whole at lm_head: size -1 is negative"
    with pytest.raises(RuntimeError, match=r"Sociable at model\.layers\.0\.self_attn failed$"):
        planned(v3, attention, rule("lm_head", Forgetful))


def test_a_claim_inside_what_another_operator_consumes_names_both_rules(
    v3: PreTrainedModel,
) -> None:
    assert error_of(
        v3,
        rule(r"mlp\.experts", Whole),
        rule("kv_b_proj|o_proj", Whole),
        rule("self_attn$", Attention),
    ) == (
        "rules[0]: rule 1 claims model.layers.1.mlp.experts.act_fn inside "
        "model.layers.1.mlp.experts, which Whole of rule 1 (rules[0]) consumes (and 1 more)\n"
        "  end the regex with $, or set recursive: false on rule 1\n"
        "rules[1]: rule 2 claims model.layers.0.self_attn.kv_b_proj inside "
        "model.layers.0.self_attn, which Attention of rule 3 (rules[2]) consumes (and 2 more)\n"
        "  end the regex with $, or set recursive: false on rule 3"
    )
    assert planned(v3, rule(r"mlp\.experts", Whole, recursive=False)).replacements
    assert planned(v3, rule("act_fn"), rule(r"mlp\.experts$", Whole)).replacements


def test_a_default_that_only_keeps_what_an_operator_consumes_is_an_error(
    v3: PreTrainedModel,
) -> None:
    assert error_of(v3, rule(r"mlp\.experts\.act_fn$"), rule(r"mlp\.experts$", Whole)) == (
        "rules[0]: rule 1 claims model.layers.1.mlp.experts.act_fn inside "
        "model.layers.1.mlp.experts, which Whole of rule 2 (rules[1]) consumes (and 1 more)\n"
        "  end the regex with $, or set recursive: false on rule 2"
    )


def test_a_module_of_two_names_can_be_kept_but_not_replaced() -> None:
    shared = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert error_of(model, rule("^a", Shell)) == (
        "rules[0]: rule 1 takes one module of several names: a, b\n"
        "  a shared module can't be replaced\n"
        "rules[0]: rule 1 takes one module of several names: a.0, b.0\n"
        "  a shared module can't be replaced"
    )
    assert taken(planned(model, rule("^b"))) == ["b", "b.0"]


def test_errors_of_every_kind_come_together(v3: PreTrainedModel) -> None:
    error = error_of(
        v3,
        rule("mpl"),
        rule(r"mlp\.experts", Whole),
        rule({"layers": 7}),
        rule("o_proj", Whole, kwargs={"size": -1}),
        rule("lm_head", "os.system"),
        rule("embed", Needy, expect=2),
    )
    assert [line.split(": ")[0] for line in error.splitlines() if not line.startswith(" ")] == [
        "rules[0]",
        "rules[1]",
        "rules[2].match.layers",
        "rules[3]",
        "rules[4].replace.class",
        "rules[5].replace.class",
        "rules[5].expect",
    ]


# Included files


@pytest.mark.parametrize(
    ("own", "lines"),
    [
        # All, some and none of what the included rule means, and what is around it.
        ("name: 'mlp\\.experts$'", ["model.layers.{1-2}.mlp.experts: {}  [own.yaml:3, 2 modules]"]),
        (
            "name: '1\\.mlp\\.experts$'",
            [
                "model.layers.1.mlp.experts: {}  [own.yaml:3, 1 module]",
                "model.layers.2.mlp.experts: {}  [base.yaml:1, 1 module]",
            ],
        ),
    ],
)
def test_an_included_rule_may_lose_its_modules(
    v3: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, lines: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keep = "\n  replace: {class: default}\n"
    Path("base.yaml").write_text("- match: {name: 'mlp\\.experts$'}\n  expect: 2" + keep)
    Path("own.yaml").write_text(f"include: base.yaml\nrules:\n- match: {{{own}}}" + keep)
    kept = "DeepseekV3Experts -> default"
    assert format_replacements(plan(v3, load_rules("own.yaml"))) == [
        line.replace("{}", kept) for line in lines
    ]
    Path("own.yaml").write_text(
        f"include: base.yaml\nrules:\n- match: {{name: 'layers\\.[12]$'}}\n  recursive: false{keep}"
    )
    assert len(plan(v3, load_rules("own.yaml")).replacements) == 2


def test_an_included_rule_that_shuts_out_the_includer_s_is_an_error(
    v3: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keep = "\n  replace: {class: default}\n"
    Path("base.yaml").write_text("- match: {name: 'mlp$'}\n  recursive: false" + keep)
    Path("own.yaml").write_text("include: base.yaml\nrules:\n- match: {name: 'gate$'}" + keep)
    with pytest.raises(RuleError) as caught:
        plan(v3, load_rules("own.yaml"))
    assert str(caught.value) == (
        "own.yaml:3: rule 1 takes nothing: all that it matches belongs to rule 2 (base.yaml:1)\n"
        "  its recursive: false shuts out others"
    )


# Lines


def test_replacements_are_shown_a_line_for_each_rule_and_kind_folded_over_layers() -> None:
    model = meta_model(v3_config(num_hidden_layers=8, first_k_dense_replace=2))
    result = planned(
        model,
        rule(r"layers\.4\.mlp$"),
        rule({"name": r"\.mlp\.(experts|gate)$", "layers": "0-5,7"}, Whole, kwargs={"size": 2}),
        rule("lm_head|shared_experts.up_proj", Whole, kwargs={"options": "x", "size": 1}),
    )
    assert format_replacements(result) == [
        "model.layers.{2-5,7}.mlp.experts: DeepseekV3Experts -> Whole(size=2)  "
        "[rules[1], 5 modules]",
        "model.layers.{2-5,7}.mlp.gate: DeepseekV3TopkRouter -> Whole(size=2)  "
        "[rules[1], 5 modules]",
        "model.layers.{2-7}.mlp.shared_experts.up_proj: Linear -> Whole(options=x, size=1)  "
        "[rules[2], 6 modules]",
        "model.layers.4.mlp: DeepseekV3MoE -> default  [rules[0], 1 module]",
        "lm_head: Linear -> Whole(options=x, size=1)  [rules[2], 1 module]",
    ]


# Properties

KINDS = (nn.Identity, nn.ReLU, nn.Sequential)
KEYS = st.sampled_from(["a", "b", "layers", "0", "1", "2"])
TREES: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.just({}), lambda inner: st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
MATCHES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["a", "b", "^a", "a$", r"\.", r"layers\.\d$", "[01]", "a.b"]),
        "class": st.sampled_from(["ReLU", "torch.nn.Sequential", "Module", "Identity"]),
        "layers": st.sampled_from(["0", "1-2", "0,2"]),
    },
).filter(bool)
RULES = st.lists(
    st.tuples(MATCHES, st.sampled_from(["default", Shell]), st.booleans()), min_size=1, max_size=5
)


def grow(tree: dict[str, Any], kind: int = 0) -> nn.Module:
    """Make modules of a dictionary: of kinds that its size decides."""
    module = KINDS[(kind + len(tree)) % len(KINDS)]()
    for name, inner in tree.items():
        module.add_module(name, grow(inner, kind + 1))
    return module


def matches(found: Rule, name: str, module: nn.Module) -> bool:
    """Say whether the rule means the module, written to be obvious."""
    match, parts = found.match, name.split(".")
    layer = None
    for part, after in itertools.pairwise(parts):
        if part == "layers" and after.isdecimal():
            layer = int(after)
            break
    return (
        (match.name is None or match.name.search(name) is not None)
        and (
            match.class_path is None
            or match.class_path.rpartition(".")[2]
            in [base.__name__ for base in type(module).__mro__]
        )
        and (match.layers is None or any(layer in part for part in match.layers))
    )


@settings(deadline=None)  # machines are busy
@given(TREES, RULES)
def test_every_module_is_taken_by_the_first_rule_that_matches_it(
    tree: dict[str, Any], written: list[Any]
) -> None:
    model = grow(tree)
    rules = load_rules([rule(m, to, recursive=deep, expect="any") for m, to, deep in written])
    expected: dict[str, Rule] = {}
    shut: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in shut)
        takers = [found for found in rules if matches(found, name, module)]
        if name and takers and not inside:
            expected[name] = takers[0]
            if not takers[0].recursive:
                shut.append(name)
    before = snapshot(model)
    result = plan(model, rules)
    assert snapshot(model) == before
    assert result.rule_of() == expected
    assert [item.name for item in result.replacements] == list(expected)

    names = [name for name, _ in model.named_modules()]
    apply(model, result)
    assert [name for name, _ in model.named_modules()] == names  # Shell keeps all children
    for item in result.replacements:
        here = model.get_submodule(item.name)
        assert here is item.operator if item.operator else not isinstance(here, Shell)


@settings(deadline=None)  # machines are busy
@given(
    st.lists(st.tuples(MATCHES, st.sampled_from([Whole, Shell, Forgetful, Heavy]), st.booleans()))
)
def test_a_plan_that_fails_leaves_the_model_as_it_was(written: list[Any]) -> None:
    model = nn.Sequential(grow({"a": {"b": {}, "layers": {"0": {"a": {}}, "1": {}}}}), nn.ReLU())
    before = snapshot(model)
    rules = [rule(m, to, recursive=deep, kwargs={}) for m, to, deep in written]
    try:
        planned(model, *rules, rule("zzz"))
    except RuleError:
        assert snapshot(model) == before
    else:
        raise AssertionError("a rule that matches nothing is an error")


# The models that all this is for


@pytest.mark.parametrize(
    ("model_name", "config"),
    [
        ("tiny", v3_config(num_hidden_layers=4)),
        ("deepseek-v3", v3_config(num_hidden_layers=5, first_k_dense_replace=3)),
        ("deepseek-v2", v2_config(num_hidden_layers=4)),
    ],
    ids=["tiny", "v3", "v2"],
)
@pytest.mark.parametrize("weight", ["int8", "int4"])
def test_shipped_file_leaves_no_projection_to_torch(
    model_name: str, config: Any, weight: str
) -> None:
    name = f"{model_name}-cpu-{weight}"
    model = meta_model(config)
    result = plan(model, load_rules(name, overrides=["threads=2"]), dtype=torch.bfloat16)
    layers = {f"model.layers.{layer}" for layer in range(config.num_hidden_layers)}
    linears = {at for at, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {item.name for item in result.replacements} == {*layers, "lm_head"}
    assert {at for at in linears if not any(at.startswith(f"{x}.") for x in layers)} == {"lm_head"}
    size = {} if weight == "int8" else {"group_size": 32 if model_name == "tiny" else 128}
    chosen = {"weight": weight, **size, "threads": 2, "cache_format": "int8"}
    for item in result.replacements:
        assert item.operator_class is not None
        assert item.operator_class.__name__ == (
            "CpuLinear" if item.name == "lm_head" else "CpuDecoderLayer"
        )
        assert item.kwargs == (
            {"weight": "int8", "threads": 2} if item.name == "lm_head" else chosen
        )


def test_the_examples_of_the_guide_do_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "rules.md").read_text()
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 32}
    model = meta_model(v3_config(num_hidden_layers=61, first_k_dense_replace=3, **sizes))
    write_profile("v3-uses.json", 8192, {layer: [1] * 32 for layer in range(3, 61)})
    examples = text.split("```yaml\n")[1:]
    assert len(examples) == 6
    for example in examples:
        Path("rules.yaml").write_text(example.partition("```")[0])
        lines = format_replacements(plan(model, load_rules("rules.yaml"), dtype=torch.bfloat16))
        if example is examples[0]:
            assert "\n".join(lines) in text
    (script,) = (part.partition("```")[0] for part in text.split("```python\n")[1:])
    exec(script, {"model": model})
    assert type(model.model.layers[60]).__name__ == "CpuDecoderLayerV3"


REAL_SIZE = """
import time, torch
from transformers import AutoModelForCausalLM, DeepseekV3Config
from ktransformers.inject import format_replacements, plan
from ktransformers.rules import load_rules
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(DeepseekV3Config())
start = time.process_time()
swaps = plan(model, load_rules("deepseek-v3-cpu-int8"), dtype=torch.bfloat16)
seconds = time.process_time() - start
print(len(swaps.replacements), len(format_replacements(swaps)), end=" ")
# Not ru_maxrss: a process inherits that of the one that started it.
with open("/proc/self/status") as status:
    (peak,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(seconds < 3, peak < 1e9)
"""


def test_deepseek_v3_at_its_real_size_is_planned_in_3_s_and_1_gb() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REAL_SIZE], capture_output=True, text=True, timeout=300, check=True
    )
    taken, kinds = 61 + 1, 2  # layers and the head
    assert done.stdout == f"{taken} {kinds} True True\n"
