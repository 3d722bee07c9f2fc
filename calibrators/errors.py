"""The root of the project's error tree, and the errors of calibration.

`trt_int8.errors` draws the whole tree.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class TrtInt8Error(Exception):
    """Something the user can act on: what could not be done, what was found, what was expected, the next step.

    The command line prints it as one line and exits with status 1. Everything else keeps its traceback.
    """


class CalibrationError(TrtInt8Error):
    """Calibration, or the use of a calibration, is not possible as asked."""


class EmptyCalibrationSetError(CalibrationError):
    """The calibration data held no sample."""


class NonFiniteActivationError(CalibrationError):
    """An activation held NaN or infinity.

    Attributes:
        tensor: name of the tensor.
        batch: index of the batch, counted from 0.
        node: name of the node that produced the tensor.
    """

    def __init__(self, message: str, *, tensor: str, batch: int, node: str) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.batch = batch
        self.node = node

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes with its attributes; an exception's own way knows no keyword arguments."""
        return partial(type(self), tensor=self.tensor, batch=self.batch, node=self.node), self.args


class CacheFormatError(CalibrationError):
    """A calibration file is not in the format that its reader expects."""


class FileAccessError(TrtInt8Error):
    """A file could not be read or written."""
