"""trt_int8.backends over the SIMULATED TensorRT: the packages that really import decide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tensorrt as trt

from trt_int8.backends import choose_backend
from trt_int8.doctor import diagnose
from trt_int8.machine import read_cuda_driver


def test_auto_takes_tensorrt_and_says_what_it_found() -> None:
    """The simulated device counts as a GPU, and its name is in the reason."""
    backend = choose_backend("auto")

    assert backend.name == "tensorrt"
    assert backend.reason.startswith(f"found SIMULATED, TensorRT {trt.__version__} and ")
    assert backend.reason.endswith(("pycuda", "cuda-python"))


@pytest.mark.pycuda
def test_pycuda_is_taken_where_it_can_be_loaded() -> None:
    """It comes before cuda-python, as the device itself has it."""
    assert choose_backend("tensorrt").reason.endswith(" and pycuda")


def test_onnx_runtime_can_be_asked_for() -> None:
    """A GPU forces nobody."""
    assert choose_backend("onnxruntime").name == "onnxruntime"


def test_doctor_says_the_same_as_run() -> None:
    """One decision serves both; the wheel of the bindings is found by its own name."""
    (section,) = (section for section in diagnose() if section.title == "NVIDIA GPU")
    said = {finding.what: (finding.found, finding.meaning) for finding in section.findings}

    assert said["run --backend auto"] == ("takes tensorrt", choose_backend().reason)
    assert said["TensorRT"][0].startswith(trt.__version__)


def test_the_bindings_wheel_tells_which_cuda_it_is_for() -> None:
    """Those of the simulation are for CUDA 13: a driver for CUDA 12 is too old for them."""
    old = replace(read_cuda_driver(), cuda_version="12.9")

    assert choose_backend("auto", cuda=old).reason.startswith("the driver serves CUDA 12.9, and TensorRT's wheel")
