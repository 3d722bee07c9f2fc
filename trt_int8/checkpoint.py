"""The state of a calibration pass, kept beside its output, so that a run that was killed goes on where it was.

A checkpoint is a calibration of the first batches of the stream, in the file format of every calibration. Going on is
calibrating the rest and merging, which is exact. The hash of the stream up to there tells whether the data are still
the same.
"""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from calibrators.calibration import Calibration
from calibrators.errors import FileAccessError
from calibrators.files import remove_leftovers

_log = logging.getLogger(__name__)

INTERVAL_S = 60.0
"""Seconds between two checkpoints, where nobody asks for a number of batches."""

_SHARE = 0.005
"""Of the time that writing checkpoints may take; where it takes longer, they become rarer."""

FINISHED = "finished"
"""Setting of the checkpoint of a pass that is done, of several over the same data."""


@dataclass(slots=True)
class Checkpoint:
    """Where the state of one pass is kept, and how often.

    Attributes:
        path: the file.
        every: batches between two checkpoints; None writes them by time: one a minute, and so seldom that they take
            less than 1 % of the pass.
        clock: gives seconds.
    """

    path: Path
    every: int | None = None
    clock: Callable[[], float] = time.monotonic
    _next_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._next_s = self.clock() + INTERVAL_S

    def of_pass(self, index: int, count: int) -> Checkpoint:
        """Return the checkpoint of one of several passes; of a single one it is this one.

        Args:
            index: of the pass, counted from 0.
            count: number of passes.
        """
        if count == 1:
            return self
        name = f"{self.path.stem}.{index + 1}of{count}{self.path.suffix}"
        return replace(self, path=self.path.with_name(name))

    def due(self, batches: int) -> bool:
        """Tell whether the state after so many batches is to be kept; asked once for each number of batches."""
        if self.every is not None:
            return batches % self.every == 0
        now = self.clock()
        if now < self._next_s:
            return False
        self._next_s = now + INTERVAL_S  # batches are read ahead: the next one must not ask before this one is kept
        return True

    def load(self) -> Calibration | None:
        """Read the state; None where there is none.

        Raises:
            CacheFormatError: the file is no calibration.
            FileAccessError: the file cannot be read.
        """
        return Calibration.load(self.path) if self.path.exists() else None

    def save(self, state: Calibration) -> None:
        """Write the state, atomically. A disk that is full does not end the pass: it goes on without, and says so."""
        started = self.clock()
        try:
            state.save(self.path)
        except FileAccessError as error:
            _log.warning("%s The calibration goes on; if it is interrupted, it starts from its last checkpoint.", error)
        now = self.clock()
        self._next_s = now + max(INTERVAL_S, (now - started) / _SHARE)

    def remove(self) -> None:
        """Delete the state of all passes, where there is any, and what a killed process left half-written."""
        pattern = f"{glob.escape(self.path.stem)}.*of*{glob.escape(self.path.suffix)}"
        for path in (self.path, *self.path.parent.glob(pattern)):
            try:
                remove_leftovers(path)
                path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("Cannot delete the checkpoint %s: %s. Delete it yourself.", path, error.strerror or error)


def checkpoint_beside(output: Path) -> Path:
    """Return where `calibrate` keeps its state: calibration.part.npz beside calibration.npz."""
    return output.with_name(f"{output.stem}.part{output.suffix}")
