"""A TensorRT engine that computes what the model computes and gives out the tensors that are to be calibrated."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import helper

from calibrators.protocols import Array
from engines.device import Device, DeviceArray
from engines.errors import DeviceError
from engines.graph import PreparedModel, save_model
from engines.onnxrt import tensor_specs
from engines.profiles import Profile, Shape, dynamic_inputs, seen_profile
from engines.trt_builder import build_engine
from engines.trt_options import BuildOptions
from engines.trt_runner import TensorRTRunner
from engines.trt_types import Precision, held_types

_log = logging.getLogger(__name__)


class TensorRTModel:
    """Runs an FP32 engine, TF32 off, that gives out the wanted tensors. See `engines.gpu_activations.GpuModel`.

    The engine is built for the shapes of the first batch, and for smaller batches of them. A batch that does not fit
    has it built anew for the shapes of all batches so far. TensorRT chooses kernels by their measured times: two
    engines of the same model may differ in the last bits of what they compute.

    Args:
        prepared: the model.
        tensors: names of the activations that are needed.
        device: where it runs.
    """

    def __init__(self, prepared: PreparedModel, tensors: Sequence[str], device: Device) -> None:
        self._prepared = prepared
        self._tensors = list(tensors)
        self._device = device
        self._inputs, _ = tensor_specs(prepared.proto)
        _, half = held_types(prepared.proto)
        self._precision: Precision = "fp16" if half else "fp32"  # the types are the model's own
        self._folder = TemporaryDirectory(prefix="trt-int8-")
        self._seen: dict[str, Counter[Shape]] = {}
        self._profile: Profile = {}
        self._runner: TensorRTRunner | None = None

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, DeviceArray]:
        """Queue one run; the first one builds the engine.

        Raises:
            EngineBuildError: TensorRT cannot build the model.
            EngineLoadError: there is not enough device memory for the engine.
            InferenceError: TensorRT refused the run.
            DeviceError: out of device memory for inputs and outputs.
        """
        for name, value in feeds.items():
            self._seen.setdefault(name, Counter())[value.shape] += 1
        if self._runner is None or any(feeds[name].shape not in bounds for name, bounds in self._profile.items()):
            self._open()
        if self._runner is None:
            raise AssertionError("an engine was opened")
        session = self._runner.session
        session.bind({name: value.shape for name, value in feeds.items()})
        session.copy_in(feeds)
        session.execute()
        return session.on_device()

    def close(self) -> None:
        """Give the engine back."""
        with suppress(DeviceError):  # after a kernel failed every call does, and that was reported where it was found
            self._close_engine()
        self._folder.cleanup()

    def _close_engine(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            self._device.synchronize()
            runner.__exit__(None, None, None)

    def _open(self) -> None:
        """Build the engine for all shapes so far."""
        self._close_engine()
        self._profile = seen_profile(self._inputs, self._seen) if dynamic_inputs(self._inputs) else {}
        ranges = "".join(f"; {name} {bounds}" for name, bounds in self._profile.items())
        _log.info("building a TensorRT engine that gives out %d activations%s", len(self._tensors), ranges)
        model, plan = (Path(self._folder.name) / name for name in ("model.onnx", "model.engine"))
        if not model.exists():
            save_model(_exposed(self._prepared, self._tensors), model)
        options = BuildOptions(self._precision, profiles=[self._profile] if self._profile else [])
        build_engine(model, plan, options, shown=self._prepared.path, device=self._device)
        self._runner = TensorRTRunner(plan, name=self._prepared.path.name, device=self._device, fetched=())
        self._runner.__enter__()


def _exposed(prepared: PreparedModel, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return the model with `tensors` among its outputs, each with its type, which TensorRT's parser asks for."""
    model = prepared.editable()
    present = {value.name for value in [*model.graph.output, *model.graph.input]}
    types = {
        value.name: value.dtype for node in prepared.ir().graph for value in node.outputs if value.dtype is not None
    }
    model.graph.output.extend(
        helper.make_tensor_value_info(name, int(types[name]), None) for name in tensors if name not in present
    )
    return model
