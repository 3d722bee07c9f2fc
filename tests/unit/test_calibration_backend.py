"""What runs the model while it is calibrated, on machines with and without a GPU."""

from __future__ import annotations

import sys
from typing import Any

import onnxruntime
import pytest

from trt_int8.calibration_backend import choose_calibration_backend
from trt_int8.errors import ConfigError, DeviceError, MissingDependencyError
from trt_int8.machine import CudaDriver, Gpu

NONE = CudaDriver("there is no NVIDIA driver", None, None, ())
ONE = CudaDriver(None, "13.0", None, (Gpu("A GPU", (9, 0), 0),))


def nothing() -> None:
    """No problem."""


def test_the_processor_is_taken_unless_something_else_is_asked_for() -> None:
    """On a machine with a GPU too; the version of ONNX Runtime is kept."""
    backend = choose_calibration_backend(cuda=ONE)

    assert (backend.name, backend.reason, backend.on_gpu) == ("onnxruntime", "on the processor", False)
    assert backend.settings == {"backend": "onnxruntime", "onnxruntime": onnxruntime.__version__}


def test_auto_without_a_gpu_takes_the_processor() -> None:
    """The driver says why."""
    backend = choose_calibration_backend("auto", cuda=NONE)
    assert (backend.name, backend.reason) == ("onnxruntime", "there is no NVIDIA driver")


def test_auto_takes_the_cuda_provider_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU and the version are kept: the last bits depend on them."""
    monkeypatch.setattr("trt_int8.calibration_backend.loading_problem", lambda module: None)
    backend = choose_calibration_backend("auto", cuda=ONE, compiler=nothing, provider=nothing)

    assert (backend.name, backend.on_gpu) == ("cuda", True)
    assert backend.settings == {"backend": "cuda", "onnxruntime": onnxruntime.__version__, "gpu": "A GPU"}


def test_auto_says_what_is_missing_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to a GPU are named."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    backend = choose_calibration_backend("auto", cuda=ONE, compiler=nothing)

    assert backend.name == "onnxruntime"
    assert "has no CUDAExecutionProvider" in backend.reason
    assert "TensorRT's Python package is not installed" in backend.reason


@pytest.mark.parametrize("requested", ["cuda", "tensorrt"])
def test_a_gpu_that_was_asked_for_must_be_there(requested: Any) -> None:
    """No fallback."""
    with pytest.raises(DeviceError, match="there is no NVIDIA driver"):
        choose_calibration_backend(requested, cuda=NONE)


@pytest.mark.parametrize(
    ("provider", "loading", "compiler", "expected"),
    [
        ("it has none", None, None, "it has none. Install onnxruntime-gpu"),
        (None, "is not installed", None, "pycuda is not installed; cuda-python is not installed. Install"),
        (None, None, "no NVRTC", "nothing compiles the kernel: no NVRTC. Install NVRTC"),
    ],
)
def test_each_part_of_the_cuda_provider_is_checked(
    monkeypatch: pytest.MonkeyPatch, provider: str | None, loading: str | None, compiler: str | None, expected: str
) -> None:
    """The provider, a package for device memory, and a compiler; before anything slow."""
    monkeypatch.setattr("trt_int8.calibration_backend.loading_problem", lambda module: loading)
    with pytest.raises(MissingDependencyError, match=expected):
        choose_calibration_backend("cuda", cuda=ONE, compiler=lambda: compiler, provider=lambda: provider)


def test_another_word_is_refused() -> None:
    """The words are listed."""
    requested: Any = "gpu"
    with pytest.raises(ConfigError, match="backend is 'gpu'; expected 'auto'"):
        choose_calibration_backend(requested)
