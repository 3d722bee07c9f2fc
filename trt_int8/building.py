"""The build stage: a model, and the scales of a calibration, become a TensorRT engine.

There are two ways to INT8. The usual one, for TensorRT 10 and 11, writes the types into the model (Q/DQ nodes, FP16)
and lets TensorRT keep to them. The other one ("implicit", TensorRT 10 and older) leaves the model in FP32 and hands
TensorRT a calibrator; see `trt_int8.implicit`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from calibrators.calibration import DEFAULT_METHOD, DEFAULT_PERCENTILE, Calibration
from calibrators.percentile import check_percentile
from calibrators.protocols import Track, untracked
from calibrators.tensorrt_batches import ShortBatch
from calibrators.tensorrt_cache_file import check_replaceable, record_path
from engines import trt_builder
from engines.device import Device, UploadBuffers, open_device
from engines.graph import prepare, save_model
from engines.onnxrt import load_header, tensor_specs
from engines.optional import require
from engines.placement_options import Attention, Residual
from engines.profiles import Profile
from engines.sidecar import sidecar_path
from engines.trt_builder import BuiltEngine
from engines.trt_checks import check_driver, open_builder, require_calibrators
from engines.trt_options import BuildOptions, HardwareCompatibility
from engines.trt_timing_cache import TimingCacheFile
from engines.trt_types import Precision, check_types, held_types
from trt_int8.build_checks import (
    Shapes,
    check_calibrated_inputs,
    check_combination,
    engine_profile,
    engine_stem,
    given_ranges,
    needs_calibration,
)
from trt_int8.calibration import DEFAULT_MAX_BATCHES
from trt_int8.choices import check_choice
from trt_int8.config import Method
from trt_int8.data import DataSpec, open_data
from trt_int8.idle_options import refuse_idle
from trt_int8.implicit import (
    CalibrationFeed,
    CalibratorName,
    calibrator_of_calibration,
    calibrator_of_data,
    usage_note,
)
from trt_int8.input_alarm import note_inputs
from trt_int8.outputs import check_outputs
from trt_int8.placement_options import placement_options
from trt_int8.replaced_engines import earlier_engine, replacement_note
from trt_int8.typed_models import Scales, provenance_of, write_typed

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing


def build_engine(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: Precision = "int8",
    calibration: Calibration | str | os.PathLike[str] | None = None,
    method: Method = "entropy",
    percentile: float = DEFAULT_PERCENTILE,
    residual: Residual = "int8",
    attention: Attention = "float",
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    force: bool = False,
    shapes: Mapping[str, Shapes] | None = None,
    batch: tuple[int, int, int] | None = None,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    hardware_compatibility: HardwareCompatibility = "none",
    version_compatible: bool = False,
    implicit: bool = False,
    data: DataSpec | None = None,
    calibrator: CalibratorName | None = None,
    batch_size: int | None = None,
    max_batches: int | None = DEFAULT_MAX_BATCHES,
    cache: str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    data_id: str | None = None,
    short_batch: ShortBatch = "drop",
    name: str | None = None,
    device: Device | None = None,
    track: Track = untracked,
) -> BuiltEngine:
    """Build a TensorRT engine.

    An FP32 model is given the types of the precision first, and the result is kept as OUTPUT/NAME.engine.onnx: the
    model as TensorRT was given it. A model that holds such types already (Q/DQ nodes, FP16) is built as it is.

    Args:
        model: an ONNX file.
        output: folder of the engine OUTPUT/STEM.PRECISION.engine and its sidecar `.json`. STEM is the model's file name
            without ".onnx", and without ".PRECISION" and ".engine" before it.
        precision: "fp32", "tf32" (FP32 whose products TensorRT may round to TF32), "fp16", "int8" (with FP32 for the
            rest), or "int8+fp16".
        calibration: the model's calibration, or its file. Gives the scales of INT8 and the range guard of FP16, and to
            every precision the shapes that it saw; so it must be of this model.
        method: calibration method.
        percentile: of the percentile method, and of the percentile calibrator.
        residual: whether the skip input of residual Adds is quantized.
        attention: whether the operands of attention products are quantized, where the rules allow it.
        exclude: regular expressions; weighted nodes whose whole name matches stay float.
        include: the same for nodes to quantize against a rule about speed or accuracy; see `engines.node_rules`.
        force: use a calibration of another graph where the tensor names fit.
        shapes: input name to its smallest, optimal and largest shape.
        batch: smallest, optimal and largest batch, for inputs that `shapes` does not name and whose only dynamic axis
            is the batch. Without both, the shapes that the calibration saw, down to a batch of one; with `data` those
            of its first batch.
        workspace_bytes: most device memory that a kernel may use for itself; None leaves TensorRT's default, all of it.
        optimization_level: 0 to 5, how long TensorRT searches; None leaves its default, 3.
        timing_cache: file that keeps measured kernel times between builds; FILE.json beside it tells later builds that
            it is theirs, and a file of something else is refused.
        hardware_compatibility: other GPUs that the engine must run on; costs speed.
        version_compatible: whether newer TensorRT releases must be able to load the engine; costs speed.
        implicit: INT8 by a calibrator of TensorRT's, of 10 and older, from `data` or `calibration`.
        data: implicit: DATA that TensorRT calibrates on.
        calibrator: implicit, with `data`: "entropy2" (TensorRT's entropy, where None), "minmax", or "percentile" (a
            pass of its own over the data first, where no cache of one fits).
        batch_size: implicit: samples a batch, where the data are cut here; 1 by default.
        max_batches: implicit: read no more batches than this.
        cache: implicit: the calibration cache; OUTPUT/STEM.CALIBRATOR.cache where None. It is read back only for the
            same model, data, calibrator and preprocessing; a file of something else is refused.
        preprocessing: implicit: how images become arrays.
        data_id: implicit: identity of data that come from code, so that their cache can be read back.
        short_batch: implicit: leave a batch with fewer samples out ("drop"), or fill it up by repeating them ("pad").
        name: STEM, where it is not to be the model's.
        device: the GPU; opened for the build where None.
        track: shows the progress.

    Returns:
        The engine. Its notes tell of another engine that it replaced: one of another TensorRT release, GPU, model,
        method or calibration.

    Raises:
        ConfigError: options contradict each other, or something that the precision needs was not given.
        CalibrationError: the calibration belongs to another model, or lacks a scale.
        FileAccessError, CacheFormatError: a file cannot be read or written, or writing it would replace something else.
        MissingDependencyError: TensorRT, or a package for the GPU, is not installed.
        DeviceError: there is no GPU, its driver is too old for TensorRT, or its memory is exhausted.
        EngineBuildError: the model's types or shapes do not fit, or TensorRT refused; quotes its log.
        Exception: whatever the user's own data raised.
    """
    for word, value, choices in (
        ("precision", precision, Precision),
        ("method", method, Method),
        ("hardware_compatibility", hardware_compatibility, HardwareCompatibility),
        ("calibrator", calibrator or "entropy2", CalibratorName),
        ("short_batch", short_batch, ShortBatch),
    ):
        check_choice(word, value, choices)
    check_percentile(percentile)
    placement = placement_options(residual, attention, exclude, include)
    reading = {
        "--calibrator": calibrator,
        "--batch-size": batch_size,
        "--max-batches": None if max_batches == DEFAULT_MAX_BATCHES else max_batches,
        "--cache": cache,
        "--preprocessing": preprocessing,
        "--data-id": data_id,
        "--short-batch": None if short_batch == "drop" else short_batch,
    }
    scaling = {
        "--method": None if method == DEFAULT_METHOD else method,
        "--residual": None if residual == "int8" else residual,
        "--attention": None if attention == "float" else attention,
        "--exclude": exclude or None,
        "--include": include or None,
    }
    takes_percentile = (method if data is None else calibrator) == "percentile"
    file = Path(model)
    header = load_header(file)
    inputs, _ = tensor_specs(header)
    typed = any(held_types(header))
    check_combination(
        precision=precision,
        implicit=implicit,
        typed=typed,
        calibration=calibration is not None,
        data=data is not None,
        of_data=reading,
        of_scales=scaling,
        percentile=None if percentile == DEFAULT_PERCENTILE else takes_percentile,
    )
    refuse_idle({"--force": force and calibration is None}, "it is about a calibration", "give one with --calibration")
    if typed or implicit:
        check_types(file, header, precision, implicit=implicit)
    elif calibration is None and precision not in ("fp32", "tf32"):
        raise needs_calibration(file, precision)
    stem = engine_stem(file, name)
    target = Path(output) / f"{stem}.{precision}.engine"
    scales_file = Path(cache or target.with_name(f"{stem}.{calibrator or 'entropy2'}.cache"))
    kept = kept_model(target)
    as_it_is = typed or (kept.exists() and kept.samefile(file))
    times = None if timing_cache is None else Path(timing_cache)
    written = [(path, "--output") for path in (target, sidecar_path(target), *([] if as_it_is else [kept]))]
    if data is not None:
        written += [(path, "--cache" if cache else "--output") for path in (scales_file, record_path(scales_file))]
    if times is not None:
        written += [(path, "--timing-cache") for path in (times, record_path(times))]
    check_outputs(written, file, data, calibration)
    kernel_times = None if times is None else TimingCacheFile(times)
    if data is not None:
        check_replaceable(scales_file)
    found = Calibration.load(calibration) if isinstance(calibration, str | os.PathLike) else calibration
    ranges = given_ranges(shapes, batch, inputs)
    if found is not None and not (force and ranges):
        check_calibrated_inputs(file, inputs, found.input_shapes)
    options = BuildOptions(
        precision=precision,
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
        timing_cache=times,
        hardware_compatibility=hardware_compatibility,
        version_compatible=version_compatible,
    )
    feed = None
    if data is None:
        options = _for_shapes(options, engine_profile(file, inputs, ranges, found.input_shapes if found else None))
    else:
        source = open_data(
            data,
            inputs,
            batch_size=batch_size,
            max_batches=max_batches,
            preprocessing=preprocessing,
            data_id=data_id,
        )
        refuse_idle(
            {"--data-id": data_id is not None and source.from_files},
            "files are known by their content",
            "name data that come from code",
        )
        feed = CalibrationFeed(
            calibrator=calibrator or "entropy2",
            data=data,
            source=source,
            cache=scales_file,
            percentile=percentile,
            batch_size=batch_size,
            max_batches=max_batches,
            preprocessing=preprocessing,
            short_batch=short_batch,
        )
    job = _Job(file, header, as_it_is, target, Scales(found, method, percentile, placement, force), track)
    trt = require("tensorrt", "build a TensorRT engine")
    if implicit:
        require_calibrators(trt, file)
    with ExitStack() as stack:
        gpu = device or stack.enter_context(open_device())
        check_driver(gpu)
        if kernel_times is not None and kernel_times.foreign:  # only TensorRT can tell whether it is a timing cache
            kernel_times.attach(trt, open_builder(trt, gpu, file, precision).create_builder_config())
        earlier = earlier_engine(target)
        built = _build_implicit(job, options, gpu, trt, feed, ranges) if implicit else _build_typed(job, options, gpu)
    replaced = replacement_note(earlier, built.sidecar)
    return built if replaced is None else replace(built, notes=(*built.notes, replaced))


@dataclass(frozen=True, slots=True)
class _Job:
    """What is built, and where it goes."""

    model: Path
    header: onnx.ModelProto
    as_it_is: bool
    plan: Path
    scales: Scales
    track: Track

    @contextmanager
    def network(self) -> Iterator[Path]:
        """Give the file that TensorRT is given: the model, or one to be written, which is kept if all goes well."""
        kept = kept_model(self.plan)
        if self.as_it_is:
            yield self.model
            if kept.exists() and not kept.samefile(self.model):
                kept.unlink()  # it is of the engine that this one replaced
            return
        folder = self.plan.parent
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as workshop:
                yield Path(workshop) / kept.name
                for file in Path(workshop).iterdir():
                    file.replace(folder / file.name)
        except BaseException:
            if is_new:
                with suppress(OSError):  # something lies in it
                    folder.rmdir()
            raise


def kept_model(plan: Path) -> Path:
    """Return where the model as TensorRT was given it lies: NAME.engine.onnx beside NAME.engine."""
    return plan.with_name(f"{plan.name}.onnx")


def _build_typed(job: _Job, options: BuildOptions, device: Device) -> BuiltEngine:
    """Give the model its types where it has none, and build it."""
    notes: tuple[str, ...] = ()
    with job.network() as network:
        if job.as_it_is:
            provenance = provenance_of(job.header)
        else:
            provenance, notes = write_typed(job.model, options.precision, job.scales, output=network, track=job.track)
        built = trt_builder.build_engine(
            network, job.plan, options, calibration=provenance, shown=job.model, device=device, track=job.track
        )
    return replace(built, notes=(*notes, *built.notes))


def _build_implicit(
    job: _Job,
    options: BuildOptions,
    device: Device,
    trt: Any,
    feed: CalibrationFeed | None,
    ranges: Profile | None,
) -> BuiltEngine:
    """Build the FP32 model with a calibrator."""
    open_builder(trt, device, job.model, options.precision)  # what it cannot do is said before a pass over the data
    scales = job.scales
    prepared = prepare(job.model)
    noted = prepared.editable()
    with UploadBuffers(device) as buffers, job.network() as network:
        if feed is not None:
            ready = calibrator_of_data(trt, prepared, feed, buffers=buffers, look=ranges is None, track=job.track)
            options = _for_shapes(options, engine_profile(job.model, feed.source.inputs, ranges, ready.seen))
        else:
            if scales.calibration is None:
                raise AssertionError("an implicit build has neither data nor a calibration")
            ready = calibrator_of_calibration(
                trt,
                prepared,
                scales.calibration,
                method=scales.method,
                percentile=scales.percentile,
                force=scales.force,
            )
            note_inputs(noted, scales.calibration.input_statistics)
        if not job.as_it_is:
            save_model(noted, network)
        built = trt_builder.build_engine(
            network,
            job.plan,
            options,
            calibrator=ready.calibrator,
            calibration_shapes=ready.shapes,
            calibration=ready.provenance,
            shown=job.model,
            device=device,
            track=job.track,
        )
    used = None if feed is None else usage_note(feed, ready.calibrator)
    return replace(built, notes=(*ready.notes, *([used] if used else []), *built.notes))


def _for_shapes(options: BuildOptions, profile: Profile | None) -> BuildOptions:
    return replace(options, profiles=() if profile is None else (profile,))
