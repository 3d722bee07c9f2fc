"""Ranges: what is kept where min-max is all that is wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibrators.calibration import Calibration, Fingerprint
from calibrators.counter import RangeCounter, histogram_of
from calibrators.errors import CacheFormatError, CalibrationError
from calibrators.histogram_file import load_histograms
from calibrators.magnitude_range import MagnitudeRange

FINGERPRINT = Fingerprint("g", "w", ("d",), "none", "1", 2, 3)


def range_of(*arrays: np.ndarray) -> MagnitudeRange:
    counter = RangeCounter()
    for values in arrays:
        counter.update(values)
    return counter.range()


def test_by_hand() -> None:
    """Signs are kept, both zeros are zeros, what is not finite is in nothing else."""
    found = range_of(np.array([0.0, -3.0, 2.0]), np.array([-0.0, np.nan, np.inf, 1.0]))

    assert found == MagnitudeRange(count=5, minimum=-3.0, maximum=2.0, zeros=2, nonfinite=2)
    assert found.amax == 3.0


@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)), st.integers(0, 40))
def test_ranges_are_those_of_histograms(values: np.ndarray, cut: int) -> None:
    """Every float32 there is, in one update, in two, and merged."""
    expected = MagnitudeRange.of(histogram_of(values))

    assert range_of(values) == range_of(values[:cut], values[cut:]) == expected
    assert range_of(values[:cut]).merge(range_of(values[cut:])) == expected


@pytest.mark.parametrize("size", [1, 7, 33, 5000])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extremes_of_one_sign(size: int, sign: float) -> None:
    """All positive or all negative, any size."""
    found = range_of((sign * np.linspace(1, 2, size)).astype(np.float32))

    assert sorted([sign * found.minimum, sign * found.maximum]) == [1.0, 2.0 if size > 1 else 1.0]


@pytest.mark.parametrize(
    "numbers",
    [(1, 2.0, 1.0, 0, 0), (1, 0.0, 0.0, 2, 0), (2, 0.0, np.inf, 0, 0), (1, 0.0, 0.0, 0, -1), (3, 0.0, 1.0, 3, 0)],
)
def test_numbers_that_contradict_each_other(numbers: tuple[int, float, float, int, int]) -> None:
    """They are refused, as only a damaged file holds them."""
    with pytest.raises(ValueError, match="contradict"):
        MagnitudeRange(*numbers)


class TestCalibration:
    """A calibration that holds ranges alone."""

    def calibration(self, *values: float) -> Calibration:
        return Calibration({"x": range_of(np.array(values)), "dead": range_of(np.zeros(3))}, FINGERPRINT)

    def test_serves_minmax(self) -> None:
        """With the scales of the same values' histograms."""
        found = self.calibration(-12.7, 3.0)
        full = Calibration({"x": histogram_of(np.array([-12.7, 3.0])), "dead": histogram_of(np.zeros(3))}, FINGERPRINT)

        assert found.scales("minmax") == full.scales("minmax")
        assert (found.statistics, found.searches, found.always_zero) == ("minmax", ("minmax",), ("dead",))
        assert found.range("x") == full.range("x")
        assert found.sha256 != full.sha256

    @pytest.mark.parametrize("method", ["entropy", "percentile", "mse", "auto"])
    def test_refuses_the_other_methods(self, method: str) -> None:
        """With what it holds, and the two ways out."""
        with pytest.raises(CalibrationError, match=r"ranges alone.*Use --method minmax, or calibrate again without"):
            self.calibration(1.0).scales(method)

    def test_has_no_histogram(self) -> None:
        """The tensor is named."""
        with pytest.raises(CalibrationError, match=r"the histogram of 'x'.*ranges alone"):
            self.calibration(1.0).histogram("x")

    def test_a_file_gives_it_back(self, tmp_path: Path) -> None:
        """Equal in everything, also after a change of its notes."""
        found = self.calibration(-1.5, 4.0).annotated(settings={"a": 1})
        found.save(tmp_path / "c.npz")

        again = Calibration.load(tmp_path / "c.npz")

        assert (again.sha256, again.settings) == (found.sha256, {"a": 1})
        assert again.magnitude_range("x") == found.magnitude_range("x") == MagnitudeRange(2, -1.5, 4.0, 0, 0)

    def test_its_file_has_a_version_of_its_own(self, tmp_path: Path) -> None:
        """So that an older version says that it is newer; files of histograms stay readable for that one."""
        self.calibration(1.0).save(tmp_path / "ranges.npz")
        Calibration({"x": histogram_of(np.ones(2))}, FINGERPRINT).save(tmp_path / "histograms.npz")

        assert load_histograms(tmp_path / "ranges.npz")[1]["version"] == 2
        assert load_histograms(tmp_path / "histograms.npz")[1]["version"] == 1

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        """One whose arrays are cut short is refused."""
        path = tmp_path / "c.npz"
        self.calibration(1.0).save(path)
        with np.load(path) as archive:
            arrays = dict(archive)
        np.savez(path, **{**arrays, "count": arrays["count"][:1]})

        with pytest.raises(CacheFormatError, match="'count' is int64"):
            Calibration.load(path)

    def test_merges_with_its_like_alone(self) -> None:
        """Two give the range of both; with histograms it is refused."""
        merged = self.calibration(-1.0, 2.0).merge(self.calibration(3.0))

        assert merged.magnitude_range("x") == MagnitudeRange(3, -1.0, 3.0, 0, 0)
        full = Calibration({"x": histogram_of(np.ones(1)), "dead": histogram_of(np.zeros(1))}, FINGERPRINT)
        with pytest.raises(CalibrationError, match="one holds ranges alone and the other histograms"):
            merged.merge(full)
