"""The one gate to packages that are not part of the base installation."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from engines.errors import MissingDependencyError

EXTRAS = {
    "tensorrt": "tensorrt11 (or tensorrt10, which still has INT8 calibrators)",
    "pycuda": "pycuda",
    "cuda": "cuda",
    "pynvml": "tensorrt11 (or tensorrt10)",
    "ray": "ray",
}
"""The extra that brings a package, by the name that it is imported under."""


def require(module: str, purpose: str) -> Any:
    """Import an optional module.

    Args:
        module: what to import: "tensorrt", or a module inside such a package: "pycuda.driver".
        purpose: what cannot be done without it, as in "cannot {purpose}".

    Returns:
        The module.

    Raises:
        MissingDependencyError: its package is not installed, or cannot be loaded here: a library that it links to is
            missing, or the NVIDIA driver is.
    """
    package = module.partition(".")[0]
    try:
        loaded: ModuleType = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise _unusable(package, purpose, error) from error
        extra, _, remark = EXTRAS[package].partition(" ")
        raise MissingDependencyError(
            f"Cannot {purpose}: the package {package!r} is not installed. "
            f"Install it with `pip install 'trt-int8[{extra}]'`{remark and ' ' + remark}."
        ) from error
    except (ImportError, OSError) as error:
        raise _unusable(package, purpose, error) from error
    return loaded


def _unusable(package: str, purpose: str, error: Exception) -> MissingDependencyError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    advice = "It needs an NVIDIA driver and the libraries of its own release; `trt-int8 doctor` shows what is there."
    if package == "ray":
        advice = "Install it anew with `pip install --force-reinstall 'trt-int8[ray]'`."
    return MissingDependencyError(
        f"Cannot {purpose}: the package {package!r} is installed but cannot be loaded: {reason}. {advice}"
    )
