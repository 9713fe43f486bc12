"""The classic entry point, run as people run it: by its path, with its options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import PATIENCE_S, Outcome
from ktransformers.shipped import choose_rules
from shipped_files import MODELS
from tiny_models import random_model, v2_config

SCRIPT = Path(__file__).parents[2] / "ktransformers" / "local_chat.py"


def call(*args: object, stdin: str = "") -> Outcome:
    """Run the script from its repository."""
    process = subprocess.run(
        [sys.executable, str(SCRIPT.relative_to(SCRIPT.parents[1])), *map(str, args)],
        cwd=SCRIPT.parents[1],
        input=stdin,
        text=True,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return Outcome(process.returncode, process.stdout, process.stderr)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("hello\n")
    return path


def test_the_classic_command_line_answers_the_prompt_file(folder: Path, prompt_file: Path) -> None:
    options: dict[str, Any] = {
        "--model_path": folder,
        "--gguf_path": folder,
        "--prompt_file": prompt_file,
        "--cpu_infer": 2,
        "--cache_lens": 200,
        "--max_new_tokens": 5,
        "--chunk_size": 16,
        "--mode": "normal",
        "--device": "cpu",
    }
    outcome = call(*(part for option in options.items() for part in option))
    assert outcome.code == 0, outcome
    assert "rules: deepseek-v3-cpu-int8 (0.0 GiB of weights, " in outcome.err
    assert "[prefill 24 tokens, " in outcome.err
    assert "decode 5 tokens" in outcome.err


def test_an_empty_line_asks_the_prompt_file_and_others_are_asked_themselves(
    folder: Path, prompt_file: Path, rule_file: Path
) -> None:
    options = ["--optimize_config_path", rule_file, "--max_new_tokens", 5]
    files = ["--model_path", folder, "--prompt_file", prompt_file]
    outcome = call(*files, *options, stdin="\n/reset\nhello\n/reset\nhi\n")
    assert outcome.code == 0, outcome
    assert "rules: " not in outcome.err
    speeds = [line for line in outcome.err.splitlines() if "[prefill" in line]
    assert [line.split(" tokens")[0] for line in speeds] == [
        "[prefill 24",
        "[prefill 1 of 24",
        "[prefill 13 of 21",  # the beginning and the h of hello
    ]


def test_thinking_can_be_forced(folder: Path, prompt_file: Path, rule_file: Path) -> None:
    options = ["--optimize_config_path", rule_file, "--max_new_tokens", 1, "--force_think"]
    outcome = call("--model_path", folder, "--prompt_file", prompt_file, *options)
    assert outcome.code == 0, outcome
    assert outcome.out.lstrip().startswith("<think>\n")
    assert "[prefill 32 tokens" in outcome.err


def test_threads_and_cache_are_those_that_were_asked_for(
    folder: Path, prompt_file: Path, rule_file: Path
) -> None:
    files = ["--model_path", folder, "--prompt_file", prompt_file, "--verbose"]
    sizes = ["--cpu_infer", 2, "--cache_lens", 20, "--mode", "long_context"]
    outcome = call(*files, "--optimize_config_path", rule_file, *sizes)
    assert outcome.code == 0, outcome
    assert "threads=2" in outcome.err
    assert "the prompt is 24 tokens, and the cache 20 with the answer" in outcome.err


def test_sampling_can_be_chosen(folder: Path, prompt_file: Path, rule_file: Path) -> None:
    files = ["--model_path", folder, "--prompt_file", prompt_file]
    rules = ["--optimize_config_path", rule_file, "--max_new_tokens", 12, "--seed", 3]

    def answer(*options: object) -> str:
        outcome = call(*files, *rules, *options)
        assert outcome.code == 0, outcome
        return outcome.out

    likeliest = answer("--temperature", 0)
    cut_off = ["--top_p", 0.0, "--top_k", 1, "--min_p", 1.0]
    assert answer("--temperature", 1, *cut_off) == likeliest
    penalised = answer("--temperature", 0, "--repetition_penalty", 5, "--stop", likeliest[3])
    assert penalised != likeliest
    assert likeliest[3] not in penalised


def test_the_format_of_the_cache_can_be_chosen(
    folder: Path, prompt_file: Path, rule_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a GPU on the CPU would take fp8
    files = ["--model_path", folder, "--prompt_file", prompt_file]
    options = ["--optimize_config_path", rule_file, "--max_new_tokens", 1, "--cache_format"]
    assert call(*files, *options, "fp32").code == 0
    refused = call(*files, *options, "fp8")
    assert "fp8 latents are for GPUs: on the CPU take int8, bf16 or fp32" in refused.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--device", "cuda:0"], "--device cuda:0: rule files say what stands on which GPU; leave"),
        (["--gguf_path", "a.gguf"], "a.gguf: GGUF is not read yet; pass a folder of safetensors"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    ],
)
def test_what_can_not_be_done_is_one_sentence(
    folder: Path, options: list[str], reason: str
) -> None:
    outcome = call("--model_path", folder, *options)
    assert outcome.code == 2
    assert outcome.err.startswith(reason)
    assert "Traceback" not in outcome.err


def test_the_first_rules_whose_weights_fit_are_chosen(folder: Path, tmp_path: Path) -> None:
    assert choose_rules(folder, memory=10 << 20).rules == "deepseek-v3-cpu-int8"
    config = v2_config(num_hidden_layers=4, moe_intermediate_size=512, hidden_size=512)
    random_model(config).save_pretrained(tmp_path)
    enough = choose_rules(tmp_path, memory=10 << 30)
    assert enough.rules == "deepseek-v2-cpu-int8"
    too_few = choose_rules(tmp_path, memory=1 << 20)
    assert too_few.rules == "deepseek-v2-cpu-int4"
    assert too_few.reason.endswith("too few, but nothing smaller is shipped")


@pytest.mark.parametrize(
    ("model", "memory", "gpus", "rules"),
    [
        ("deepseek-v3", 400, [24, 24], "deepseek-v3-2x24gb-cpu-int4"),
        ("deepseek-v3", 800, [24, 24, 12], "deepseek-v3-2x24gb-cpu-int8"),
        ("deepseek-v3", 400, [12, 24], "deepseek-v3-1x12gb-cpu-int4"),
        ("deepseek-v3", 400, [8], "deepseek-v3-cpu-int4"),
        ("deepseek-v3", 300, [24], "deepseek-v3-cpu-int4"),  # which can be mapped
        ("deepseek-v2-lite", 400, [24, 24], "deepseek-v2-lite-1x12gb"),
        ("deepseek-v2-lite", 400, [], "deepseek-v2-cpu-int8"),
    ],
)
def test_rules_for_the_gpus_that_are_here_are_chosen_where_they_fit(
    tmp_path: Path, model: str, memory: int, gpus: list[int], rules: str
) -> None:
    MODELS[model].config.save_pretrained(tmp_path)
    cards = [int(size * 1.055e9) for size in gpus]  # what the driver shows of a card
    choice = choose_rules(tmp_path, memory=memory * 10**9, gpus=cards)
    assert choice.rules == rules
    assert ("cuda:0" in choice.reason) == ("gb" in rules)


def test_a_longer_context_finds_room_or_another_file(tmp_path: Path) -> None:
    MODELS["deepseek-v3"].config.save_pretrained(tmp_path)
    found = [
        choose_rules(tmp_path, 400 * 10**9, [int(24 * 1.055e9)], context).rules
        for context in (16384, 163840)
    ]
    assert found == ["deepseek-v3-1x24gb-cpu-int4", "deepseek-v3-1x12gb-cpu-int4"]


def test_a_model_without_shipped_rules_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    with pytest.raises(
        ValueError, match="no rule file comes with the package for model_type llama"
    ):
        choose_rules(tmp_path)
