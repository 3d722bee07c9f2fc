"""What the report says about the inside of a model: the tensors with their thresholds, and what was done where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibrators.calibration import METHODS, Calibration
from calibrators.histogram import MagnitudeHistogram, lower_edges
from calibrators.numerics import scale_from_amax

Json = Mapping[str, Any]

THRESHOLD_METHODS = tuple(method for method in METHODS if method != "auto")
"""The methods that find a threshold of their own; `auto` picks among them."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """What one method made of one tensor.

    Attributes:
        method: the method.
        amax: the threshold, in the tensor's unit.
        scale: amax / 127 as float32; 1 for a tensor that is always zero.
        clipped: share of all values whose magnitude lies above the threshold, 0 to 1; exact to the histogram's bins, a
            thousandth of the threshold wide.
    """

    method: str
    amax: float
    scale: float
    clipped: float


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One calibrated tensor.

    Attributes:
        name: its name.
        minimum: smallest value.
        maximum: largest value.
        count: number of values seen.
        zeros: share of them that are exactly zero, 0 to 1.
        thresholds: one per method, in the order of `THRESHOLD_METHODS`.
        spread: largest threshold / smallest; 1 where the methods agree, and for a tensor that is always zero.
        targets: the targets whose placement takes this tensor's scale.
        auto: the method that `auto` took for it; empty where it was not asked.
        smoothed: whether the models quantize it smoothed, with other scales than those of the calibration.
    """

    name: str
    minimum: float
    maximum: float
    count: int
    zeros: float
    thresholds: tuple[Threshold, ...]
    spread: float
    targets: tuple[str, ...]
    auto: str
    smoothed: bool

    @property
    def always_zero(self) -> bool:
        """Whether every value was zero."""
        return self.minimum == 0.0 and self.maximum == 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """One Q/DQ pair on an activation, see `engines.placement.ActivationPoint`."""

    tensor: str
    scale_of: str
    rule: str
    reason: str
    scale: float | None


@dataclass(frozen=True, slots=True)
class PlacementView:
    """What was quantized where, and why, in the models that share one placement.

    Attributes:
        target: "cpu" or "tensorrt".
        mode: "static", "dynamic" or "weight-only"; the weights alone are INT8 with the last one.
        files: the models.
        scale_file: the model that `Pair.scale` is of.
        quantized: the weighted nodes that compute on INT8, or whose weight is stored as INT8.
        held: the other weighted nodes.
        rules: (rule, reason) to number of nodes, largest first.
        pairs: the Q/DQ pairs.
        pair_rules: (rule, reason) to number of pairs, largest first.
        notes: what the stage had to say, each once.
    """

    target: str
    mode: str
    files: tuple[str, ...]
    scale_file: str
    quantized: tuple[Json, ...]
    held: tuple[Json, ...]
    rules: tuple[tuple[str, str, int], ...]
    pairs: tuple[Pair, ...]
    pair_rules: tuple[tuple[str, str, int], ...]
    notes: tuple[str, ...]


def tensor_rows(calibration: Calibration, quantization: Json | None, percentile: float) -> tuple[TensorRow, ...]:
    """Make one row per calibrated tensor, in graph order.

    Args:
        calibration: the calibration.
        quantization: the content of `quantization.json`, for what uses a tensor.
        percentile: of the percentile method.
    """
    amax = {method: calibration.amax(method, percentile=percentile) for method in THRESHOLD_METHODS}
    targets: dict[str, list[str]] = {}
    chosen: dict[str, str] = {}
    for model in (quantization or {}).get("models") or []:
        for pair in model.get("pairs") or []:
            users = targets.setdefault(str(pair.get("scale_of", "")), [])
            if model.get("target") not in users:
                users.append(str(model.get("target")))
        chosen |= (model.get("auto") or {}).get("methods") or {}
    smoothed = set((quantization or {}).get("smoothed") or [])
    return tuple(
        _row(
            name,
            calibration.histogram(name),
            amax,
            targets=tuple(sorted(targets.get(name, []))),
            auto=chosen.get(name, ""),
            smoothed=name in smoothed,
        )
        for name in calibration.tensors
    )


def most_contested(rows: Sequence[TensorRow], limit: int) -> tuple[TensorRow, ...]:
    """Return the tensors on which the methods differ most, the widest first, without those that are always zero."""
    plottable = [row for row in rows if not row.always_zero]
    return tuple(sorted(plottable, key=lambda row: -row.spread)[:limit])


def placements(quantization: Json | None, delivered: str | None) -> tuple[PlacementView, ...]:
    """Group the INT8 models by their placement: the methods of one target share it, and differ only in scales.

    Args:
        quantization: the content of `quantization.json`.
        delivered: the method whose scales are shown, where a group has it.
    """
    groups: dict[str, list[Json]] = {}
    for model in (quantization or {}).get("models") or []:
        groups.setdefault(repr((model.get("target"), model.get("decisions"), model.get("pairs"))), []).append(model)
    views = [_placement(models, delivered) for models in groups.values()]
    return tuple(sorted(views, key=lambda view: view.target != "cpu"))


def clipped_share(histogram: MagnitudeHistogram, amax: float) -> float:
    """Return the share of all values, zeros included, whose magnitude lies above `amax`, by whole bins."""
    if amax >= histogram.amax:
        return 0.0
    return float(histogram.counts[lower_edges(histogram.bins) >= amax].sum()) / histogram.count


def _row(
    name: str,
    histogram: MagnitudeHistogram,
    amax: Mapping[str, Mapping[str, float]],
    *,
    targets: tuple[str, ...],
    auto: str,
    smoothed: bool,
) -> TensorRow:
    found = tuple(
        Threshold(method, values[name], scale_from_amax(values[name]), clipped_share(histogram, values[name]))
        for method, values in amax.items()
    )
    limits = [threshold.amax for threshold in found]
    return TensorRow(
        name=name,
        minimum=histogram.minimum,
        maximum=histogram.maximum,
        count=histogram.count,
        zeros=histogram.zeros / histogram.count if histogram.count else 0.0,
        thresholds=found,
        spread=max(limits) / min(limits) if min(limits) > 0 else 1.0,
        targets=targets,
        auto=auto,
        smoothed=smoothed,
    )


def _placement(models: Sequence[Json], delivered: str | None) -> PlacementView:
    shown = next((model for model in models if model.get("method") == delivered), models[0])
    decisions = shown.get("decisions") or []
    scales = shown.get("scales") or {}
    pairs = tuple(
        Pair(
            tensor=str(pair.get("tensor", "")),
            scale_of=str(pair.get("scale_of", "")),
            rule=str(pair.get("rule", "")),
            reason=str(pair.get("reason", "")),
            scale=scales.get(pair.get("tensor"), scales.get(pair.get("scale_of"))),
        )
        for pair in shown.get("pairs") or []
    )
    return PlacementView(
        target=str(shown.get("target", "")),
        mode=str(shown.get("mode") or "static"),
        files=tuple(str(model.get("file", "")) for model in models),
        scale_file=str(shown.get("file", "")),
        quantized=tuple(decision for decision in decisions if decision.get("quantized")),
        held=tuple(decision for decision in decisions if not decision.get("quantized")),
        rules=_counted([(str(item.get("rule", "")), str(item.get("reason", ""))) for item in decisions]),
        pairs=pairs,
        pair_rules=_counted([(pair.rule, pair.reason) for pair in pairs]),
        notes=tuple(dict.fromkeys(str(note) for model in models for note in model.get("notes") or [])),
    )


def _counted(reasons: Sequence[tuple[str, str]]) -> tuple[tuple[str, str, int], ...]:
    return tuple((rule, reason, count) for (rule, reason), count in Counter(reasons).most_common())
