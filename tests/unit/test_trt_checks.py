"""engines.trt_checks: the driver that TensorRT's package needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engines import trt_checks
from engines.errors import DeviceError
from engines.trt_checks import check_driver


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages and their versions; filled by the test."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(trt_checks, "_version", versions.get)
    monkeypatch.setattr(trt_checks, "driver_release", lambda: "550.54.14")
    return versions


def gpu(cuda_version: str) -> Any:
    return SimpleNamespace(name="NVIDIA T4", cuda_version=cuda_version)


def test_a_driver_that_is_new_enough(installed: dict[str, str]) -> None:
    """The same CUDA, or a newer one; versions are numbers and no text."""
    installed["tensorrt-cu13-bindings"] = "11.4.0"
    check_driver(gpu("13.0"))
    check_driver(gpu("13.10"))
    installed.clear()
    installed["tensorrt-cu12-bindings"] = "10.16.1"
    check_driver(gpu("12.2"))


def test_a_driver_that_is_too_old(installed: dict[str, str]) -> None:
    """Its release, what it serves, and which one is needed."""
    installed["tensorrt-cu13-bindings"] = "11.4.0"
    with pytest.raises(DeviceError) as caught:
        check_driver(gpu("12.4"))

    assert str(caught.value) == (
        "Cannot use TensorRT 11.4.0 on NVIDIA T4: the NVIDIA driver 550.54.14 serves CUDA 12.4 at most; tensorrt-cu13 "
        "needs CUDA 13.0. Install driver 580 or newer, or a TensorRT that is built for an older CUDA "
        "(the extras tensorrt10-cu12 and tensorrt11-cu12)."
    )
    installed.clear()
    installed["tensorrt-cu12-bindings"] = "10.16.1"
    with pytest.raises(DeviceError, match=r"needs CUDA 12\.0\. Install driver 535 or newer"):
        check_driver(gpu("11.8"))


def test_what_cannot_be_told_passes(installed: dict[str, str]) -> None:
    """TensorRT of another source tells nothing; of two packages it is not known which one is in use."""
    check_driver(gpu("11.8"))
    installed.update({"tensorrt-cu13-bindings": "11.4.0", "tensorrt-cu12-bindings": "11.4.0"})
    check_driver(gpu("12.4"))
