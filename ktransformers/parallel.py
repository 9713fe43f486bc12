"""Jobs in parallel that Ctrl-C reaches: waiting without a limit may sleep through it.

CPython looks for a signal between bytecodes. One that comes when the main thread has looked and is
about to block in a lock finds nothing to interrupt, and is noticed only when the lock is released:
after the longest job, or never. So whoever waits in the main thread looks up now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

POLL_S = 0.2

Result = TypeVar("Result")


def in_parallel(
    jobs: Iterable[Callable[[], Result]],
    threads: int,
    stop: Callable[[], object] = lambda: None,
) -> list[Result]:
    """Run jobs in so many threads; return what they return, in order.

    However that ends, `stop` is called before what still runs is waited for. After an error, which
    is raised here, or Ctrl-C, jobs that have not begun never do.
    """
    with ThreadPoolExecutor(threads) as pool:
        try:  # from the first one on: what is submitted must be told to stop
            futures = [pool.submit(job) for job in jobs]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
