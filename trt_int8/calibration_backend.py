"""What runs the model while it is calibrated: ONNX Runtime on the processor, or a GPU, which then counts as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import onnxruntime

from calibrators.protocols import CalibrationBatch
from engines.device import open_device
from engines.gpu_activations import GpuActivations, GpuModel
from engines.gpu_onnxrt import OnnxRuntimeCudaModel, cuda_provider_problem
from engines.gpu_tensorrt import TensorRTModel
from engines.graph import PreparedModel
from engines.kernel_compiler import compiler_problem
from engines.optional import require
from trt_int8.backends import DEVICE_LIBRARIES, choose_backend, loading_problem
from trt_int8.choices import check_choice
from trt_int8.errors import DeviceError, MissingDependencyError, TrtInt8Error
from trt_int8.machine import CudaDriver, read_cuda_driver

_log = logging.getLogger(__name__)

CalibrationBackendName = Literal["onnxruntime", "cuda", "tensorrt"]
CalibrationBackendChoice = Literal["auto", "onnxruntime", "cuda", "tensorrt"]

DEFAULT_CALIBRATION_BACKEND: CalibrationBackendChoice = "onnxruntime"
"""The processor, on a machine with a GPU too: so a calibration does not depend, in the last bits of its activations, on
what else is installed where it is made, and one that was made elsewhere is still recognised."""


@dataclass(frozen=True, slots=True)
class CalibrationBackend:
    """What runs the model.

    Attributes:
        name: "onnxruntime" (the processor), "cuda" (ONNX Runtime's CUDA provider) or "tensorrt" (an FP32 engine).
        reason: why it was taken, in a few words without a full stop.
        settings: what a calibration's result depends on with it; kept in the calibration.
    """

    name: CalibrationBackendName
    reason: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the activations stay on a GPU."""
        return self.name != "onnxruntime"


def choose_calibration_backend(
    requested: CalibrationBackendChoice = DEFAULT_CALIBRATION_BACKEND,
    *,
    cuda: CudaDriver | None = None,
    compiler: Callable[[], str | None] = compiler_problem,
    provider: Callable[[], str | None] = cuda_provider_problem,
) -> CalibrationBackend:
    """Choose what runs the model while it is calibrated.

    "auto" takes a GPU where there is one and nothing is missing: ONNX Runtime's CUDA provider before TensorRT, as it
    runs the graph as it is and needs no engine, whose building takes as long as many batches.

    Args:
        requested: "auto", or the one to take.
        cuda: what the CUDA driver says; it is asked where None.
        compiler: tells why no kernel can be compiled, None where one can.
        provider: tells why ONNX Runtime has no CUDA provider, None where it has.

    Raises:
        ConfigError: there is no such backend.
        DeviceError: a GPU was asked for, and there is none that it can run on.
        MissingDependencyError: a GPU was asked for, and a package is missing.
    """
    check_choice("backend", requested, CalibrationBackendChoice)
    if requested == "onnxruntime":
        return _on_processor("on the processor")
    driver = cuda or read_cuda_driver()
    attempts: dict[str, Callable[[], CalibrationBackend]] = {
        "cuda": lambda: _provider(driver, compiler, provider),
        "tensorrt": lambda: _tensorrt(driver, compiler),
    }
    if requested != "auto":
        return attempts[requested]()
    reasons = []
    for attempt in attempts.values():
        try:
            return attempt()
        except TrtInt8Error as error:
            reasons.append(str(error))
    return _on_processor(driver.error or " ".join(reasons).rstrip("."))


def open_gpu_activations(
    backend: CalibrationBackend,
    prepared: PreparedModel,
    tensors: Sequence[str],
    batches: Iterable[CalibrationBatch],
    *,
    exposed: Sequence[str] | None = None,
    first: int = 0,
) -> AbstractContextManager[GpuActivations]:
    """Open the GPU, and the model on it.

    Args:
        backend: one that is on a GPU.
        prepared: the model.
        tensors: names of the tensors that are counted.
        batches: the stream.
        exposed: tensors that all passes over the data count together. ONNX Runtime exposes them in each pass, so that
            its values do not depend on how the tensors are shared out; TensorRT would have to hold them all in memory.
        first: index of the first batch.

    Raises:
        TrtInt8Error: as `engines.gpu_activations` and the models say.
    """
    with ExitStack() as stack:
        device = stack.enter_context(open_device())
        _log.info("calibrating on %s by %s", device.name, backend.name)
        model: GpuModel = (
            TensorRTModel(prepared, tensors, device)
            if backend.name == "tensorrt"
            else OnnxRuntimeCudaModel(prepared, tensors, device, exposed=exposed)
        )
        activations = GpuActivations(prepared, tensors, batches, device=device, model=model, first=first)
        stack.pop_all()  # the activations close the device from here on
    return activations


def _on_processor(reason: str) -> CalibrationBackend:
    return CalibrationBackend("onnxruntime", reason, _settings("onnxruntime", onnxruntime=onnxruntime.__version__))


def _provider(
    driver: CudaDriver, compiler: Callable[[], str | None], provider: Callable[[], str | None]
) -> CalibrationBackend:
    if driver.error is not None:
        raise DeviceError(
            f"Cannot calibrate by ONNX Runtime's CUDA provider: {driver.error}. It needs an NVIDIA GPU and its driver "
            "(a container must be started with the GPUs); `--backend onnxruntime` calibrates on the processor."
        )
    problem = provider()
    if problem is not None:
        raise MissingDependencyError(
            f"Cannot calibrate by ONNX Runtime's CUDA provider: {problem}. Install onnxruntime-gpu in place of "
            "onnxruntime; `--backend onnxruntime` calibrates on the processor."
        )
    problems = {name: loading_problem(module) for name, module in DEVICE_LIBRARIES.items()}
    if all(problems.values()):
        found = "; ".join(f"{name} {problem}" for name, problem in problems.items())
        raise MissingDependencyError(
            f"Cannot calibrate by ONNX Runtime's CUDA provider: {found}. Install `pip install 'trt-int8[cuda]'`; "
            "`--backend onnxruntime` calibrates on the processor."
        )
    _require_compiler(compiler)
    gpu = driver.gpus[0].name
    settings = _settings("cuda", onnxruntime=onnxruntime.__version__, gpu=gpu)
    return CalibrationBackend("cuda", f"found {gpu} and ONNX Runtime's CUDA provider", settings)


def _tensorrt(driver: CudaDriver, compiler: Callable[[], str | None]) -> CalibrationBackend:
    found = choose_backend("tensorrt", cuda=driver)
    _require_compiler(compiler)
    version = str(require("tensorrt", "calibrate by TensorRT").__version__)
    return CalibrationBackend(
        "tensorrt", found.reason, _settings("tensorrt", tensorrt=version, gpu=driver.gpus[0].name)
    )


def _require_compiler(compiler: Callable[[], str | None]) -> None:
    problem = compiler()
    if problem is not None:
        raise MissingDependencyError(
            f"Cannot count on the GPU: nothing compiles the kernel: {problem}. Install NVRTC with `pip install "
            "nvidia-cuda-nvrtc` (nvidia-cuda-nvrtc-cu12 for CUDA 12) beside cuda-python, or the CUDA toolkit; "
            "`--backend onnxruntime` calibrates on the processor."
        )


def _settings(backend: str, **versions: Any) -> dict[str, str]:
    return {"backend": backend, **{name: str(version) for name, version in versions.items()}}
