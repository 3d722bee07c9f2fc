"""TensorRT's log: collected, so that errors can quote it, and handed on to Python's logging."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)

_WITHOUT_SCALE = re.compile(r"Missing scale and zero-point for tensor (.+?), expect fall back")

_LISTED = 5
"""Tensors that a warning names before it only counts them."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of TensorRT's log.

    Attributes:
        level: of Python's logging: `logging.ERROR`, `logging.WARNING`, ...
        text: what TensorRT wrote.
    """

    level: int
    text: str


class LogLines:
    """What TensorRT logged while `TensorRTLog.listen` was open, warnings and errors alone, oldest first.

    Attributes:
        lines: the lines.
        interrupted: whether Ctrl-C came while TensorRT was logging, which would have lost it.
    """

    def __init__(self) -> None:
        self.lines: list[LogLine] = []
        self.interrupted = False

    @property
    def errors(self) -> list[str]:
        """The errors."""
        return [line.text for line in self.lines if line.level >= logging.ERROR]

    @property
    def warnings(self) -> list[str]:
        """The warnings, each text once; tensors without a scale, a line each in the log, are one warning."""
        texts = dict.fromkeys(line.text for line in self.lines if line.level == logging.WARNING)
        tensors = {text: match[1] for text in texts if (match := _WITHOUT_SCALE.search(text))}
        others = [text for text in texts if text not in tensors]
        if not tensors:
            return others
        names = list(tensors.values())
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        summary = f"TensorRT has no scale for {len(names)} tensors, and layers that read or write them are not INT8"
        return [*others, f"{summary}: {', '.join(names[:_LISTED])}{more}"]

    @property
    def texts(self) -> list[str]:
        """All of them."""
        return [line.text for line in self.lines]

    def quote(self) -> str:
        """Return what to quote in an error of one line: the first error, which later ones mostly follow from."""
        for text in (*self.errors, *reversed(self.texts)):
            return _one_line(text)
        return "it logged nothing"

    def take(self) -> str:
        """Return what to quote, and forget all lines: what fails next is not explained by them."""
        quoted = self.quote()
        self.lines.clear()
        return quoted


class TensorRTLog:
    """The process's one logger for TensorRT.

    TensorRT keeps the first logger that it is given and ignores every other one with a warning, so there is one for all
    builders and runtimes, and who wants lines listens for a while.

    Attributes:
        logger: a `tensorrt.ILogger`.
    """

    def __init__(self, trt: Any) -> None:
        self._listeners: list[LogLines] = []
        self._lock = threading.Lock()
        levels = {
            trt.ILogger.INTERNAL_ERROR: logging.ERROR,
            trt.ILogger.ERROR: logging.ERROR,
            trt.ILogger.WARNING: logging.WARNING,
            trt.ILogger.INFO: logging.DEBUG,  # pages of it for each build
            trt.ILogger.VERBOSE: logging.DEBUG,
        }
        receive, interrupt = self._receive, self._interrupt

        class Logger(trt.ILogger):  # type: ignore[misc]  # TensorRT ships no types
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                try:
                    receive(levels.get(severity, logging.DEBUG), message)
                except KeyboardInterrupt:
                    interrupt()

        self.logger = Logger()

    @contextmanager
    def listen(self) -> Iterator[LogLines]:
        """Collect what TensorRT logs, from whatever thread, while the block runs."""
        lines = LogLines()
        with self._lock:
            self._listeners.append(lines)
        try:
            yield lines
        finally:
            with self._lock:
                self._listeners = [listener for listener in self._listeners if listener is not lines]

    @contextmanager
    def aside(self) -> Iterator[LogLines]:
        """Collect what TensorRT logs while the block runs, and keep it from all other listeners."""
        with self._lock:
            others, self._listeners = self._listeners, []
        try:
            with self.listen() as lines:
                yield lines
        finally:
            with self._lock:
                self._listeners = others

    def _interrupt(self) -> None:
        for listener in self._listeners:
            listener.interrupted = True

    def _receive(self, level: int, message: str) -> None:
        # TensorRT calls this from threads of its own, and while an error is on its way: nothing here may raise.
        text = message.strip()
        if level >= logging.WARNING:
            with self._lock:
                listeners: Sequence[LogLines] = tuple(self._listeners)
            for listener in listeners:
                listener.lines.append(LogLine(level, text))
        # An error is quoted by the exception that follows it.
        _log.log(min(level, logging.WARNING) if not self._listeners else logging.DEBUG, "TensorRT: %s", text)


@functools.cache
def tensorrt_log(trt: Any) -> TensorRTLog:
    """Return the process's logger for TensorRT; it lives as long as the process, as TensorRT needs it to.

    TensorRT's own plugins are registered with it: the ONNX parser makes some operators of them (RoiAlign, DeformConv),
    and a plan that holds one cannot be loaded before.

    Args:
        trt: the module `tensorrt`.
    """
    log = TensorRTLog(trt)
    trt.init_libnvinfer_plugins(log.logger, "")
    return log


def _one_line(text: str) -> str:
    return " ".join(text.split())
