"""What TensorRT needs of the machine and of its own release; checked before anything slow is done with it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.device import Device, driver_release
from engines.errors import DeviceError, EngineBuildError
from engines.trt_log import tensorrt_log
from engines.trt_types import Precision

WHEELS = {
    "tensorrt-cu12-bindings": ((12, 0), "535"),
    "tensorrt-cu13-bindings": ((13, 0), "580"),
}
"""TensorRT's packages: the CUDA release that they are built for, and the first driver that NVIDIA asks for there."""


def outdated_driver(
    cuda_version: str, installed: Callable[[str], str | None]
) -> tuple[str, tuple[int, int], str] | None:
    """Tell what TensorRT's installed wheel needs that a driver does not serve.

    Args:
        cuda_version: newest CUDA that the driver serves: "13.0".
        installed: gives the version of a distribution, None where it is not there.

    Returns:
        The wheel that needs least, the CUDA release that it needs, and the first driver that serves it; None where that
        is served, or where TensorRT did not come from a Python package index and tells nothing of it.
    """
    needs = [(cuda, driver, wheel) for wheel, (cuda, driver) in WHEELS.items() if installed(wheel) is not None]
    if not needs:
        return None
    cuda, driver, wheel = min(needs)
    if tuple(int(part) for part in cuda_version.split(".")) >= cuda:
        return None
    return wheel, cuda, driver


def check_driver(device: Device) -> None:
    """Check that the driver serves the CUDA release that the installed TensorRT is built for.

    TensorRT that did not come from a Python package index tells nothing of that and passes.

    Raises:
        DeviceError: the driver is too old; names both, and the driver that is needed.
    """
    missing = outdated_driver(device.cuda_version, _version)
    if missing is None:
        return
    package, cuda, driver = missing
    release = driver_release()
    here = f"the NVIDIA driver{f' {release}' if release else ''} serves CUDA {device.cuda_version} at most"
    wheel = package.removesuffix("-bindings")
    raise DeviceError(
        f"Cannot use TensorRT {_version(package)} on {device.name}: {here}; {wheel} needs CUDA "
        f"{cuda[0]}.{cuda[1]}. Install driver {driver} or newer, or a TensorRT that is built for an older "
        "CUDA (the extras tensorrt10-cu12 and tensorrt11-cu12)."
    )


def require_calibrators(trt: Any, model: Path) -> None:
    """Check that this TensorRT release has INT8 calibrators: 10 and older do.

    Args:
        trt: the module `tensorrt`.
        model: what is to be built with one, for the message.

    Raises:
        EngineBuildError: it has none; says what to do instead.
    """
    if not hasattr(trt, "IInt8Calibrator"):
        raise EngineBuildError(
            f"Cannot build {str(model)!r} with a calibrator: TensorRT {trt.__version__} has none, they were "
            "removed in TensorRT 11; expected 10 or older. Run `trt-int8 quantize` and build its result without "
            "--implicit."
        )


def open_builder(trt: Any, device: Device, model: Path, precision: Precision) -> Any:
    """Start TensorRT's builder, and check that the GPU has INT8 hardware where that is asked for.

    Only TensorRT 10 and older can tell of INT8 hardware; newer releases refuse the build.

    Args:
        trt: the module `tensorrt`.
        device: the GPU.
        model: what is to be built, for messages.
        precision: what it is to compute in.

    Returns:
        A `tensorrt.Builder`.

    Raises:
        EngineBuildError: TensorRT cannot start; quotes its log. Or the GPU has no INT8 hardware.
    """
    with tensorrt_log(trt).listen() as log:
        try:
            builder = trt.Builder(tensorrt_log(trt).logger)
        except TypeError as error:  # the bindings' word for "TensorRT returned nothing"
            raise EngineBuildError(
                f"TensorRT {trt.__version__} cannot start to build {str(model)!r}: {log.quote()}. "
                "Check the driver with `trt-int8 doctor`.",
                log_lines=log.texts,
            ) from error
    if precision.startswith("int8") and not getattr(builder, "platform_has_fast_int8", True):
        raise EngineBuildError(
            f"Cannot build {str(model)!r} with INT8: {device.name} (compute capability {device.compute_capability}) "
            "has no INT8 hardware. Build it as fp16 or fp32."
        )
    return builder


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
