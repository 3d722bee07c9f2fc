"""What `trt-int8 cache check` found: new data against a calibration, tensor by tensor, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from calibrators.histogram import MagnitudeHistogram
from calibrators.percentile import percentile_amax
from trt_int8.console import make_table
from trt_int8.errors import GateMissedError
from trt_int8.report_tensors import clipped_share

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["fine", "drift", "gross"]

GROSS_RATIO = 8.0
"""An input whose typical magnitude is so many times what it was, or as small a part of it, is another input."""

FORGOTTEN_255 = (64.0, 1024.0)
"""Ratios of an input that a forgotten /255 explains: 255 alone, about 100 to 420 with mean and deviation beside it."""

DRIFT_SHARE = 0.1
"""Per cent of its values by which a tensor must clip more than it did in calibration, and twice as much as there."""

CHANCE = 4.0
"""Standard deviations of a count of clipped values that chance may add: of a few hundred values one clips easily."""

DRIFT_RATIO = 2.0
"""A tensor whose largest magnitude is so many times the calibrated one has drifted, however rare that is."""

SHRUNK_RATIO = 0.25
"""Below this part of its typical magnitude a tensor uses a quarter of its codes: two bits are lost."""

_TYPICAL_PERCENTILE = 99.0
_LISTED = 3


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One tensor on the new data.

    Attributes:
        tensor: its name.
        model_input: whether it is an input of the model.
        calibrated_max: largest magnitude in calibration.
        new_max: largest magnitude now.
        amax_ratio: new_max / calibrated_max; infinite where the tensor was always 0 and is not now.
        typical_ratio: the same for the magnitude that 99 % of the values do not exceed, which no single value moves.
        beyond_max: per cent of the new values beyond the calibrated maximum; by whole bins of the histogram, so those
            within a thousandth of it are not counted.
        clipped: per cent of the new values beyond the method's threshold.
        calibrated_clipped: the same for the calibration's own data.
        count: number of new values.
    """

    tensor: str
    model_input: bool
    calibrated_max: float
    new_max: float
    amax_ratio: float
    typical_ratio: float
    beyond_max: float
    clipped: float
    calibrated_clipped: float
    count: int

    @property
    def drifted(self) -> bool:
        """Whether it left its calibrated range."""
        share, count = self.calibrated_clipped / 100, max(self.count, 1)
        chance = 100 * CHANCE * math.sqrt((share + 1 / count) / count)
        limit = max(self.calibrated_clipped + max(DRIFT_SHARE, chance), 2 * self.calibrated_clipped)
        return self.clipped > limit or self.amax_ratio >= DRIFT_RATIO or self.typical_ratio <= SHRUNK_RATIO

    @property
    def gross(self) -> bool:
        """Whether it is a model input that is not what was calibrated."""
        return self.model_input and not 1 / GROSS_RATIO < self.typical_ratio < GROSS_RATIO


@dataclass(frozen=True, slots=True)
class CheckResult:
    """New data against a calibration.

    Attributes:
        verdict: "fine", "drift" or "gross".
        line: the verdict in a sentence.
        method: whose thresholds were judged by.
        batches: number of batches of the new data.
        samples: number of samples in them.
        tensors: every tensor of the calibration, the one that clips most first.
        notes: what a user should know.
    """

    verdict: Verdict
    line: str
    method: str
    batches: int
    samples: int
    tensors: tuple[TensorCheck, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; a ratio to nothing is null."""
        rows = [{**asdict(row), "drifted": row.drifted} for row in self.tensors]
        for row in rows:
            row |= {key: None for key in ("amax_ratio", "typical_ratio") if row[key] == float("inf")}
        return {**asdict(self), "tensors": rows, "notes": list(self.notes)}

    def table(self, limit: int | None) -> Table:
        """Return the tensors that clip most, at most `limit` of them."""
        shown = self.tensors if limit is None else self.tensors[:limit]
        rows = [
            (
                row.tensor,
                f"{row.calibrated_max:.5g}",
                f"{row.new_max:.5g}",
                f"{row.amax_ratio:.3g}x",
                f"{row.beyond_max:.3f}",
                f"{row.clipped:.3f}",
                f"{row.calibrated_clipped:.3f}",
                "yes" if row.drifted else "",
            )
            for row in shown
        ]
        columns = ("tensor", "max then", "max now", "now / then", "beyond max %", "clipped %", "then %", "drifted")
        title = f"{len(shown)} of {len(self.tensors)} tensors by {self.method}, the most clipped first"
        return make_table(title, columns, rows)

    def lines(self) -> list[str]:
        """Return what follows the table: the verdict comes last."""
        return [f"{self.batches} batches, {self.samples} samples", *self.notes, self.line]

    def require_clipped(self, limit: float | None) -> None:
        """Check that no tensor clips more than `limit` per cent of its values; None for no limit.

        Raises:
            GateMissedError: one does.
        """
        beyond = [row for row in self.tensors if limit is not None and row.clipped > limit]
        if beyond:
            raise GateMissedError(
                f"{len(beyond)} of {len(self.tensors)} tensors clip more than {limit:g} % of their values, most of all "
                f"{beyond[0].tensor!r} with {beyond[0].clipped:.3g} %. Calibrate on data like these, or check their "
                "preprocessing."
            )


def compare_tensor(
    name: str, model_input: bool, calibrated: MagnitudeHistogram, new: MagnitudeHistogram, threshold: float
) -> TensorCheck:
    """Compare one tensor.

    Args:
        name: its name.
        model_input: whether it is an input of the model.
        calibrated: its values in calibration.
        new: its values now.
        threshold: the calibrated magnitude beyond which it clips.
    """
    return TensorCheck(
        tensor=name,
        model_input=model_input,
        calibrated_max=calibrated.amax,
        new_max=new.amax,
        amax_ratio=_ratio(new.amax, calibrated.amax),
        typical_ratio=_ratio(_typical(new), _typical(calibrated)),
        beyond_max=100 * clipped_share(new, calibrated.amax),
        clipped=100 * clipped_share(new, threshold),
        calibrated_clipped=100 * clipped_share(calibrated, threshold),
        count=new.count,
    )


def judge(rows: Sequence[TensorCheck], unlike: Sequence[str]) -> tuple[Verdict, str]:
    """Return the verdict, in a word and in a sentence.

    Args:
        rows: all tensors.
        unlike: sentences about inputs whose mean or deviation is not what it was.
    """
    gross = [row for row in rows if row.gross]
    if gross:
        return "gross", f"grossly different input: {'; '.join(_input_line(row) for row in gross[:_LISTED])}"
    drifted = sorted((row for row in rows if row.drifted), key=lambda row: -row.clipped)
    if drifted:
        more = f" and {len(drifted) - _LISTED} more" if len(drifted) > _LISTED else ""
        shown = "; ".join(
            f"{row.tensor} clips {row.clipped:.3g} % of its values ({row.calibrated_clipped:.3g} % in calibration), "
            f"reaches {row.amax_ratio:.3g}x its calibrated maximum"
            for row in drifted[:_LISTED]
        )
        parts = [*unlike, f"{len(drifted)} of {len(rows)} tensors leave their calibrated ranges: {shown}{more}"]
        return "drift", f"drift: {'; '.join(parts)}"
    if unlike:
        return "drift", f"drift: no tensor leaves its calibrated range, but {'; '.join(unlike)}"
    worst = max(rows, key=lambda row: row.beyond_max)
    return "fine", (
        f"fine: all {len(rows)} tensors stay within their calibrated ranges "
        f"(at most {worst.beyond_max:.3g} % of the values of {worst.tensor} lie beyond its maximum)"
    )


def _input_line(row: TensorCheck) -> str:
    ratio = row.typical_ratio
    low, high = FORGOTTEN_255
    hint = "is it scaled as in calibration?"
    if low <= ratio <= high:
        hint = "was /255 forgotten?"
    elif low <= _ratio(1.0, ratio) <= high:
        hint = "was it divided by 255 twice, or not at all in calibration?"
    elif ratio == 0:
        hint = "it is always 0"
    times = f"{ratio:.3g} times" if ratio >= 1 else f"1/{_ratio(1.0, ratio):.3g} of"
    return (
        f"{row.tensor!r} is {times} what it was in calibration (up to {row.new_max:.4g}, then "
        f"{row.calibrated_max:.4g}): {hint}"
    )


def _typical(histogram: MagnitudeHistogram) -> float:
    return percentile_amax(histogram, _TYPICAL_PERCENTILE)


def _ratio(new: float, calibrated: float) -> float:
    if calibrated == 0:
        return 1.0 if new == 0 else float("inf")
    return new / calibrated
