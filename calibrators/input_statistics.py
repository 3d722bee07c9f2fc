"""Mean, deviation and range of what a model was fed: they betray data that were preprocessed in another way.

Each row (one sample, or one channel of one image) is summed in float64 in a fixed order, and the sums of rows are added
as exact fractions. So the result depends neither on the order of the samples nor on how they were cut into batches or
merged; a mean is off by no more than float64's rounding within a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit
from calibrators.protocols import Array

MAX_CHANNELS = 16
"""A second axis of 4-D inputs that is longer is taken for a height: channels come last there."""

_LANES = 256
_FLOAT32_LIMIT = float(np.finfo(np.float32).max)
_MAX_EXPONENT = 2200
"""More bits behind the point than a sum of squares of float32 can have; a file with more is no file of ours."""

_MAX_BITS = 4400


@dataclass(frozen=True, slots=True)
class ValueStatistics:
    """Count, sums and range of some values; exact, and merged by addition.

    Attributes:
        count: number of values, at least 1.
        total: their sum.
        squares: the sum of their squares.
        minimum: the smallest.
        maximum: the largest.
    """

    count: int
    total: Fraction
    squares: Fraction
    minimum: float
    maximum: float

    @property
    def mean(self) -> float:
        """The mean."""
        return float(self.total / self.count)

    @property
    def deviation(self) -> float:
        """The standard deviation of the values around their mean: sqrt(E[x^2] - E[x]^2)."""
        return math.sqrt(max(0.0, float(self.squares / self.count - (self.total / self.count) ** 2)))

    def merge(self, other: ValueStatistics) -> ValueStatistics:
        """Return the statistics of both sets of values; commutative and associative."""
        return ValueStatistics(
            count=self.count + other.count,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
        )

    def to_json(self) -> list[int | float]:
        """Return the numbers as JSON can hold them; `from_json` gives exactly the same back."""
        sums = [number for part in (self.total, self.squares) for number in _dyadic(part)]
        return [self.count, *sums, self.minimum, self.maximum]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> ValueStatistics:
        """Take what `to_json` gave.

        Raises:
            ValueError: these are not such numbers.
        """
        count, total, exponent, squares, squares_exponent, minimum, maximum = values
        for number in (count, total, exponent, squares, squares_exponent):
            if not isinstance(number, int) or number.bit_length() > _MAX_BITS:
                raise ValueError(f"the sums of its inputs hold {str(number)[:20]!r}")
        if count < 1 or not (0 <= exponent <= _MAX_EXPONENT and 0 <= squares_exponent <= _MAX_EXPONENT):
            raise ValueError("the sums of its inputs contradict each other")
        if not -math.inf < float(minimum) <= float(maximum) < math.inf:
            raise ValueError("the ranges of its inputs contradict each other")
        return cls(
            count=count,
            total=Fraction(total, 1 << exponent),
            squares=Fraction(squares, 1 << squares_exponent),
            minimum=float(minimum),
            maximum=float(maximum),
        )


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What one input of a model was fed.

    Attributes:
        channels: one entry for each index along axis 1 of an image (4-D, at most 16 channels); else one for all values.

    Raises:
        ValueError: there is no channel; only a damaged file can do that.
    """

    channels: tuple[ValueStatistics, ...]

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("the statistics of an input have no channel")

    @property
    def overall(self) -> ValueStatistics:
        """The statistics of all channels together."""
        return reduce(ValueStatistics.merge, self.channels)

    def merge(self, other: InputStatistics) -> InputStatistics:
        """Return the statistics of both; where their channels differ in number, of all values together."""
        if len(self.channels) != len(other.channels):
            return InputStatistics((self.overall.merge(other.overall),))
        pairs = zip(self.channels, other.channels, strict=True)
        return InputStatistics(tuple(one.merge(another) for one, another in pairs))


Inputs = Mapping[str, InputStatistics]
"""Model input to its statistics; inputs of whole numbers (token ids) are not in it."""


def statistics_of_feeds(feeds: Mapping[str, Array], samples: int) -> dict[str, InputStatistics]:
    """Return the statistics of one batch.

    Args:
        feeds: model input to array; those that hold no floats are left out.
        samples: number of real samples; rows beyond it pad the batch and are left out.
    """
    rows = next((len(value) for value in feeds.values() if value.ndim), samples)
    return {
        name: statistics_of(value[:samples] if value.ndim and len(value) == rows else value)
        for name, value in feeds.items()
        if np.issubdtype(value.dtype, np.floating) and value.size
    }


def statistics_of(values: Array) -> InputStatistics:
    """Return the statistics of an array of finite floats, any shape but an empty one.

    Values beyond float32's range count as its largest.
    """
    if values.dtype == np.float64:
        values = np.clip(values, -_FLOAT32_LIMIT, _FLOAT32_LIMIT)
    single = np.ascontiguousarray(values, dtype=np.float32)
    channels = single.shape[1] if single.ndim == 4 and single.shape[1] <= MAX_CHANNELS else 1
    samples = len(single) if single.ndim else 1
    rows = single.reshape(samples * channels, -1)
    rows.flags.writeable = False  # numba would compile the kernel twice, for writeable and for read-only arrays
    sums = _row_sums(rows)
    minima, maxima = rows.min(axis=1), rows.max(axis=1)
    return InputStatistics(
        tuple(
            ValueStatistics(
                count=samples * rows.shape[1],
                total=sum(map(Fraction, sums[channel::channels, 0].tolist()), Fraction()),
                squares=sum(map(Fraction, sums[channel::channels, 1].tolist()), Fraction()),
                # Adding 0.0 turns -0.0 into 0.0, so that the order of the two zeros in the data cannot show.
                minimum=float(minima[channel::channels].min()) + 0.0,
                maximum=float(maxima[channel::channels].max()) + 0.0,
            )
            for channel in range(channels)
        )
    )


def merge_inputs(one: Inputs, other: Inputs) -> dict[str, InputStatistics]:
    """Return the statistics of two streams together; an input that only one of them fed is as it is there."""
    merged = dict(one)
    for name, statistics in other.items():
        merged[name] = merged[name].merge(statistics) if name in merged else statistics
    return merged


def _dyadic(value: Fraction) -> tuple[int, int]:
    """Return n and k of n / 2**k."""
    return value.numerator, value.denominator.bit_length() - 1


@njit
def _row_sums(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return, for each row, the sum of its values and of their squares, (rows, 2).

    Many sums run side by side, which vectorises, and their order is the same on every processor.
    """
    sums = np.empty((rows.shape[0], 2), dtype=np.float64)
    totals = np.empty(_LANES, dtype=np.float64)
    squares = np.empty(_LANES, dtype=np.float64)
    for k in range(rows.shape[0]):
        row = rows[k]
        totals[:] = 0.0
        squares[:] = 0.0
        for start in range(0, row.size, _LANES):
            # A slice, not an offset: LLVM does not vectorise a loop whose index has a variable added to it.
            block = row[start : start + _LANES]
            for i in range(block.size):
                value = np.float64(block[i])
                totals[i] += value
                squares[i] += value * value
        total = 0.0
        square = 0.0
        for i in range(_LANES):
            total += totals[i]
            square += squares[i]
        sums[k, 0] = total
        sums[k, 1] = square
    return sums
