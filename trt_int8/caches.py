"""What `trt-int8 cache` does: show a calibration, and write it in TensorRT's format."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from calibrators.calibration import SEARCHES, Calibration
from calibrators.errors import CalibrationError
from calibrators.files import read_bytes
from calibrators.tensorrt_cache import ENTROPY_2, MINMAX, TensorRTCache, header_version
from trt_int8.console import make_table
from trt_int8.outputs import check_output

if TYPE_CHECKING:
    from rich.table import Table

LAST_IMPLICIT_MAJOR = 10
"""TensorRT 11 removed calibrators, and with them the cache."""


def show_table(file: str | os.PathLike[str], percentile: float) -> tuple[Table, list[str]]:
    """Return a table of a calibration or of a TensorRT cache, and lines that summarise it.

    Scales that no engine can use are listed, not refused: looking at a file is how one finds them.

    Raises:
        FileAccessError: the file is missing or unreadable.
        CacheFormatError: the file is neither.
    """
    if read_bytes(file, "the calibration")[:2] == b"PK":
        return _calibration_table(Calibration.load(file), Path(file).name, percentile)
    return _cache_table(TensorRTCache.load(file), Path(file).name)


def export_cache(
    file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    method: str = "entropy",
    percentile: float = 99.99,
    tensorrt_version: str = "10.16.1",
) -> str:
    """Write a calibration's scales as a TensorRT calibration cache.

    The header names the calibrator that will read it: MinMaxCalibration for "minmax", EntropyCalibration2 for
    everything else, since TensorRT 10 accepts any scales from a cache of that algorithm.

    Returns:
        One line that says what was written.

    Raises:
        CalibrationError: TensorRT of that version has no calibrators, or the method is unknown.
        ConfigError: `output` is the calibration itself.
    """
    check_output(output, file)
    calibration = Calibration.load(file)
    cache = tensorrt_cache(calibration, method=method, percentile=percentile, tensorrt_version=tensorrt_version)
    cache.save(output)
    return f"{os.fspath(output)}: {len(cache.scales)} scales, {method}, for TensorRT {tensorrt_version}"


def tensorrt_cache(calibration: Calibration, *, method: str, percentile: float, tensorrt_version: str) -> TensorRTCache:
    """Turn a calibration into the content of a TensorRT calibration cache; see `export_cache`."""
    version = header_version(tensorrt_version)
    if int(tensorrt_version.split(".", maxsplit=1)[0]) > LAST_IMPLICIT_MAJOR:
        raise CalibrationError(
            f"TensorRT {tensorrt_version} has no calibrators and reads no calibration cache; the last one that does is "
            "10.x. Use a Q/DQ model there: `trt-int8 quantize`."
        )
    return TensorRTCache(
        version, MINMAX if method == "minmax" else ENTROPY_2, calibration.scales(method, percentile=percentile)
    )


def _calibration_table(calibration: Calibration, name: str, percentile: float) -> tuple[Table, list[str]]:
    scales = {method: calibration.scales(method, percentile=percentile) for method in SEARCHES}
    rows = []
    for tensor in calibration.tensors:
        histogram = calibration.histogram(tensor)
        zeros = 100 * histogram.zeros / histogram.count if histogram.count else 0.0
        rows.append(
            (
                tensor,
                f"{histogram.minimum:.5g}",
                f"{histogram.maximum:.5g}",
                f"{zeros:.1f}",
                *(f"{scales[method][tensor]:.6g}" for method in SEARCHES),
            )
        )
    columns = ("tensor", "min", "max", "zeros %", "minmax", "entropy", f"percentile {percentile:g}", "mse")
    fingerprint = calibration.fingerprint
    lines = [
        f"{len(calibration.tensors)} tensors, {fingerprint.batches} batches, {fingerprint.samples} samples",
        f"made by trt-int8 {fingerprint.tool}",
        f"graph {fingerprint.graph[:16]}, weights {fingerprint.weights[:16]}",
        f"data {', '.join(part[:16] or 'unknown' for part in fingerprint.data)}",
    ]
    lines += [f"always 0: {tensor} (its scale is 1)" for tensor in calibration.always_zero]
    return make_table(f"{name}: scales by method", columns, rows), lines


def _cache_table(cache: TensorRTCache, name: str) -> tuple[Table, list[str]]:
    rows = [(tensor, f"{scale:.6g}", f"{scale * 127:.6g}") for tensor, scale in cache.scales.items()]
    lines = [f"{len(cache.scales)} scales, TensorRT version {cache.version}, algorithm {cache.algorithm}"]
    for tensor in cache.unusable:
        scale = cache.scales[tensor]
        kind = "zero" if scale == 0 else "negative" if math.isfinite(scale) else "not finite"
        lines.append(f"unusable: the scale of {tensor} is {kind} ({scale:g})")
    return make_table(f"{name}: TensorRT calibration cache", ("tensor", "scale", "amax"), rows), lines
