"""TensorRT's own calibrators: subclasses of its calibrator classes, for implicit INT8 on TensorRT 10 and older.

Two of them stream batches, from which TensorRT takes the scales by its own algorithm; `streaming_calibrator` makes
them. A third hands TensorRT scales that are already known, such as those of `Calibration.scales`, as a calibration
cache, and delivers no batch; `scales_calibrator` makes it. That is the way for the percentile, MSE and auto methods, as
TensorRT's own percentile calibrator (the legacy one) fails on common networks.

TensorRT swallows what a callback raises: it prints the exception, takes it for the end of the data, and builds an
engine from what it has got so far. So a calibrator keeps the first error, and who builds the engine re-raises it:

    plan = builder.build_serialized_network(network, config)
    calibrator.raise_error()

A progress monitor that stops the build once `calibrator.error` is set saves the time that such an engine would take.

The module `tensorrt` is handed in, never imported here; its calibrator classes do not exist in TensorRT 11 any more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from calibrators.errors import CalibrationError
from calibrators.protocols import Array, CalibrationBatch, DeviceBuffers, Track, untracked
from calibrators.tensorrt_batches import ShortBatch, device_batches
from calibrators.tensorrt_cache import ENTROPY_2, TensorRTCache, header_version
from calibrators.tensorrt_cache_file import CacheFile, CacheOrigin

STREAMING_CALIBRATORS = {"entropy2": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}
"""Name of a streaming calibrator to TensorRT's base class."""

_log = logging.getLogger(__name__)


class ImplicitCalibrator:
    """What all calibrators here have in common; TensorRT's base class comes behind it in the order of inheritance.

    Attributes:
        error: the first exception in a callback.
        notes: what the user should know about this calibration, one line each.
        batches_delivered: number of batches that TensorRT was given.
        cache: content of the calibration cache that TensorRT read or wrote; None before.
        consulted: whether TensorRT called the calibrator at all; it does not where a network holds Q/DQ nodes.
    """

    def __init__(self) -> None:
        super().__init__()  # TensorRT's class: without this call the process crashes
        self.error: BaseException | None = None
        self.notes: list[str] = []
        self.batches_delivered = 0
        self.cache: bytes | None = None
        self.consulted = False

    def get_batch_size(self) -> int:
        """Return 1: the batch is an explicit dimension of the network, so TensorRT multiplies nothing by this."""
        self.consulted = True
        return 1

    def raise_error(self) -> None:
        """Re-raise the first exception of a callback, if there was one."""
        if self.error is not None:
            raise self.error

    def _record(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error

    def _note(self, text: str) -> None:
        self.notes.append(text)
        _log.warning(text)


Calibrator = TypeVar("Calibrator", bound=ImplicitCalibrator)


class StreamingCalibrator(ImplicitCalibrator):
    """Streams batches to the device, one for each call of TensorRT; made by `streaming_calibrator`."""

    def __init__(
        self,
        batches: Iterable[CalibrationBatch],
        *,
        buffers: DeviceBuffers,
        batch_size: int,
        short_batch: ShortBatch,
        cache_file: CacheFile | None,
        total: int | None,
        track: Track,
    ) -> None:
        super().__init__()
        self._batches = batches
        self._buffers = buffers
        self._batch_size = batch_size
        self._short_batch = short_batch
        self._cache_file = cache_file
        self._total = total
        self._track = track
        self._stream: Iterator[dict[str, Array]] | None = None

    def read_calibration_cache(self) -> bytes | None:
        """Return the cache of an earlier calibration where it still fits, None to make TensorRT calibrate."""
        try:
            if self._cache_file is not None:
                self.cache, reason = self._cache_file.read()
                if reason:
                    self._note(f"Calibrating anew, {str(self._cache_file.path)!r} is not used: {reason}.")
        except BaseException as error:
            self._record(error)
        return self.cache

    def get_batch(self, names: Sequence[str]) -> list[int] | None:
        """Upload the next batch.

        Args:
            names: the network's inputs.

        Returns:
            Their device addresses in the order of `names`; None when there are no more batches, or after an error.
        """
        if self.error is not None:
            return None
        try:
            if self._stream is None:
                self._stream = device_batches(
                    self._track(self._batches, "calibrate", self._total),
                    tuple(names),
                    batch_size=self._batch_size,
                    short_batch=self._short_batch,
                    report=self._note,
                )
            feeds = next(self._stream, None)
            if feeds is None:
                return None
            addresses = [self._buffers.upload(name, feeds[name]) for name in names]
        except BaseException as error:
            self._record(error)
            return None
        self.batches_delivered += 1
        return addresses

    def write_calibration_cache(self, cache: memoryview) -> None:
        """Keep what TensorRT made of the batches, unless an error cut them short."""
        if self.error is not None:
            return
        try:
            self.cache = bytes(cache)  # the memory behind it is TensorRT's, and valid during this call only
            if self._cache_file is not None:
                self._cache_file.write(self.cache, self.batches_delivered)
        except BaseException as error:
            self._record(error)


class ScalesCalibrator(ImplicitCalibrator):
    """Serves known scales as a calibration cache and never delivers a batch; made by `scales_calibrator`."""

    def __init__(self, cache: TensorRTCache) -> None:
        super().__init__()
        self._served = cache

    def read_calibration_cache(self) -> bytes:
        """Return the scales in TensorRT's format."""
        self.cache = self._served.to_bytes()
        return self.cache

    def get_batch(self, names: Sequence[str]) -> None:
        """Record an error: TensorRT asks for batches only where it has not taken the cache."""
        self._record(
            CalibrationError(
                f"TensorRT did not take the {len(self._served.scales)} scales: it refused the calibration cache "
                f"TRT-{self._served.version}-{self._served.algorithm} and asked for {', '.join(map(repr, names))}; "
                "expected it to build without calibration data. TensorRT's log says why."
            )
        )

    def write_calibration_cache(self, cache: memoryview) -> None:
        """Keep nothing: the scales are the ones that were served."""


def streaming_calibrator(
    trt: Any,
    kind: str,
    batches: Iterable[CalibrationBatch],
    *,
    buffers: DeviceBuffers,
    batch_size: int,
    cache_path: str | os.PathLike[str] | None = None,
    origin: CacheOrigin | None = None,
    short_batch: ShortBatch = "drop",
    total: int | None = None,
    track: Track = untracked,
) -> StreamingCalibrator:
    """Make a calibrator whose scales TensorRT computes from a stream of batches.

    Floating inputs are uploaded as float32, whatever the network's type: TensorRT calibrates a float32 build of it.
    int32, int64 and bool inputs are kept.

    Args:
        trt: the module `tensorrt`, version 10 or older.
        kind: one of `STREAMING_CALIBRATORS`: "entropy2" or "minmax".
        batches: the stream; iterated once, and not before TensorRT asks for a batch. Further arrays in it are ignored.
        buffers: device memory; open as long as the calibrator is in use.
        batch_size: samples that each batch must hold, as in the network or its calibration profile.
        cache_path: where TensorRT's calibration cache is kept, beside it `<cache_path>.json` with its fingerprint.
        origin: what the batches and the model are. Without it a cache is written, but never read back.
        short_batch: a batch with fewer samples is left out ("drop"), or filled up by repeating its samples ("pad").
        total: number of batches, where it is known; part of the fingerprint.
        track: shows the progress.

    Raises:
        CalibrationError: this TensorRT has no calibrators, or an argument is not one of those named above.
        CacheFormatError: a file of something else lies where the cache or its fingerprint is to be written.
    """
    if kind not in STREAMING_CALIBRATORS:
        raise CalibrationError(f"There is no calibrator {kind!r}: expected {' or '.join(STREAMING_CALIBRATORS)}.")
    if short_batch not in ("drop", "pad"):
        raise CalibrationError(f"Cannot {short_batch!r} a short batch: expected 'drop' or 'pad'.")
    if batch_size < 1:
        raise CalibrationError(f"The batch size of the calibration is {batch_size}; expected at least 1.")
    calibrator = _calibrator_class(trt, StreamingCalibrator, STREAMING_CALIBRATORS[kind])
    cache_file = None
    if cache_path is not None:
        settings = {"calibrator": kind, "batch_size": batch_size, "short_batch": short_batch, "total": total}
        cache_file = CacheFile(Path(cache_path), origin, {**settings, "tensorrt": str(trt.__version__)})
    return calibrator(
        batches,
        buffers=buffers,
        batch_size=batch_size,
        short_batch=short_batch,
        cache_file=cache_file,
        total=total,
        track=track,
    )


def scales_calibrator(trt: Any, scales: Mapping[str, float]) -> ScalesCalibrator:
    """Make a calibrator that gives TensorRT known scales: no calibration data, no passes.

    Args:
        trt: the module `tensorrt`, version 10 or older.
        scales: tensor name to scale = amax / 127. A tensor of the network that is missing stays in floating point;
            names that the network does not have are ignored by TensorRT.

    Raises:
        CalibrationError: this TensorRT has no calibrators; or there is no scale, or one that is not a finite number
            above zero in float32, with its tensor named.
    """
    calibrator = _calibrator_class(trt, ScalesCalibrator, "IInt8EntropyCalibrator2")
    cache = TensorRTCache(header_version(str(trt.__version__)), ENTROPY_2, scales)
    if not cache.scales:
        raise CalibrationError("Cannot build from scales: there are none; expected one for each activation.")
    if cache.unusable:
        name = cache.unusable[0]
        raise CalibrationError(
            f"Cannot build from the scales: {len(cache.unusable)} of {len(cache.scales)} are not usable, the first is "
            f"{cache.scales[name]} of tensor {name!r}; expected finite numbers above zero. Calibrate again."
        )
    return calibrator(cache)


def _calibrator_class(trt: Any, behaviour: type[Calibrator], base_name: str) -> type[Calibrator]:
    """Derive a calibrator class from one of TensorRT's, which exist up to TensorRT 10."""
    base = getattr(trt, base_name, None)
    if base is None:
        raise CalibrationError(
            f"TensorRT {trt.__version__} has no calibrators: {base_name} was removed in TensorRT 11; expected 10 or "
            "older. Put the scales into the model instead: run trt-int8 quantize, then build its result without "
            "--implicit."
        )
    return cast("type[Calibrator]", type(behaviour.__name__, (behaviour, base), {"__module__": __name__}))
