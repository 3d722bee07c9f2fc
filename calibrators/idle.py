"""How long the workers of a pass have nothing to do: what is lost by data that come too late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class IdleMeter:
    """Adds up the time in which workers have nothing to do.

    Args:
        workers: how many there are; all of them idle at first.
        clock: gives seconds.
    """

    def __init__(self, workers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._workers = workers
        self._clock = clock
        self._lock = threading.Lock()
        self._idle = workers
        self._idle_s = 0.0
        self._at = clock()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count one worker as busy."""
        self._change(-1)
        try:
            yield
        finally:
            self._change(1)

    def idle_s(self) -> float:
        """Return for how many seconds a worker has been idle so far, on average over all of them."""
        with self._lock:
            self._advance()
            return self._idle_s / self._workers

    def _change(self, by: int) -> None:
        with self._lock:
            self._advance()
            self._idle += by

    def _advance(self) -> None:
        now = self._clock()
        self._idle_s += self._idle * (now - self._at)
        self._at = now
