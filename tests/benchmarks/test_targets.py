"""`make targets`: what holds, what does not, and what has no figure."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

import targets
from target_rows import TARGETS, Target


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "command.py"
    path.write_text("print('talk')\nprint('{\"figure\": 2.5}')\n")
    return str(path)


@pytest.mark.parametrize(
    ("figure", "bounds", "outcome", "verdict"),
    [
        ("figure", {"at_least": 2.5}, 0, "yes"),
        ("figure", {"at_least": 2.6}, 1, "NO"),
        ("figure", {"at_most": 2.5}, 0, "yes"),
        ("figure", {"at_most": 2.4}, 1, "NO"),
        ("other", {"at_most": 9.0}, 2, "absent"),
    ],
)
def test_a_target_holds_or_not_or_has_no_figure(
    figure: str,
    bounds: dict[str, float],
    outcome: int,
    verdict: str,
    script: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(targets, "TARGETS", (Target("it", script, itemgetter(figure), **bounds),))
    assert targets.main() == outcome
    assert verdict in capsys.readouterr().out


PEER = Target("it", "command", itemgetter("ratio"), at_least=2)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (
            {"status": "absent", "reason": "not installed: make peers", "cannot": False},
            (2, "absent: not installed: make peers", "ERROR"),
        ),
        (
            {"status": "absent", "reason": "needs AVX-512", "cannot": True},
            (0, "absent: needs AVX-512", "-"),
        ),
        (
            {"status": "stale", "reason": "gone", "date": "2026-11-02T10:00", "ratio": 1.5},
            (0, "1.5, stale (2026-11-02: gone)", "then NO"),
        ),
        ({"status": "measured", "ratio": 1.5}, (1, "1.5", "NO")),
    ],
)
def test_a_peer_that_cannot_be_measured_is_named_with_the_reason(
    figures: dict[str, Any], expected: tuple[int, str, str]
) -> None:
    assert targets.judge(PEER, figures) == expected


def test_a_row_of_other_machines_alone_is_no_error() -> None:
    (row,) = (t for t in TARGETS if t.promise == "v3 int8: prefill 1,024, share of AMX tile peak")
    without = {"isa": "avx512_vnni", "prefill_1024_share": 0.8}
    assert targets.judge(row, without)[:2] == (0, "absent: this machine has no AMX (avx512_vnni)")
    assert targets.judge(row, {**without, "isa": "amx_int8"}) == (0, "0.8", "yes")


def test_rows_have_names_of_their_own_and_commands_that_exist() -> None:
    names = [target.promise for target in TARGETS]
    assert len(set(names)) == len(names)
    for target in TARGETS:
        assert (targets.ROOT / target.command.split()[0]).exists()


def test_a_command_that_fails_leaves_its_targets_without_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("print('{\"figure\": 1}')\nraise SystemExit('no luck')\n")
    target = Target("it", str(tmp_path / "broken.py"), itemgetter("figure"), at_least=0)
    monkeypatch.setattr(targets, "TARGETS", (target,))
    assert targets.main() == 2
    assert "no luck" in capsys.readouterr().err
