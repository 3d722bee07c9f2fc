"""Errors of graphs and of running them. `trt_int8.errors` draws the whole tree."""

from __future__ import annotations

from collections.abc import Sequence

from calibrators.errors import TrtInt8Error


class ModelError(TrtInt8Error):
    """A model file cannot be used as asked."""


class UnsupportedModelError(ModelError):
    """A graph holds something that cannot be carried out; the operator is named."""


class InferenceError(TrtInt8Error):
    """A model could not be run on the data it was given."""


class MissingDependencyError(TrtInt8Error, ImportError):
    """An optional package is needed and not installed; the extra that brings it is named."""


class EngineError(TrtInt8Error):
    """A TensorRT engine cannot be built, loaded or kept on a GPU as asked."""


class EngineBuildError(EngineError):
    """TensorRT could not build an engine.

    Attributes:
        log_lines: what TensorRT had logged by then, warnings and errors, oldest first.
    """

    def __init__(self, message: str, *, log_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log_lines = tuple(log_lines)


class EngineLoadError(EngineError):
    """A plan file cannot be loaded here: changed, truncated, of another TensorRT or GPU, or no plan at all."""


class DeviceError(EngineError):
    """The GPU cannot be opened, a CUDA call failed, or its memory is exhausted."""
