"""A progress bar of bytes that shows itself only where the work takes longer than a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

PATIENCE_S = 2.0  # work that ends before this shows no bar


@contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told of bytes done, from any thread, and draws on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True))
    bar = Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    lock = threading.Lock()
    start = time.monotonic()
    shown = False

    def advance(nbytes: int) -> None:
        nonlocal shown
        with lock:
            if not shown and time.monotonic() - start > PATIENCE_S:
                bar.start()
                shown = True
            bar.update(task, advance=nbytes)

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
