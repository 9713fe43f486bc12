"""Prefill or decode: which of the two a forward is, for operators that do more than one thing.

Decode gives each sequence one new token. So does a prompt of one token, and the last piece of a
prompt may: who reads a prompt says so. Who studies decode over many tokens at once says that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class _Phase(threading.local):
    now: Literal["prefill", "decode"] | None = None


_phase = _Phase()


def is_decode(new_tokens: int) -> bool:
    """Return whether a forward on this thread with so many new tokens a sequence is decode."""
    return new_tokens == 1 if _phase.now is None else _phase.now == "decode"


@contextmanager
def phase(now: Literal["prefill", "decode"]) -> Iterator[None]:
    """Say what forwards on this thread are, whatever their size."""
    before, _phase.now = _phase.now, now
    try:
        yield
    finally:
        _phase.now = before
