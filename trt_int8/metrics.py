"""What differs between two models' outputs, and how often a model is right: accumulated batch by batch in float64.

With r the reference's values and c the candidate's:

    SQNR       10 log10(sum r^2 / sum (r - c)^2)                 dB, over all elements of all samples
    cosine     sum r c / sqrt(sum r^2  sum c^2)                  of each sample, averaged over the samples
    max_abs    max |r - c|
    agreement  share of positions with argmax r = argmax c      per cent
    top-k      share of samples whose label is among the k largest logits; of equal logits the lower class comes first

**Not-a-number is no number.** A candidate's NaN or infinity is counted (`nonfinite`) and makes SQNR, cosine and max_abs
NaN: a mean over the rest would hide it. A sample whose largest logit is not finite agrees with nothing and is never
right. Where the *reference* is not finite (masked logits of minus infinity, say) only one thing counts: whether the
candidate gives the same value.

**Infinite SQNR.** Identical outputs have no noise, so their SQNR is infinite; a reference of zeros has no signal, so
the SQNR of anything else is minus infinity. JSON has neither: there `sqnr_db` is null, and `identical` and `nonfinite`
beside it tell the three cases apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.protocols import Array

TOP = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a candidate's outputs lie from the reference's.

    Attributes:
        sqnr_db: signal to quantization noise ratio in dB; inf for identical outputs, NaN where `nonfinite` > 0.
        cosine: mean over the samples of the cosine between the two outputs, -1 to 1; two zero vectors have 1.
        max_abs: largest absolute error, in the output's own unit.
        nonfinite: number of the candidate's values that are NaN or infinite where the reference's are not the same.
        elements: number of values compared.
    """

    sqnr_db: float
    cosine: float
    max_abs: float
    nonfinite: int
    elements: int

    @property
    def identical(self) -> bool:
        """Whether every value is the same."""
        return self.max_abs == 0.0 and self.nonfinite == 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; what is not a finite number is null."""
        return {
            "sqnr_db": finite_or_none(self.sqnr_db),
            "cosine": finite_or_none(self.cosine),
            "max_abs": finite_or_none(self.max_abs),
            "identical": self.identical,
            "nonfinite": self.nonfinite,
        }


class DifferenceMeter:
    """Accumulates the `Difference` of one output, or of several outputs together."""

    def __init__(self) -> None:
        self._signal = 0.0
        self._noise = 0.0
        self._cosine_sum = 0.0
        self._vectors = 0
        self._max_abs = 0.0
        self._nonfinite = 0
        self._elements = 0

    def update(self, reference: Array, candidate: Array, samples: int) -> None:
        """Add the outputs of one batch.

        Args:
            reference: any real dtype; first axis = samples, or an output of the batch as a whole.
            candidate: same shape.
            samples: number of samples in the batch; an output with another first axis counts as one vector.
        """
        r = reference.astype(np.float64)
        c = candidate.astype(np.float64)
        self._elements += r.size
        odd = ~np.isfinite(r)
        same = odd & ((r == c) | (np.isnan(r) & np.isnan(c)))
        self._nonfinite += int(np.count_nonzero((~np.isfinite(c) | odd) & ~same))
        r[odd] = 0.0
        c[odd] = 0.0
        with np.errstate(invalid="ignore", over="ignore"):  # the candidate's infinities end up in NaN, as they should
            error = np.abs(r - c)
            self._signal += float(np.sum(r * r))
            self._noise += float(np.sum(error * error))
            self._max_abs = max(self._max_abs, float(np.max(error, initial=0.0)))
            rows = samples if r.ndim and len(r) == samples else 1
            self._cosine_sum += float(np.sum(_cosines(r.reshape(rows, -1), c.reshape(rows, -1))))
            self._vectors += rows

    def result(self) -> Difference:
        """Return what was accumulated so far; nothing makes every figure NaN."""
        if self._nonfinite or not self._elements:
            return Difference(math.nan, math.nan, math.nan, self._nonfinite, self._elements)
        if self._noise == 0.0:
            sqnr_db = math.inf
        elif self._signal == 0.0:
            sqnr_db = -math.inf
        else:
            sqnr_db = 10.0 * math.log10(self._signal / self._noise)
        return Difference(sqnr_db, self._cosine_sum / self._vectors, self._max_abs, 0, self._elements)

    @classmethod
    def total(cls, meters: Iterable[DifferenceMeter]) -> DifferenceMeter:
        """Return the meter of several outputs together: sums of sums, mean of all cosines, largest error."""
        total = cls()
        for meter in meters:
            total._signal += meter._signal
            total._noise += meter._noise
            total._cosine_sum += meter._cosine_sum
            total._vectors += meter._vectors
            total._max_abs = max(total._max_abs, meter._max_abs)
            total._nonfinite += meter._nonfinite
            total._elements += meter._elements
        return total


class AgreementMeter:
    """Accumulates how often two models decide alike: the same arg-max along the class axis."""

    def __init__(self) -> None:
        self._alike = 0
        self._positions = 0

    def update(self, reference: Array, candidate: Array) -> None:
        """Add the logits of one batch, both of the same shape; see `class_axis`."""
        chosen = winners(reference)
        self._alike += int(np.count_nonzero((chosen == winners(candidate)) & (chosen >= 0)))
        self._positions += chosen.size

    def percent(self) -> float:
        """Return the share of positions that agree, in per cent."""
        return 100.0 * self._alike / self._positions


class LabelMeter:
    """Accumulates how often a classifier is right: top-1 and top-5."""

    def __init__(self) -> None:
        self._top1 = 0
        self._top5 = 0
        self._samples = 0

    def update(self, logits: Array, labels: NDArray[np.integer[Any]]) -> None:
        """Add one batch.

        Args:
            logits: shape (samples, classes).
            labels: shape (samples,), 0 to classes - 1.
        """
        values = logits.astype(np.float64)
        own = np.take_along_axis(values, labels[:, None].astype(np.int64), axis=1)
        lower_class = np.arange(values.shape[1])[None] < labels[:, None]
        rank = np.count_nonzero((values > own) | ((values == own) & lower_class), axis=1)
        sound = np.isfinite(values.max(axis=1))
        self._top1 += int(np.count_nonzero(sound & (rank == 0)))
        self._top5 += int(np.count_nonzero(sound & (rank < TOP)))
        self._samples += len(labels)

    def top1(self) -> float:
        """Return the share of samples whose label has the largest logit, in per cent."""
        return 100.0 * self._top1 / self._samples

    def top5(self) -> float:
        """Return the share of samples whose label is among the five largest logits, in per cent."""
        return 100.0 * self._top5 / self._samples


def class_axis(rank: int) -> int:
    """Return the axis of the classes in an output of this rank, 2 or more.

    (samples, classes) and (samples, tokens, vocabulary) have it last, dense predictions (samples, classes, height,
    width) have it second: the layouts of the transformers library's and of torchvision's models.
    """
    return rank - 1 if rank <= 3 else 1


def winners(logits: Array) -> NDArray[np.int64]:
    """Return the arg-max along the class axis; -1 where the largest value is NaN or infinite.

    Args:
        logits: rank 2 or more.

    Returns:
        The shape of `logits` without the class axis. Of equal values the lower class wins.
    """
    axis = class_axis(logits.ndim)
    sound = np.isfinite(logits.max(axis=axis))
    return np.where(sound, logits.argmax(axis=axis), -1).astype(np.int64)


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None where JSON cannot hold it."""
    return value if math.isfinite(value) else None


def _cosines(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine of each pair of rows; 1 where both are zero, 0 where one is."""
    dot = np.einsum("ij,ij->i", reference, candidate)
    r_power = np.einsum("ij,ij->i", reference, reference)
    c_power = np.einsum("ij,ij->i", candidate, candidate)
    norms = np.sqrt(r_power * c_power)  # one root, so that identical rows give exactly 1
    cosine = np.divide(dot, norms, out=np.zeros_like(dot), where=norms != 0.0)
    return np.where((r_power == 0.0) & (c_power == 0.0), 1.0, np.clip(cosine, -1.0, 1.0))
