"""`trt-int8 cache merge`: calibrations of one model on several data sets become one, as if of one pass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from calibrators.calibration import Calibration
from calibrators.errors import CalibrationError
from trt_int8.calibration import releases
from trt_int8.errors import UsageError
from trt_int8.outputs import check_output

_SHOWN_DIGITS = 12
_LISTED = 5


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A merged calibration.

    Attributes:
        path: the file.
        calibration: the calibration.
        parts: the files that it was made from.
        notes: what a user should know.
    """

    path: str
    calibration: Calibration
    parts: tuple[str, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the summary for the terminal."""
        fingerprint = self.calibration.fingerprint
        total = f"{fingerprint.batches} batches, {fingerprint.samples} samples of {len(self.parts)} calibrations"
        return [f"{self.path}: {len(self.calibration.tensors)} tensors, {total}", *self.notes]


def merge_calibrations(
    files: Sequence[str | os.PathLike[str]], *, output: str | os.PathLike[str], force: bool = False
) -> MergeResult:
    """Merge calibrations exactly: their histograms are added, bin by bin.

    Args:
        files: two or more calibrations of the same model with the same preprocessing, on different data.
        output: the file to write.
        force: merge parts of the same data, too, whose samples then count twice, and parts of different releases of
            trt-int8.

    Raises:
        UsageError: fewer than two files.
        CalibrationError: they differ in model, preprocessing, tensors or padding, were made from the same data, or by
            different releases.
        CacheFormatError: a file is no calibration.
        ConfigError: `output` is one of the files.
    """
    if len(files) < 2:
        raise UsageError(f"Cannot merge {len(files)} calibration; expected two or more.")
    paths = [os.fspath(file) for file in files]
    check_output(output, *paths)
    parts = [Calibration.load(path) for path in paths]
    for path, part in zip(paths[1:], parts[1:], strict=True):
        differences = differing(parts[0], part)
        if differences:
            raise CalibrationError(
                f"Cannot merge {paths[0]!r} and {path!r}: they differ in {'; '.join(differences)}. Expected the same "
                "model, preprocessing, tensors, statistics and padding; calibrate the same model file in the same way "
                "on the other data."
            )
    made_by = {part.fingerprint.tool for part in parts}
    if len({release for tool in made_by for release in releases(tool)}) > 1 and not force:
        raise CalibrationError(
            f"Cannot merge: the parts were made by trt-int8 {' and '.join(sorted(made_by))}, which may count "
            "otherwise. Calibrate all with one release, or merge all the same with --force."
        )
    twice = _twice(paths, parts)
    if twice and not force:
        raise CalibrationError(
            f"Cannot merge: {twice}, so their samples would count twice. Leave one of them out, or merge all the same "
            "with --force."
        )
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    notes = [f"{twice}: their samples count twice"] if twice else []
    nameless = [path for path, part in zip(paths, parts, strict=True) if not all(part.fingerprint.data)]
    if nameless:
        notes.append(f"the data of {', '.join(nameless)} have no hash: whether samples count twice is not known")
    merged.save(output)
    return MergeResult(os.fspath(output), merged, tuple(paths), tuple(notes))


def differing(first: Calibration, second: Calibration) -> list[str]:
    """Say in what two calibrations differ that keeps them from being merged; nothing where they can be."""
    found = []
    for what in ("graph", "weights", "preprocessing"):
        one, other = getattr(first.fingerprint, what), getattr(second.fingerprint, what)
        if one != other:
            found.append(f"{what} ({_short(one)} and {_short(other)})")
    if first.statistics != second.statistics:
        found.append(f"statistics ({first.statistics} and {second.statistics})")
    padding = [part.settings.get("padding") or "none" for part in (first, second)]
    if padding[0] != padding[1]:
        found.append(f"the padding left out ({padding[0]} and {padding[1]})")
    only_first = [name for name in first.tensors if name not in set(second.tensors)]
    only_second = [name for name in second.tensors if name not in set(first.tensors)]
    for where, names in (("first", only_first), ("second", only_second)):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            found.append(f"tensors (only the {where} holds {', '.join(names[:_LISTED])}{more})")
    return found


def _twice(paths: Sequence[str], parts: Sequence[Calibration]) -> str:
    """Say which two parts hold the same samples; nothing where none are known to.

    Equal hashes tell the same batches in the same order. Equal sums of all that was fed tell the same samples in other
    batches or another order: the sums are exact, and depend on neither.
    """
    for (path, part), (other_path, other) in combinations(zip(paths, parts, strict=True), 2):
        common = sorted((set(part.fingerprint.data) & set(other.fingerprint.data)) - {""})
        if common:
            return f"{path!r} and {other_path!r} were made from the same data ({_short(common[0])})"
        if _same_sums(part, other):
            samples = part.fingerprint.samples
            return f"{path!r} and {other_path!r} were made from the same {samples} samples, cut or ordered otherwise"
    return ""


def _same_sums(part: Calibration, other: Calibration) -> bool:
    """Tell whether two parts were fed equal numbers of values with equal sums, sums of squares and ranges.

    Whole numbers are not summed up, and inputs that never vary, such as a mask of ones, tell nothing apart.
    """
    sums = dict(part.input_statistics)
    complete = bool(sums) and sums.keys() == part.input_shapes.keys()
    vary = any(channel.minimum < channel.maximum for found in sums.values() for channel in found.channels)
    return (
        complete
        and vary
        and part.fingerprint.samples == other.fingerprint.samples
        and sums == dict(other.input_statistics)
    )


def _short(text: str) -> str:
    """Return the start of a hash, which tells it from another one; of other text the whole."""
    if not text:
        return "none"
    return f"{text[:_SHOWN_DIGITS]}..." if len(text) > 2 * _SHOWN_DIGITS and " " not in text else text
