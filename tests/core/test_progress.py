"""The bar of bytes: silent for short work, on stderr for long, told of from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ktransformers import progress


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.byte_progress("Loading", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_long_work_shows_a_bar_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich draw without a terminal
    with progress.byte_progress("Loading", 1000) as advance:
        advance(250)
        advance(750)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Loading" in err


def test_many_threads_may_report_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    total = 0

    def count(_: object, __: object, advance: int) -> None:
        nonlocal total
        before = total
        total = before + advance

    monkeypatch.setattr("ktransformers.progress.Progress.update", count)
    with progress.byte_progress("Loading", 4000) as advance, ThreadPoolExecutor(4) as pool:
        list(pool.map(advance, [1] * 4000))
    assert total == 4000
