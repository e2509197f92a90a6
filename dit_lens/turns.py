"""Turns: one run of a pipeline at a time, as clock, taps and traces all sit in the pipeline's own modules."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary


class _Turn:
    """Whose turn it is to run a pipeline."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder: int | None = None


_turns: WeakKeyDictionary[Any, _Turn] = WeakKeyDictionary()


@contextmanager
def one_at_a_time(pipe: Any) -> Iterator[None]:
    """Wait until no other thread runs the pipeline, and hold it meanwhile."""
    turn = _turns.setdefault(pipe, _Turn())
    if turn.holder == threading.get_ident():
        raise RuntimeError("a lens cannot run inside a reducer, sink or edit of a run on the same pipeline")
    with turn.lock:
        turn.holder = threading.get_ident()
        try:
            yield
        finally:
            turn.holder = None
