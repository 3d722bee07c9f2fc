"""Histograms of many tensors, or their ranges, in one `.npz` file.

The arrays of all tensors are laid end to end; tensor k owns the entries offsets[k] to offsets[k + 1] of `bins` and
`counts`:

    header    uint8            UTF-8 JSON: {"format", "version", "tensors": [names], ...}
    offsets   int64 (T + 1,)
    bins      int32 (n,)       non-empty bins of finite magnitudes, ascending within a tensor
    counts    int64 (n,)
    minimum, maximum  float32 (T,)      zeros, nonfinite  int64 (T,)

Version 2 of the format holds ranges alone (`calibrators.magnitude_range`): `count`, int64 (T,), instead of `offsets`,
`bins` and `counts`. Files of histograms stay at version 1.

Nothing in it is pickled. Entries carry a fixed date, so that equal content gives equal bytes.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.errors import CacheFormatError
from calibrators.files import atomic_path, read_bytes
from calibrators.histogram import FINITE_BINS, MagnitudeHistogram
from calibrators.magnitude_range import MagnitudeRange

FORMAT = "trt-int8 calibration"
VERSION = 1
RANGES_VERSION = 2

_LARGEST_HEADER = 256 * 2**20
"""Bytes; the description of a thousand tensors takes one million."""

_LARGEST_NPY_HEADER = 10_000
"""Bytes; what numpy itself takes for safe."""

_EARLIEST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
_COMPRESSION = 1
"""Bins are runs of neighbours and counts mostly small: the fastest level already gets most of what there is to gain."""


def save_histograms(
    path: str | os.PathLike[str], histograms: Mapping[str, MagnitudeHistogram], description: Mapping[str, Any]
) -> None:
    """Write the histograms of all tensors, in their order, with a description that JSON can hold.

    Raises:
        FileAccessError: the file cannot be written.
    """
    parts = list(histograms.values())
    arrays: dict[str, NDArray[Any]] = {
        "offsets": np.cumsum([0, *(part.bins.size for part in parts)], dtype=np.int64),
        "bins": np.concatenate([np.zeros(0, np.int32), *(part.bins for part in parts)]),
        "counts": np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)]),
    }
    _save(path, {"version": VERSION, "tensors": list(histograms), **description}, arrays, parts)


def save_ranges(
    path: str | os.PathLike[str], ranges: Mapping[str, MagnitudeRange], description: Mapping[str, Any]
) -> None:
    """Write the ranges of all tensors; as `save_histograms`."""
    parts = list(ranges.values())
    arrays: dict[str, NDArray[Any]] = {"count": np.array([part.count for part in parts], dtype=np.int64)}
    _save(path, {"version": RANGES_VERSION, "tensors": list(ranges), **description}, arrays, parts)


def _save(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    parts: Sequence[MagnitudeHistogram | MagnitudeRange],
) -> None:
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True)
    arrays = {
        "header": np.frombuffer(text.encode(), dtype=np.uint8),
        **arrays,
        "minimum": np.array([part.minimum for part in parts], dtype=np.float32),
        "maximum": np.array([part.maximum for part in parts], dtype=np.float32),
        "zeros": np.array([part.zeros for part in parts], dtype=np.int64),
        "nonfinite": np.array([part.nonfinite for part in parts], dtype=np.int64),
    }
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_EARLIEST_ZIP_DATE)
            archive.writestr(entry, stream.getbuffer(), zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION)


Loaded = dict[str, MagnitudeHistogram] | dict[str, MagnitudeRange]


def load_histograms(path: str | os.PathLike[str]) -> tuple[Loaded, dict[str, Any]]:
    """Read what `save_histograms` or `save_ranges` wrote.

    Returns:
        The histograms or ranges by tensor name, and the whole header, which holds the description.

    Raises:
        FileAccessError: there is no such file, or it cannot be read.
        CacheFormatError: it is damaged, is not such a file, or was written by another version of the format.
    """
    data = read_bytes(path, "the calibration")
    try:
        return _parse(data)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CacheFormatError(
            f"Cannot read calibration {os.fspath(path)!r}: {reason}; expected a .npz file that `trt-int8 calibrate` "
            "wrote. Calibrate again, or name the right file."
        ) from error


_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError),  # not a zip archive, or cut off, or damaged
    *(NotImplementedError, RuntimeError),  # a zip archive that is encrypted or compressed in another way
    *(KeyError, TypeError, ValueError, OverflowError),  # other arrays, another header, numbers that do not fit
)


def _parse(data: bytes) -> tuple[Loaded, dict[str, Any]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        header = json.loads(_read_array(archive, "header", np.uint8).tobytes())
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError("its header is not that of a calibration")
        version = header.get("version")
        if version not in (VERSION, RANGES_VERSION):
            raise ValueError(
                f"it has format version {version} and this version of trt-int8 reads versions {VERSION} and "
                f"{RANGES_VERSION}"
            )
        names = header["tensors"]
        if version == RANGES_VERSION:
            return _ranges(archive, names), header
        offsets = _read_array(archive, "offsets", np.int64, len(names) + 1)
        if offsets[0] != 0 or np.any(np.diff(offsets) < 0) or np.any(np.diff(offsets) > FINITE_BINS):
            raise ValueError("its offsets do not ascend from 0 in steps that histograms have")
        bins = _read_array(archive, "bins", np.int32, offsets[-1])
        counts = _read_array(archive, "counts", np.int64, offsets[-1])
        minimum = _read_array(archive, "minimum", np.float32, len(names))
        maximum = _read_array(archive, "maximum", np.float32, len(names))
        zeros = _read_array(archive, "zeros", np.int64, len(names))
        nonfinite = _read_array(archive, "nonfinite", np.int64, len(names))
    histograms = {
        str(name): MagnitudeHistogram(
            # Copies, since a view would keep the arrays of all tensors alive.
            bins=bins[start:stop].copy(),
            counts=counts[start:stop].copy(),
            minimum=float(minimum[k]),
            maximum=float(maximum[k]),
            zeros=int(zeros[k]),
            nonfinite=int(nonfinite[k]),
        )
        for k, (name, start, stop) in enumerate(zip(names, offsets[:-1], offsets[1:], strict=True))
    }
    if len(histograms) != len(names):
        raise ValueError("it names a tensor twice")
    return histograms, header


def _ranges(archive: zipfile.ZipFile, names: Sequence[str]) -> dict[str, MagnitudeRange]:
    count, zeros, nonfinite = (
        _read_array(archive, what, np.int64, len(names)) for what in ("count", "zeros", "nonfinite")
    )
    minimum, maximum = (_read_array(archive, what, np.float32, len(names)) for what in ("minimum", "maximum"))
    ranges = {
        str(name): MagnitudeRange(
            int(count[k]), float(minimum[k]), float(maximum[k]), zeros=int(zeros[k]), nonfinite=int(nonfinite[k])
        )
        for k, name in enumerate(names)
    }
    if len(ranges) != len(names):
        raise ValueError("it names a tensor twice")
    return ranges


def _read_array(archive: zipfile.ZipFile, name: str, dtype: type[np.generic], size: int | None = None) -> NDArray[Any]:
    """Read one array, of so many entries where that is known; what it says of its size is not believed."""
    expected = np.dtype(dtype)
    limit = _LARGEST_HEADER if size is None else int(size) * expected.itemsize + _LARGEST_NPY_HEADER
    length = archive.getinfo(f"{name}.npy").file_size
    if length > limit:
        raise ValueError(f"its array {name!r} takes {length} bytes, more than the {limit} that it could need")
    # The entry is read whole before it is parsed, so that its checksum is known to be right.
    content = archive.read(f"{name}.npy")
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"its array {name!r} is of another version of numpy's format")
    shape, _, found = np.lib.format.read_array_header_1_0(stream)
    held = (length - stream.tell()) // expected.itemsize
    if found != expected or shape != (held if size is None else size,) or shape != (held,):
        raise ValueError(f"its array {name!r} is {found}{list(shape)}")
    return np.frombuffer(content, expected, held, stream.tell())
