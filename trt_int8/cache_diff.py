"""`trt-int8 cache diff`: how far the scales of two calibrations or TensorRT caches lie apart."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrators.calibration import DEFAULT_METHOD, DEFAULT_PERCENTILE, Calibration
from calibrators.errors import CalibrationError
from calibrators.files import read_bytes
from calibrators.tensorrt_cache import TensorRTCache, release_of, why_unusable
from trt_int8.console import make_table
from trt_int8.idle_options import refuse_idle, refuse_idle_percentile
from trt_int8.quantization import method_name

if TYPE_CHECKING:
    from rich.table import Table

UNCHANGED = 1e-6
"""Scales that differ by less, in proportion, count as equal: float32 resolves 1.2e-7."""


_NAMED = 3
"""Tensors of a file that a message names."""


@dataclass(frozen=True, slots=True)
class ScaleFile:
    """The scales of a calibration or of a TensorRT cache.

    Attributes:
        name: the file's.
        kind: what they are, for a user: "calibration, entropy" or "TensorRT 8.6.1, EntropyCalibration2".
        scales: by tensor name.
    """

    name: str
    kind: str
    scales: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class MovedScale:
    """A tensor that both files hold.

    Attributes:
        tensor: its name.
        first: its scale in the first file.
        second: its scale in the second.
        factor: second / first.
        percent: the same as a change, in per cent of the first.
    """

    tensor: str
    first: float
    second: float
    factor: float
    percent: float


@dataclass(frozen=True, slots=True)
class CacheDiff:
    """Two files, tensor by tensor.

    Attributes:
        first: name and kind of the first file.
        second: of the second.
        moved: tensors that both hold, the one that moved farthest first: by |log(second / first)|, so that half and
            double are equally far.
        only_first: tensors that only the first holds.
        only_second: tensors that only the second holds.
        unusable: tensors that both hold, but one of them with a scale that is not above zero and finite.
    """

    first: str
    second: str
    moved: tuple[MovedScale, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    unusable: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "first": self.first,
            "second": self.second,
            "tensors": [asdict(row) for row in self.moved],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "unusable": list(self.unusable),
        }

    @property
    def changed(self) -> tuple[MovedScale, ...]:
        """Those of `moved` that did move."""
        return tuple(row for row in self.moved if abs(row.factor - 1) > UNCHANGED)

    def table(self, limit: int | None) -> Table:
        """Return the tensors that moved farthest as a table, at most `limit` of them."""
        changed = self.changed
        shown = changed if limit is None else changed[:limit]
        rows = [
            (row.tensor, f"{row.first:.5g}", f"{row.second:.5g}", f"{row.percent:+.1f}", f"{row.factor:.3g}x")
            for row in shown
        ]
        title = f"{len(shown)} of {len(changed)} scales that differ, the farthest first"
        return make_table(title, ("tensor", "scale A", "scale B", "change %", "B / A"), rows)

    def lines(self, limit: int | None) -> list[str]:
        """Return what the table does not say; of the tensors that only one file holds, at most `limit` names each."""
        same = len(self.moved) - len(self.changed)
        lines = [f"A: {self.first}", f"B: {self.second}", f"{len(self.moved)} tensors in both, {same} of them equal"]
        for which, names in (("A", self.only_first), ("B", self.only_second)):
            shown = names if limit is None else names[:limit]
            lines += [f"only in {which}: {name}" for name in shown]
            if len(names) > len(shown):
                lines.append(f"only in {which}: {len(names) - len(shown)} more")
        return [*lines, *(f"not compared, a scale is unusable: {name}" for name in self.unusable)]


def diff_caches(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    method: str = DEFAULT_METHOD,
    percentile: float = DEFAULT_PERCENTILE,
) -> CacheDiff:
    """Compare the scales of two files, each a calibration or a TensorRT cache.

    Args:
        first: a file.
        second: another one.
        method: whose scales a calibration gives; a TensorRT cache has those that its calibrator found.
        percentile: of the method "percentile".

    Raises:
        FileAccessError: a file is missing or unreadable.
        CacheFormatError: a file is neither.
        CalibrationError: there is no such method, or no tensor is in both files.
        UsageError: a method for two TensorRT caches, or a percentile for another method.
    """
    if any(map(is_calibration, (first, second))):
        refuse_idle_percentile(percentile, method)
    else:
        refuse_idle(
            {"--method": method != DEFAULT_METHOD, "--percentile": percentile != DEFAULT_PERCENTILE},
            "TensorRT caches hold the scales of their calibrators alone",
            "compare a calibration with one of them",
        )
    one, other = (read_scales(file, method=method, percentile=percentile) for file in (first, second))
    both = [name for name in one.scales if name in other.scales]
    if not both:
        raise CalibrationError(
            f"Cannot compare {os.fspath(first)!r} and {os.fspath(second)!r}: they have no tensor in common. The first "
            f"holds {_named(one.scales)}; the second {_named(other.scales)}. Expected two files of one model."
        )
    unusable = [name for name in both if why_unusable(one.scales[name]) or why_unusable(other.scales[name])]
    rows = []
    for name in both:
        if name not in set(unusable):
            factor = other.scales[name] / one.scales[name]
            rows.append(MovedScale(name, one.scales[name], other.scales[name], factor, 100 * (factor - 1)))
    return CacheDiff(
        f"{one.name} ({one.kind})",
        f"{other.name} ({other.kind})",
        tuple(sorted(rows, key=lambda row: -abs(math.log(row.second) - math.log(row.first)))),
        tuple(name for name in one.scales if name not in other.scales),
        tuple(name for name in other.scales if name not in one.scales),
        tuple(unusable),
    )


def read_scales(file: str | os.PathLike[str], *, method: str, percentile: float) -> ScaleFile:
    """Read the scales of a calibration or of a TensorRT cache.

    Raises:
        FileAccessError: the file is missing or unreadable.
        CacheFormatError: it is neither.
        CalibrationError: there is no such method.
    """
    name = Path(file).name
    if is_calibration(file):
        scales = Calibration.load(file).scales(method, percentile=percentile)
        return ScaleFile(name, f"calibration, {method_name(method, percentile)}", scales)
    cache = TensorRTCache.load(file)
    return ScaleFile(name, f"TensorRT {release_of(cache.version)}, {cache.algorithm}", cache.scales)


def _named(scales: Mapping[str, float]) -> str:
    """Count the tensors of a file, and name the first ones."""
    shown = list(islice(scales, _NAMED))
    more = ", ..." if len(scales) > len(shown) else ""
    return f"{len(scales)} tensors ({', '.join(shown)}{more})"


def is_calibration(file: str | os.PathLike[str]) -> bool:
    """Tell whether a file is an archive, as calibrations are, and not text, as TensorRT's caches are.

    Raises:
        FileAccessError: the file is missing or unreadable.
    """
    return read_bytes(file, "the calibration")[:2] == b"PK"
