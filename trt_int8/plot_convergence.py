"""How the scales moved while the batches came in, as an SVG element for an HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.convergence import TOLERANCE, History, Points, judge
from trt_int8.plot_histogram import DASHES
from trt_int8.plot_svg import COLOUR, empty_figure, inline_svg, make_axes, round_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN_TENSORS = 120
"""Curves at most: the tensors whose scales moved most."""

_WIDTH, _HEIGHT = 12.2, 2.9
_TICKS = (0, 1, 3, 10, 30, 100, 300, 1000)
"""Per cent; the axis is linear within the tolerance and logarithmic far beyond it."""

_SHOWN = math.asinh(2.0)
"""The axis reaches to 2 % at least, however little the scales have moved."""

_NARROW = 0.3
"""Labels of points closer than this, in doublings, would overlap."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """One scale: numbers of batches, where they lie on the axis, and how high the scale lies there."""

    counts: tuple[int, ...]
    places: tuple[float, ...]
    heights: tuple[float, ...]

    @classmethod
    def of(cls, points: Points) -> _Curve:
        last = points[-1][1]
        return cls(
            counts=tuple(batches for batches, _ in points),
            places=tuple(math.log2(batches) for batches, _ in points),
            heights=tuple(_height(100 * (scale - last) / last) for _, scale in points),
        )

    @property
    def reach(self) -> float:
        return max(map(abs, self.heights))


def convergence_figure(history: History, method: str, labels: Mapping[str, str], description: str, name: str) -> str:
    """Draw on the left the distance of each scale from its last value, on the right how many scales still moved.

    Args:
        history: of all methods, up to a batch that is the double of an earlier one.
        method: whose scales are drawn on the left.
        labels: method to its label.
        description: the figure in words.
        name: unique among the figures of a page: letters, digits, dashes.
    """
    verdict = judge(history, method)
    moving = () if verdict is None else tuple(verdict.moving)
    curves = {tensor: _Curve.of(points) for tensor, points in history[method].items()}
    drawn = sorted(curves, key=lambda tensor: (tensor in moving, curves[tensor].reach))[-DRAWN_TENSORS:]
    with empty_figure(_WIDTH, _HEIGHT) as figure:
        _distances(
            make_axes(figure, 0.05, 0.16, 0.52, 0.72),
            [(curves[tensor], tensor in moving) for tensor in drawn],
            labels[method],
        )
        _counts(make_axes(figure, 0.65, 0.16, 0.24, 0.72), history, labels)
        return inline_svg(figure, name, description)


def _distances(axes: Axes, curves: Sequence[tuple[_Curve, bool]], label: str) -> None:
    """Draw each scale's curve, those in the list's end on top; those that still moved stand out."""
    heights = [height for curve, _ in curves for height in curve.heights]
    lowest, highest = min(-_SHOWN, *heights), max(_SHOWN, *heights)
    tolerance = _height(100 * TOLERANCE)
    axes.axhspan(-tolerance, tolerance, color=COLOUR["plot-fill"], alpha=0.35, linewidth=0)
    for curve, moving in curves:
        axes.plot(
            curve.places,
            curve.heights,
            color=COLOUR["method-percentile" if moving else "plot-text"],
            linewidth=1.2 if moving else 0.7,
            alpha=1.0 if moving else 0.55,
        )
    axes.set_ylim(1.08 * lowest, 1.08 * highest)
    ticks = sorted({sign * tick for tick in _TICKS for sign in (-1, 1)})
    shown = [tick for tick in ticks if lowest <= _height(tick) <= highest]
    axes.set_yticks([_height(tick) for tick in shown], [f"{tick:+d} %" if tick else "0" for tick in shown])
    _batches_axis(axes, curves[0][0].counts)
    _title(axes, f"{label}: distance of each scale from its last value; shaded: 1 %")


def _counts(axes: Axes, history: History, labels: Mapping[str, str]) -> None:
    most = 1
    ends: list[tuple[int, str]] = []
    batches = [count for count, _ in next(iter(next(iter(history.values())).values()))]
    for method, found in history.items():
        counts: dict[int, int] = {}
        for seen in range(1, len(batches) + 1):
            part = {method: {tensor: points[:seen] for tensor, points in found.items()}}
            verdict = judge(part, method)
            if verdict is not None and verdict.since is not None:
                counts[batches[seen - 1]] = len(verdict.moving)
        most = max(most, *counts.values())
        axes.plot(
            [math.log2(count) for count in counts],
            list(counts.values()),
            color=COLOUR[f"method-{method}"],
            linestyle=DASHES[method],
            linewidth=1.4,
            marker="o",
            markersize=3,
            markeredgewidth=0,
        )
        ends.append((counts[batches[-1]], method))
    axes.set_ylim(-0.03 * most, 1.06 * most)
    ticks = [tick for tick in round_positions(0.0, most) if tick == round(tick)]
    axes.set_yticks(ticks, [f"{tick:.0f}" for tick in ticks])
    _batches_axis(axes, batches[1:])
    _end_labels(axes, ends, most, labels)
    _title(axes, "scales that moved by more than 1 % over the last doubling")


def _end_labels(axes: Axes, ends: Sequence[tuple[int, str]], most: int, labels: Mapping[str, str]) -> None:
    """Write each method's name behind the end of its curve, the names clear of each other."""
    height, step = -math.inf, 0.12 * most
    for count, method in sorted(ends):
        height = max(count, height + step)
        axes.annotate(
            f"{labels[method]}: {count}",
            (1.0, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=COLOUR[f"method-{method}"],
            fontsize=8,
        )


def _batches_axis(axes: Axes, counts: Sequence[int]) -> None:
    places = [math.log2(count) for count in counts]
    margin = 0.02 * (places[-1] - places[0]) or 0.5
    axes.set_xlim(places[0] - margin, places[-1] + margin)
    following = [*places[1:], math.inf]
    shown = [
        (place, f"{count:,}")
        for count, place, after in zip(counts, places, following, strict=True)
        if after - place > _NARROW
    ]
    axes.set_xticks([place for place, _ in shown], [label for _, label in shown])
    axes.set_xlabel("batches", color=COLOUR["plot-text"], fontsize=8, labelpad=1)


def _height(percent: float) -> float:
    return math.asinh(percent)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", pad=5, color=COLOUR["plot-text"], fontsize=8.5)
