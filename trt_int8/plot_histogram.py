"""The histogram of a calibrated tensor with each method's threshold drawn in, as an SVG element for an HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrators.histogram import MagnitudeHistogram, lower_edges
from trt_int8.plot_svg import COLOUR, empty_figure, inline_svg, make_axes, round_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES: dict[str, Any] = {
    "minmax": (0, (1, 1.2)),
    "entropy": "solid",
    "percentile": (0, (5, 1.6)),
    "mse": (0, (3, 1.2, 1, 1.2)),
}
"""Line style of each method's threshold, so that colour is not the only thing that tells them apart."""

HISTOGRAM_BINS = 96
LOGARITHMIC_BELOW = 0.08
"""A histogram's axis becomes logarithmic where a threshold lies below this share of the largest magnitude."""

LEFT_OUT = 0.01
"""Share of the values that are not zero, the smallest, which a logarithmic axis leaves out."""

WIDEST_RANGE = 1e8
"""Largest magnitude / smallest one on a logarithmic axis."""

_CHARACTER_SHARE = 0.0175
"""Width of a letter of a threshold's label, as a share of the axes' width."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def histogram_figure(
    histogram: MagnitudeHistogram,
    thresholds: Mapping[str, float],
    labels: Mapping[str, str],
    description: str,
    name: str,
) -> str:
    """Draw a tensor's magnitudes with each method's threshold as a labelled line.

    Counts are on a logarithmic axis; exact zeros are left out, since no threshold changes them.

    Args:
        histogram: holds at least one value that is not zero.
        thresholds: method to threshold.
        labels: method to its label.
        description: the figure in words.
        name: unique among the figures of a page: letters, digits, dashes.
    """
    amax = histogram.amax
    logarithmic = min(thresholds.values()) < LOGARITHMIC_BELOW * amax
    counts, edges = _rebinned(histogram, _lowest_edge(histogram, min(thresholds.values())) if logarithmic else 0.0)
    place = np.log10 if logarithmic else np.asarray
    with empty_figure(3.7, 2.2) as figure:
        axes = make_axes(figure, 0.095, 0.15, 0.885, 0.56)
        heights = np.where(counts > 0, np.log10(np.maximum(counts, 1)) + 0.3, 0.0)
        axes.stairs(heights, place(edges), fill=True, color=COLOUR["plot-fill"], linewidth=0)
        top = float(heights.max()) * 1.05
        left, right = float(place(edges[0])), float(place(amax))
        axes.set_xlim(left, right + 0.012 * (right - left))
        axes.set_ylim(0, top)
        step = max(1, round((top - 0.3) / 3))
        decades = list(range(0, int(top - 0.3) + 1, step))
        axes.set_yticks([decade + 0.3 for decade in decades], [_power(decade) for decade in decades])
        positions = _decades(left, right) if logarithmic else round_positions(0.0, right)
        axes.set_xticks(positions, [_power(round(p)) if logarithmic else f"{p:g}" for p in positions])
        _threshold_lines(
            axes, {method: float(place(value)) for method, value in thresholds.items()}, thresholds, labels
        )
        return inline_svg(figure, name, description)


def _threshold_lines(
    axes: Axes, positions: Mapping[str, float], thresholds: Mapping[str, float], labels: Mapping[str, str]
) -> None:
    """Draw one line per method up to its label, each label in a row of its own above the axes.

    Labels lie to the left of their line, where there is room. The rows are ordered such that no label crosses a line:
    of those to the left, the line furthest right is the tallest.
    """
    transform = axes.get_xaxis_transform()
    left, right = axes.get_xlim()
    texts = {method: f"{labels[method]}: {thresholds[method]:.4g}" for method in positions}
    shares = {method: (position - left) / (right - left) for method, position in positions.items()}
    leftwards = {method: shares[method] > 0.03 + _CHARACTER_SHARE * len(texts[method]) for method in positions}
    order = sorted(
        positions, key=lambda method: (leftwards[method], -shares[method] if leftwards[method] else shares[method])
    )
    for row, method in enumerate(order):
        position, height = positions[method], 1.47 - 0.13 * row
        colour = COLOUR[f"method-{method}"]
        axes.plot(
            [position, position], [0, height], transform=transform, color=colour, linewidth=1.3,
            linestyle=DASHES[method], clip_on=False, solid_capstyle="butt",
        )  # fmt: skip
        axes.text(
            position + (-0.012 if leftwards[method] else 0.012) * (right - left), height, texts[method],
            transform=transform, ha="right" if leftwards[method] else "left", va="top", color=colour, fontsize=7.5,
        )  # fmt: skip


def _lowest_edge(histogram: MagnitudeHistogram, threshold: float) -> float:
    """Return where a logarithmic axis starts: `LEFT_OUT` of the values that are not zero lie below.

    It stays well below the lowest threshold, and within `WIDEST_RANGE` of the largest magnitude.
    """
    ranks = np.cumsum(histogram.nonzero_counts())
    first = int(np.searchsorted(ranks, LEFT_OUT * ranks[-1], side="right"))
    edge = float(lower_edges(histogram.bins[first : first + 1])[0])
    return max(min(edge, threshold / 10), histogram.amax / WIDEST_RANGE)


def _rebinned(histogram: MagnitudeHistogram, smallest: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum a histogram's bins into at most `HISTOGRAM_BINS` wider ones; return their counts and edges.

    Args:
        histogram: exact zeros are left out.
        smallest: 0.0 for bins of one width from 0; else the lowest edge of bins of one ratio. A bin then goes where its
            lower edge lies: at a thousandth of its magnitude it is far narrower than the wide ones.
    """
    if smallest:
        edges = np.geomspace(smallest, histogram.amax * (1 + 1e-9), HISTOGRAM_BINS + 1)
        weights = histogram.nonzero_counts().astype(np.float64)
        return np.histogram(lower_edges(histogram.bins), edges, weights=weights)
    linear = histogram.linear()
    group = -(-linear.counts.size // HISTOGRAM_BINS)
    padded = np.pad(linear.counts, (0, -linear.counts.size % group))
    counts = padded.reshape(-1, group).sum(axis=1).astype(np.float64)
    return counts, np.arange(counts.size + 1) * group * linear.width


def _decades(left: float, right: float) -> list[float]:
    """Return at most six whole numbers within the limits, evenly spaced."""
    first, last = math.ceil(left), math.floor(right)
    return [float(decade) for decade in range(first, last + 1, max(1, -(-(last - first) // 5)))]


def _power(decade: int) -> str:
    """Write 10^decade: 1, 10, 100, then with an exponent."""
    return str(10**decade) if 0 <= decade <= 2 else f"10{str(decade).translate(_SUPERSCRIPTS)}"
