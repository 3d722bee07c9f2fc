"""TensorRT's progress monitor, shown as a bar, and the way to stop a build."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from calibrators.protocols import Track


def progress_monitor(trt: Any, description: str, track: Track, stop: Callable[[], bool]) -> Any:
    """Make a progress monitor that shows the outermost phase of a build.

    Args:
        trt: the module `tensorrt`.
        description: the step, as the user reads it.
        track: shows the progress.
        stop: asked after each step; True cancels the build.

    Returns:
        A `tensorrt.IProgressMonitor` with an attribute `error`: the first exception in it, Ctrl-C included, which
        TensorRT would have swallowed; it cancels the build.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # TensorRT ships no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._lock = threading.RLock()  # TensorRT calls from several threads
            self._phase: str | None = None
            self._steps: Iterator[int] = iter(())

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._guard():
                # A bar at a time: phases within the first one, or beside it, are not shown.
                if self._phase is None and not parent_phase:
                    self._phase = phase_name
                    self._steps = iter(track(range(num_steps), description, num_steps))
                    next(self._steps, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._guard():
                if phase_name == self._phase:
                    next(self._steps, None)
            return self.error is None and not stop()

        def phase_finish(self, phase_name: str) -> None:
            with self._guard():
                if phase_name == self._phase:
                    self._phase = None
                    self.finish()

        def finish(self) -> None:
            """Let the bar end; for builds that TensorRT broke off without a word."""
            for _ in self._steps:
                pass

        def _guard(self) -> _Guard:
            return _Guard(self, self._lock)

    return Monitor()


class _Guard:
    """Holds a monitor's lock, and keeps an exception in the monitor instead of raising it into TensorRT."""

    def __init__(self, monitor: Any, lock: threading.RLock) -> None:
        self._monitor = monitor
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> bool:
        if exc is not None and self._monitor.error is None:
            self._monitor.error = exc
        self._lock.release()
        return True
