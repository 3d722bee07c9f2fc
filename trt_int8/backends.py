"""Which runtime carries out a run: TensorRT on an NVIDIA GPU, or ONNX Runtime on the processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from engines.optional import require
from engines.trt_checks import outdated_driver
from trt_int8.errors import DeviceError, MissingDependencyError, TrtInt8Error
from trt_int8.machine import CudaDriver, installed_version, read_cuda_driver

BackendName = Literal["onnxruntime", "tensorrt"]
BackendChoice = Literal["auto", "onnxruntime", "tensorrt"]

MINIMUM_CAPABILITY = (7, 5)
"""The compute capability (Turing's) from which TensorRT supports GPUs, since its release `TURING_RELEASE`."""

TURING_RELEASE = (10, 5)
"""The TensorRT release that dropped Volta."""

DEVICE_LIBRARIES = {"pycuda": "pycuda.driver", "cuda-python": "cuda.bindings.driver"}
"""The packages that serve device memory, in the order in which `engines.device.open_device` takes them, to the module
that shows whether they can be loaded."""

Load = Callable[[str, str], Any]
"""Imports an optional module, as `engines.optional.require` does."""

Installed = Callable[..., str | None]
"""Gives the version of the first one installed of several distributions, as `machine.installed_version` does."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What runs the models.

    Attributes:
        name: "tensorrt" or "onnxruntime".
        reason: why it was taken, in a few words without a full stop.
    """

    name: BackendName
    reason: str


@dataclass(frozen=True, slots=True)
class _Obstacle:
    """Why TensorRT cannot be used here, and what to do about it."""

    reason: str
    remedy: str
    error: type[TrtInt8Error] = MissingDependencyError


def choose_backend(
    requested: BackendChoice = "auto",
    *,
    cuda: CudaDriver | None = None,
    load: Load = require,
    installed: Installed = installed_version,
) -> Backend:
    """Choose what runs the models.

    "auto" takes TensorRT where there is a GPU (the CUDA driver says so), a TensorRT that can be imported and that this
    driver and GPU serve, and a package for device memory; ONNX Runtime elsewhere.

    Args:
        requested: "auto", or the one to take.
        cuda: what the CUDA driver says; it is asked where None.
        load: imports an optional module.
        installed: gives the version of a distribution.

    Raises:
        DeviceError: TensorRT was asked for, and there is no GPU or driver that it can run on.
        MissingDependencyError: TensorRT was asked for, and a package is missing or cannot be loaded.
    """
    if requested == "onnxruntime":
        return Backend("onnxruntime", "as asked for")
    found = _find_tensorrt(cuda or read_cuda_driver(), load, installed)
    if isinstance(found, str):
        return Backend("tensorrt", found)
    if requested == "tensorrt":
        raise found.error(f"Cannot run on TensorRT: {found.reason}. {found.remedy}")
    return Backend("onnxruntime", found.reason)


def loading_problem(module: str, load: Load = require) -> str | None:
    """Tell why an optional module cannot be imported, None where it can.

    Returns:
        "is not installed", or "cannot be loaded: REASON".
    """
    try:
        load(module, f"import {module}")
    except MissingDependencyError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and (cause.name or "").partition(".")[0] == module.partition(".")[0]:
            return "is not installed"
        return f"cannot be loaded: {' '.join(str(cause or error).split())}"
    return None


def driver_problem(cuda: CudaDriver, installed: Installed = installed_version) -> str | None:
    """Tell why TensorRT's installed wheel does not run on this driver, None where it does or nothing tells."""
    missing = None if cuda.cuda_version is None else outdated_driver(cuda.cuda_version, installed)
    if missing is None:
        return None
    _, release, driver = missing
    return (
        f"the driver serves CUDA {cuda.cuda_version}, and TensorRT's wheel is for CUDA {release[0]}, "
        f"which needs driver {driver} or newer"
    )


def _find_tensorrt(cuda: CudaDriver, load: Load, installed: Installed) -> str | _Obstacle:
    """Return what was found, or what is in the way."""
    if cuda.error is not None:
        return _Obstacle(
            cuda.error,
            "It needs an NVIDIA GPU and its driver (a container must be started with the GPUs); "
            "`--backend onnxruntime` runs on the processor.",
            DeviceError,
        )
    problem = loading_problem("tensorrt", load)
    if problem is not None:
        return _Obstacle(
            f"TensorRT's Python package {problem}",
            "Install `pip install 'trt-int8[tensorrt11]'`, or tensorrt10, which still has INT8 calibrators; "
            "`trt-int8 doctor` shows what is there.",
        )
    problem = driver_problem(cuda, installed)
    if problem is not None:
        return _Obstacle(problem, "Update the NVIDIA driver, or install the TensorRT wheel for its CUDA.", DeviceError)
    version = str(load("tensorrt", "read its version").__version__)
    gpu = cuda.gpus[0]
    release = tuple(int(part) for part in version.split(".")[:2])
    if release >= TURING_RELEASE and gpu.compute_capability < MINIMUM_CAPABILITY:
        return _Obstacle(
            f"{gpu.name} has compute capability {'.'.join(map(str, gpu.compute_capability))}, "
            f"and TensorRT {version} begins with {'.'.join(map(str, MINIMUM_CAPABILITY))}",
            "Take a GPU of the Turing generation or newer; `--backend onnxruntime` runs on the processor.",
            DeviceError,
        )
    problems = {name: loading_problem(module, load) for name, module in DEVICE_LIBRARIES.items()}
    library = next((name for name, problem in problems.items() if problem is None), None)
    if library is None:
        return _Obstacle(
            "; ".join(f"{name} {problem}" for name, problem in problems.items()),
            "Install one of them: `pip install 'trt-int8[cuda]'` is ready to use, `pip install 'trt-int8[pycuda]'` "
            "compiles.",
        )
    return f"found {gpu.name}, TensorRT {version} and {library}"
