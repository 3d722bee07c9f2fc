"""Typed ONNX models to TensorRT engines.

There is one path for TensorRT 10 and 11: the model's own types are the engine's types (a strongly typed network), so an
FP32 model gives an FP32 engine, an FP16 model an FP16 one, and Q/DQ nodes give INT8. The other path, INT8 by TensorRT's
calibrators ("implicit"), exists up to TensorRT 10.

Names that one of the releases does not have are never touched there, and no value of TensorRT's enumerations is
written down: the releases number them differently.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from calibrators.files import atomic_path
from calibrators.protocols import Track, untracked
from calibrators.tensorrt import ImplicitCalibrator, StreamingCalibrator
from engines.device import Device, open_device
from engines.errors import EngineBuildError
from engines.onnxrt import load_header, tensor_specs
from engines.opset import opset_of
from engines.optional import require
from engines.profiles import Profile, ShapeRange, check_profiles
from engines.runner import TensorSpec
from engines.sidecar import OWN_KEYS, Environment, Provenance, Sidecar, sha256_of_model, write_sidecar
from engines.size import external_files
from engines.trt_checks import check_driver, open_builder, require_calibrators
from engines.trt_log import LogLines, tensorrt_log
from engines.trt_options import BuildOptions
from engines.trt_progress import progress_monitor
from engines.trt_timing_cache import TimingCacheFile
from engines.trt_types import check_types, network_specs


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine that was built.

    Attributes:
        path: the plan file; its sidecar lies beside it.
        sidecar: what is known about it.
        seconds: how long TensorRT built.
        notes: what a user should know, one line each: TensorRT's warnings, and those of the calibrator.
    """

    path: Path
    sidecar: Sidecar
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"file": self.path.name, "notes": list(self.notes), **self.sidecar.to_json()}


def build_engine(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: BuildOptions | None = None,
    *,
    calibrator: ImplicitCalibrator | None = None,
    calibration_shapes: Mapping[str, Sequence[int]] | None = None,
    calibration: Provenance | None = None,
    shown: Path | None = None,
    device: Device | None = None,
    track: Track = untracked,
) -> BuiltEngine:
    """Build a TensorRT engine and write its plan file and sidecar.

    Args:
        model: an ONNX file whose types are those of `options.precision`; with a calibrator, an FP32 file.
        output: the plan file to write: NAME.engine.
        options: how to build.
        calibrator: builds with implicit INT8 (TensorRT 10 and older): "int8", or "int8+fp16" where TensorRT may take
            either for each layer.
        calibration_shapes: shape of each dynamic input in the calibrator's batches; the first profile's optimum where
            None.
        calibration: where the scales come from, for the sidecar; without a hash it gets that of the calibration cache
            that the calibrator served or wrote.
        shown: the file that messages name, where `model` was made from it; `model` where None.
        device: the GPU; opened for the build where None.
        track: shows the progress. A calibrator that streams data shows its own in place of the builder's.

    Raises:
        FileAccessError: the model is missing, the output cannot be written, or the timing cache is a file of something
            else.
        ModelError: the model is no ONNX file.
        MissingDependencyError: TensorRT, or a package for the GPU, is not installed.
        EngineBuildError: the model's types or shapes do not fit the options, or TensorRT refused; quotes its log.
        DeviceError: there is no GPU.
        Exception: whatever the calibrator's data raised.
    """
    options = options or BuildOptions()
    file, target = Path(model), Path(output)
    header = load_header(file)
    inputs, _ = tensor_specs(header)
    check_types(shown or file, header, options.precision, implicit=calibrator is not None)
    check_profiles(repr(str(shown or file)), inputs, options.profiles)
    trt = require("tensorrt", "build a TensorRT engine")
    with ExitStack() as stack:
        gpu = device or stack.enter_context(open_device())
        check_driver(gpu)
        build = _Build(trt, gpu, file, shown or file, header, options)
        log = stack.enter_context(tensorrt_log(trt).listen())
        plan, seconds = build.run(log, calibrator, calibration_shapes, track)
        notes = (*build.notes, *log.warnings, *(calibrator.notes if calibrator is not None else ()))
        served = {} if calibrator is None else {"calibration_batches": calibrator.batches_delivered}
        sidecar = Sidecar(
            plan_bytes=plan.nbytes,
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            environment=Environment.of(trt, gpu),
            precision=options.precision,
            inputs=build.inputs,
            outputs=build.outputs,
            profiles=tuple(
                {name: (shapes.minimum, shapes.optimum, shapes.maximum) for name, shapes in profile.items()}
                for profile in options.profiles
            ),
            model=file.name,
            model_sha256=sha256_of_model([file, *(file.parent / name for name in external_files(header))]),
            calibration=_provenance(calibration, calibrator),
            options=options.to_json() | {"implicit": calibrator is not None, **served},
            build_seconds=seconds,
            warnings=notes,
            metadata={entry.key: entry.value for entry in header.metadata_props if entry.key.startswith(OWN_KEYS)},
        )
        with atomic_path(target) as temporary:
            temporary.write_bytes(memoryview(plan))
        write_sidecar(target, sidecar)
    return BuiltEngine(target, sidecar, seconds, notes)


class _Build:
    """One build: the objects that TensorRT needs alive together, and the steps in their order."""

    def __init__(
        self, trt: Any, device: Device, file: Path, shown: Path, header: onnx.ModelProto, options: BuildOptions
    ) -> None:
        self._trt = trt
        self._device = device
        self._file = file
        self._shown = shown
        self._header = header
        self._options = options
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.notes: list[str] = []

    def run(
        self,
        log: LogLines,
        calibrator: ImplicitCalibrator | None,
        calibration_shapes: Mapping[str, Sequence[int]] | None,
        track: Track,
    ) -> tuple[Any, float]:
        """Return the plan (a buffer) and the seconds that it took."""
        trt = self._trt
        if calibrator is not None:
            require_calibrators(trt, self._shown)
        builder = open_builder(trt, self._device, self._shown, self._options.precision)
        network = builder.create_network(0 if calibrator is not None else _strongly_typed(trt))
        self._parse(network, log)
        header_inputs, header_outputs = tensor_specs(self._header)
        self.inputs = network_specs(trt, [network.get_input(i) for i in range(network.num_inputs)], header_inputs)
        self.outputs = network_specs(trt, [network.get_output(i) for i in range(network.num_outputs)], header_outputs)
        check_profiles(repr(str(self._shown)), self.inputs, self._options.profiles)
        config = self._config(builder, log)
        if calibrator is not None:
            self._calibrate_with(builder, config, calibrator, calibration_shapes)
        cache = self._attach_timing_cache(config)

        def stop() -> bool:
            return log.interrupted or (calibrator is not None and calibrator.error is not None)

        name = f"build {self._options.precision}"
        shows_itself = isinstance(calibrator, StreamingCalibrator)
        monitor = progress_monitor(trt, name, untracked if shows_itself else track, stop)
        config.progress_monitor = monitor
        start = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        seconds = time.perf_counter() - start
        monitor.finish()
        if calibrator is not None:
            calibrator.raise_error()
        if log.interrupted:
            raise KeyboardInterrupt
        if monitor.error is not None:
            raise monitor.error
        if plan is None:
            raise self._failed("cannot build", log, _advice(log))
        if cache is not None:
            cache.write(bytes(config.get_timing_cache().serialize()))
        return plan, seconds

    def _parse(self, network: Any, log: LogLines) -> None:
        parser = self._trt.OnnxParser(network, tensorrt_log(self._trt).logger)
        if parser.parse_from_file(os.fspath(self._file)):
            return
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        problems = list(dict.fromkeys(_parser_problem(error) for error in errors))
        text = "; ".join(problems[:3]) or log.quote()
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        opset = opset_of(self._header, self._shown)
        raise EngineBuildError(
            f"TensorRT {self._trt.__version__} cannot take {str(self._shown)!r} (opset {opset}): "
            f"{text}{more}. Export the model without these operators, or with another opset.",
            log_lines=log.texts,
        )

    def _config(self, builder: Any, log: LogLines) -> Any:
        trt, options = self._trt, self._options
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector knows nothing but names
        # TF32 is on by default, and an "FP32" measured with it is none.
        if options.precision == "tf32":
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper(), None)
        if level is None:
            raise EngineBuildError(
                f"TensorRT {trt.__version__} has no hardware compatibility {options.hardware_compatibility!r}; "
                f"it has {', '.join(name.lower() for name in trt.HardwareCompatibilityLevel.__members__)}."
            )
        config.hardware_compatibility_level = level
        for profile in options.profiles:
            if config.add_optimization_profile(self._profile(builder, profile)) < 0:
                raise self._failed("cannot use the optimization profile for", log, "Check its shapes.")
        return config

    def _profile(self, builder: Any, shapes: Profile) -> Any:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, bounds.minimum, bounds.optimum, bounds.maximum)
        return profile

    def _calibrate_with(
        self, builder: Any, config: Any, calibrator: ImplicitCalibrator, shapes: Mapping[str, Sequence[int]] | None
    ) -> None:
        trt, options = self._trt, self._options
        config.set_flag(trt.BuilderFlag.INT8)
        if options.precision == "int8+fp16":
            config.set_flag(trt.BuilderFlag.FP16)
        config.int8_calibrator = calibrator
        if options.profiles:
            # TensorRT calibrates at one shape alone, the optimum, and reads each batch as if it had that shape.
            first = options.profiles[0]
            fixed = {name: tuple((shapes or {}).get(name, bounds.optimum)) for name, bounds in first.items()}
            profile = {name: ShapeRange(shape, shape, shape) for name, shape in fixed.items()}
            config.set_calibration_profile(self._profile(builder, profile))

    def _attach_timing_cache(self, config: Any) -> TimingCacheFile | None:
        if self._options.timing_cache is None:
            return None
        cache = TimingCacheFile(self._options.timing_cache)
        note = cache.attach(self._trt, config)
        if note is not None:
            self.notes.append(note)
        return cache

    def _failed(self, what: str, log: LogLines, advice: str) -> EngineBuildError:
        return EngineBuildError(
            f"TensorRT {self._trt.__version__} {what} {str(self._shown)!r} as {self._options.precision}: "
            f"{log.quote()}. {advice}",
            log_lines=log.texts,
        )


def _provenance(calibration: Provenance | None, calibrator: ImplicitCalibrator | None) -> Provenance | None:
    if calibration is None or calibration.sha256 is not None or calibrator is None or calibrator.cache is None:
        return calibration
    return replace(calibration, sha256=hashlib.sha256(calibrator.cache).hexdigest())


def _strongly_typed(trt: Any) -> int:
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parser_problem(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
    return where + " ".join(str(error.desc()).split()).rstrip(".")


def _advice(log: LogLines) -> str:
    if any("int8 support" in text.lower() for text in log.errors):
        return "Build it as fp16 or fp32."
    if any("memory" in text.lower() for text in log.errors):
        return "Lower the workspace limit or the profile's largest shape, or free device memory."
    if any("could not find any implementation" in text.lower() for text in log.errors):
        return (
            "TensorRT has no kernel for the layer that it names: quantize the model again without it (--exclude), or "
            "raise the workspace limit."
        )
    return "The error's log_lines hold the rest of TensorRT's log."
