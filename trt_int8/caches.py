"""What `trt-int8 cache show` and `export` do: look at a calibration or a TensorRT cache, and write the latter."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from calibrators.calibration import DEFAULT_METHOD, DEFAULT_PERCENTILE, Calibration
from calibrators.errors import CalibrationError
from calibrators.tensorrt_cache import ENTROPY_2, MINMAX, TensorRTCache, header_version, release_of, why_unusable
from engines.tensorrt_names import is_tensorrts_own
from trt_int8.cache_diff import is_calibration
from trt_int8.console import make_table
from trt_int8.errors import UsageError
from trt_int8.idle_options import refuse_idle, refuse_idle_percentile
from trt_int8.outputs import check_output
from trt_int8.report_tensors import clipped_share

if TYPE_CHECKING:
    from rich.table import Table

_LISTED = 10

LAST_IMPLICIT_MAJOR = 10
"""TensorRT 11 removed calibrators, and with them the cache."""


def show_table(file: str | os.PathLike[str], percentile: float) -> tuple[Table, list[str]]:
    """Return a table of a calibration or of a TensorRT cache, and lines that summarise it.

    Scales that no engine can use are listed, not refused: looking at a file is how one finds them.

    Raises:
        FileAccessError: the file is missing or unreadable.
        CacheFormatError: the file is neither.
        UsageError: a percentile for a file that holds no histograms.
    """
    asked = {"--percentile": percentile != DEFAULT_PERCENTILE}
    if is_calibration(file):
        calibration = Calibration.load(file)
        if "percentile" not in calibration.searches:
            refuse_idle(asked, "the calibration holds ranges alone", "calibrate without --statistics minmax")
        return _calibration_table(calibration, Path(file).name, percentile)
    refuse_idle(asked, "a TensorRT cache holds the scales of its calibrator alone", "show a calibration")
    return _cache_table(TensorRTCache.load(file), Path(file).name)


def export_cache(
    file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    method: str | None = None,
    percentile: float = 99.99,
    tensorrt_version: str = "10.16.1",
) -> str:
    """Write scales as a TensorRT calibration cache for one version of TensorRT.

    The header names the calibrator that will read it: MinMaxCalibration for "minmax", EntropyCalibration2 for
    everything else, since TensorRT 10 accepts any scales from a cache of that algorithm. The scales of another
    version's cache keep their algorithm.

    Args:
        file: a calibration, or the cache of another version.
        output: the file to write.
        method: whose scales of a calibration, "entropy" where None; a cache has those that it has.
        percentile: of the method "percentile".
        tensorrt_version: such as "8.6.1", three numbers at least; its header tells versions apart.

    Returns:
        One line that says what was written.

    Raises:
        CalibrationError: TensorRT of that version has no calibrators, the method is unknown, or a scale cannot be used.
        ConfigError: `output` is the calibration itself.
        UsageError: a method or percentile for a TensorRT cache, or a percentile for another method.
    """
    check_output(output, file)
    if is_calibration(file):
        calibration, method = Calibration.load(file), method or DEFAULT_METHOD
        refuse_idle_percentile(percentile, method)
        cache = tensorrt_cache(calibration, method=method, percentile=percentile, tensorrt_version=tensorrt_version)
        origin = method
    else:
        old = TensorRTCache.load(file)
        if method is not None:
            raise UsageError(
                f"--method {method} says which scales of a calibration to take; {os.fspath(file)!r} is a TensorRT "
                f"cache, which holds those of {old.algorithm} alone. Leave it out."
            )
        refuse_idle(
            {"--percentile": percentile != DEFAULT_PERCENTILE},
            "a TensorRT cache holds the scales of its calibrator alone",
            "export a calibration",
        )
        cache = _usable(TensorRTCache(_implicit_version(tensorrt_version), old.algorithm, old.scales))
        origin = f"{old.algorithm} of TensorRT {release_of(old.version)}"
    cache.save(output)
    return f"{os.fspath(output)}: {len(cache.scales)} scales, {origin}, for TensorRT {tensorrt_version}"


def tensorrt_cache(calibration: Calibration, *, method: str, percentile: float, tensorrt_version: str) -> TensorRTCache:
    """Turn a calibration into the content of a TensorRT calibration cache; see `export_cache`."""
    scales = calibration.scales(method, percentile=percentile)
    version = _implicit_version(tensorrt_version)
    return _usable(TensorRTCache(version, MINMAX if method == "minmax" else ENTROPY_2, scales))


def _implicit_version(tensorrt_version: str) -> int:
    """Return the number of a version's header; CalibrationError where that version reads no cache."""
    major = tensorrt_version.split(".", maxsplit=1)[0]
    if major.isdecimal() and int(major) > LAST_IMPLICIT_MAJOR:
        raise CalibrationError(
            f"TensorRT {tensorrt_version} has no calibrators and reads no calibration cache; the last one that does is "
            "10.x. Use a Q/DQ model there: `trt-int8 quantize`."
        )
    return header_version(tensorrt_version)


def _usable(cache: TensorRTCache) -> TensorRTCache:
    if cache.unusable:
        shown = ", ".join(f"{name} is {why_unusable(cache.scales[name])}" for name in cache.unusable[:_LISTED])
        more = f" and {len(cache.unusable) - _LISTED} more" if len(cache.unusable) > _LISTED else ""
        raise CalibrationError(
            f"Cannot write a calibration cache: {len(cache.unusable)} scales cannot be used: {shown}{more}; expected "
            "finite numbers above zero. Calibrate again with `trt-int8 calibrate`."
        )
    return cache


def _calibration_table(calibration: Calibration, name: str, percentile: float) -> tuple[Table, list[str]]:
    searches = calibration.searches
    amax = {method: calibration.amax(method, percentile=percentile) for method in searches}
    scales = {method: calibration.scales(method, percentile=percentile) for method in searches}
    rows = []
    for tensor in calibration.tensors:
        found = calibration.magnitude_range(tensor)
        zeros = 100 * found.zeros / found.count if found.count else 0.0
        cells = [tensor, f"{found.minimum:.5g}", f"{found.maximum:.5g}", f"{zeros:.1f}"]
        for method in searches:
            cells.append(f"{scales[method][tensor]:.5g}")
            if method != "minmax":  # clips nothing
                cells.append(_percent(100 * clipped_share(calibration.histogram(tensor), amax[method][tensor])))
        rows.append(cells)
    columns = ["tensor", "min", "max", "zeros %", "minmax"]
    for method in searches[1:]:
        columns += [f"percentile\n{percentile:g}" if method == "percentile" else method, "clip %"]
    fingerprint = calibration.fingerprint
    lines = [
        f"{len(calibration.tensors)} tensors, {fingerprint.batches} batches, {fingerprint.samples} samples",
        f"made by trt-int8 {fingerprint.tool}",
        f"graph {fingerprint.graph[:16]}, weights {fingerprint.weights[:16]}",
        f"data {', '.join(part[:16] or 'unknown' for part in fingerprint.data)}",
        f"preprocessing {fingerprint.preprocessing or 'none'}",
    ]
    if calibration.statistics == "minmax":
        lines.append("ranges alone (--statistics minmax): it serves the method minmax")
    lines += [f"always 0: {tensor} (its scale is 1)" for tensor in calibration.always_zero]
    return make_table(f"{name}: scales by method, and the share of values that each clips", columns, rows), lines


def _percent(share: float) -> str:
    """Format per cent in a narrow column; a share too small to show is not shown as none."""
    return "0" if share == 0 else "<0.001" if share < 0.0005 else f"{share:.3f}" if share < 10 else f"{share:.1f}"


def _cache_table(cache: TensorRTCache, name: str) -> tuple[Table, list[str]]:
    rows = [(tensor, f"{scale:.6g}", f"{scale * 127:.6g}") for tensor, scale in cache.scales.items()]
    own = sum(map(is_tensorrts_own, cache.scales))
    fingerprint = hashlib.sha256(cache.to_bytes()).hexdigest()[:16]
    origin = f"TensorRT {release_of(cache.version)} (version {cache.version}), algorithm {cache.algorithm}"
    lines = [
        f"{len(cache.scales)} scales, {own} of tensors that TensorRT named itself; {origin}; fingerprint {fingerprint}"
    ]
    for tensor in cache.unusable:
        scale = cache.scales[tensor]
        lines.append(f"unusable: the scale of {tensor} is {why_unusable(scale)} ({scale:g})")
    return make_table(f"{name}: TensorRT calibration cache", ("tensor", "scale", "amax"), rows), lines
