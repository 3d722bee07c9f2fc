"""Errors of graphs and of running them. `trt_int8.errors` draws the whole tree."""

from calibrators.errors import TrtInt8Error


class ModelError(TrtInt8Error):
    """A model file cannot be used as asked."""


class UnsupportedModelError(ModelError):
    """A graph holds something that cannot be carried out; the operator is named."""


class InferenceError(TrtInt8Error):
    """A model could not be run on the data it was given."""


class MissingDependencyError(TrtInt8Error, ImportError):
    """An optional package is needed and not installed; the extra that brings it is named."""
