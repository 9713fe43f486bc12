"""What benchmarks make of their measurements; no test here looks at how long anything takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import results
import target_rows
from limits import Measured, Work, measure, quartiles, timed_calls
from results import Row, emit, last, markdown, summary


@dataclass
class PretendedMeter:
    """A machine that reads 10 bytes and does 100 operations a second, at its best."""

    bandwidths: list[float] = field(default_factory=lambda: [10.0, 8.0])
    calls: int = 0

    def bandwidth(self) -> float:
        self.calls += 1
        return self.bandwidths[self.calls % 2]

    def peak(self) -> float:
        return 100.0


def work(tokens: int, seconds: list[float], *, nbytes: float = 20, operations: float = 50) -> Work:
    meter: Any = PretendedMeter()
    timed: Callable[[float], list[float]] = lambda _: list(seconds)  # noqa: E731
    return Work("avx2", tokens, nbytes, operations, timed, meter)


def test_a_call_is_held_to_the_better_of_two_measurements_of_its_limit() -> None:
    (result,) = measure([work(1, [4.0])], rounds=2)
    assert result.bandwidths == [10, 10]
    assert result.bandwidth_shares() == [0.5, 0.5]  # 20 bytes at 10 a second, in 4 seconds
    assert result.peak_shares() == [0.125, 0.125]
    assert result.shares() == [0.5, 0.5]


def test_the_limit_of_a_call_is_the_slower_of_both() -> None:
    (result,) = measure([work(64, [10.0], operations=800)], rounds=1)
    assert result.shares() == result.peak_shares() == [0.8]


def test_the_first_round_does_not_count_and_leaves_out_large_calls() -> None:
    done: list[int] = []

    def noting(tokens: int) -> Work:
        meter: Any = PretendedMeter()

        def seconds(_: float) -> list[float]:
            done.append(tokens)
            return [1.0]

        return Work("avx2", tokens, 1, 1, seconds, meter)

    small, large = measure([noting(1), noting(1024)], rounds=2)
    assert done == [1, 1, 1024, 1, 1024]
    assert len(small.seconds) == len(large.seconds) == 2


def test_calls_are_numbered_and_made_at_least_once() -> None:
    numbers: list[int] = []
    assert len(timed_calls(numbers.append)(0.0)) == 1
    assert len(timed_calls(numbers.append)(1e-4)) == len(numbers) - 1
    assert numbers == [0, *range(len(numbers) - 1)]


def test_quartiles_of_one_value_are_that_value() -> None:
    assert quartiles([3.0]) == (3, 3, 3)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)


def row(tokens: int, seconds: float, isa: str = "avx2", operations: float = 50) -> Row:
    result = Measured(work(tokens, [seconds], operations=operations))
    result.seconds.append(seconds)
    result.medians.append(seconds)
    result.bandwidths.append(10.0)
    result.peaks.append(100.0)
    made = Row.of(result)
    return made if isa == "avx2" else Row(**{**{n: getattr(made, n) for n in ROW}, "isa": isa})


ROW = tuple(Row.__dataclass_fields__)


def test_the_summary_names_what_targets_ask_for() -> None:
    rows = [row(1, 2.5), row(4, 4.0), row(64, 2.0), row(256, 4.0, operations=320)]
    other = row(1, 1000.0, isa="portable")
    assert summary([*rows, other]) == {
        "decode_share": 0.8,
        "middle_share": 0.5,
        "prefill_256_share": 0.8,
        "limit_256_share": 0.8,
    }


def test_every_share_that_is_a_target_is_in_the_summary_of_an_ordinary_run() -> None:
    rows = [row(tokens, 1.0) for tokens in (1, 4, 16, 64, 256, 1024)]
    assert target_rows.SHARES.keys() <= summary(rows).keys()


def test_a_row_has_rates_of_its_median() -> None:
    cells = row(4, 2.0).cells()
    assert cells[:5] == ["avx2", "4", "2e+03 (2e+03 to 2e+03)", "2", "0.0"]
    assert cells[5] == "100%"


def test_a_table_is_markdown_and_aligned() -> None:
    assert markdown(("a", "long"), [["xyz", "1"]]) == (
        "|   a | long |\n| --: | ---: |\n| xyz |    1 |"
    )


def test_figures_are_kept_with_machine_and_commit_and_the_newest_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    assert last("it") is None
    emit("it", {"ratio": 1.23456789}, save=False)
    assert last("it") is None
    emit("it", {"ratio": 2.0}, save=True)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == last("it")
    assert printed["ratio"] == 2
    assert {"machine", "commit", "date"} <= printed.keys()
    for machine, ratio, date in (("other", 3, "2999"), ("older", 4, "1999")):
        folder = tmp_path / "results" / machine
        folder.mkdir()
        (folder / "it.json").write_text(json.dumps({"ratio": ratio, "date": date}))
    assert last("it") == printed  # this machine's own comes first
    (tmp_path / "results" / results.machine_folder() / "it.json").unlink()
    found = last("it")
    assert found is not None
    assert found["ratio"] == 3
