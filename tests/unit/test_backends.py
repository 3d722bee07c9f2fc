"""trt_int8.backends: what runs the models, and why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engines.errors import MissingDependencyError
from trt_int8.backends import BackendChoice, choose_backend, loading_problem
from trt_int8.errors import DeviceError, TrtInt8Error
from trt_int8.machine import CudaDriver, Gpu

NO_DRIVER = CudaDriver("no NVIDIA driver (libcuda.so.1 is not installed)", None, None, ())
EVERYTHING = {"tensorrt": "11.4.0", "pycuda": "2026.1", "cuda": "13.0"}


def driver(capability: tuple[int, int] = (9, 0), cuda_version: str = "13.0") -> CudaDriver:
    return CudaDriver(None, cuda_version, "580.65.06", (Gpu("NVIDIA X", capability, 1 << 34),))


class Packages:
    """Installed packages: import name to version, or to what their import raises."""

    def __init__(self, **packages: str | Exception) -> None:
        self.packages = packages

    def load(self, module: str, purpose: str) -> SimpleNamespace:
        name = module.partition(".")[0]
        version = self.packages.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(version, Exception):
            raise MissingDependencyError(f"Cannot {purpose}") from version
        return SimpleNamespace(__version__=version)

    def choose(self, requested: BackendChoice, cuda: CudaDriver, *distributions: str) -> tuple[str, str]:
        backend = choose_backend(
            requested,
            cuda=cuda,
            load=self.load,
            installed=lambda *names: "1" if set(names) & set(distributions) else None,
        )
        return backend.name, backend.reason


@pytest.mark.parametrize("requested", ["auto", "tensorrt"])
def test_tensorrt_is_taken_where_all_that_it_needs_is_there(requested: BackendChoice) -> None:
    """The reason names the GPU, TensorRT's version, and what serves device memory: pycuda before cuda-python."""
    expected = ("tensorrt", "found NVIDIA X, TensorRT 11.4.0 and pycuda")
    assert Packages(**EVERYTHING).choose(requested, driver()) == expected
    without = Packages(tensorrt="10.16.1", cuda="13.0")
    assert without.choose(requested, driver())[1] == "found NVIDIA X, TensorRT 10.16.1 and cuda-python"


@pytest.mark.parametrize(
    ("cuda", "packages", "wheel", "reason", "error", "remedy"),
    [
        (NO_DRIVER, EVERYTHING, "", r"no NVIDIA driver \(libcuda", DeviceError, "--backend onnxruntime"),
        (
            CudaDriver("cuInit failed with 100: no device", None, None, ()), EVERYTHING, "",
            "cuInit failed with 100: no device", DeviceError, "--backend onnxruntime",
        ),
        (
            driver(), {"pycuda": "1"}, "",
            "TensorRT's Python package is not installed", MissingDependencyError, r"trt-int8\[tensorrt11\]",
        ),
        (
            driver(), {"pycuda": "1", "tensorrt": ImportError("libnvinfer.so.10: cannot open")}, "",
            "TensorRT's Python package cannot be loaded: libnvinfer.so.10: cannot open",
            MissingDependencyError, "trt-int8 doctor",
        ),
        (
            driver(cuda_version="12.8"), EVERYTHING, "tensorrt-cu13-bindings",
            "the driver serves CUDA 12.8, and TensorRT's wheel is for CUDA 13, which needs driver 580 or newer",
            DeviceError, "Update the NVIDIA driver",
        ),
        (
            driver((7, 0)), EVERYTHING, "",
            "NVIDIA X has compute capability 7.0, and TensorRT 11.4.0 begins with 7.5",
            DeviceError, "--backend onnxruntime",
        ),
        (
            driver(), {"tensorrt": "11.4.0", "pycuda": ImportError("libcuda.so.1: no such file")}, "",
            "pycuda cannot be loaded: libcuda.so.1: no such file; cuda-python is not installed",
            MissingDependencyError, r"trt-int8\[cuda\]",
        ),
    ],
    ids=["no driver", "no GPU", "no TensorRT", "broken TensorRT", "old driver", "old GPU", "no device library"],
)  # fmt: skip
def test_onnx_runtime_is_taken_where_something_is_missing(
    cuda: CudaDriver, packages: dict[str, str | Exception], wheel: str, reason: str, error: type[TrtInt8Error],
    remedy: str,
) -> None:  # fmt: skip
    """The reason says what; asking for TensorRT there is an error of one line with the next step."""
    here = Packages(**packages)

    name, why = here.choose("auto", cuda, wheel)
    assert name == "onnxruntime"
    assert not why.endswith(".")
    with pytest.raises(error, match=f"^Cannot run on TensorRT: {reason}.*\\. .*{remedy}") as caught:
        here.choose("tensorrt", cuda, wheel)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cuda_version", "wheel"), [("13.1", "tensorrt-cu12-bindings"), ("12.4", "tensorrt-cu12-bindings"), ("12.4", "")]
)
def test_a_driver_serves_the_wheels_of_older_cuda(cuda_version: str, wheel: str) -> None:
    """Only a wheel for a newer CUDA than the driver's is in the way; a TensorRT of no wheel is believed."""
    assert Packages(**EVERYTHING).choose("auto", driver(cuda_version=cuda_version), wheel)[0] == "tensorrt"


@pytest.mark.parametrize(("version", "taken"), [("10.4.0", True), ("10.5.0", False), ("10.16.1.11", False)])
def test_volta_is_served_by_the_releases_before_turing_became_the_oldest(version: str, taken: bool) -> None:
    """TensorRT 10.5 dropped compute capability 7.0, not TensorRT 11."""
    name, _ = Packages(tensorrt=version, cuda="1").choose("auto", driver((7, 0)))

    assert (name == "tensorrt") is taken


def test_onnx_runtime_is_not_questioned() -> None:
    """Who asks for it gets it, whatever is there."""
    assert Packages(**EVERYTHING).choose("onnxruntime", driver()) == ("onnxruntime", "as asked for")


def test_a_module_inside_an_optional_package_that_is_missing_is_no_missing_package() -> None:
    """Something that the package itself needs is not there: it is installed, and cannot be loaded."""
    problem = loading_problem("pycuda.driver", Packages(pycuda=ModuleNotFoundError("no pytools", name="pytools")).load)

    assert problem == "cannot be loaded: no pytools"
