"""TensorRT's calibration cache: the text file in which calibrators of TensorRT 10 and older keep their scales.

    TRT-101601-EntropyCalibration2         TRT-<version>-<algorithm>
    input_1:0: 3c010a14                    <tensor>: <scale>

The scale is amax / 127 as the bits of a float32, in hexadecimal without leading zeros; zero is written as "0". A
tensor's name may hold colons and spaces, so a line is split at its last ": ". A file that gives a tensor two scales
is refused, as nothing says which of them TensorRT would use.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import numpy as np

from calibrators.errors import CacheFormatError, CalibrationError
from calibrators.files import read_bytes, write_bytes
from calibrators.foreign_tables import kind_of

ENTROPY_2 = "EntropyCalibration2"
MINMAX = "MinMaxCalibration"

_HEADER = re.compile(r"TRT-([0-9]+)-([A-Za-z0-9_]+)")
_HEX = re.compile(r"[0-9A-Fa-f]{1,8}")

_TEN = 10
_OLD_MAJOR, _NEW_MAJOR = 1000, 10000
"""What the major version counts in a header: before TensorRT 10, and since."""


def header_version(version: str) -> int:
    """Return the number that a TensorRT release writes into its caches: 101601 for "10.16.1", 8601 for "8.6.1".

    Raises:
        CalibrationError: `version` is not three or more numbers with dots between.
    """
    match = re.match(r"([0-9]+)\.([0-9]+)\.([0-9]+)(?:\.|$)", version)
    if match is None:
        raise CalibrationError(f"Cannot read TensorRT version {version!r}: expected one like '10.16.1'.")
    major, minor, patch = (int(part) for part in match.groups())
    return major * (_OLD_MAJOR if major < _TEN else _NEW_MAJOR) + minor * 100 + patch


def release_of(version: int) -> str:
    """Return the TensorRT release that a cache's header names: "10.16.1" for 101601, "8.6.1" for 8601."""
    base = _OLD_MAJOR if version < _TEN * _OLD_MAJOR else _NEW_MAJOR
    return f"{version // base}.{version % base // 100}.{version % 100}"


def why_unusable(scale: float) -> str:
    """Say what is wrong with a scale: "zero", "negative" or "not finite"; empty for one above zero."""
    if not math.isfinite(scale):
        return "not finite"
    return "zero" if scale == 0 else "negative" if scale < 0 else ""


@dataclass(frozen=True, slots=True)
class TensorRTCache:
    """The content of a calibration cache.

    Attributes:
        version: of TensorRT, as `header_version` gives it.
        algorithm: of the calibrator, such as `ENTROPY_2`; TensorRT takes a cache only for the algorithm that it names.
        scales: tensor name to scale, in the order of the file; rounded to float32. A file may hold scales that cannot
            be used; `unusable` names them.

    Raises:
        CalibrationError: the version, the algorithm or a name cannot be written.
    """

    version: int
    algorithm: str
    scales: Mapping[str, float]

    def __post_init__(self) -> None:
        if not _HEADER.fullmatch(f"TRT-{self.version}-{self.algorithm}"):
            raise CalibrationError(
                f"Cannot make a calibration cache of version {self.version} and algorithm {self.algorithm!r}: "
                f"expected a number like 101601 and letters like {ENTROPY_2!r}."
            )
        for name in self.scales:
            if not _is_writable(name):
                raise CalibrationError(
                    f"Cannot put tensor {name!r} into a calibration cache: expected a name of valid Unicode, not empty "
                    "and without line breaks. Rename the tensor in the model."
                )
        object.__setattr__(
            self, "scales", MappingProxyType({name: _float32(scale) for name, scale in self.scales.items()})
        )

    @property
    def unusable(self) -> tuple[str, ...]:
        """Names of the tensors whose scale is not a finite number above zero."""
        return tuple(name for name, scale in self.scales.items() if why_unusable(scale))

    def to_bytes(self) -> bytes:
        """Return the file's content, as TensorRT writes it."""
        lines = [f"TRT-{self.version}-{self.algorithm}"]
        lines += [f"{name}: {_hex_from_scale(scale)}" for name, scale in self.scales.items()]
        return "".join(f"{line}\n" for line in lines).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a file's content; lines may end in CR LF, and hexadecimal digits may be upper case.

        Raises:
            CacheFormatError: it is not a TensorRT calibration cache, but of the kind named; or the line
                named is damaged.
        """
        header, *lines = _lines(data)
        match = _HEADER.fullmatch(header)
        if match is None:
            raise CacheFormatError(
                f"This is not a TensorRT calibration cache: found {kind_of(data)}; "
                f"expected a first line like 'TRT-101601-{ENTROPY_2}'."
            )
        scales: dict[str, float] = {}
        for number, line in enumerate(lines, start=2):
            name, separator, digits = line.rpartition(": ")
            if not separator or not name or not _HEX.fullmatch(digits):
                raise CacheFormatError(
                    f"The calibration cache is damaged: line {number} is {line[:80]!r}; "
                    "expected a tensor, a colon, a blank and a hexadecimal float32."
                )
            if name in scales:
                raise CacheFormatError(
                    f"The calibration cache is ambiguous: line {number} gives tensor {name!r} a second scale; "
                    "expected one for each tensor."
                )
            scales[name] = _scale_from_hex(digits)
        return cls(int(match[1]), match[2], scales)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file, atomically.

        Raises:
            FileAccessError: the file cannot be written.
        """
        write_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a cache from a file.

        Raises:
            FileAccessError: there is no such file, or it cannot be read.
            CacheFormatError: it is not a TensorRT calibration cache.
        """
        try:
            return cls.from_bytes(read_bytes(path, "the calibration cache"))
        except CacheFormatError as error:
            raise CacheFormatError(f"Cannot read {os.fspath(path)!r}: {error}") from error


def foreign_content(data: bytes) -> str | None:
    """Say what a file's content is that is not a calibration cache, judged by its first line; None for a cache."""
    return None if _HEADER.fullmatch(_lines(data)[0]) else kind_of(data)


def _lines(data: bytes) -> list[str]:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]


def _is_writable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return bool(name) and "\n" not in name and "\r" not in name


def _float32(scale: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(scale))


def _hex_from_scale(scale: float) -> str:
    (bits,) = struct.unpack(">I", struct.pack(">f", scale))
    return f"{bits:x}"


def _scale_from_hex(digits: str) -> float:
    (scale,) = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))
    return float(scale)
