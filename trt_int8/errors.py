"""The whole error tree.

TrtInt8Error                     everything the user can act on; the command line catches only this
|- ConfigError                   a configuration or an option does not make sense
|- DataError                     calibration or test data cannot be used
|- ExportError                   a PyTorch model could not be loaded, exported or reproduced
|- GateMissedError               a limit that the user set was missed (exit status 3)
|- FileAccessError               a file could not be read or written
|- CalibrationError
|  |- EmptyCalibrationSetError
|  |- NonFiniteActivationError   tensor, batch, node
|  `- CacheFormatError           not a calibration file, or damaged
|- ModelError
|  `- UnsupportedModelError      an operator that cannot be carried out, named
|- InferenceError                a model could not be run on its data
|- EngineError
|  |- EngineBuildError           TensorRT could not build an engine; quotes its log
|  |- EngineLoadError            a plan file cannot be loaded here, and why
|  `- DeviceError                no GPU, a CUDA call failed, or out of device memory
`- MissingDependencyError        an optional package is missing; names the extra
"""

from calibrators.errors import (
    CacheFormatError,
    CalibrationError,
    EmptyCalibrationSetError,
    FileAccessError,
    NonFiniteActivationError,
    TrtInt8Error,
)
from engines.errors import (
    DeviceError,
    EngineBuildError,
    EngineError,
    EngineLoadError,
    InferenceError,
    MissingDependencyError,
    ModelError,
    UnsupportedModelError,
)

__all__ = [
    "CacheFormatError",
    "CalibrationError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "EmptyCalibrationSetError",
    "EngineBuildError",
    "EngineError",
    "EngineLoadError",
    "ExportError",
    "FileAccessError",
    "GateMissedError",
    "InferenceError",
    "MissingDependencyError",
    "ModelError",
    "NonFiniteActivationError",
    "TrtInt8Error",
    "UnsupportedModelError",
    "UsageError",
]


class ConfigError(TrtInt8Error):
    """A configuration, a key of it, or a combination of options does not make sense."""


class UsageError(ConfigError):
    """Options that do not go together, or not with what they are given for; the command line exits with status 2."""


class DataError(TrtInt8Error):
    """Calibration or test data is missing, empty, of another shape or dtype, or not finite."""


class ExportError(TrtInt8Error):
    """A PyTorch model could not be loaded, exported, or reproduced by its ONNX form."""


class GateMissedError(TrtInt8Error):
    """A limit that the user set (accuracy, speed) was missed; the command line exits with status 3."""
