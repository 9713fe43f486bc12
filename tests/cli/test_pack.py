"""`ktransformers pack`: what it says, and that what it packed is used."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import GREEDY, call, finished, start


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """Copy the model, so that what is packed beside it is this test's alone."""
    return Path(shutil.copytree(folder, tmp_path / "tiny"))


def generated(model: Path, rule_file: Path, *options: str | Path) -> Any:
    return call("generate", model, "hello", "--rules", rule_file, *GREEDY, *options)


def test_what_is_packed_is_used_from_then_on(model: Path, rule_file: Path) -> None:
    want = generated(model, rule_file).out
    packed = call("pack", model, "--rules", rule_file)
    assert (packed.code, packed.err) == (0, "")
    assert re.fullmatch(rf"{model}/packed: 2 operators packed; [\d.]+ MiB in all\n", packed.out)
    outcome = generated(model, rule_file, "--verbose")
    assert f" of 2 operators mapped from {model}/packed\n" in outcome.err
    assert outcome.out == want
    assert "packed cache" not in generated(model, rule_file, "--verbose", "--cache", "none").err


def test_a_cache_elsewhere_is_named(model: Path, rule_file: Path, tmp_path: Path) -> None:
    want = generated(model, rule_file).out
    call("pack", model, "--rules", rule_file, "--out", tmp_path / "cache")
    options = ("--cache", tmp_path / "cache", "--cache-mode", "copy")
    outcome = generated(model, rule_file, *options, "--verbose")
    assert f" of 2 operators copied from {tmp_path}/cache\n" in outcome.err
    assert outcome.out == want


def test_packing_again_says_what_was_there(model: Path, rule_file: Path) -> None:
    call("pack", model, "--rules", rule_file)
    again = call("pack", model, "--rules", rule_file)
    assert " 0 operators packed, 2 were there and whole; " in again.out
    file = model / "packed/model.layers.1.mlp.experts.safetensors"
    os.truncate(file, 4096)
    mended = call("pack", model, "--rules", rule_file)
    assert re.fullmatch(rf"{file}: 4,096 bytes, expected [\d,]+; packed again\n", mended.err)
    assert " 1 operators packed, 1 were there and whole; " in mended.out


def test_verify_reads_everything(model: Path, rule_file: Path) -> None:
    call("pack", model, "--rules", rule_file)
    sound = call("pack", "--verify", model / "packed")
    assert re.fullmatch(rf"{model}/packed: [\d.]+ MiB are as they were written\n", sound.out)
    file = model / "packed/model.layers.2.mlp.experts.safetensors"
    data = bytearray(file.read_bytes())
    data[5000] ^= 8
    file.write_bytes(data)
    damaged = call("pack", "--verify", model / "packed")
    assert (damaged.code, damaged.out) == (2, "")
    assert re.match(rf"{file}: checksum \w+, but \w+ when it was written: damaged\n", damaged.err)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "expected MODEL and --rules FILE to pack, or --verify DIR to check"),
        ("{model}", "expected MODEL and --rules FILE to pack, or --verify DIR to check"),
        ("--verify {model} --rules x", "--verify DIR takes no MODEL, --rules or --out"),
        (
            "--verify {model}",
            "{model}: no packed cache (there is no packed.json); make one: "
            "`ktransformers pack MODEL --rules FILE --out {model}`",
        ),
        (
            "{model} --rules {rules} --out {model}",
            "{model}: holds other things, such as chat_template.jinja; choose a folder of its own",
        ),
        ("{model} --rules {rules} --out {rules}/x", "{rules}/x: Not a directory"),
        ("{model} --rules nowhere", "nowhere: no such rule file"),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(
    line: str, message: str, model: Path, rule_file: Path
) -> None:
    places = {"model": model, "rules": rule_file}
    outcome = call("pack", *line.format(**places).split())
    assert outcome.err.startswith(message.format(**places))
    assert outcome.err.count("\n") == 1
    assert (outcome.code, outcome.out) == (2, "")


def test_a_cache_that_does_not_match_is_refused(model: Path, rule_file: Path) -> None:
    call("pack", model, "--rules", rule_file)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcome = generated(model, rule_file)
    assert outcome.code == 2
    assert "model.safetensors has other contents; delete the folder and pack again" in outcome.err
    assert "\n".join(outcome.err.splitlines()[1:]) == (
        f"{model}/packed was found beside the weights; cache=None (--cache none) ignores it"
    )


SLOW_OPERATOR = """
import os

from ktransformers.operators.experts import CpuExperts


class SlowExperts(CpuExperts):
    def load_weights(self, checkpoint):
        if self.site.layer == 2:
            os.write(int(os.environ["STARTED"]), b"!")
            while True:  # until a read finds that packing was stopped
                checkpoint.read(next(iter(self.weight_shapes())))
        super().load_weights(checkpoint)
"""


def test_ctrl_c_says_how_to_go_on_and_leaves_whole_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "slow_operator.py").write_text(SLOW_OPERATOR)
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "- {match: {name: 'mlp\\.experts$'}, replace: {class: slow_operator.SlowExperts}}"
    )
    started, tell = os.pipe()
    environment = {**os.environ, "STARTED": str(tell)}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    process = start("pack", model, "--rules", rules, env=environment, pass_fds=(tell,))
    os.close(tell)
    assert os.read(started, 1) == b"!"  # nothing, were the process to end before
    process.send_signal(signal.SIGINT)
    os.close(started)
    outcome = finished(process)
    assert (outcome.code, outcome.out) == (130, "")
    assert re.fullmatch(
        rf"interrupted\n{model}/packed: [01] of 2 operators are packed; the same command goes on "
        r"with the rest\n",
        outcome.err,
    )
    assert not list((model / "packed").glob("*.partial"))
