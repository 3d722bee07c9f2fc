"""The HTML report of a run: one file that needs nothing else, made from the files in the run's folder alone.

It asks for nothing over the network, works without JavaScript (which only sorts and filters tables), and follows the
reader's light or dark scheme. What a run does not hold is said, not hidden. Figures are drawn by `trt_int8.plots`
text is `templates/report.html.j2`, what it says is decided in `trt_int8.report_models`, `report_tensors` and
`report_verdict`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from calibrators import convergence
from calibrators.calibration import DEFAULT_METHOD, DEFAULT_PERCENTILE, METHODS, Calibration
from calibrators.files import write_text
from calibrators.protocols import Track, untracked
from engines.device import SIMULATED
from trt_int8 import plots
from trt_int8.errors import ConfigError
from trt_int8.plot_convergence import DRAWN_TENSORS, convergence_figure
from trt_int8.plot_histogram import histogram_figure
from trt_int8.plot_svg import PALETTE
from trt_int8.report_models import Json, ModelRow, Size, model_rows
from trt_int8.report_tensors import TensorRow, most_contested, placements, tensor_rows
from trt_int8.report_text import (
    ABSENT,
    breakable,
    describe_tensor,
    fixed,
    format_bytes,
    moment,
    percent,
    significant,
)
from trt_int8.report_verdict import closest_methods, headline, judge
from trt_int8.run_folder import read_manifest

REPORT = "report.html"
POLYGRAPHY = "polygraphy/commands.sh"

PLOTTED_TENSORS = 80
"""Histograms in a report at most: the tensors on which the methods differ most. The table lists every tensor."""

OPEN_TENSORS = 6
"""Histograms that are seen without opening anything."""

SMALLEST_PART = 0.01
"""Data types below this share of every file are drawn together."""


@dataclass(frozen=True, slots=True)
class TensorCard:
    """A tensor with its histogram."""

    row: TensorRow
    figure: Markup


def render_report(folder: Path, *, track: Track = untracked) -> Path:
    """Write `report.html` into a run's folder.

    Args:
        folder: the folder; its `manifest.json` is needed, every other file is optional, and its absence is said.
        track: shows the progress.

    Returns:
        The page's path.

    Raises:
        ConfigError: the folder is not the folder of a run, or one of its files is damaged.
        FileAccessError: a file cannot be read, or the page cannot be written.
        CacheFormatError: `calibration.npz` is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    config: Json = manifest.get("config") or {}
    quantize_config: Json = config.get("quantize") or {}
    method = quantize_config.get("method")
    percentile = float(quantize_config.get("percentile") or DEFAULT_PERCENTILE)
    names = ("export", "quantization", "engines", "layers", "benchmark", "accuracy", "sizes")
    files = {name: _read_json(folder / f"{name}.json") for name in names}
    calibration = _read_calibration(folder / "calibration.npz")

    engines = (files["engines"] or {}).get("engines") or ()
    gpu = engines[0]["environment"]["gpu"] if engines else None
    sizes = None if gpu == SIMULATED else files["sizes"]  # such plan files hold what the simulation needs
    rows = model_rows(files["quantization"], files["benchmark"], files["accuracy"], sizes, files["engines"])
    groups = _size_groups(rows)
    own_evaluation = not config.get("data") or bool(config["data"].get("evaluation"))
    tensors = () if calibration is None else tensor_rows(calibration, files["quantization"], percentile)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            manifest=manifest,
            machine=_machine_facts(manifest.get("machine") or {}),
            verdict=judge(rows, method, own_evaluation=own_evaluation, gpu=gpu),
            rows=rows,
            engines=engines,
            gpu=gpu,
            simulated_gpu=gpu == SIMULATED,
            delivered=headline(rows, method),
            files=files,
            figures=_figures(rows, groups),
            size_groups=groups,
            closest=closest_methods(rows),
            configured_method=method,
            fingerprint=None if calibration is None else calibration.fingerprint,
            tensors=tensors,
            convergence=None if calibration is None else _convergence(calibration, method),
            cards=[] if calibration is None else _cards(calibration, tensors, percentile, track),
            open_cards=OPEN_TENSORS,
            method_labels=_method_labels(percentile),
            placements=placements(files["quantization"], method),
            polygraphy=(folder / POLYGRAPHY).is_file(),
            config_yaml=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
            palette=PALETTE,
        )
    )
    target = folder / REPORT
    write_text(target, page)
    return target


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trt_int8"),
        autoescape=True,
        # A run of an older version may lack what a newer one writes; such figures are absent, no error.
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        fixed=fixed,
        significant=significant,
        percent=percent,
        bytes=format_bytes,
        tensor=describe_tensor,
        breakable=breakable,
        moment=moment,
    )
    environment.globals["absent"] = ABSENT
    return environment


def _read_json(path: Path) -> Json | None:
    """Read a result file; None where the run has none.

    Raises:
        ConfigError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Cannot report on {str(path)!r}: it cannot be read as JSON ({error}). Run its stage again."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"Cannot report on {str(path)!r}: it holds a {type(value).__name__}; expected an object. "
            "Run its stage again."
        )
    return value


def _read_calibration(path: Path) -> Calibration | None:
    return Calibration.load(path) if path.is_file() else None


def _method_labels(percentile: float) -> dict[str, str]:
    return {method: f"{method} {percentile:g}" if method == "percentile" else method for method in METHODS}


def _cards(calibration: Calibration, rows: Sequence[TensorRow], percentile: float, track: Track) -> list[TensorCard]:
    chosen = most_contested(rows, PLOTTED_TENSORS)
    labels = _method_labels(percentile)
    cards: list[TensorCard] = []
    for index, row in enumerate(track(chosen, "report", len(chosen))):
        thresholds = {threshold.method: threshold.amax for threshold in row.thresholds}
        words = ", ".join(f"{labels[method]} {value:.4g}" for method, value in thresholds.items())
        figure = histogram_figure(
            calibration.histogram(row.name),
            thresholds,
            labels,
            f"Histogram of the magnitudes of {row.name}, counts on a logarithmic axis. Thresholds: {words}.",
            f"histogram-{index}",
        )
        cards.append(TensorCard(row, Markup(figure)))
    return cards


@dataclass(frozen=True, slots=True)
class ConvergenceView:
    """Whether the scales have settled.

    Attributes:
        verdict: of the method that is shown.
        figure: how the scales moved; None where there is but one point.
        left_out: number of tensors whose curves are not drawn.
    """

    verdict: convergence.Convergence
    figure: Markup | None
    left_out: int


def _convergence(calibration: Calibration, delivered: str | None) -> ConvergenceView | None:
    """Return what is known of the scales' history; None where it was not kept."""
    history = calibration.convergence
    if not history:
        return None
    shown = delivered if delivered is not None and delivered in history else DEFAULT_METHOD
    verdicts = {method: found for method in history if (found := convergence.judge(history, method)) is not None}
    if verdicts[shown].since is None:
        return ConvergenceView(verdicts[shown], None, 0)
    figure = convergence_figure(
        history,
        shown,
        # The history is that of the default percentile, whatever percentile the models were made with.
        _method_labels(DEFAULT_PERCENTILE),
        f"How the scales moved over {verdicts[shown].batches} batches: " + "; ".join(map(str, verdicts.values())),
        "convergence",
    )
    return ConvergenceView(verdicts[shown], Markup(figure), max(0, len(calibration.tensors) - DRAWN_TENSORS))


def _figures(rows: Sequence[ModelRow], groups: Sequence[SizeGroup]) -> dict[str, Markup]:
    """Draw the figures about the models that the results allow, by section."""
    figures: dict[str, str] = {}
    bars = [_latency_bar(row) for row in rows if row.timing is not None and not row.timing.simulated]
    reference = next((row.name for row in rows if row.reference), "the first model")
    if bars:
        words = "; ".join(f"{bar.label} {bar.median_ms:.3g} ms" for bar in bars)
        figures["speed"] = plots.latency_figure(bars, reference, f"Median time of one inference: {words}.", "speed")
    sizes = _size_bars(groups)
    if any(group.size.weight_bytes for group in groups):  # engines do not tell what they hold
        words = "; ".join(f"{bar.label} {format_bytes(sum(bar.parts.values()))}" for bar in sizes)
        figures["size"] = plots.size_figure(sizes, f"Size of each model by data type: {words}.", "size")
    figures |= _accuracy_figure(rows)
    return {name: Markup(figure) for name, figure in figures.items()}  # the figures escape what they hold


def _latency_bar(row: ModelRow) -> plots.LatencyBar:
    timing = row.timing
    if timing is None:
        raise AssertionError(f"{row.name} was not timed")
    return plots.LatencyBar(
        label=row.name,
        precision=row.precision,
        median_ms=timing.median_ms,
        p90_ms=timing.p90_ms,
        p95_ms=timing.p95_ms,
        p99_ms=timing.p99_ms,
        speedup=timing.speedup,
        low=timing.low,
        high=timing.high,
    )


@dataclass(frozen=True, slots=True)
class SizeGroup:
    """Models that differ in nothing but the values of their scales, so that one size stands for all.

    Attributes:
        label: what they are.
        models: how many.
        size: of the first one.
        rest: bytes of its file that are no weights.
    """

    label: str
    models: int
    size: Size
    rest: int


def _size_groups(rows: Sequence[ModelRow]) -> list[SizeGroup]:
    groups: dict[str, SizeGroup] = {}
    for row in rows:
        if row.size is None:
            continue
        shared = row.is_int8 and row.method in METHODS  # models of another mode are stored otherwise
        label = f"{row.precision.upper()}, {row.target} target" if shared else row.name
        before = groups.get(label)
        if before is None:
            rest = max(0, row.size.file_bytes - sum(row.size.weight_bytes.values()))
            groups[label] = SizeGroup(label, 1, row.size, rest)
        else:
            groups[label] = replace(before, models=before.models + 1)
    return list(groups.values())


def _size_bars(groups: Sequence[SizeGroup]) -> list[plots.SizeBar]:
    """Make one bar per group; data types that are nowhere a hundredth of the file are drawn as one."""
    shares: dict[str, float] = {}
    for group in groups:
        for kind, count in group.size.weight_bytes.items():
            shares[kind] = max(shares.get(kind, 0.0), count / max(group.size.file_bytes, 1))
    bars = []
    for group in groups:
        parts = {kind: count for kind, count in group.size.weight_bytes.items() if shares[kind] >= SMALLEST_PART}
        other = sum(count for kind, count in group.size.weight_bytes.items() if shares[kind] < SMALLEST_PART)
        bars.append(plots.SizeBar(group.label, {**parts, "other": other, "rest": group.rest}))
    return bars


def _accuracy_figure(rows: Sequence[ModelRow]) -> dict[str, str]:
    points = [
        plots.AccuracyPoint(
            row.method,
            row.target,
            row.accuracy.simulated,
            {
                "SQNR, dB": row.accuracy.sqnr_db,
                "agreement with FP32, %": row.accuracy.agreement,
                "top-1, %": row.accuracy.top1,
            },
        )
        for row in rows
        if row.precision == "int8" and row.accuracy is not None and row.method in METHODS
    ]
    panels = [
        panel for panel in (points[0].values if points else ()) if any(p.values[panel] is not None for p in points)
    ]
    if not panels:
        return {}
    reference = next((row for row in rows if row.reference), None)
    lines: dict[str, tuple[str, float]] = {}
    if reference is not None and reference.accuracy is not None and reference.accuracy.top1 is not None:
        lines["top-1, %"] = (reference.name, reference.accuracy.top1)
    words = "; ".join(
        f"{point.method} on {point.target}: "
        + ", ".join(f"{panel} {value:.4g}" for panel in panels if (value := point.values[panel]) is not None)
        for point in points
    )
    return {
        "accuracy": plots.accuracy_figure(points, panels, lines, f"Accuracy by method and target: {words}.", "accuracy")
    }


def _machine_facts(machine: Json) -> list[tuple[str, str]]:
    """Write `describe_machine()` as (what, value) lines; parts that are absent are left out."""
    cpu, cuda, versions = (machine.get(key) or {} for key in ("cpu", "cuda", "versions"))
    facts: list[tuple[str, Any]] = [
        ("processor", cpu.get("model")),
        ("cores", _cores(cpu)),
        ("INT8 and vector features", ", ".join(cpu.get("features") or ()) or ("none that matter" if cpu else None)),
        ("memory", format_bytes(machine["memory_bytes"]) if machine.get("memory_bytes") else None),
        ("GPU", ", ".join(str(gpu.get("name")) for gpu in cuda.get("gpus") or ()) or cuda.get("error")),
        ("system", machine.get("system")),
        ("Python", machine.get("python")),
        ("packages", ", ".join(f"{package} {version}" for package, version in versions.items() if version)),
    ]
    return [(what, str(value)) for what, value in facts if value]


def _cores(cpu: Json) -> str | None:
    if not cpu.get("cores_logical"):
        return None
    physical = f"{cpu['cores_physical']} cores, " if cpu.get("cores_physical") else ""
    usable = (
        f", {cpu['cores_usable']} usable here" if cpu.get("cores_usable") not in (None, cpu["cores_logical"]) else ""
    )
    return f"{physical}{cpu['cores_logical']} threads{usable}"
