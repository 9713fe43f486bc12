"""Rule files that mean harm end in an error, soon, in little memory, and run nothing.

One process reads them all. Each gets 5 s of processor time, so that a busy machine changes nothing:
a timer of the kernel then ends the process, even inside of C code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

READER = """
import json, signal, sys
import torch
from ktransformers.inject import plan
from ktransformers.rules import RuleError, load_rules
model = torch.nn.Module()
for _ in range(1000):
    model.add_module(f"a_rather_long_name_as_modules_have_them_{_}", torch.nn.ReLU())
for name in sys.argv[1:]:
    signal.setitimer(signal.ITIMER_PROF, 5)
    try:
        plan(model, load_rules(name))
        error = "none"
    except RuleError as caught:
        error = str(caught)
    signal.setitimer(signal.ITIMER_PROF, 0)
    # Not ru_maxrss: a process inherits that of the one that started it.
    with open("/proc/self/status") as status:
        (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps([name, error, peak]), flush=True)
"""

KEEP = "replace: {class: default}"
RULE = f"- match: {{name: a}}\n  {KEEP}\n"


def pattern(text: str) -> str:
    return f"- match: {{name: '{text}'}}\n  {KEEP}\n"


def calls(class_path: str, **kwargs: object) -> str:
    replace = json.dumps({"class": class_path, "kwargs": kwargs})
    return f"- match: {{name: a}}\n  replace: {replace}\n"


LAUGHS = "".join(
    f"  v{n}: &v{n} [{', '.join([f'*v{n - 1}'] * 9 if n else ['lol'] * 9)}]\n" for n in range(12)
)
DOUBLING = "".join(f"  v{n}: '${{v{n - 1}}}${{v{n - 1}}}'\n" for n in range(1, 45))
DOUBLING_LISTS = "".join(f"  v{n}: ['${{v{n - 1}}}', '${{v{n - 1}}}']\n" for n in range(1, 45))
MANY = ", ".join(f"v{n}: '${{w{n}}}'" for n in range(9_000))

TOO_LONG = "match.name: takes too long: all names together get 1 s"
NO_OPERATOR = "expected an Operator (a subclass of ktransformers.base.Operator)"

# Content, and what the error must hold.
FILES: dict[str, tuple[str, str]] = {
    "alias bomb": (
        f"vars:\n{LAUGHS}rules:\n{RULE}",
        "rules.yaml:6: more than 20,000 values, aliases expanded",
    ),
    "alias of itself": (
        f"vars: {{a: &a [*a]}}\nrules:\n{RULE}",
        "rules.yaml:1: alias 'a' stands before",
    ),
    "10 MB of rules": (RULE * 290_000, "rules.yaml: more than 1,000,000 bytes; not a rule file"),
    "1 MB of rules": (RULE * 20_000, "rules.yaml:4445: more than 20,000 values"),
    "1 MB of brackets": ("[" * 999_999, "rules.yaml:1: nested more than 20 deep"),
    "1 MB of dashes": ("- " * 499_999, "rules.yaml:1: nested more than 20 deep"),
    "1 MB of keys": ("? " * 499_999, "rules.yaml:1: nested more than 20 deep"),
    "1 MB of commas": ("[" + "a," * 499_990 + "]", "rules.yaml:1: more than 20,000 values"),
    "1 MB of one word": ("a" * 999_999, "rules.yaml:1: expected a mapping with rules"),
    "1 MB of one key": ("{" + "a" * 999_000 + ": 1}", "rules.yaml:1: "),
    "1 MB of quotes": ("'" * 999_999, "rules.yaml:1: not YAML: "),
    "1 MB of digits": (f"vars: {{a: {'9' * 999_000}}}\nrules:\n{RULE}", "rules.yaml:1: '9999"),
    "1 MB of anchors": ("&a " * 333_000, "rules.yaml:1: not YAML: "),
    "a long name of a kwarg": (calls("a.B", **{"k" * 900_000: 1}), "a key of more than 200"),
    "a long class path": (calls("a." * 400_000 + "B"), "rules.yaml:2: replace.class: expected def"),
    "a long alias": (f"[*{'a' * 900_000}]", "rules.yaml:1: alias 'aaaa"),
    "many errors": (f"vars: {{{MANY}}}\nrules:\n{RULE}", "rules.yaml:1: vars.v0: ${w0}: no such"),
    "one key many times": ("{" + "a: 1," * 9_000 + "}", "rules.yaml:1: duplicate key 'a'"),
    "doubling strings": (
        f"vars:\n  v0: abcdefgh\n{DOUBLING}rules:\n{RULE}",
        "rules.yaml:18: vars.v16: interpolation adds more than 1,000,000 characters and values",
    ),
    "doubling lists": (
        f"vars:\n  v0: [a]\n{DOUBLING_LISTS}rules:\n{RULE}",
        "rules.yaml:20: vars.v18: interpolation adds more than 1,000,000 characters and values",
    ),
    "braces": (f"vars: {{a: '{'${' * 300_000}'}}\nrules:\n{RULE}", "rules.yaml:1: vars.a: ${"),
    "python tag": (
        f"vars: {{a: !!python/object/apply:os.system ['touch ran']}}\nrules:\n{RULE}",
        "rules.yaml:1: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
    ),
    "python tag on top": (
        "!!python/object/new:os.system [touch ran]",
        "rules.yaml:1: tag 'tag:yaml.org,2002:python/object/new:os.system' is not allowed",
    ),
    "environment": (pattern("${oc.env:HOME}"), "rules.yaml:1: match.name: ${oc.env:HOME} is ref"),
    "os.system": (
        calls("os.system", command="touch ran"),
        f"rules.yaml:2: replace.class: os.system is a builtin_function_or_method; {NO_OPERATOR}",
    ),
    "subprocess.Popen": (
        calls("subprocess.Popen", args=["touch", "ran"]),
        f"rules.yaml:2: replace.class: subprocess.Popen is a class; {NO_OPERATOR}",
    ),
    "pathlib.Path.touch": (
        calls("pathlib.Path.touch", self="ran"),
        "rules.yaml:2: replace.class: no module pathlib.Path",
    ),
    "backtracking": (pattern(r"(.*){1,20}[^\w.]"), TOO_LONG),
    "slow on each name": ("".join([pattern(r"^(.*.*.*.*.*)(?<=Z)$")] * 40), TOO_LONG),
    "fuzzy regex": (pattern(r"(?b)(?:abcdefghijklmnopqrst){e<=12}(?<=Z)"), TOO_LONG),
    "repeats of repeats": (pattern("((a{1,1000}){1,1000}){1,1000}Z"), "rules.yaml:1: rule 1 match"),
    "parentheses": (pattern("(" * 500), "rules.yaml:1: match.name: bad regex '(((("),
    "a long regex": (pattern("(a|b)" * 9000), "rules.yaml:1: match.name: expected a regex of 1 to"),
    "layers without end": (
        f"- match: {{layers: '0-{'9' * 9000}'}}\n  {KEEP}\n",
        "rules.yaml:1: match.layers: expected layers such as",
    ),
    "include itself": (
        "include: rules.yaml",
        "rules.yaml:1: include: files that include one ano",
    ),
    "include a device": ("include: /dev/zero", "rules.yaml:1: include: '/dev/zero': no such rule"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int, bool]]:
    """Error, memory peak so far in KiB, and whether anything ran, by the name of the file."""
    folder = tmp_path_factory.mktemp("hostile")
    names = {}
    for name, (content, _) in FILES.items():
        path = folder / name.replace(" ", "_") / "rules.yaml"
        path.parent.mkdir()
        path.write_text(content)
        names[str(path)] = name
    done = subprocess.run(
        [sys.executable, "-c", READER, *names],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = {}
    for line in done.stdout.splitlines():
        path, error, peak = json.loads(line)
        results[names[path]] = (error.replace(path, "rules.yaml"), peak, (folder / "ran").exists())
    results["stderr"] = (done.stderr, 0, False)
    return results


@pytest.mark.parametrize("name", FILES)
def test_hostile_file_ends_in_an_error(
    name: str, outcomes: dict[str, tuple[str, int, bool]]
) -> None:
    assert name in outcomes, f"the file before it took more than 5 s: {outcomes['stderr'][0]}"
    error, peak, ran = outcomes[name]
    assert FILES[name][1] in error
    assert len(error) < 50_000
    assert peak < 1_000_000
    assert not ran


def test_a_file_that_never_ends_is_not_read(tmp_path: Path) -> None:
    code = "from ktransformers.rules import load_rules; load_rules('/dev/zero')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "/dev/zero: no such rule file" in done.stderr
