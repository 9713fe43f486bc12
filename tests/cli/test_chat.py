"""A conversation: from a pipe, and in a terminal with its keys."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import GREEDY, PATIENCE_S, call


def test_exit_and_the_end_of_input_leave_a_chat(folder: Path, rule_file: Path) -> None:
    for stdin in ("/exit\nnever asked\n", ""):
        outcome = call("chat", folder, "--rules", rule_file, stdin=stdin)
        assert outcome.code == 0
        assert "tok/s" not in outcome.err


def test_a_chat_remembers_until_it_is_reset(folder: Path, rule_file: Path) -> None:
    stdin = "hello\nhello\n/reset\nhello\n"
    outcome = call("chat", folder, "--rules", rule_file, *GREEDY, stdin=stdin)
    first, second, third = re.findall(r"\[prefill ([\d of]+) tokens", outcome.err)
    assert first == "24"
    new, prompt = map(int, second.split(" of "))
    assert prompt - new >= 24  # and of the answer what its text gives back as the same tokens
    assert new >= len("\nuser: hello\nassistant: ")
    # /reset forgets the conversation, and what the prompts have in common is still in the cache.
    assert third == "1 of 24"


def test_an_answer_ends_before_a_stop_text(folder: Path, rule_file: Path) -> None:
    chat: list[str | Path] = ["chat", folder, "--rules", rule_file, *GREEDY]
    whole = call(*chat, stdin="hello\n").out
    stop = whole[4]
    outcome = call(*chat, "--stop", stop, "--repetition-penalty", "1", stdin="hello\n")
    assert outcome.out.startswith(whole.partition(stop)[0] + "\n")
    assert stop not in outcome.out.rstrip("\n")


def test_a_chat_is_held_in_the_cache_that_was_asked_for(folder: Path, rule_file: Path) -> None:
    options = ["--cache-lens", "40", "--cache-format", "int8", "--chunk-size", "8"]
    stdin = "hello\nhello\n"
    outcome = call("chat", folder, "--rules", rule_file, *GREEDY, *options, stdin=stdin)
    assert outcome.code == 0
    assert re.search(
        r"the prompt is \d+ tokens, and the cache 40 with the answer; shorten it, or /reset",
        outcome.err,
    )


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, command: list[str]):
        in_a_terminal = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", in_a_terminal, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TERM": "dumb"},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def send(self, text: str) -> None:
        self.stdin.write(text.encode())
        self.stdin.flush()

    def interrupt(self) -> None:
        """Press Ctrl-C once the command waits for a key, as a person would.

        It also empties the terminal's queue of keys. Readline, told of a key that is gone when it
        looks, waits for the next one and hears no signal until it comes; and a signal that comes
        just before it waits is lost on it too.
        """
        parent = self.process.pid
        child = Path(f"/proc/{parent}/task/{parent}/children").read_text().strip()
        end = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "it never waits for a key"
            time.sleep(0.01)
        self.send("\x03")

    def until(self, end: str | None) -> str:
        """Return what is shown up to and with `end`; None means the end of the process."""
        shown = b""
        while end is None or end.encode() not in shown:
            ready, _, _ = select.select([self.stdout], [], [], PATIENCE_S)
            assert ready, f"nothing came after {shown!r}, waiting for {end!r}"
            piece = os.read(self.stdout.fileno(), 1 if end is not None else 4096)
            if not piece:
                assert end is None, f"it ended with {shown!r}, waiting for {end!r}"
                break
            shown += piece
        text = shown.decode(errors="replace").replace("\r\n", "\n")
        return re.sub(r"\x1b\[\d*m", "", text)  # colours


@pytest.fixture(scope="module")
def conversation(folder: Path, rule_file: Path) -> dict[str, str]:
    """Hold one conversation in a terminal; return what each step showed."""
    options = ["--temperature", "0", "--max-new-tokens", "220"]
    command = ["chat", str(folder), "--rules", str(rule_file), *options]
    terminal = Terminal([sys.executable, "-m", "ktransformers", *command])
    try:
        shown = {"loaded": terminal.until(">>> ")}
        terminal.send("hello\r")
        shown["answer"] = terminal.until(">>> ")
        terminal.send("hello\r")
        shown["too long"] = terminal.until(">>> ")
        terminal.send("/forget\r")
        shown["unknown command"] = terminal.until(">>> ")
        terminal.send("/reset\r")
        terminal.until(">>> ")
        terminal.send("hello\r")
        terminal.until("hello")
        terminal.until("\n")
        os.read(terminal.stdout.fileno(), 1)  # the answer has begun
        terminal.send("\x03")
        shown["ended answer"] = terminal.until(">>> ")
        terminal.send("hel")
        terminal.until("hel")
        terminal.interrupt()
        shown["ended line"] = terminal.until(">>> ")
        terminal.interrupt()
        shown["left"] = terminal.until(None)
        shown["exit code"] = str(terminal.process.wait(PATIENCE_S))
    finally:
        terminal.process.kill()  # else a failure above would wait for a chat that waits for a key
        terminal.process.communicate()
    return shown


def test_an_answer_ends_with_its_speed(conversation: dict[str, str]) -> None:
    assert re.search(
        r"\[prefill 24 tokens, [\d,.]+ tok/s; decode 220 tokens, [\d,.]+ tok/s; "
        r"ended after 220 tokens\]\n>>> $",
        conversation["answer"],
    )


def test_a_conversation_that_grows_too_long_is_told_and_goes_on(
    conversation: dict[str, str],
) -> None:
    assert re.fullmatch(
        r"hello\nthe prompt is \d+ tokens, and the model's context 256 with the answer; "
        r"shorten it, or /reset\n>>> ",
        conversation["too long"],
    )


def test_an_unknown_command_is_not_sent_to_the_model(conversation: dict[str, str]) -> None:
    assert conversation["unknown command"] == (
        "/forget\n/forget: unknown command (expected /reset, /exit)\n>>> "
    )


def test_ctrl_c_ends_the_answer_and_not_the_chat(conversation: dict[str, str]) -> None:
    assert "; ended by Ctrl-C]\n>>> " in conversation["ended answer"]


def test_ctrl_c_at_the_prompt_ends_the_line_and_a_second_one_the_chat(
    conversation: dict[str, str],
) -> None:
    assert conversation["ended line"].endswith("(Ctrl-C again, Ctrl-D or /exit leaves)\n>>> ")
    assert conversation["exit code"] == "0"


def test_nothing_but_the_conversation_is_shown(conversation: dict[str, str]) -> None:
    assert conversation["loaded"] == (
        "/reset forgets the conversation, /exit leaves; Ctrl-C ends an answer\n>>> "
    )
    assert "Traceback" not in "".join(conversation.values())
