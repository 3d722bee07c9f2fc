"""ONNX Runtime's CUDA provider, whose outputs stay on the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
from onnx import helper

from calibrators.protocols import Array
from engines.device import Device, DeviceArray, UploadBuffers
from engines.errors import DeviceError, InferenceError, MissingDependencyError
from engines.graph import PreparedModel, open_session
from engines.onnxrt import tensor_specs

PROVIDER = "CUDAExecutionProvider"

_GPU = "cuda", 0
"""The first GPU that the driver shows, as for `engines.device`."""


def cuda_provider_problem() -> str | None:
    """Tell why ONNX Runtime cannot run on a GPU as it is installed, None where it may."""
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if PROVIDER in providers:
        return None
    return f"ONNX Runtime {onnxruntime.__version__} has no {PROVIDER}, only {', '.join(providers)}"


class OnnxRuntimeCudaModel:
    """Runs the model by ONNX Runtime's CUDA provider, TF32 off. See `engines.gpu_activations.GpuModel`.

    It works in the device's own stream, so that what is queued there afterwards finds its outputs complete.

    Args:
        prepared: the model.
        tensors: names of the activations that are needed.
        device: where it runs.
        exposed: tensors that are made outputs, `tensors` among them; nodes are not fused across an output, so that for
            the same values the same tensors must be exposed.

    Raises:
        MissingDependencyError: the installed ONNX Runtime has no CUDA provider.
        DeviceError: the provider is there and does not start.
        ModelError: ONNX Runtime refuses the model.
    """

    def __init__(
        self, prepared: PreparedModel, tensors: Sequence[str], device: Device, *, exposed: Sequence[str] | None = None
    ) -> None:
        problem = cuda_provider_problem()
        if problem is not None:
            raise MissingDependencyError(
                f"Cannot calibrate on the GPU: {problem}. Install onnxruntime-gpu in place of onnxruntime, or take "
                "--backend tensorrt, or onnxruntime for the processor."
            )
        model = prepared.editable()
        inputs, outputs = ({spec.name for spec in specs} for specs in tensor_specs(model))
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in exposed or tensors if name not in inputs | outputs
        )
        options = {"device_id": _GPU[1], "user_compute_stream": str(device.stream), "use_tf32": 0}
        self._name = prepared.path.name
        self._session: Any = open_session(
            model, execution="native", providers=[(PROVIDER, options), "CPUExecutionProvider"]
        )
        if PROVIDER not in self._session.get_providers():
            raise DeviceError(
                f"Cannot calibrate on the GPU: ONNX Runtime's {PROVIDER} is installed and does not start. Expected the "
                "CUDA and cuDNN libraries of the release that it was built for; `--backend onnxruntime` calibrates on "
                "the processor."
            )
        self._fetched = [name for name in tensors if name not in inputs]
        self._uploads = UploadBuffers(device)
        self._outputs: list[Any] = []

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, DeviceArray]:
        """Queue one run.

        Raises:
            InferenceError: ONNX Runtime failed.
            DeviceError: out of device memory for the inputs.
        """
        located = {}
        binding = self._session.io_binding()
        for name, value in feeds.items():
            array = np.ascontiguousarray(value)
            located[name] = DeviceArray(self._uploads.upload(name, array), array.shape, array.dtype)
            binding.bind_input(name, *_GPU, array.dtype, array.shape, located[name].address)
        for name in self._fetched:
            binding.bind_output(name, *_GPU)
        self._outputs.clear()  # their memory is free for this run
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises its own classes, which share no base
            raise InferenceError(" ".join(str(error).split())[:300]) from error
        self._outputs = binding.get_outputs()
        for name, output in zip(self._fetched, self._outputs, strict=True):
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(output.element_type()))
            located[name] = DeviceArray(output.data_ptr(), tuple(output.shape()), dtype)
        return located

    def close(self) -> None:
        """Drop the session and what it computed."""
        self._outputs.clear()
        self._session = None
        with suppress(DeviceError):  # after a kernel failed every call does, and that was reported where it was found
            self._uploads.free()
