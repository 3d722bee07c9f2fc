"""INT8 by TensorRT's own calibrators ("implicit"), on TensorRT 10 and older: where their scales come from.

A calibrator either streams data, from which TensorRT takes the scales by its own algorithm, or serves scales that are
known already. The percentile calibrator is of the second kind, as TensorRT's own one fails on common networks: it makes
a pass over the data itself where no cache of an earlier one fits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calibrators.calibration import Calibration, InputShapes
from calibrators.protocols import DeviceBuffers, Track
from calibrators.tensorrt import ImplicitCalibrator, scales_calibrator, streaming_calibrator
from calibrators.tensorrt_batches import ShortBatch
from calibrators.tensorrt_cache import ENTROPY_2, TensorRTCache, header_version
from calibrators.tensorrt_cache_file import CacheFile, CacheOrigin
from engines.calibrated_tensors import tensors_to_calibrate
from engines.graph import PreparedModel
from engines.profiles import dynamic_inputs
from engines.sidecar import Provenance
from trt_int8 import __version__
from trt_int8.calibration import calibrate, check_fits
from trt_int8.data import BatchSource, DataBatch, DataSpec
from trt_int8.feeds import batch_input
from trt_int8.quantization import method_name

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

CalibratorName = Literal["entropy2", "minmax", "percentile"]
"""TensorRT's entropy and min-max calibrators, and the percentile calibrator of this program."""

_LISTED = 5
"""Tensors that a note names before it only counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFeed:
    """The data of a calibrator, and how it reads them.

    Attributes:
        calibrator: which one.
        data: DATA, as the user gave it.
        source: the same, opened for the model.
        cache: file that keeps the scales between builds.
        percentile: of the percentile calibrator.
        batch_size: as the user gave it.
        max_batches: read no more batches than this.
        preprocessing: how images become arrays.
        short_batch: what a streaming calibrator does with a batch that lacks samples.
    """

    calibrator: CalibratorName
    data: DataSpec
    source: BatchSource
    cache: Path
    percentile: float
    batch_size: int | None
    max_batches: int | None
    preprocessing: Preprocessing | None
    short_batch: ShortBatch


@dataclass(frozen=True, slots=True)
class ReadyCalibrator:
    """A calibrator that a build can be given.

    Attributes:
        calibrator: the calibrator.
        seen: model input to the shapes of its data, each with its number of batches; empty where nothing was looked at.
        shapes: model input to the shape of the batches that the calibrator delivers; None where it delivers none.
        provenance: where the scales come from.
        notes: what the user should know.
    """

    calibrator: ImplicitCalibrator
    seen: InputShapes
    shapes: Mapping[str, Sequence[int]] | None
    provenance: Provenance
    notes: tuple[str, ...] = ()


def calibrator_of_calibration(
    trt: Any, prepared: PreparedModel, calibration: Calibration, *, method: str, percentile: float, force: bool
) -> ReadyCalibrator:
    """Make a calibrator that serves a calibration's scales.

    Activations that the calibration does not hold stay in floating point; a note counts them and names the first ones.

    Raises:
        CalibrationError: the calibration belongs to another model, or holds a scale that cannot be used.
    """
    if not force:
        check_fits(calibration, prepared)
    calibrator = scales_calibrator(trt, calibration.scales(method, percentile=percentile))
    provenance = Provenance(method_name(method, percentile), calibration.sha256)
    every = tensors_to_calibrate(prepared, "all")
    missing = [name for name in every if name not in set(calibration.tensors)]
    notes = []
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        notes.append(
            f"{len(missing)} of {len(every)} activations have no scale, and what reads or writes them stays in "
            f"floating point: {', '.join(missing[:_LISTED])}{more}. "
            "Calibrate with --tensors all to give each of them one."
        )
    return ReadyCalibrator(calibrator, calibration.input_shapes, None, provenance, tuple(notes))


def calibrator_of_data(
    trt: Any, prepared: PreparedModel, feed: CalibrationFeed, *, buffers: DeviceBuffers, look: bool, track: Track
) -> ReadyCalibrator:
    """Make a calibrator that takes its scales from data.

    Args:
        trt: the module `tensorrt`, version 10 or older.
        prepared: the FP32 model.
        feed: the data.
        buffers: device memory; open until the engine is built.
        look: whether the shapes of the first batch are needed, as nobody said which shapes the engine is for.
        track: shows the progress.

    Raises:
        DataError: the data do not fit the model, or would have to be read twice and can be read only once.
        Exception: whatever the user's own code raises.
    """
    if feed.calibrator == "percentile":
        return _percentile(trt, prepared, feed, look, track)
    first, batches = _look(feed.source)
    shapes = _batch_shapes(first, feed.source)
    leader = batch_input(feed.source.inputs)
    calibrator = streaming_calibrator(
        trt,
        feed.calibrator,
        batches,
        buffers=buffers,
        batch_size=1 if leader is None else shapes[leader.name][0],
        cache_path=feed.cache,
        origin=_origin(prepared, feed),
        short_batch=feed.short_batch,
        total=feed.source.batches,
        track=track,
    )
    provenance = Provenance(f"{feed.calibrator} (TensorRT)", None)
    return ReadyCalibrator(calibrator, {name: {shape: 1} for name, shape in shapes.items()}, shapes, provenance)


def usage_note(feed: CalibrationFeed, calibrator: ImplicitCalibrator) -> str | None:
    """Say after the build how a streaming calibrator came by its scales; None for the percentile calibrator."""
    if feed.calibrator == "percentile":
        return None
    if calibrator.batches_delivered:
        count = calibrator.batches_delivered
        return f"TensorRT's {feed.calibrator} calibrator read {count} batches; its scales are kept in {feed.cache}."
    return f"The scales were read back from {feed.cache}; no batch was calibrated on."


def _percentile(trt: Any, prepared: PreparedModel, feed: CalibrationFeed, look: bool, track: Track) -> ReadyCalibrator:
    source = feed.source
    shapes: Mapping[str, tuple[int, ...]] = {}
    if look and dynamic_inputs(source.inputs):
        source.require_rewindable("to see the shapes that the engine is for, and to calibrate")
        shapes = _batch_shapes(_look(source)[0], source)
    settings = {"calibrator": "percentile", "percentile": feed.percentile, "batch_size": source.batch_size}
    file = CacheFile(feed.cache, _origin(prepared, feed), {**settings, "total": source.batches})
    content, reason = file.read()
    notes = []
    if content is not None:
        calibrator = scales_calibrator(trt, TensorRTCache.from_bytes(content).scales)
        notes.append(f"The scales were read back from {feed.cache}; no pass over the data was made.")
    else:
        if reason:
            notes.append(f"Calibrating anew, {str(feed.cache)!r} is not used: {reason}.")
        calibration = calibrate(
            prepared.path,
            feed.data,
            tensors="all",
            batch_size=feed.batch_size,
            max_batches=feed.max_batches,
            preprocessing=feed.preprocessing,
            track=track,
        )
        scales = calibration.scales("percentile", percentile=feed.percentile)
        calibrator = scales_calibrator(trt, scales)
        batches = calibration.fingerprint.batches
        file.write(TensorRTCache(header_version(str(trt.__version__)), ENTROPY_2, scales).to_bytes(), batches)
        notes.append(
            f"The percentile calibrator made a pass of its own over {batches} batches; its scales are kept in "
            f"{feed.cache}."
        )
    provenance = Provenance(method_name("percentile", feed.percentile), None)
    seen = {name: {shape: 1} for name, shape in shapes.items()}
    return ReadyCalibrator(calibrator, seen, None, provenance, tuple(notes))


def _look(source: BatchSource) -> tuple[DataBatch, Iterable[DataBatch]]:
    """Return the first batch, and all of them."""
    batches = iter(source)
    first = next(batches)
    return first, chain([first], batches)


def _batch_shapes(first: DataBatch, source: BatchSource) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a full batch: of what the data are cut into, or else of the first one."""
    leader = batch_input(source.inputs)
    rows = 1 if leader is None else len(first.feeds[leader.name])

    def full(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (source.batch_size or rows, *shape[1:]) if shape[:1] == (rows,) else shape

    return {name: full(array.shape) for name, array in first.feeds.items()}


def _origin(prepared: PreparedModel, feed: CalibrationFeed) -> CacheOrigin:
    data = feed.source.data_hash
    if data is not None and feed.source.batches is None:
        data = f"{data}, at most {feed.max_batches} batches"  # only a pass tells how many there are
    model = hashlib.sha256(f"{prepared.graph_hash} {prepared.weights_hash}".encode()).hexdigest()
    return CacheOrigin(model=model, data=data, preprocessing=feed.source.preprocessing, tool=__version__)
