"""The figures of the report about whole models: speed, size, accuracy. Each returns an SVG element for an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trt_int8.plot_svg import COLOUR, empty_figure, inline_svg, make_axes, round_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 12.2
"""Inches of the figures that take the page's width."""


@dataclass(frozen=True, slots=True)
class LatencyBar:
    """One model of the latency figure.

    Attributes:
        label: its name in the figure.
        precision: "fp32", "tf32", "fp16", "int8", "int8+fp16" or "other": the colour.
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
        target: "cpu" or "tensorrt".
        simulated: whether ONNX Runtime only simulated the target: the marker.
        values: value by panel title; None where it is not known.
    """

    method: str
    target: str
    simulated: bool
    values: dict[str, float | None]


def latency_figure(bars: Sequence[LatencyBar], reference: str, description: str, name: str) -> str:
    """Draw median times with their percentiles, and beside them the speed-ups with their intervals."""
    height = 0.62 + 0.27 * len(bars)
    with empty_figure(WIDTH, height) as figure:
        bottom, share = 0.36 / height, (height - 0.62) / height
        times = make_axes(figure, 0.185, bottom, 0.39, share)
        ratios = make_axes(figure, 0.645, bottom, 0.335, share)
        _rows(times, [bar.label for bar in bars])
        _rows(ratios, [""] * len(bars))
        limit = min(max(bar.p99_ms for bar in bars), 2.2 * max(bar.median_ms for bar in bars)) * 1.12
        for row, bar in enumerate(bars):
            _latency_row(times, row, bar, limit)
            _speedup_row(ratios, row, bar)
        times.set_xlim(0, limit)
        ticks = round_positions(0.0, limit)
        times.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        low, high = _span([value for bar in bars for value in (bar.low, bar.high) if value is not None] + [1.0])
        ratios.set_xlim(max(0.0, low), high)
        ticks = round_positions(max(0.0, low), high)
        ratios.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        ratios.axvline(1.0, color=COLOUR["plot-text"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        _title(times, "one inference, ms: bar = median, whisker = p90, p95, p99")
        _title(ratios, f"speed-up against {reference}, with 95 % interval")
        return inline_svg(figure, name, description)


def size_figure(bars: Sequence[SizeBar], description: str, name: str) -> str:
    """Draw the bytes of each model, stacked by what they are."""
    height = 0.66 + 0.28 * len(bars)
    kinds = list(dict.fromkeys(kind for bar in bars for kind, count in bar.parts.items() if count and kind != "rest"))
    with empty_figure(WIDTH, height) as figure:
        axes = make_axes(figure, 0.185, 0.36 / height, 0.795, (height - 0.66) / height)
        _rows(axes, [bar.label for bar in bars])
        largest = max(sum(bar.parts.values()) for bar in bars)
        unit, unit_name = (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
        for row, bar in enumerate(bars):
            start = 0.0
            for kind in (*kinds, "rest"):
                width = bar.parts.get(kind, 0) / unit
                axes.barh(row, width, 0.62, left=start, color=_dtype_colour(kind), linewidth=0)
                start += width
            axes.text(
                start + 0.008 * largest / unit, row, f"{start:.3g} {unit_name}", va="center", **_text("plot-strong")
            )
        axes.set_xlim(0, largest / unit * 1.1)
        ticks = round_positions(0.0, largest / unit)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        _legend(
            axes,
            [("other types" if kind == "other" else kind, _dtype_colour(kind)) for kind in kinds]
            + [("graph and rest", _dtype_colour("rest"))],
        )
        return inline_svg(figure, name, description)


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
    with empty_figure(WIDTH, height) as figure:
        width = (0.88 - 0.035 * (len(panels) - 1)) / len(panels)
        for column, panel in enumerate(panels):
            left = 0.1 + column * (width + 0.035)
            axes = make_axes(figure, left, 0.36 / height, width, (height - 0.86) / height)
            _rows(axes, methods if column == 0 else [""] * len(methods))
            found = [value for point in points if (value := point.values.get(panel)) is not None]
            if panel in references:
                label, reference = references[panel]
                axes.axvline(reference, color=COLOUR["plot-text"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
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
            ticks = [tick for tick in round_positions(low, high) if "%" not in panel or 0 <= tick <= 100]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            _title(axes, panel_title)
        _marker_key(figure, points, height)
        return inline_svg(figure, name, description)


def _latency_row(axes: Axes, row: int, bar: LatencyBar, limit: float) -> None:
    axes.barh(row, bar.median_ms, 0.6, color=_precision_colour(bar.precision), linewidth=0)
    line: dict[str, Any] = {"color": COLOUR["plot-strong"], "linewidth": 0.9}
    axes.plot([bar.median_ms, min(bar.p99_ms, limit)], [row, row], **line)
    for value, half in ((bar.p90_ms, 0.13), (bar.p95_ms, 0.18), (bar.p99_ms, 0.23)):
        if value <= limit:
            axes.plot([value, value], [row - half, row + half], **line)
    axes.text(
        0.012 * limit, row, f"{bar.median_ms:.3g}", va="center", color=COLOUR["plot-page"], fontsize=8, weight="bold"
    )
    if bar.p99_ms > limit:
        axes.text(limit, row - 0.28, f"p99 {bar.p99_ms:.3g} →", ha="right", va="center", **_text("plot-text", 7))


def _speedup_row(axes: Axes, row: int, bar: LatencyBar) -> None:
    if bar.speedup is None or bar.low is None or bar.high is None:
        axes.annotate(
            "reference", (1.0, row), xytext=(5, 0), textcoords="offset points", va="center", **_text("plot-text")
        )
        return
    colour = _precision_colour(bar.precision)
    axes.plot([bar.low, bar.high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
    axes.plot([bar.speedup], [row], marker="o", markersize=5.5, color=colour, markeredgewidth=0)
    axes.annotate(
        f"{bar.speedup:.2f}x",
        (bar.high, row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        **_text("plot-strong"),
    )


def _accuracy_marker(axes: Axes, row: int, point: AccuracyPoint, value: float) -> None:
    colour = COLOUR[f"method-{point.method}"]
    simulated = point.simulated
    axes.plot(
        [value],
        [row + (0.17 if simulated else -0.17)],
        marker="D" if simulated else "o",
        markersize=5 if simulated else 6,
        markerfacecolor="none" if simulated else colour,
        markeredgecolor=colour,
        markeredgewidth=1.4,
        linestyle="none",
    )


def _marker_key(figure: Figure, points: Sequence[AccuracyPoint], height: float) -> None:
    """Say above the panels what the two markers are."""
    top = 1 - 0.1 / height
    kinds = sorted({(point.simulated, point.target) for point in points})
    present = [
        f"◇ {target} target, simulated" if simulated else f"● {target} target, measured" for simulated, target in kinds
    ]
    for index, text in enumerate(present):
        figure.text(0.1 + 0.16 * index, top, text, va="center", ha="left", **_text("plot-text"))


def _legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """Write the legend in one line above the axes, each name beside its colour."""
    position = 0.0
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
    for text, colour in entries:
        axes.annotate("■", (position, 1.0), xytext=(0, 7), color=colour, fontsize=10, **place)
        axes.annotate(text, (position, 1.0), xytext=(11, 7), **place, **_text("plot-text"))
        position += (24 + 5.6 * len(text)) / (WIDTH * 72 * 0.795)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [label if len(label) <= 30 else f"{label[:29]}…" for label in labels])
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=COLOUR["plot-strong"])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=COLOUR["plot-line"], linewidth=0.6)
    axes.set_axisbelow(True)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", pad=5, **_text("plot-text"))


def _text(colour: str, size: float = 8.5) -> dict[str, Any]:
    return {"color": COLOUR[colour], "fontsize": size}


def _dtype_colour(kind: str) -> str:
    return COLOUR.get(f"dtype-{kind.lower()}", COLOUR["dtype-other"])


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return limits that hold all values with some air, on the right also for a label."""
    low, high = min(values), max(values)
    room = (high - low) or max(abs(high), 1.0) * 0.02
    return low - 0.12 * room, high + 0.2 * room


def _precision_colour(precision: str) -> str:
    return COLOUR[f"precision-{precision.replace('+', '-')}"]
