"""`make targets`: what holds, what does not, and what has no figure."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

import pytest

import targets
from targets import Target


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


def test_a_command_that_fails_leaves_its_targets_without_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("print('{\"figure\": 1}')\nraise SystemExit('no luck')\n")
    target = Target("it", str(tmp_path / "broken.py"), itemgetter("figure"), at_least=0)
    monkeypatch.setattr(targets, "TARGETS", (target,))
    assert targets.main() == 2
    assert "no luck" in capsys.readouterr().err
