"""The command line, as its users meet it: what it says, where, and with which exit code."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from command_line import GREEDY, call, finished, start
from ktransformers.rules import shipped_rules

# What is quick


def test_no_argument_prints_help() -> None:
    outcome = call()
    assert outcome.out == call("--help").out
    assert outcome.code == 0


def test_help_teaches_every_verb_and_shows_an_example() -> None:
    out = call("--help").out
    verbs = ["chat", "generate", "explain", "plan", "pack", "rules"]
    assert [verb for verb in verbs if f"\n  {verb} " in out] == verbs
    assert "\n    ktransformers chat path/to/DeepSeek-V2-Lite --rules " in out


@pytest.mark.parametrize("verb", ["chat", "generate", "explain", "plan", "pack"])
def test_help_of_a_verb_shows_an_example(verb: str) -> None:
    assert f"\n  ktransformers {verb} " in call(verb, "--help").out


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["rules"], ["generate", "--help"], ["plan", "--help"]]
)
def test_what_needs_no_model_imports_no_torch(args: list[str]) -> None:
    code = (
        "import sys\n"
        "from ktransformers.cli import main\n"
        f"main({args!r}, standalone_mode=False)\n"
        "print({'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr == "set()\n"


def test_version_names_what_runs() -> None:
    from ktransformers import _native

    assert call("--version").out.endswith(
        f"torch {version('torch')}, transformers {version('transformers')}, "
        f"CPU kernels {_native.isa()}\n"
    )


def test_rules_lists_shipped_files_with_their_first_line() -> None:
    out = call("rules").out
    assert re.search(r"^tiny-cpu-int8 +examples/tiny-deepseek-v3, ", out, re.MULTILINE)


def test_a_pipe_that_is_closed_early_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("rules", stdout=write)
    os.close(write)
    outcome = finished(process)
    assert (outcome.code, outcome.err) == (141, "")


# Wrong calls


SHIPPED = f"shipped: {', '.join(shipped_rules())}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("explain {model} --rules nowhere", f"nowhere: no such rule file ({SHIPPED})"),
        (
            "explain /nowhere --rules {rules}",
            "/nowhere: no such folder, and no hub id (expected the form owner/name)",
        ),
        (
            "explain {rules} --rules {rules}",
            "{rules}: no folder with a config.json; pass a model's whole folder",
        ),
        (
            "explain {model} --rules {rules} --set thread=3",
            "override thread=3: no such variable (variables: threads)\n  nearest: threads",
        ),
        (
            "explain {model} --rules {rules} --set threads=0",
            "{rules}:4: CpuExperts at model.layers.1.mlp.experts (and 1 more): "
            "threads 0 is not 'auto' or a number from 1 to 1024",
        ),
        (
            "explain {llama} --rules {rules}",
            r"{rules}:4: rule 1 matches no module: name '\.mlp\.experts$'",
        ),
        (
            "generate {model} x --rules {rules} --prompt-file y",
            "two prompts: an argument and --prompt-file; give one of them",
        ),
        (
            "generate {model} --rules {rules} --prompt-file /nowhere",
            "/nowhere: No such file or directory",
        ),
        (
            "generate {model} --rules {rules} --prompt-file {latin1}",
            "{latin1}: not UTF-8 at byte 1",
        ),
        ("generate {model} '' --rules {rules}", "the prompt has no tokens; pass some text"),
        (
            f"generate {{model}} {'x' * 300} --rules {{rules}}",
            "the prompt is 300 tokens, and the model's context 256 with the answer; shorten it",
        ),
        (
            "generate {model} x --rules {rules} --temperature 0 --top-k 3",
            "--temperature 0 always takes the likeliest token: leave out top_k",
        ),
        (
            "generate {bare} x --rules {rules}",
            "{bare}: no tokenizer that can be read (--verbose shows why); expected tokenizer.json "
            "and tokenizer_config.json beside config.json",
        ),
        (
            "chat {plain} --rules {rules}",
            "{plain}: its tokenizer has no chat template; `ktransformers generate` needs none",
        ),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(
    line: str, message: str, places: dict[str, Path]
) -> None:
    outcome = call(*shlex.split(line.format(**places)))
    assert outcome.err.partition("\n  nearest: model")[0].rstrip("\n") == message.format(**places)
    assert outcome.out == ""
    assert outcome.code == 2


@pytest.fixture
def places(
    folder: Path, rule_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> dict[str, Path]:
    """Return what wrong calls refer to, by name."""
    names = ("bare", "plain", "llama")
    made = {name: tmp_path / name for name in names}
    config = (folder / "config.json").read_text()
    for path in made.values():
        path.mkdir()
        (path / "config.json").write_text(config)
    tokenizer.save_pretrained(made["plain"])
    (made["plain"] / "chat_template.jinja").unlink()
    (made["llama"] / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, '
        '"num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 32}'
    )
    made["latin1"] = tmp_path / "latin1.txt"
    made["latin1"].write_bytes(b"a\xe9")
    return {"model": folder, "rules": rule_file, **made}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("generate x", "--rules"),
        ("generate", "MODEL"),
        ("explain x --rules y --thread 3", "--thread"),
        ("explian", "explian"),
        ("generate x --rules y --temperature -1", "--temperature"),
        ("generate x --rules y --dtype int3", "int3"),
    ],
)
def test_a_wrong_option_is_named_and_help_pointed_to(line: str, found: str) -> None:
    outcome = call(*line.split())
    assert outcome.code == 2
    assert outcome.out == ""
    assert found in outcome.err
    assert "-h' for help" in outcome.err


def test_verbose_shows_where_an_error_comes_from(places: dict[str, Path]) -> None:
    outcome = call("generate", places["bare"], "x", "--rules", places["rules"], "--verbose")
    assert outcome.code == 2
    assert "Traceback (most recent call last)" in outcome.err


# explain


def test_explain_shows_every_rule_and_what_it_costs(folder: Path, rule_file: Path) -> None:
    outcome = call("explain", folder, "--rules", rule_file)
    [experts] = [line for line in outcome.out.splitlines() if "CpuExperts" in line]
    assert re.fullmatch(
        r" +experts +DeepseekV3Experts -> CpuExperts\(weight='int8', threads=1\) +[\d.]+ KiB +"
        rf"{re.escape(str(rule_file))}:4 *",
        experts,
    )
    assert re.search(r"\n +layers\.1-2 +DeepseekV3DecoderLayer +2 x [\d.]+ KiB", outcome.out)
    assert re.search(r"\nwith these rules +cpu +[\d.]+ KiB +[\d.]+ k +[\d.]+ KiB", outcome.out)
    assert (outcome.err, outcome.code) == ("", 0)


def test_explain_reads_no_weights(folder: Path, rule_file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert (
        call("explain", tmp_path, "--rules", rule_file).out
        == call("explain", folder, "--rules", rule_file).out
    )


# generate


def test_text_alone_goes_to_stdout(folder: Path, rule_file: Path) -> None:
    outcome = call("generate", folder, "hello", "--rules", rule_file, *GREEDY)
    assert outcome.code == 0
    assert outcome.out
    assert re.fullmatch(
        r"prefill 5 tokens, [\d,.]+ tok/s; decode 12 tokens, [\d,.]+ tok/s\n", outcome.err
    )


def test_a_prompt_comes_from_an_argument_a_file_or_stdin(
    folder: Path, rule_file: Path, tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("hello")
    common = ["generate", str(folder), "--rules", str(rule_file), *GREEDY]
    outputs = {
        call(*common, "hello").out,
        call(*common, "--prompt-file", prompt).out,
        call(*common, stdin="hello").out,
    }
    assert len(outputs) == 1


def test_a_seed_makes_sampling_repeatable(folder: Path, rule_file: Path) -> None:
    def sampled(seed: int) -> str:
        options = f"--temperature 1 --max-new-tokens 12 --seed {seed}".split()
        return call("generate", folder, "hello", "--rules", rule_file, *options).out

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)


def test_options_for_sampling_reach_the_loop(folder: Path, rule_file: Path) -> None:
    """Each alone would change what the seed gives; all but the likeliest token are cut off."""

    def answer(options: str, *more: str) -> str:
        line = f"--max-new-tokens 12 --seed 1 {options}".split()
        outcome = call("generate", folder, "hello", "--rules", rule_file, *line, *more)
        assert outcome.code == 0, outcome
        return outcome.out.removesuffix("\n")

    likeliest = answer("--temperature 0")
    for options in ("--top-k 1", "--top-p 0", "--min-p 1"):
        assert answer(f"--temperature 1 {options}") == likeliest
    assert answer("--temperature 0 --repetition-penalty 5") != likeliest
    stop = likeliest[3]
    assert answer("--temperature 0 --stop never", "--stop", stop) == likeliest.partition(stop)[0]


def test_an_override_reaches_the_operator(folder: Path, rule_file: Path) -> None:
    options = ["--set", "threads=2", "--verbose", *GREEDY]
    outcome = call("generate", folder, "hello", "--rules", rule_file, *options)
    assert "CpuExperts(weight=int8, threads=2)" in outcome.err
    assert outcome.code == 0


# Ctrl-C while a model loads

SLOW_OPERATOR = """
import os

from ktransformers.operators.experts import CpuExperts


class SlowExperts(CpuExperts):
    def load_weights(self, checkpoint):
        os.write(int(os.environ["STARTED"]), b"!")
        os.read(int(os.environ["GO_ON"]), 1)
        super().load_weights(checkpoint)
"""


def test_ctrl_c_while_loading_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "slow_operator.py").write_text(SLOW_OPERATOR)
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "- {match: {name: '1\\.mlp\\.experts$'}, replace: {class: slow_operator.SlowExperts}}"
    )
    started, tell = os.pipe()
    wait, go_on = os.pipe()
    environment = {**os.environ, "STARTED": str(tell), "GO_ON": str(wait)}
    environment["PYTHONPATH"] = str(tmp_path)
    command = ("generate", folder, "hello", "--rules", rules)
    process = start(*command, env=environment, pass_fds=(tell, wait))
    os.close(tell)
    os.close(wait)
    assert os.read(started, 1) == b"!"  # nothing, were the process to end before
    process.send_signal(signal.SIGINT)
    os.close(go_on)
    os.close(started)
    outcome = finished(process)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")
