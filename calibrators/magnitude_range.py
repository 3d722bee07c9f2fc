"""What min-max calibration needs of a tensor, and no more: its extreme values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from calibrators.histogram import MagnitudeHistogram


@dataclass(frozen=True, slots=True)
class MagnitudeRange:
    """The range of a tensor's values over a calibration set; exact, and immutable.

    Attributes:
        count: number of finite values, zeros included.
        minimum: the smallest finite value, signed and exact; 0.0 if there was none.
        maximum: the largest finite value, signed and exact; 0.0 if there was none.
        zeros: how many values were exactly +0 or -0.
        nonfinite: how many values were NaN or infinite; they are in no other statistic.

    Raises:
        ValueError: the numbers contradict each other; only a damaged file can do that.
    """

    count: int
    minimum: float
    maximum: float
    zeros: int
    nonfinite: int

    def __post_init__(self) -> None:
        if not (
            0 <= self.zeros <= self.count
            and self.nonfinite >= 0
            and -np.inf < self.minimum <= self.maximum < np.inf
            and (self.zeros < self.count or self.amax == 0)
        ):
            raise ValueError("counts and extreme values contradict each other")

    @classmethod
    def of(cls, histogram: MagnitudeHistogram) -> Self:
        """Return the range of a histogram's values."""
        return cls(histogram.count, histogram.minimum, histogram.maximum, histogram.zeros, histogram.nonfinite)

    @property
    def amax(self) -> float:
        """The largest finite magnitude, exact."""
        return max(abs(self.minimum), abs(self.maximum))

    def merge(self, other: MagnitudeRange) -> MagnitudeRange:
        """Return the range of both sets of values; exact, commutative and associative."""
        filled = [part for part in (self, other) if part.count]
        return MagnitudeRange(
            count=self.count + other.count,
            minimum=min((part.minimum for part in filled), default=0.0),
            maximum=max((part.maximum for part in filled), default=0.0),
            zeros=self.zeros + other.zeros,
            nonfinite=self.nonfinite + other.nonfinite,
        )
