"""The figures of the report: matplotlib drawings as SVG that lives inside an HTML page.

Drawn on `matplotlib.figure.Figure` objects, so that pyplot's global state stays as the user's program left it. What
matplotlib writes is a document of its own; `_inline` makes an element of a page out of it: no XML header, no namespaces,
no identifiers that two figures could share, text that stays text in the page's font, and colours that are CSS variables,
so that the same figure serves the light and the dark scheme.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrators.histogram import MagnitudeHistogram, lower_edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE: dict[str, tuple[str, str]] = {
    "plot-text": ("#424a53", "#b4bcc6"),
    "plot-line": ("#c9d0d8", "#3d4650"),
    "plot-strong": ("#161b21", "#f0f3f6"),
    "plot-fill": ("#b9c7d9", "#42566f"),
    "plot-page": ("#fefefe", "#171b21"),
    "method-minmax": ("#6b7684", "#a3adb8"),
    "method-entropy": ("#1f6feb", "#6cb0ff"),
    "method-percentile": ("#c4530a", "#f0934e"),
    "method-mse": ("#0f7f5f", "#45c49b"),
    "method-auto": ("#a1418f", "#e08fd0"),
    "precision-fp32": ("#8893a0", "#76818d"),
    "precision-fp16": ("#4a8f9c", "#62b0bf"),
    "precision-int8": ("#2a63c8", "#5c9cf5"),
    "precision-other": ("#9a8a6a", "#b5a27c"),
    "dtype-float": ("#8893a1", "#76818e"),
    "dtype-float16": ("#4a8f9d", "#62b0c0"),
    "dtype-int8": ("#2a63c9", "#5c9cf6"),
    "dtype-int32": ("#9a6fc4", "#b592dd"),
    "dtype-other": ("#c98a1b", "#e0aa4a"),
    "dtype-rest": ("#d5dae1", "#343c46"),
}
"""CSS variable to its colour on a light and on a dark page. Every light colour occurs once: it stands for the variable."""

DASHES: dict[str, Any] = {
    "minmax": (0, (1, 1.2)),
    "entropy": "solid",
    "percentile": (0, (5, 1.6)),
    "mse": (0, (3, 1.2, 1, 1.2)),
}
"""Line style of each method's threshold, so that colour is not the only thing that tells them apart."""

WIDTH = 12.2
"""Inches of the figures that take the page's width."""

HISTOGRAM_BINS = 96
LOGARITHMIC_BELOW = 0.08
"""A histogram's axis becomes logarithmic where a threshold lies below this share of the largest magnitude."""

_CHARACTER_SHARE = 0.0175
"""Width of a letter of a threshold's label, as a share of the axes' width."""

_COLOUR_OF = {name: light for name, (light, _) in PALETTE.items()}
_VARIABLE_OF = {light: f"var(--{name},{light})" for name, (light, _) in PALETTE.items()}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class LatencyBar:
    """One model of the latency figure.

    Attributes:
        label: its name in the figure.
        precision: "fp32", "fp16", "int8" or "other": the colour.
        median_ms: median time.
        p90_ms: 90th percentile.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        speedup: against the reference; None for the reference itself.
        low: lower end of the interval of the speed-up.
        high: upper end.
    """

    label: str
    precision: str
    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    speedup: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class SizeBar:
    """One model of the size figure.

    Attributes:
        label: its name in the figure.
        parts: bytes by data type, and the rest of the file under "rest".
    """

    label: str
    parts: dict[str, int]


@dataclass(frozen=True, slots=True)
class AccuracyPoint:
    """One INT8 model of the accuracy figure.

    Attributes:
        method: the calibration method: the row, and the colour.
        target: "cpu" or "tensorrt": the marker.
        values: value by panel title; None where it is not known.
    """

    method: str
    target: str
    values: dict[str, float | None]


def histogram_figure(
    histogram: MagnitudeHistogram, thresholds: Mapping[str, float], labels: Mapping[str, str], description: str, name: str
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
    counts, edges = _rebinned(histogram, min(thresholds.values()) / 30 if logarithmic else 0.0)
    place = np.log10 if logarithmic else np.asarray
    with _figure(3.7, 2.2) as figure:
        axes = _axes(figure, 0.095, 0.15, 0.885, 0.56)
        heights = np.where(counts > 0, np.log10(np.maximum(counts, 1)) + 0.3, 0.0)
        axes.stairs(heights, place(edges), fill=True, color=_COLOUR_OF["plot-fill"], linewidth=0)
        top = float(heights.max()) * 1.05
        left, right = float(place(edges[0])), float(place(amax))
        axes.set_xlim(left, right + 0.012 * (right - left))
        axes.set_ylim(0, top)
        step = max(1, round((top - 0.3) / 3))
        decades = list(range(0, int(top - 0.3) + 1, step))
        axes.set_yticks([decade + 0.3 for decade in decades], [_power(decade) for decade in decades])
        positions = _decades(left, right) if logarithmic else _round_steps(right)
        axes.set_xticks(positions, [_power(round(p)) if logarithmic else f"{p:g}" for p in positions])
        _threshold_lines(axes, {method: float(place(value)) for method, value in thresholds.items()}, thresholds, labels)
        return _inline(figure, name, description)


def latency_figure(bars: Sequence[LatencyBar], reference: str, description: str, name: str) -> str:
    """Draw median times with their percentiles, and beside them the speed-ups with their intervals."""
    height = 0.62 + 0.27 * len(bars)
    with _figure(WIDTH, height) as figure:
        bottom, share = 0.36 / height, (height - 0.62) / height
        times = _axes(figure, 0.185, bottom, 0.39, share)
        ratios = _axes(figure, 0.645, bottom, 0.335, share)
        _rows(times, [bar.label for bar in bars])
        _rows(ratios, [""] * len(bars))
        limit = min(max(bar.p99_ms for bar in bars), 2.2 * max(bar.median_ms for bar in bars)) * 1.12
        for row, bar in enumerate(bars):
            _latency_row(times, row, bar, limit)
            _speedup_row(ratios, row, bar)
        times.set_xlim(0, limit)
        ticks = _round_steps(limit)
        times.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        low, high = _span([value for bar in bars for value in (bar.low, bar.high) if value is not None] + [1.0])
        ratios.set_xlim(max(0.0, low), high)
        ticks = _between(max(0.0, low), high)
        ratios.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        ratios.axvline(1.0, color=_COLOUR_OF["plot-text"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        _title(times, "one inference, ms: bar = median, whisker = p90, p95, p99")
        _title(ratios, f"speed-up against {reference}, with 95 % interval")
        return _inline(figure, name, description)


def size_figure(bars: Sequence[SizeBar], description: str, name: str) -> str:
    """Draw the bytes of each model, stacked by what they are."""
    height = 0.66 + 0.28 * len(bars)
    kinds = list(dict.fromkeys(kind for bar in bars for kind, count in bar.parts.items() if count and kind != "rest"))
    with _figure(WIDTH, height) as figure:
        axes = _axes(figure, 0.185, 0.36 / height, 0.795, (height - 0.66) / height)
        _rows(axes, [bar.label for bar in bars])
        largest = max(sum(bar.parts.values()) for bar in bars)
        unit, unit_name = (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
        for row, bar in enumerate(bars):
            start = 0.0
            for kind in (*kinds, "rest"):
                width = bar.parts.get(kind, 0) / unit
                axes.barh(row, width, 0.62, left=start, color=_dtype_colour(kind), linewidth=0)
                start += width
            axes.text(start + 0.008 * largest / unit, row, f"{start:.3g} {unit_name}", va="center", **_text("plot-strong"))
        axes.set_xlim(0, largest / unit * 1.1)
        ticks = _round_steps(largest / unit)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        _legend(axes, [("other types" if kind == "other" else kind, _dtype_colour(kind)) for kind in kinds] + [("graph and rest", _dtype_colour("rest"))])
        return _inline(figure, name, description)


def accuracy_figure(
    points: Sequence[AccuracyPoint],
    panels: Sequence[str],
    references: Mapping[str, tuple[str, float]],
    description: str,
    name: str,
) -> str:
    """Draw one row per method and one panel per measure; targets differ in their markers.

    Args:
        points: the INT8 models.
        panels: titles of the panels, keys of `AccuracyPoint.values`.
        references: panel to (label, value) of a line drawn for comparison: FP32's own score.
        description: the figure in words.
        name: unique among the figures of a page.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    height = 0.86 + 0.27 * len(methods)
    with _figure(WIDTH, height) as figure:
        width = (0.88 - 0.035 * (len(panels) - 1)) / len(panels)
        for column, panel in enumerate(panels):
            left = 0.1 + column * (width + 0.035)
            axes = _axes(figure, left, 0.36 / height, width, (height - 0.86) / height)
            _rows(axes, methods if column == 0 else [""] * len(methods))
            found = [value for point in points if (value := point.values.get(panel)) is not None]
            if panel in references:
                label, reference = references[panel]
                axes.axvline(reference, color=_COLOUR_OF["plot-text"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
                found.append(reference)
                panel_title = f"{panel} (dashed: {label})"
            else:
                panel_title = panel
            for point in points:
                value = point.values.get(panel)
                if value is not None:
                    _accuracy_marker(axes, methods.index(point.method), point, value)
            low, high = _span(found)
            axes.set_xlim(low, high)
            ticks = _between(low, high)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            _title(axes, panel_title)
        _marker_key(figure, [point.target for point in points], height)
        return _inline(figure, name, description)


def _threshold_lines(
    axes: Axes, positions: Mapping[str, float], thresholds: Mapping[str, float], labels: Mapping[str, str]
) -> None:
    """Draw one line per method up to its label, each label in a row of its own above the axes.

    Labels lie to the left of their line, where there is room. The rows are ordered such that no label crosses a line: of
    those to the left, the line furthest right is the tallest.
    """
    transform = axes.get_xaxis_transform()
    left, right = axes.get_xlim()
    texts = {method: f"{labels[method]}: {thresholds[method]:.4g}" for method in positions}
    shares = {method: (position - left) / (right - left) for method, position in positions.items()}
    leftwards = {method: shares[method] > 0.03 + _CHARACTER_SHARE * len(texts[method]) for method in positions}
    order = sorted(positions, key=lambda method: (leftwards[method], -shares[method] if leftwards[method] else shares[method]))
    for row, method in enumerate(order):
        position, height = positions[method], 1.47 - 0.13 * row
        colour = _COLOUR_OF[f"method-{method}"]
        axes.plot(
            [position, position], [0, height], transform=transform, color=colour, linewidth=1.3,
            linestyle=DASHES[method], clip_on=False, solid_capstyle="butt",
        )  # fmt: skip
        axes.text(
            position + (-0.012 if leftwards[method] else 0.012) * (right - left), height, texts[method],
            transform=transform, ha="right" if leftwards[method] else "left", va="top", color=colour, fontsize=7.5,
        )  # fmt: skip


def _latency_row(axes: Axes, row: int, bar: LatencyBar, limit: float) -> None:
    axes.barh(row, bar.median_ms, 0.6, color=_COLOUR_OF[f"precision-{bar.precision}"], linewidth=0)
    line = {"color": _COLOUR_OF["plot-strong"], "linewidth": 0.9}
    axes.plot([bar.median_ms, min(bar.p99_ms, limit)], [row, row], **line)
    for value, half in ((bar.p90_ms, 0.13), (bar.p95_ms, 0.18), (bar.p99_ms, 0.23)):
        if value <= limit:
            axes.plot([value, value], [row - half, row + half], **line)
    axes.text(
        0.012 * limit, row, f"{bar.median_ms:.3g}", va="center", color=_COLOUR_OF["plot-page"], fontsize=8, weight="bold"
    )
    if bar.p99_ms > limit:
        axes.text(limit, row - 0.28, f"p99 {bar.p99_ms:.3g} →", ha="right", va="center", **_text("plot-text", 7))


def _speedup_row(axes: Axes, row: int, bar: LatencyBar) -> None:
    if bar.speedup is None or bar.low is None or bar.high is None:
        axes.annotate(
            "reference", (1.0, row), xytext=(5, 0), textcoords="offset points", va="center", **_text("plot-text")
        )
        return
    colour = _COLOUR_OF[f"precision-{bar.precision}"]
    axes.plot([bar.low, bar.high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
    axes.plot([bar.speedup], [row], marker="o", markersize=5.5, color=colour, markeredgewidth=0)
    axes.annotate(
        f"{bar.speedup:.2f}x", (bar.high, row), xytext=(5, 0), textcoords="offset points", va="center", **_text("plot-strong")
    )


def _accuracy_marker(axes: Axes, row: int, point: AccuracyPoint, value: float) -> None:
    colour = _COLOUR_OF[f"method-{point.method}"]
    simulated = point.target == "tensorrt"
    axes.plot(
        [value], [row + (0.17 if simulated else -0.17)], marker="D" if simulated else "o", markersize=5 if simulated else 6,
        markerfacecolor="none" if simulated else colour, markeredgecolor=colour, markeredgewidth=1.4, linestyle="none",
    )  # fmt: skip


def _marker_key(figure: Figure, targets: Sequence[str], height: float) -> None:
    """Say above the panels what the two markers are."""
    top = 1 - 0.1 / height
    words = {"cpu": "● cpu target, measured", "tensorrt": "◇ tensorrt target, simulated"}
    present = [words[target] for target in words if target in targets]
    for index, text in enumerate(present):
        figure.text(0.1 + 0.16 * index, top, text, va="center", ha="left", **_text("plot-text"))


def _legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """Write the legend in one line above the axes, each name beside its colour."""
    position = 0.0
    for text, colour in entries:
        axes.annotate(
            "■", (position, 1.0), xycoords="axes fraction", xytext=(0, 7), textcoords="offset points", color=colour, fontsize=10,
            va="center",
        )  # fmt: skip
        axes.annotate(
            text, (position, 1.0), xycoords="axes fraction", xytext=(11, 7), textcoords="offset points", va="center",
            **_text("plot-text"),
        )  # fmt: skip
        position += (24 + 5.6 * len(text)) / (WIDTH * 72 * 0.795)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=_COLOUR_OF["plot-strong"])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=_COLOUR_OF["plot-line"], linewidth=0.6)
    axes.set_axisbelow(True)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", pad=5, **_text("plot-text"))


def _text(colour: str, size: float = 8.5) -> dict[str, Any]:
    return {"color": _COLOUR_OF[colour], "fontsize": size}


def _dtype_colour(kind: str) -> str:
    return _COLOUR_OF.get(f"dtype-{kind.lower()}", _COLOUR_OF["dtype-other"])


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    axes = figure.add_axes((left, bottom, width, height), facecolor="none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_COLOUR_OF["plot-line"])
    axes.tick_params(length=2.5, color=_COLOUR_OF["plot-line"], labelcolor=_COLOUR_OF["plot-text"], labelsize=7.5, pad=2)
    return axes


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure, sizes in inches, under settings of its own.

    The identifiers in the SVG follow from `svg.hashsalt`, so that equal data give equal pages.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trt-int8", "path.simplify": False}):
        figure = Figure(figsize=(width, height), facecolor="none", edgecolor="none")
        FigureCanvasSVG(figure)
        yield figure


def _inline(figure: Figure, name: str, description: str) -> str:
    """Render a figure as an `<svg>` element for an HTML page.

    Args:
        figure: the drawing.
        name: prefix of the identifiers that the element needs (clip paths, markers).
        description: the figure in words, for those who cannot see it.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ET.fromstring(stream.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(_compact(attributes))
        element.text = (element.text or "").strip() or None
        element.tail = None
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style") or (child.tag == "defs" and not len(child))]:
            parent.remove(child)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        _rename(element, used, name)
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    root.attrib.clear()
    root.attrib.update(
        {
            "class": "plot",
            "role": "img",
            "aria-label": description,
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": f"{width * 4 / 3:.0f}",
            "height": f"{height * 4 / 3:.0f}",
        }
    )
    text = ET.tostring(root, encoding="unicode", short_empty_elements=False)
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: _VARIABLE_OF.get(match[0], match[0]), text)


def _compact(attributes: dict[str, str]) -> dict[str, str]:
    """Shorten what matplotlib writes: a tenth of a point is finer than any screen; the font is the page's."""
    short: dict[str, str] = {}
    for key, value in attributes.items():
        if key == "d":
            value = _rounded(" ".join(value.split()), 1)
        elif key in ("x", "y", "width", "height", "transform"):
            value = _rounded(value, 2)
        elif key == "style":
            value = re.sub(r"font-family:[^;]*;? ?", "", value)
            value = re.sub(r"(font: .*?px) '[^;]*", r"\1 sans-serif", value)
        short[key] = value
    return short


def _rounded(text: str, digits: int) -> str:
    return re.sub(r"-?\d+\.\d+", lambda match: f"{round(float(match[0]), digits):g}", text)


def _rename(element: ET.Element, used: set[str], name: str) -> None:
    identifier = element.attrib.pop("id", None)
    if identifier in used:
        element.set("id", f"{name}-{identifier}")
    for key, value in element.attrib.items():
        if key == "href":
            element.set(key, f"#{name}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))


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


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return limits that hold all values with some air, on the right also for a label."""
    low, high = min(values), max(values)
    room = (high - low) or max(abs(high), 1.0) * 0.02
    return low - 0.12 * room, high + 0.2 * room


def _round_steps(limit: float) -> list[float]:
    """Return about four round positions from 0 up to `limit`."""
    return _between(0.0, limit)


def _between(low: float, high: float) -> list[float]:
    """Return three to six round positions within the limits."""
    raw = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * magnitude for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - raw))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _decades(left: float, right: float) -> list[float]:
    return [float(decade) for decade in range(math.ceil(left), math.floor(right) + 1)]


def _power(decade: int) -> str:
    """Write 10^decade: 1, 10, 100, then with an exponent."""
    return str(10**decade) if 0 <= decade <= 2 else f"10{str(decade).translate(_SUPERSCRIPTS)}"
