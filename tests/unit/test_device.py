"""engines.device where there is no GPU; tests/tensorrt has the tests of a device that is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engines import device_cuda, device_pycuda
from engines.device import DeviceLibrary, driver_release, open_device, version_text
from engines.errors import DeviceError, MissingDependencyError

DRIVER = """
class Status:
    def __init__(self, name):
        self.name = name

class CUresult:
    CUDA_SUCCESS = Status("CUDA_SUCCESS")
    CUDA_ERROR_NO_DEVICE = Status("CUDA_ERROR_NO_DEVICE")
    CUDA_ERROR_OUT_OF_MEMORY = Status("CUDA_ERROR_OUT_OF_MEMORY")

def cuGetErrorString(status):
    return CUresult.CUDA_SUCCESS, b"no CUDA-capable device is detected"

def cuInit(flags):
    INIT
"""


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is the only one where packages are found; pycuda and cuda-python are forgotten."""
    assert device_cuda.CudaPythonDevice is not device_pycuda.PycudaDevice  # both are loaded before the paths go
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pycuda", "cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def install(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def cuda_python(init: str) -> dict[str, str]:
    return {
        "cuda/__init__.py": "",
        "cuda/bindings/__init__.py": "__version__ = '13.0'",
        "cuda/bindings/driver.py": DRIVER.replace("INIT", init),
    }


def test_without_both_packages_both_are_named() -> None:
    """The message tells which one is ready to use and which one is compiled."""
    with pytest.raises(MissingDependencyError, match=r"trt-int8\[cuda\].*ready to use.*trt-int8\[pycuda\].*compiles"):
        open_device()


@pytest.mark.parametrize(("library", "extra"), [("pycuda", "pycuda"), ("cuda", "cuda")])
def test_an_absent_library_that_was_asked_for_is_named(library: DeviceLibrary, extra: str) -> None:
    """No other library is taken in its place."""
    with pytest.raises(MissingDependencyError, match=rf"Install it with `pip install 'trt-int8\[{extra}\]'`"):
        open_device(library)


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("return (CUresult.CUDA_ERROR_NO_DEVICE,)", r"CUDA_ERROR_NO_DEVICE \(no CUDA-capable device is detected\)"),
        ("raise RuntimeError('libcuda.so.1 is not there.')", r"libcuda\.so\.1 is not there\. Expected"),
    ],
)
def test_no_gpu_is_an_error_of_one_line(packages: Path, init: str, reason: str) -> None:
    """The driver's own reason, what was expected, and the command that shows more."""
    install(packages, cuda_python(init))

    with pytest.raises(DeviceError, match=f"Cannot open an NVIDIA GPU: .*{reason}") as caught:
        open_device()
    assert "trt-int8 doctor" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pycuda_that_cannot_be_loaded_gives_way_to_cuda_python(packages: Path) -> None:
    """It may have been compiled for a driver that is not here; cuda-python is asked next."""
    install(packages, {"pycuda/__init__.py": "", "pycuda/driver.py": "raise ImportError('libcuda.so.1 is missing')"})
    with pytest.raises(MissingDependencyError, match=r"'pycuda' is installed but cannot be loaded: libcuda\.so\.1"):
        open_device()

    install(packages, cuda_python("return (CUresult.CUDA_ERROR_NO_DEVICE,)"))
    with pytest.raises(DeviceError, match="CUDA_ERROR_NO_DEVICE"):
        open_device()


def test_cuda_versions_are_written_as_people_do() -> None:
    """The driver's number is 1000 times the major release and 10 times the minor one."""
    assert version_text(13000) == "13.0"
    assert version_text(12060) == "12.6"


def test_the_release_of_the_driver_is_read_from_its_kernel_module(tmp_path: Path) -> None:
    """The release stands in the first line of the module's /proc file; without the file there is none."""
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  gcc 12.3.0\n"
    )

    assert driver_release(file) == "580.65.06"
    assert driver_release(tmp_path / "none") is None
