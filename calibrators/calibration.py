"""The result of a calibration pass: histograms, and what they were made from. Every method takes its scales from it."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from calibrators.convergence import History, history_from_json, history_to_json
from calibrators.entropy import entropy_amax
from calibrators.errors import CacheFormatError, CalibrationError
from calibrators.histogram import MagnitudeHistogram
from calibrators.histogram_file import load_histograms, save_histograms, save_ranges
from calibrators.input_statistics import Inputs, InputStatistics, ValueStatistics, merge_inputs
from calibrators.magnitude_range import MagnitudeRange
from calibrators.mse import mse_amax
from calibrators.numerics import scale_from_amax
from calibrators.percentile import check_percentile, percentile_amax

SEARCHES = ("minmax", "entropy", "percentile", "mse")
"""Methods that find a threshold from a histogram alone."""

METHODS = (*SEARCHES, "auto")
DEFAULT_METHOD = "entropy"
DEFAULT_PERCENTILE = 99.99

_TOGETHER = 16
"""Tensors that a thread is given at a time at most: handing one over takes as long as some searches do."""

InputShapes = Mapping[str, Mapping[tuple[int, ...], int]]
"""Model input to the shapes that were fed, each with its number of batches."""

Settings = Mapping[str, str | int | bool | None]
"""What a pass was told, beside the model and the data, that its result depends on."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a calibration was made from, so that it is never used for another model or taken for another data set.

    Attributes:
        graph: hash of the model's structure.
        weights: hash of its weights.
        data: hash or identity of the calibration data, one per merged part.
        preprocessing: the preprocessing of the data, as text.
        tool: version of trt-int8 that made it.
        batches: number of batches.
        samples: number of samples.
    """

    graph: str
    weights: str
    data: tuple[str, ...]
    preprocessing: str
    tool: str
    batches: int
    samples: int

    def merge(self, other: Self) -> Fingerprint:
        """Return the fingerprint of both parts together.

        Raises:
            CalibrationError: they come from different models or preprocessings; says which differ.
        """
        differing = [
            name for name in ("graph", "weights", "preprocessing") if getattr(self, name) != getattr(other, name)
        ]
        if differing:
            found = "; ".join(f"{name} {getattr(self, name)!r} and {getattr(other, name)!r}" for name in differing)
            raise CalibrationError(
                f"Cannot merge the calibrations: they differ in {found}; expected the same model and preprocessing. "
                "Calibrate the same model file again on the other data."
            )
        return Fingerprint(
            graph=self.graph,
            weights=self.weights,
            data=self.data + other.data,
            preprocessing=self.preprocessing,
            tool=", ".join(dict.fromkeys((*self.tool.split(", "), *other.tool.split(", ")))),
            batches=self.batches + other.batches,
            samples=self.samples + other.samples,
        )


class Calibration:
    """Histograms of a model's activations over a calibration set; immutable.

    One pass over the data serves every method:

        calibration.scales("entropy")
        calibration.scales("percentile", percentile=99.999)
    """

    __slots__ = (
        "_convergence", "_fingerprint", "_histograms", "_input_shapes", "_input_statistics", "_settings", "_thresholds",
    )  # fmt: skip

    def __init__(
        self,
        histograms: Mapping[str, MagnitudeHistogram] | Mapping[str, MagnitudeRange],
        fingerprint: Fingerprint,
        input_shapes: InputShapes | None = None,
        *,
        input_statistics: Inputs | None = None,
        convergence: History | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Take the histograms of all tensors, in graph order.

        Args:
            histograms: by tensor name; or ranges, for min-max alone.
            fingerprint: the model and the data that they were made from.
            input_shapes: model input to the shapes that were fed, each with its number of batches; None where they were
                not kept.
            input_statistics: model input to mean, deviation and range of what was fed; None where they were not kept.
            convergence: how the scales of all tensors moved during the pass; None where that was not kept.
            settings: what the pass was told; None where it is not known, or where it was more than one pass.

        Raises:
            CalibrationError: a histogram holds NaN or infinity.
        """
        for name, histogram in histograms.items():
            if histogram.nonfinite:
                raise CalibrationError(
                    f"Cannot calibrate tensor {name!r}: {histogram.nonfinite} of its values are NaN or infinite; "
                    "expected finite activations."
                )
        self._histograms: dict[str, MagnitudeHistogram | MagnitudeRange] = dict(histograms)
        self._fingerprint = fingerprint
        self._input_shapes = {name: dict(sorted(shapes.items())) for name, shapes in (input_shapes or {}).items()}
        self._input_statistics = dict(input_statistics or {})
        self._convergence = {method: dict(points) for method, points in (convergence or {}).items()}
        self._settings = dict(settings or {})
        self._thresholds: dict[tuple[str, float], dict[str, float]] = {}

    def __repr__(self) -> str:
        return f"Calibration({len(self._histograms)} tensors, {self._fingerprint.samples} samples)"

    @property
    def fingerprint(self) -> Fingerprint:
        """The model and the data that it was made from."""
        return self._fingerprint

    @property
    def input_shapes(self) -> InputShapes:
        """Model input to the shapes that were fed, each with its number of batches.

        Rows that filled up a batch of a model with a fixed batch were fed, too. Empty for a calibration whose file does
        not tell. Engines with dynamic axes take their ranges from it.
        """
        return MappingProxyType({name: MappingProxyType(shapes) for name, shapes in self._input_shapes.items()})

    @property
    def input_statistics(self) -> Inputs:
        """Model input to mean, deviation and range of what was fed, rows that fill up a batch left out.

        Exact, whatever the order of the samples and the cut into batches; whole numbers (token ids) are not in it.
        Empty for a calibration whose file does not tell.
        """
        return MappingProxyType(self._input_statistics)

    @property
    def convergence(self) -> History:
        """Method to tensor to ((batches, scale), ...): the scales at the last doublings (32, 64, ...) and at the end.

        `calibrators.convergence.judge` says whether they have settled. The percentile is the default one. Empty for a
        merged calibration, as data without an order have no history, and where the file does not tell.
        """
        return MappingProxyType({method: MappingProxyType(points) for method, points in self._convergence.items()})

    @property
    def settings(self) -> Settings:
        """What the pass was told, beside the model and the data; empty for a merged calibration."""
        return MappingProxyType(self._settings)

    @property
    def statistics(self) -> str:
        """What was kept of each tensor: "histogram", which serves every method, or "minmax", its range alone."""
        ranges = any(isinstance(found, MagnitudeRange) for found in self._histograms.values())
        return "minmax" if ranges else "histogram"

    @property
    def searches(self) -> tuple[str, ...]:
        """Those of `SEARCHES` that it can serve."""
        return ("minmax",) if self.statistics == "minmax" else SEARCHES

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors, in graph order."""
        return tuple(self._histograms)

    @property
    def always_zero(self) -> tuple[str, ...]:
        """Names of the tensors that were 0 in every sample; their amax is 0 and their scale 1."""
        return tuple(name for name, histogram in self._histograms.items() if histogram.amax == 0)

    @property
    def sha256(self) -> str:
        """Hash of the statistics and of what they were made from, in hex; equal calibrations have equal ones."""
        digest = hashlib.sha256(json.dumps(asdict(self._fingerprint), sort_keys=True).encode())
        for name, histogram in self._histograms.items():
            digest.update(f"{name}\0{histogram.minimum!r}\0{histogram.maximum!r}\0{histogram.zeros}\0".encode())
            if isinstance(histogram, MagnitudeHistogram):
                digest.update(histogram.bins.tobytes())
                digest.update(histogram.counts.tobytes())
            else:
                digest.update(f"{histogram.count}\0".encode())
        return digest.hexdigest()

    def histogram(self, tensor: str) -> MagnitudeHistogram:
        """Return the histogram of one tensor.

        Raises:
            CalibrationError: the calibration has no such tensor, or holds ranges alone.
        """
        found = self._magnitudes(tensor)
        if isinstance(found, MagnitudeRange):
            raise CalibrationError(_only_ranges(f"the histogram of {tensor!r}"))
        return found

    def magnitude_range(self, tensor: str) -> MagnitudeRange:
        """Return the range of one tensor, with its counts.

        Raises:
            CalibrationError: the calibration has no such tensor.
        """
        found = self._magnitudes(tensor)
        return found if isinstance(found, MagnitudeRange) else MagnitudeRange.of(found)

    def _magnitudes(self, tensor: str) -> MagnitudeHistogram | MagnitudeRange:
        try:
            return self._histograms[tensor]
        except KeyError:
            near = difflib.get_close_matches(tensor, self._histograms, n=3)
            hint = f"; near names: {', '.join(map(repr, near))}" if near else ""
            raise CalibrationError(
                f"The calibration does not hold tensor {tensor!r}: it holds {len(self._histograms)} others{hint}. "
                "Calibrate again with --tensors all, or check that it belongs to this model."
            ) from None

    def range(self, tensor: str) -> tuple[float, float]:
        """Return the smallest and the largest value of a tensor, signed and exact."""
        found = self._magnitudes(tensor)
        return found.minimum, found.maximum

    def amax(self, method: str = DEFAULT_METHOD, percentile: float = DEFAULT_PERCENTILE) -> dict[str, float]:
        """Return the threshold of every tensor: the magnitude that becomes code 127, larger ones saturate.

        Thresholds are computed once per method and kept.

        Args:
            method: "minmax" (the exact maximum), "entropy" (least loss of information), "percentile" (of the
                magnitudes), "mse" (least expected squared error), or "auto": choosing by the model's outputs takes
                data, and without data "auto" is "mse".
            percentile: for method "percentile": 0 < percentile <= 100.

        Returns:
            Tensor name to threshold in the tensor's unit; 0.0 for a tensor that is always zero.

        Raises:
            CalibrationError: there is no such method, or the percentile is out of range; or the calibration holds
                ranges alone, and the method is not "minmax".
        """
        search, key = _search(method, percentile)
        if key[0] not in self.searches:
            raise CalibrationError(_only_ranges(f"the scales of method {method!r}"))
        self._find({key: search})
        return dict(self._thresholds[key])

    def _find(self, searches: Mapping[tuple[str, float], Callable[[Any], float]]) -> None:
        """Make the searches that have not been made yet, all in the same threads, as they release the GIL."""
        missing = {key: search for key, search in searches.items() if key not in self._thresholds}
        if not missing:
            return
        magnitudes = list(self._histograms.values())
        threads = len(os.sched_getaffinity(0))
        size = max(1, min(_TOGETHER, len(magnitudes) // (8 * threads)))
        parts = [magnitudes[start : start + size] for start in range(0, len(magnitudes), size)]
        pool = _searchers(threads)
        found = {key: pool.map(partial(_each, search), parts) for key, search in missing.items()}
        for key, thresholds in found.items():
            self._thresholds[key] = dict(zip(self._histograms, chain.from_iterable(thresholds), strict=True))

    def scales(self, method: str = DEFAULT_METHOD, percentile: float = DEFAULT_PERCENTILE) -> dict[str, float]:
        """Return the scale of every tensor, amax / 127 rounded to float32; 1.0 for a tensor that is always zero.

        Arguments and errors are those of `amax`.
        """
        thresholds = self.amax(method, percentile)
        scales = scale_from_amax(np.array(list(thresholds.values()), dtype=np.float64))
        return dict(zip(thresholds, scales.tolist(), strict=True))

    def all_scales(self) -> dict[str, dict[str, float]]:
        """Return method to `scales` for all of `searches`; faster than asking for one after the other."""
        self._find({key: search for search, key in (_search(method, DEFAULT_PERCENTILE) for method in self.searches)})
        return {method: self.scales(method) for method in self.searches}

    def merge(self, other: Self) -> Calibration:
        """Return the calibration on both data sets together, exactly as if one pass had seen them all.

        Except for what only one pass has: convergence and settings are left out, but for the padding that both left
        out.

        Raises:
            CalibrationError: the two are not of the same model, preprocessing and tensors, or left out other padding.
        """
        fingerprint = self._fingerprint.merge(other._fingerprint)
        unshared = sorted(self._histograms.keys() ^ other._histograms.keys())
        if unshared:
            raise CalibrationError(
                f"Cannot merge the calibrations: {len(unshared)} tensors are in only one, such as {unshared[0]!r}; "
                "expected the same tensors in both. Calibrate both with the same --tensors."
            )
        if self.statistics != other.statistics:
            raise CalibrationError(
                f"Cannot merge the calibrations: one holds {_KEPT[self.statistics]} and the other "
                f"{_KEPT[other.statistics]}; expected the same. Calibrate both with the same --statistics."
            )
        mine, theirs = self._settings.get("padding"), other._settings.get("padding")
        if mine != theirs:
            raise CalibrationError(
                f"Cannot merge the calibrations: padding was left out by {mine or 'nothing'} in one and by "
                f"{theirs or 'nothing'} in the other; expected the same. Calibrate both with the same --padding-mask "
                "or --lengths."
            )
        histograms = {name: _merged(found, other._histograms[name]) for name, found in self._histograms.items()}
        shapes = {name: Counter(counts) for name, counts in self._input_shapes.items()}
        for name, counts in other._input_shapes.items():
            shapes.setdefault(name, Counter()).update(counts)
        inputs = merge_inputs(self._input_statistics, other._input_statistics)
        merged_histograms, merged_ranges = _separate(histograms)
        return Calibration(
            merged_ranges or merged_histograms,
            fingerprint,
            shapes,
            input_statistics=inputs,
            settings=None if mine is None else {"padding": mine},
        )

    def annotated(self, *, convergence: History | None = None, settings: Settings | None = None) -> Calibration:
        """Return the same statistics with another history of their scales, or other settings; None leaves them."""
        histograms, ranges = _separate(self._histograms)
        other = Calibration(
            ranges or histograms,
            self._fingerprint,
            self._input_shapes,
            input_statistics=self._input_statistics,
            convergence=self._convergence if convergence is None else convergence,
            settings=self._settings if settings is None else settings,
        )
        other._thresholds = self._thresholds
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration to a `.npz` file, atomically; equal calibrations give equal bytes.

        Raises:
            FileAccessError: the file cannot be written.
        """
        shapes = {
            name: [[list(shape), count] for shape, count in seen.items()] for name, seen in self._input_shapes.items()
        }
        description = {
            "fingerprint": asdict(self._fingerprint),
            "input_shapes": shapes,
            "input_statistics": {
                name: [channel.to_json() for channel in statistics.channels]
                for name, statistics in self._input_statistics.items()
            },
            "convergence": history_to_json(self._convergence, self.tensors),
            "settings": self._settings,
        }
        histograms, ranges = _separate(self._histograms)
        if ranges:
            save_ranges(path, ranges, description)
        else:
            save_histograms(path, histograms, description)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a calibration that `save` wrote.

        Raises:
            FileAccessError: there is no such file, or it cannot be read.
            CacheFormatError: it is damaged, is not a calibration, or was written by a newer version.
        """
        histograms, description = load_histograms(path)
        try:
            return cls(
                histograms,
                _fingerprint_from_json(description["fingerprint"]),
                _input_shapes_from_json(description.get("input_shapes", {})),
                input_statistics=_input_statistics_from_json(description.get("input_statistics", {})),
                convergence=history_from_json(description.get("convergence", {}), list(histograms)),
                settings=description.get("settings", {}),
            )
        except (AttributeError, KeyError, TypeError, ValueError, CalibrationError) as error:
            raise CacheFormatError(
                f"Cannot read calibration {os.fspath(path)!r}: its description is damaged ({error!r}); "
                "expected a file that trt-int8 calibrate wrote. Calibrate again."
            ) from error


_KEPT = {"histogram": "histograms", "minmax": "ranges alone"}


def _only_ranges(wanted: str) -> str:
    return (
        f"The calibration cannot give {wanted}: it holds ranges alone, as it was made with --statistics minmax; "
        "expected histograms. Use --method minmax, or calibrate again without --statistics minmax."
    )


def _merged(
    one: MagnitudeHistogram | MagnitudeRange, other: MagnitudeHistogram | MagnitudeRange
) -> MagnitudeHistogram | MagnitudeRange:
    if isinstance(one, MagnitudeHistogram) and isinstance(other, MagnitudeHistogram):
        return one.merge(other)
    if isinstance(one, MagnitudeRange) and isinstance(other, MagnitudeRange):
        return one.merge(other)
    raise AssertionError("a histogram and a range cannot be merged")


def _separate(
    found: Mapping[str, MagnitudeHistogram | MagnitudeRange],
) -> tuple[dict[str, MagnitudeHistogram], dict[str, MagnitudeRange]]:
    histograms = {name: part for name, part in found.items() if isinstance(part, MagnitudeHistogram)}
    ranges = {name: part for name, part in found.items() if isinstance(part, MagnitudeRange)}
    return histograms, ranges


@cache
def _searchers(threads: int) -> ThreadPoolExecutor:
    """Return the threads that search, always the same ones: each new thread may take memory that it does not return."""
    return ThreadPoolExecutor(threads, thread_name_prefix="search")


os.register_at_fork(after_in_child=_searchers.cache_clear)  # a forked process has none of its parent's threads


def _each(search: Callable[[Any], float], magnitudes: Sequence[Any]) -> list[float]:
    return [search(one) for one in magnitudes]


def _search(method: str, percentile: float) -> tuple[Callable[[Any], float], tuple[str, float]]:
    """Return the function that finds a tensor's threshold, and the key under which its results are kept."""
    match method:
        case "minmax":
            return lambda histogram: histogram.amax, (method, 0.0)
        case "entropy":
            return entropy_amax, (method, 0.0)
        case "mse" | "auto":
            return mse_amax, ("mse", 0.0)
        case "percentile":
            check_percentile(percentile)
            return lambda histogram: percentile_amax(histogram, percentile), (method, float(percentile))
    raise CalibrationError(f"There is no calibration method {method!r}; expected one of {', '.join(METHODS)}.")


def _input_shapes_from_json(values: Mapping[str, Any]) -> InputShapes:
    return {
        str(name): {tuple(int(length) for length in shape): int(count) for shape, count in seen}
        for name, seen in values.items()
    }


def _input_statistics_from_json(values: Mapping[str, Any]) -> Inputs:
    return {
        str(name): InputStatistics(tuple(ValueStatistics.from_json(channel) for channel in channels))
        for name, channels in values.items()
    }


def _fingerprint_from_json(values: Mapping[str, Any]) -> Fingerprint:
    found = Fingerprint(
        graph=str(values["graph"]),
        weights=str(values["weights"]),
        data=tuple(str(part) for part in values["data"]),
        preprocessing=str(values["preprocessing"]),
        tool=str(values["tool"]),
        batches=int(values["batches"]),
        samples=int(values["samples"]),
    )
    if found.batches < 1 or found.samples < 1:
        raise ValueError(f"it counts {found.batches} batches and {found.samples} samples")
    return found
