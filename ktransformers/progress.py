"""Progress bars that show themselves only where the work takes longer than a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

PATIENCE_S = 2.0  # work that ends before this shows no bar


Advance = Callable[[int], None]


def byte_progress(description: str, total: int) -> AbstractContextManager[Advance]:
    """Yield a function that is told of bytes done, from any thread, and draws on stderr."""
    return _progress(description, total, DownloadColumn(True), TransferSpeedColumn())


def token_progress(description: str, total: int) -> AbstractContextManager[Advance]:
    """Yield a function that is told of tokens done, from any thread, and draws on stderr."""
    return _progress(description, total, MofNCompleteColumn(), TimeRemainingColumn())


@contextmanager
def _progress(description: str, total: int, *numbers: ProgressColumn) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), *numbers)
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    lock = threading.Lock()
    start = time.monotonic()
    shown = False

    def advance(done: int) -> None:
        nonlocal shown
        with lock:
            if not shown and time.monotonic() - start > PATIENCE_S:
                bar.start()
                shown = True
            bar.update(task, advance=done)

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
