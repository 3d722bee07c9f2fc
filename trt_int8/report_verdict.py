"""The verdict of the report: what came out of a run, in one sentence that a newcomer understands.

It claims no more than was measured. A speed-up whose interval holds 1 is called none, a difference in top-1 is set
against what chance explains, and what was simulated is called that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calibrators.calibration import DEFAULT_METHOD, METHODS
from engines.device import SIMULATED
from trt_int8.report_models import TARGETS, ModelRow, Timing
from trt_int8.report_text import format_bytes

_NOISE = 2.0
"""Standard deviations of a difference in top-1 that chance is allowed."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the large figures at the top of the page.

    Attributes:
        title: what it is.
        value: the figure.
        note: one line below it.
        tone: "good", "bad" or "plain".
    """

    title: str
    value: str
    note: str
    tone: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out of the run.

    Attributes:
        sentence: the answer in one sentence, two where INT8 is not faster.
        remarks: what has to be known beside it, one sentence or two each.
        tiles: its figures.
    """

    sentence: str
    remarks: tuple[str, ...]
    tiles: tuple[Tile, ...]


def headline(rows: Sequence[ModelRow], method: str | None) -> ModelRow | None:
    """Pick the INT8 model that the verdict is about.

    The delivered method decides, then `auto`, then the default; of its models the fastest of those that were timed
    here.

    Args:
        rows: all models.
        method: the delivered method, where the configuration names one.
    """
    int8 = [row for row in rows if row.is_int8]
    for wanted in (method, "auto", DEFAULT_METHOD, *METHODS):
        same = [row for row in int8 if row.method == wanted]
        if same:
            return min(same, key=_preference)
    return int8[0] if int8 else None


def _preference(row: ModelRow) -> tuple[float, bool]:
    timed = row.timing is not None and not row.timing.simulated
    return (row.timing.median_ms if row.timing is not None and timed else math.inf), row.target != "cpu"


def judge(rows: Sequence[ModelRow], method: str | None, *, own_evaluation: bool, gpu: str | None = None) -> Verdict:
    """Say in plain words what came out.

    Args:
        rows: all models.
        method: the delivered method, where the configuration names one.
        own_evaluation: whether accuracy was judged on data of its own, not on the calibration's.
        gpu: name of the GPU whose engines were measured; None where ONNX Runtime ran the models on the CPU.
    """
    row = headline(rows, method)
    reference = next((other for other in rows if other.reference), None)
    if row is None:
        return Verdict("This run holds no INT8 model yet.", (), ())
    against = reference.name if reference is not None else "FP32"
    place = "this CPU" if gpu is None else "this GPU"
    speed = None if row.timing is None or row.timing.simulated else _speed_words(row.timing, against, place)
    rest = list(filter(None, (_size_words(row, against if speed is None else ""), _accuracy_words(row, reference))))
    if speed is None and not rest:
        sentence = f"{row.short_name} was made, and not measured yet."
    elif speed is None:
        sentence = f"{row.short_name} {' and '.join(rest)}."
    elif row.timing is not None and row.timing.faster:
        sentence = f"{row.short_name} {_listed([speed, *rest])}."
    else:
        sentence = f"{row.short_name} {speed}." + (f" It {' and '.join(rest)}." if rest else "")
    # Where engines ran, there is nothing to be told about what they would do.
    same = [other for other in rows if other.method == row.method and other.target == "tensorrt" and gpu is None]
    twin = same[0] if same else None
    simulated = "TensorRT and the GPU are SIMULATED here: no figure is a GPU's." if gpu == SIMULATED else ""
    remarks = [simulated, _tensorrt_words(twin, alone=twin is row), _noise_words(row, reference)]
    if row.accuracy is not None and not own_evaluation:
        remarks.append(
            "Accuracy was judged on the calibration data, which flatters: name evaluation data for a fair figure."
        )
    return Verdict(sentence, tuple(filter(None, remarks)), tuple(_tiles(row, twin, reference, against, place)))


def closest_methods(rows: Sequence[ModelRow]) -> tuple[str, ...]:
    """Say for each target which calibration method comes closest to FP32, by the SQNR of the outputs."""
    lines = []
    for target in TARGETS:
        found = [
            (row.accuracy.sqnr_db, row.method)
            for row in rows
            if row.precision == "int8"
            and row.target == target
            and row.method in METHODS
            and row.accuracy is not None
            and row.accuracy.sqnr_db is not None
        ]
        if len(found) > 1:
            (most, best), (least, worst) = max(found), min(found)
            lines.append(
                f"On the {target} target {best} comes closest to FP32 ({most:.1f} dB), "
                f"{worst} stays furthest ({least:.1f} dB)."
            )
    return tuple(lines)


def lost_top1(row: ModelRow, reference: ModelRow | None) -> float | None:
    """Return the points of top-1 that a model loses against the reference; None without labels."""
    if row.accuracy is None or reference is None or reference.accuracy is None:
        return None
    if row.accuracy.top1 is None or reference.accuracy.top1 is None:
        return None
    return reference.accuracy.top1 - row.accuracy.top1


def top1_noise(row: ModelRow) -> float | None:
    """Return the points of top-1 that chance explains: two standard deviations of the difference between two models.

    Both answer the same samples, so only changed answers count: of d of them each side wins some, and the difference
    in right answers has a standard deviation of at most sqrt(d).
    """
    changed = changed_answers(row)
    if row.accuracy is None or not row.accuracy.samples or changed is None:
        return None
    return 100.0 * _NOISE * math.sqrt(changed) / row.accuracy.samples


def changed_answers(row: ModelRow) -> int | None:
    """Return on how many samples a model decides unlike the reference; None where it is not known."""
    if row.accuracy is None or row.accuracy.agreement is None or not row.accuracy.samples:
        return None
    return round((100.0 - row.accuracy.agreement) / 100.0 * row.accuracy.samples)


def _speed_words(timing: Timing, against: str, place: str) -> str:
    interval = f"95 % interval {timing.low:.2f} to {timing.high:.2f}"
    if timing.faster:
        return f"runs {timing.speedup:.2f}x as fast as {against} on {place} ({interval})"
    if timing.faster is False:
        return f"is not faster than {against} on {place}, but slower: {timing.speedup:.2f}x its speed ({interval})"
    return f"is not faster than {against} on {place}: the two cannot be told apart ({timing.speedup:.2f}x, {interval})"


def _size_words(row: ModelRow, against: str) -> str:
    if row.size is None or row.size.ratio is None:
        return ""
    than = f" than {against}" if against else ""
    if row.size.ratio < 1:
        return f"is {1 / row.size.ratio:.1f}x larger{than}"
    return f"is {row.size.ratio:.1f}x smaller{than}"


def _accuracy_words(row: ModelRow, reference: ModelRow | None) -> str:
    found = row.accuracy
    if found is None:
        return ""
    if found.nonfinite:
        return f"gives {found.nonfinite:,} values that are NaN or infinite"
    lost = lost_top1(row, reference)
    if lost is not None and reference is not None and reference.accuracy is not None:
        digits = _digits(found.samples)
        scores = f"{reference.accuracy.top1:.{digits}f} to {found.top1:.{digits}f} %"
        if round(lost, digits) == 0:
            return f"keeps its top-1 of {found.top1:.{digits}f} %"
        return f"{'loses' if lost > 0 else 'gains'} {abs(lost):.{digits}f} points of top-1 ({scores})"
    samples = f" of {found.samples:,} samples" if found.samples else " of the samples"
    if found.agreement is not None:
        return f"decides as FP32 does on {found.agreement:.1f} %{samples}"
    return f"keeps an SQNR of {found.sqnr_db:.1f} dB in the outputs" if found.sqnr_db is not None else ""


def _tensorrt_words(twin: ModelRow | None, *, alone: bool) -> str:
    """Give the figures of the model for TensorRT and say how they came about; `alone` where the verdict is about it."""
    if twin is None or twin.accuracy is None:
        return ""
    found = twin.accuracy
    simulated = (
        "by exact fake quantization in ONNX Runtime; "
        "no GPU was measured, so nothing here says how fast it is under TensorRT."
    )
    if alone:
        return f"Its accuracy is simulated, {simulated}" if found.simulated else ""
    figures = []
    if found.top1 is not None:
        figures.append(f"top-1 {found.top1:.{_digits(found.samples)}f} %")
    if found.agreement is not None:
        figures.append(f"{found.agreement:.1f} % agreement with FP32")
    if found.sqnr_db is not None:
        figures.append(f"{found.sqnr_db:.1f} dB SQNR")
    words = f"The same scales placed for TensorRT: {', '.join(figures) or 'no figures'}."
    return f"{words} That is simulated, {simulated}" if found.simulated else words


def _noise_words(row: ModelRow, reference: ModelRow | None) -> str:
    lost, noise, changed = lost_top1(row, reference), top1_noise(row), changed_answers(row)
    if lost is None or noise is None or changed is None or row.accuracy is None:
        return ""
    if not changed:
        return f"None of its {row.accuracy.samples:,} answers differs from FP32's."
    digits = _digits(row.accuracy.samples)
    answers = f"{changed:,} of {row.accuracy.samples:,} answers differ from FP32's"
    if abs(lost) <= noise:
        return f"{answers}; with so few, a difference of up to {noise:.{digits}f} points of top-1 may be chance."
    return f"{answers}; chance explains about {noise:.{digits}f} points of top-1, and the difference is larger."


def _tiles(
    row: ModelRow, twin: ModelRow | None, reference: ModelRow | None, against: str, place: str
) -> Iterable[Tile]:
    timing = row.timing
    if timing is not None and not timing.simulated and timing.speedup is not None:
        tone = {True: "good", False: "bad", None: "plain"}[timing.faster]
        words = {True: "as fast as", False: "slower than", None: "no faster than"}[timing.faster]
        note = f"{words} {against} ({timing.low:.2f} to {timing.high:.2f})"
        yield Tile(f"Speed on {place}", f"{timing.speedup:.2f}x", note, tone)
    if row.size is not None and row.size.ratio is not None:
        tone = "good" if row.size.ratio > 1 else "bad"
        note = f"smaller than {against}: {format_bytes(row.size.file_bytes)}"
        yield Tile("File size", f"{row.size.ratio:.1f}x", note, tone)
    lost = lost_top1(row, reference)
    if lost is not None and row.accuracy is not None and row.accuracy.top1 is not None:
        digits, noise = _digits(row.accuracy.samples), top1_noise(row) or 0.0
        change = "±0" if round(lost, digits) == 0 else f"{-lost:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
        tone = "plain" if abs(lost) <= noise else "bad" if lost > 0 else "good"
        on = f" on {row.accuracy.samples:,} samples" if row.accuracy.samples else ""
        yield Tile("Top-1, points", change, f"{row.accuracy.top1:.{digits}f} %{on}", tone)
    if row.accuracy is not None and row.accuracy.agreement is not None:
        changed = changed_answers(row)
        note = (
            "of decisions are FP32's"
            if changed is None
            else f"{changed:,} of {row.accuracy.samples:,} decisions differ"
        )
        yield Tile("Agreement with FP32", f"{row.accuracy.agreement:.1f} %", note, "plain")
    if row.accuracy is not None and row.accuracy.sqnr_db is not None:
        note = "outputs against FP32"
        if twin is not None and twin is not row and twin.accuracy is not None and twin.accuracy.sqnr_db is not None:
            note = f"TensorRT target, simulated: {twin.accuracy.sqnr_db:.1f} dB"
        yield Tile("SQNR", f"{row.accuracy.sqnr_db:.1f} dB", note, "plain")


def _listed(clauses: Sequence[str]) -> str:
    if len(clauses) < 3:
        return " and ".join(clauses)
    return f"{', '.join(clauses[:-1])}, and {clauses[-1]}"


def _digits(samples: int | None) -> int:
    """Return the decimals of a percentage that so many samples can tell apart."""
    return 1 if not samples or samples < 5000 else 2
