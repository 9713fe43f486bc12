"""Jobs in parallel: results, errors, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from functools import partial

import pytest

from ktransformers.parallel import in_parallel

PATIENCE_S = 30  # for what happens at once, unless it never does


def test_results_come_in_the_order_of_the_jobs() -> None:
    turn = [threading.Event() for _ in range(3)]

    def job(index: int) -> int:  # the last one ends first
        if index < 2:
            assert turn[index + 1].wait(PATIENCE_S)
        turn[index].set()
        return index

    assert in_parallel([partial(job, index) for index in range(3)], 3) == [0, 1, 2]
    assert in_parallel([], 1) == []


def test_an_error_is_raised_while_others_run_and_stops_them() -> None:
    stopped = threading.Event()
    begun = []

    def fail() -> None:
        raise ValueError("no such tensor")

    def run() -> None:
        begun.append(True)
        assert stopped.wait(PATIENCE_S)

    with pytest.raises(ValueError, match="no such tensor"):
        in_parallel([run, fail, *[run] * 5], 2, stopped.set)
    assert len(begun) <= 2  # one a thread: the others never began


def test_ctrl_c_is_not_slept_through() -> None:
    """Whichever thread the signal comes to: the main one, in a lock, is not interrupted then."""
    stopped = threading.Event()
    in_time = []

    def job() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        in_time.append(stopped.wait(PATIENCE_S))

    with pytest.raises(KeyboardInterrupt):
        in_parallel([lambda: None, job], 1, stopped.set)  # the second finds a thread that runs
    assert in_time == [True]
