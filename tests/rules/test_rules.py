"""Rule files: what they mean, and every error of theirs by its exact text."""

from __future__ import annotations

import contextlib
import re
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.rule_file import Problems, Source, parse_yaml, plain
from ktransformers.rules import RuleError, load_rules, parse_layers, shipped_rules

KEEP = "replace: {class: default}"
RULE = f"- match: {{name: a}}\n  {KEEP}\n"
CPU_EXPERTS = "ktransformers.operators.experts.CpuExperts"

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a rule file into an empty current folder; return its name."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes, name: str = "rules.yaml") -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(RuleError) as caught:
        load_rules(source, **options)
    return str(caught.value)


# What files mean


def test_every_key_of_a_rule_is_read(write: Write) -> None:
    (rule,) = load_rules(
        write(
            r"""
rules:
  - match: {name: '^model\.layers', class: torch.nn.Linear, layers: '0,2-3,7-'}
    replace:
      class: my_package.operators.Int4Linear
      kwargs: {bits: 4, scale: 0.5, device: cuda:0, names: [a, b], exact: true, none: null}
    recursive: false
    expect: 12
"""
        )
    )
    assert rule.index == 1
    assert rule.where == "rules.yaml:3"
    assert rule.place("replace.kwargs.bits").text == "rules.yaml:6: replace.kwargs.bits"
    assert rule.place("match.layers").text == "rules.yaml:3: match.layers"
    assert str(rule.match) == r"name '^model\.layers' and class torch.nn.Linear and layers 0,2-3,7-"
    assert rule.class_path == "my_package.operators.Int4Linear"
    assert rule.kwargs == {
        "bits": 4,
        "scale": 0.5,
        "device": "cuda:0",
        "names": ["a", "b"],
        "exact": True,
        "none": None,
    }
    assert (rule.recursive, rule.expect) == (False, 12)


def test_what_a_rule_leaves_out_has_a_default(write: Write) -> None:
    (rule,) = load_rules(write(RULE))
    assert (rule.class_path, rule.kwargs, rule.recursive, rule.expect) == (None, {}, True, None)
    assert (rule.match.class_path, rule.match.layers) == (None, None)


def test_a_list_of_dicts_means_the_same_as_a_file(write: Write) -> None:
    text = "- match: {class: Linear, layers: 3}\n  replace: {class: a.B, kwargs: {x: [1]}}\n"
    (from_file,) = load_rules(write(text))
    (from_list,) = load_rules(yaml.safe_load(text))
    assert from_list.where == "rules[0]"
    assert from_list.place("replace.kwargs.x").text == "rules[0].replace.kwargs.x"
    for field in ("index", "match", "class_path", "kwargs", "recursive", "expect"):
        assert getattr(from_list, field) == getattr(from_file, field)


def test_a_small_anchor_is_expanded(write: Write) -> None:
    text = f"rules:\n- match: &m {{name: a}}\n  {KEEP}\n- match: *m\n  {KEEP}\n"
    first, second = load_rules(write(text))
    assert second.match == first.match


def test_a_utf8_byte_order_mark_is_no_part_of_the_text(write: Write) -> None:
    assert len(load_rules(write(b"\xef\xbb\xbf" + RULE.encode()))) == 1


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        (3, [range(3, 4)]),
        ("3", [range(3, 4)]),
        ("3-60", [range(3, 61)]),
        ("3-", [range(3, sys.maxsize)]),
        ("5-7, 0,2", [range(1), range(2, 3), range(5, 8)]),
        ([1, "3-4"], [range(1, 2), range(3, 5)]),
        ("4-4", [range(4, 5)]),
    ],
)
def test_layers_are_inclusive_ranges(value: Any, layers: list[range]) -> None:
    assert parse_layers(value) == tuple(layers)


@settings(deadline=None)  # machines are busy
@given(st.sets(st.integers(0, 200), min_size=1))
def test_layers_hold_exactly_the_numbers_written(numbers: set[int]) -> None:
    ranges = parse_layers(",".join(map(str, numbers)))
    assert {number for number in range(250) if any(number in part for part in ranges)} == numbers


# Variables


def test_a_value_that_is_one_reference_keeps_its_type(write: Write) -> None:
    (rule,) = load_rules(
        write(
            r"""
vars: {threads: 4, last: 60, gpu: {id: 1, names: [x, y]}, part: experts}
rules:
  - match: {name: '\.${part}$', layers: '0-${last}'}
    replace:
      class: a.B
      kwargs: {threads: '${threads}', device: 'cuda:${gpu.id}', y: '${gpu.names.1}', all: '${gpu}'}
    expect: ${threads}
"""
        )
    )
    assert rule.match.name is not None
    assert rule.match.name.pattern == r"\.experts$"
    assert rule.match.layers == (range(61),)
    assert rule.kwargs == {
        "threads": 4,
        "device": "cuda:1",
        "y": "y",
        "all": {"id": 1, "names": ["x", "y"]},
    }
    assert rule.expect == 4


VARIABLES = """
vars: {threads: 4, double: '${threads}', gpu: {id: 0, kind: big}}
rules:
- match: {name: a}
  replace: {class: a.B, kwargs: {t: '${double}', gpu: '${gpu}'}}
"""


@pytest.mark.parametrize(
    "overrides", [["threads=8", "gpu.id=1"], {"threads": 8, "gpu": {"id": 1}}], ids=["list", "dict"]
)
def test_overrides_replace_variables_and_what_depends_on_them(write: Write, overrides: Any) -> None:
    (rule,) = load_rules(write(VARIABLES), overrides=overrides)
    assert rule.kwargs == {"t": 8, "gpu": {"id": 1, "kind": "big"}}


def test_an_override_must_name_a_variable(write: Write) -> None:
    assert error_of(write(VARIABLES), overrides=["thread=8", "gpu.ids=1", "threads"]) == (
        "override thread=8: no such variable (variables: threads, double, gpu)\n"
        "  nearest: threads\n"
        "override gpu.ids=1: no such variable (variables: threads, double, gpu)\n"
        "  nearest: gpu\n"
        "override threads: expected name=value, such as threads=8"
    )
    assert error_of(
        [{"match": {"name": "a"}, "replace": {"class": "default"}}], overrides=["a=1"]
    ) == ("override a=1: no such variable (there are no variables)")


@pytest.mark.parametrize("text", ["threads=[", "threads=!!python/object/apply:os.getcwd []", "=8="])
def test_an_override_that_is_no_value_is_an_error(write: Write, text: str) -> None:
    assert error_of(write(VARIABLES), overrides=[text]).startswith(f"override {text}: ")


def test_overrides_are_not_one_string(write: Write) -> None:
    with pytest.raises(TypeError, match="overrides must be a mapping or a list of strings"):
        load_rules(write(VARIABLES), overrides="threads=8")


def test_a_variable_without_a_value_must_be_overridden(write: Write) -> None:
    name = write("vars: {gpu: '???'}\nrules:\n" + RULE.replace("name: a", "name: '${gpu}'"))
    assert error_of(name) == "rules.yaml:1: vars.gpu: has no value; override it: gpu=..."
    (rule,) = load_rules(name, overrides={"gpu": "x"})
    assert str(rule.match) == "name 'x'"


def test_the_environment_is_out_of_reach(write: Write) -> None:
    assert error_of(write("vars: {h: '${oc.env:HOME}'}\nrules:\n" + RULE)) == (
        "rules.yaml:1: vars.h: ${oc.env:HOME} is refused: only ${name} and ${name.part} are "
        "replaced, so that a rule file can't read the environment of who runs it"
    )
    for text in ("${oc.env:HOME}", "${${x}}", "\\${x}", "${x", "${}", "${a:b}", "${x[0]}"):
        error = error_of([{"match": {"name": text}, "replace": {"class": "default"}}])
        assert error.startswith("rules[0].match.name: ")
        assert "is refused: only ${name}" in error


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ("{a: '${b}'}", "a: ${b}: no such variable (variables: a)"),
        ("{a: 'x${a}'}", "a: variables that need one another: a -> a"),
        (
            "{a: '${b}', b: ['${c}'], c: '${a}'}",
            "c: variables that need one another: a -> b -> c -> a",
        ),
        ("{a: {x: 1}, b: '${a.y}'}", "b: ${a.y}: a has no 'y'"),
        ("{a: [1], b: '${a.1}'}", "b: ${a.1}: a has no '1'"),
        ("{a: [1], b: 'x${a}'}", "b: ${a} is a list, which can't stand inside a string"),
        ("{a: null, b: 'x${a}'}", "b: ${a} is nothing, which can't stand inside a string"),
        ("{a-b: 1}", "a-b: a variable's name is made of letters, digits and _"),
        ("{7: 1}", "7: a variable's name is made of letters, digits and _"),
    ],
)
def test_bad_variable(write: Write, variables: str, error: str) -> None:
    assert error_of(write(f"vars: {variables}\nrules:\n{RULE}")) == f"rules.yaml:1: vars.{error}"


def test_a_broken_variable_is_reported_once_where_it_is_defined(write: Write) -> None:
    text = "vars: {a: '${a}'}\nrules:\n" + RULE.replace("name: a", "layers: '${a}', name: '${a}'")
    assert error_of(write(text)) == "rules.yaml:1: vars.a: variables that need one another: a -> a"


def test_a_long_chain_of_variables_is_an_error_and_no_recursion(write: Write) -> None:
    chain = ", ".join(f"v{n}: '${{v{n + 1}}}'" for n in range(400))
    error = error_of(write(f"vars: {{{chain}, v400: 1}}\nrules:\n{RULE}"))
    assert "a chain of more than 50 variables" in error


# Includes


def test_included_rules_come_after_and_their_variables_give_way(write: Write) -> None:
    write(
        "vars: {n: 1, m: 1}\nrules:\n" + RULE.replace("name: a", "name: 'base${n}${m}'"),
        "sub/base.yaml",
    )
    write(
        "include: [base.yaml]\nvars: {n: 2}\nrules:\n" + RULE.replace("name: a", "name: mid"),
        "sub/mid.yaml",
    )
    name = write("include: sub/mid.yaml\nrules:\n" + RULE.replace("name: a", "name: 'top${m}'"))
    rules = load_rules(name)
    assert [str(rule) for rule in rules] == [
        "rule 1 (rules.yaml:3)",
        "rule 2 (sub/mid.yaml:4)",
        "rule 3 (sub/base.yaml:3)",
    ]
    assert [str(rule.match) for rule in rules] == ["name 'top1'", "name 'mid'", "name 'base21'"]


def test_a_file_that_is_included_twice_is_read_once(write: Write) -> None:
    write(RULE, "base.yaml")
    write("include: base.yaml", "one.yaml")
    write("include: ./base.yaml", "two.yaml")
    assert len(load_rules(write("include: [one.yaml, two.yaml]"))) == 1


def test_a_shipped_file_is_found_by_name_from_anywhere(write: Write) -> None:
    assert "tiny-cpu-int8" in shipped_rules()
    rule = load_rules(write("include: tiny-cpu-int8"), overrides=["threads=2"])[0]
    assert rule.where == "tiny-cpu-int8.yaml:8"
    assert rule.kwargs == {"weight": "int8", "threads": 2, "cache_format": "int8"}
    operator = "ktransformers.operators.decoder_layer.CpuDecoderLayer"
    assert load_rules("tiny-cpu-int8.yaml")[0].class_path == operator


def test_a_file_of_that_name_goes_before_a_shipped_one(write: Write) -> None:
    (rule,) = load_rules(write(RULE, "tiny-cpu-int8.yaml"))
    assert str(rule.match) == "name 'a'"


@pytest.mark.parametrize("name", shipped_rules())
def test_shipped_file_loads(name: str) -> None:
    assert load_rules(name)


def test_includes_that_go_in_circles_are_an_error(write: Write) -> None:
    write("include: rules.yaml\nrules:\n" + RULE, "other.yaml")
    assert error_of(write("include: other.yaml")) == (
        "other.yaml:1: include: files that include one another: "
        "rules.yaml -> other.yaml -> rules.yaml"
    )


def test_includes_nest_eight_deep(write: Write) -> None:
    for depth in range(9):
        write(f"include: f{depth + 1}.yaml\nrules:\n" + RULE, f"f{depth}.yaml")
    write(RULE, "f9.yaml")
    assert len(load_rules("f2.yaml")) == 8
    chain = " -> ".join(f"f{depth}.yaml" for depth in range(1, 10))
    error = f"f8.yaml:1: include: included more than 8 deep: {chain}"
    assert error_of("f1.yaml") == error


def test_an_include_that_is_not_there_is_an_error_on_its_line(write: Write) -> None:
    shipped = ", ".join(shipped_rules())
    assert error_of(write("rules: []\ninclude:\n- 3\n- tiny-cpu-in8\n")) == (
        "rules.yaml:3: include[0]: expected a string, found 3\n"
        f"rules.yaml:4: include[1]: 'tiny-cpu-in8': no such rule file (shipped: {shipped})\n"
        "  nearest: tiny-cpu-int8"
    )


def test_a_missing_file_names_the_shipped_ones(write: Write) -> None:
    write(RULE)
    shipped = ", ".join(shipped_rules())
    assert error_of("rule.yaml") == f"rule.yaml: no such rule file (shipped: {shipped})"
    assert (
        error_of(Path("deepseek-v3-cpu-in8"))
        .partition("\n  nearest: ")[2]
        .startswith("deepseek-v3-cpu-int8")
    )
    assert error_of(".").startswith(".: no such rule file")
    assert "no such rule file" in error_of("x" * 5000)


# Errors of a rule, of which all come together


def test_all_errors_of_all_rules_come_together_in_the_order_of_lines(write: Write) -> None:
    text = r"""
rules:
  - match: {name: 'ab[', layers: 5-3}
    replce: {class: default}
  - match: {}
    replace:
      class: CpuExperts
      kwargs: {threads: '${n}'}
    expect: 0
    recursive: 1
  - 3
"""
    assert error_of(write(text)) == (
        "rules.yaml:3: missing key replace (expected match, replace, recursive, expect)\n"
        "rules.yaml:3: match.name: bad regex 'ab[': unterminated character set at position 3\n"
        "rules.yaml:3: match.layers: '5-3' runs backward; write '3-5'\n"
        "rules.yaml:4: replce: unknown key (expected match, replace, recursive, expect)\n"
        "  nearest: replace\n"
        "rules.yaml:5: match: expected at least one of name, class, layers\n"
        "rules.yaml:7: replace.class: expected default, or an import path such as "
        "package.module.Class, found 'CpuExperts'\n"
        "rules.yaml:8: replace.kwargs.threads: ${n}: no such variable (there are no variables)\n"
        "rules.yaml:9: expect: expected a number of modules above 0, or any, found 0\n"
        "rules.yaml:10: recursive: expected true or false, found 1\n"
        "rules.yaml:11: expected a mapping, found 3"
    )


def test_python_rules_name_the_index(write: Write) -> None:
    rules: list[Any] = [
        {"match": {"name": "a"}, "replace": {"class": "default"}},
        {"match": {"name": "("}, "replace": {"clas": "x.y"}, 3: 4},
        7,
    ]
    assert error_of(rules) == (
        "rules[1].3: unknown key (expected match, replace, recursive, expect)\n"
        "rules[1].replace.clas: unknown key (expected class, kwargs)\n"
        "  nearest: class\n"
        "rules[1].replace: missing key class (expected class, kwargs)\n"
        "rules[1].match.name: bad regex '(': missing ) at position 1\n"
        "rules[2]: expected a mapping, found 7"
    )
    assert error_of([]) == "rules: no rules"


def test_python_rules_that_hold_themselves_are_an_error() -> None:
    kwargs: dict[str, Any] = {}
    kwargs["again"] = kwargs
    rule = {"match": {"name": "a"}, "replace": {"class": "a.B", "kwargs": kwargs}}
    assert error_of([rule]) == "rules[0]: nested more than 20 deep"


def test_a_single_dict_is_no_list_of_rules() -> None:
    with pytest.raises(TypeError, match="rules must be a path or a list of dicts, found a mapping"):
        load_rules({"rules": []})  # type: ignore[arg-type]


LAYERS = "expected layers such as 3, '3-60', '3-' or '0,2,5-7', found"


@pytest.mark.parametrize(
    ("match", "error"),
    [
        ("name: 3", "name: expected a string, found 3"),
        ("name: ''", "name: expected a regex of 1 to 1,000 characters, found 0"),
        ("name: " + "a" * 1001, "name: expected a regex of 1 to 1,000 characters, found 1,001"),
        ("name: '*a'", "name: bad regex '*a': nothing to repeat at position 0"),
        ("name: " + "(" * 500 + ")" * 500, f"name: bad regex '{'(' * 77}...': nested too deeply"),
        ("class: [a]", "class: expected a string, found a list"),
        ("class: a..b", "class: 'a..b' is neither an import path nor the name of a class"),
        ("class: ../x", "class: '../x' is neither an import path nor the name of a class"),
        ("layers: -1", f"layers: {LAYERS} -1"),
        ("layers: 1.5", f"layers: {LAYERS} 1.5"),
        ("layers: true", f"layers: {LAYERS} true"),
        ("layers: a", f"layers: {LAYERS} 'a'"),
        ("layers: ''", f"layers: {LAYERS} ''"),
        ("layers: '1,,2'", f"layers: {LAYERS} ''"),
        ("layers: {a: 1}", f"layers: {LAYERS} a mapping"),
        ("layers: []", "layers: expected layers, found an empty list"),
        ("layers: '0-5,3'", "layers: 0-5 and 3 overlap"),
        ("layers: '5-7,0-5'", "layers: 0-5 and 5-7 overlap"),
        ("layers: [3-, 3-]", "layers: 3- and 3- overlap"),
    ],
)
def test_bad_match(write: Write, match: str, error: str) -> None:
    assert error_of(write(f"- match: {{{match}}}\n  {KEEP}")) == f"rules.yaml:1: match.{error}"


EXPECTED_CLASS = "replace.class: expected default, or an import path such as package.module.Class"


@pytest.mark.parametrize(
    ("rest", "error"),
    [
        ("replace: default", "replace: expected a mapping, found 'default'"),
        ("replace: {kwargs: {}}", "replace: missing key class (expected class, kwargs)"),
        ("replace: {class: 3}", "replace.class: expected a string, found 3"),
        ("replace: {class: os}", f"{EXPECTED_CLASS}, found 'os'"),
        ("replace: {class: .a}", f"{EXPECTED_CLASS}, found '.a'"),
        ("replace: {class: a.B, kwargs: }", "replace.kwargs: expected a mapping, found nothing"),
        (
            "replace: {class: a.B, kwargs: {3: 4}}",
            "replace.kwargs.3: the name of a kwarg is a string",
        ),
        (
            "replace: {class: default, kwargs: {weight: int8}}",
            "replace.kwargs.weight: class: default keeps the module and takes device alone",
        ),
        (f"{KEEP}\n  recursive: 'no'", "recursive: expected true or false, found 'no'"),
        (
            f"{KEEP}\n  expect: all",
            "expect: expected a number of modules above 0, or any, found 'all'",
        ),
        (
            f"{KEEP}\n  expect: true",
            "expect: expected a number of modules above 0, or any, found true",
        ),
        (f"{KEEP}\n  expect: -3", "expect: expected a number of modules above 0, or any, found -3"),
    ],
)
def test_bad_rule(write: Write, rest: str, error: str) -> None:
    line = 2 + rest.count("\n")
    assert error_of(write(f"- match: {{name: a}}\n  {rest}")) == f"rules.yaml:{line}: {error}"


# Errors of a file


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "rules.yaml: empty file; expected rules"),
        ("# rules\n", "rules.yaml: empty file; expected rules"),
        ("---\n", "rules.yaml: empty file; expected rules"),
        ("[]", "rules.yaml: no rules"),
        ("rules: []", "rules.yaml: no rules"),
        ("vars: {a: 1}", "rules.yaml:1: no rules (expected rules, include or both)"),
        ("rules:", "rules.yaml:1: rules: expected a list, found nothing"),
        ("rules: {a: 1}", "rules.yaml:1: rules: expected a list, found a mapping"),
        ("a", "rules.yaml:1: expected a mapping with rules, or a list of rules, found 'a'"),
        ("vars: 3\nrules:\n" + RULE, "rules.yaml:1: vars: expected a mapping, found 3"),
        (
            "rule: []\nrules:\n" + RULE,
            "rules.yaml:1: rule: unknown key (expected vars, include, rules)\n  nearest: rules",
        ),
        (
            "rules:\n" + RULE + "\nrules:\n" + RULE,
            "rules.yaml:5: duplicate key 'rules', first on line 1",
        ),
        (
            f"- match: {{name: a}}\n  match: {{name: b}}\n  {KEEP}",
            "rules.yaml:2: duplicate key 'match', first on line 1",
        ),
        (RULE + "---\n" + RULE, "rules.yaml:3: a second document; a rule file is one document"),
        (
            "rules: [",
            "rules.yaml:1: not YAML: while parsing a flow node: did not find expected node content",
        ),
        (
            "a: b: c",
            "rules.yaml:1: not YAML: mapping values are not allowed in this context",
        ),
        ("a\n\0b", "rules.yaml:2: not YAML: character 0 is refused"),
        (b"a: 1\nb: \xff\xfe\n", "rules.yaml:2: not UTF-8"),
        (RULE.encode("utf-16"), "rules.yaml:1: not UTF-8"),
        ("a: *b", "rules.yaml:1: alias 'b' stands before its anchor's end, or has none"),
        ("a: &b [*b]", "rules.yaml:1: alias 'b' stands before its anchor's end, or has none"),
        ("[" * 21 + "]" * 21, "rules.yaml:1: nested more than 20 deep"),
        (RULE + "- {? [a] : b}", None),
    ],
)
def test_bad_file(write: Write, content: str | bytes, error: str | None) -> None:
    if error is None:
        error = (
            "rules.yaml:3: a key must be a string, found a list\n"
            "rules.yaml:3: missing key match (expected match, replace, recursive, expect)\n"
            "rules.yaml:3: missing key replace (expected match, replace, recursive, expect)"
        )
    assert error_of(write(content)) == error


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!str", "!mine", "!"]
)
def test_a_tag_is_an_error(write: Write, tag: str) -> None:
    shown = tag.replace("!!", "tag:yaml.org,2002:")
    for value in ("echo", "[echo]", "{echo: 1}"):
        assert error_of(write(f"vars:\n  a: {tag} {value}\nrules:\n{RULE}")) == (
            f"rules.yaml:2: tag '{shown}' is not allowed; a rule file holds plain values"
        )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, "a boolean") for text in ("on", "off", "yes", "No", "ON")),
        *((text, "a number") for text in ("010", "1_000", "1:30", "0b11", "1_0.5", "9" * 19)),
        ("2026-01-31", "a date"),
        ("<<", "a merge key"),
    ],
)
def test_a_word_that_yaml_1_1_and_1_2_read_differently_must_be_quoted(
    write: Write, text: str, kind: str
) -> None:
    hint = "quote it, or write true or false" if kind == "a boolean" else "quote it"
    assert error_of(write(f"vars: {{a: {text}}}\nrules:\n{RULE}")) == (
        f"rules.yaml:1: '{text}' is {kind} in YAML 1.1 and a string in YAML 1.2: {hint}"
    )
    assert len(load_rules(write(f"vars: {{a: '{text}'}}\nrules:\n{RULE}"))) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("~", None),
        ("0", 0),
        ("-3", -3),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("cuda:0", "cuda:0"),
        ("3-60", "3-60"),
        ("'1'", "1"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    problems = Problems()
    node = parse_yaml(f"- {text}\n", Source(0, "x"), problems)
    assert node is not None
    assert not problems
    (read,) = plain(node)
    assert (read, type(read)) == (value, type(value))


# PyYAML, of YAML 1.1, writes text such as 0E0 or 1.5e3 without quotes; in YAML 1.2 it is a number.
EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(string.printable, max_size=8).filter(lambda text: not EXPONENT.fullmatch(text)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)  # machines are busy
@given(VALUES)
def test_what_pyyaml_writes_is_read_back(value: Any) -> None:
    problems = Problems()
    node = parse_yaml(yaml.safe_dump([value]), Source(0, "x"), problems)
    problems.check()
    assert node is not None
    assert plain(node) == [value]


@settings(deadline=None)  # machines are busy
@given(st.text(max_size=60) | st.text("[]{}:,-&*!?|>'\"# \n\tab1", max_size=60))
def test_any_text_is_rules_or_a_rule_error(text: str) -> None:
    problems = Problems()
    node = parse_yaml(text, Source(0, "x"), problems)
    assert problems or node is not None


@settings(deadline=None)  # machines are busy
@given(st.text(max_size=30) | st.text("([{}])*+?|\\^$.-<>=!:Paxyd0,", max_size=30))
def test_any_pattern_is_a_rule_or_a_rule_error(pattern: str) -> None:
    rule = {"match": {"name": pattern}, "replace": {"class": "default"}}
    with contextlib.suppress(RuleError):
        load_rules([rule])


def test_a_hundred_errors_are_enough(write: Write) -> None:
    error = error_of(write("rules:\n" + "- 3\n" * 150))
    assert len(error.splitlines()) == 101
    assert error.endswith("\nstopped after 100 errors")


def test_a_file_that_may_not_be_read_is_an_error(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(RULE)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert error_of(name) == "rules.yaml: can't be read: Permission denied"


def test_reading_rules_imports_neither_torch_nor_an_operator() -> None:
    code = (
        "import sys; from ktransformers.rules import load_rules; load_rules('tiny-cpu-int8');"
        "print([m for m in sys.modules if m in ('torch', 'transformers') or 'operators' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
