"""The MSE search, against summing up errors value by value."""

from __future__ import annotations

import numpy as np
import pytest

from calibrators.counter import histogram_of
from calibrators.histogram import MagnitudeHistogram, lower_edges
from calibrators.mse import expected_squared_errors, mse_amax

N = 40_000


def samples(shape: str) -> np.ndarray:
    rng = np.random.default_rng(6)
    values = {
        "normal": lambda: rng.normal(0, 3, N),
        "laplace": lambda: rng.laplace(size=N),
        "relu": lambda: np.maximum(rng.normal(size=N), 0),
        "uniform": lambda: rng.uniform(0, 5, N),
        "student": lambda: rng.standard_t(2, N),
        "log-normal": lambda: rng.lognormal(0, 2, N),
        "bimodal": lambda: np.concatenate([rng.normal(0, 0.1, N), rng.normal(8, 0.5, 300)]),
        "outlier": lambda: np.append(rng.normal(size=N), 30.0),
        "far outlier": lambda: np.append(rng.normal(size=N), -150.0),
        "pixels": lambda: (rng.integers(0, 256, N) / 255 - 0.485) / 0.229,
        "clipped": lambda: np.clip(rng.normal(2, 3, N), 0, 6),
    }[shape]()
    return values.astype(np.float32).astype(np.float64)


SHAPES = (
    *("normal", "laplace", "relu", "uniform", "student", "log-normal", "bimodal", "outlier", "far outlier"),
    *("pixels", "clipped"),
)


def true_mse(values: np.ndarray, threshold: float) -> float:
    """Quantize every value and average the squared errors, in float64."""
    step = threshold / 127
    return float(np.mean((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2))


def integral_of_rounding_error(u: np.ndarray) -> np.ndarray:
    """The integral of (v - round(v))**2 from 0 to u."""
    whole = np.rint(u)
    return whole / 12 + (u - whole) ** 3 / 3


def integrated_mse(histogram: MagnitudeHistogram, threshold: float) -> float:
    """Integrate the squared error over each bin as evenly filled, rounding and saturation apart.

    The threshold is an edge.
    """
    step = threshold / 127
    counts = histogram.nonzero_counts()
    low = lower_edges(histogram.bins)
    high = np.minimum(lower_edges(histogram.bins + 1), histogram.amax)
    high[-1] = max(high[-1], low[-1] * (1 + 1e-9))  # where the largest value is the lower edge of its bin
    width = high - low
    rounding = step**3 * (integral_of_rounding_error(high / step) - integral_of_rounding_error(low / step)) / width
    middle = (low + high) / 2
    saturation = (middle - threshold) ** 2 + width**2 / 12
    return float(np.sum(counts * np.where(middle <= threshold * (1 + 1e-8), rounding, saturation)) / histogram.count)


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_those_of_integrating_each_bin(shape: str) -> None:
    """The excess function gives what integration bin by bin gives, from the maximum down to 2**-10 of it."""
    histogram = histogram_of(samples(shape))
    bins = histogram.bins[-1] - np.array([0, 1, 100, 1023, 1024, 2500, 5000, 7000, 10_000])
    thresholds = np.append(lower_edges(bins), histogram.amax)

    errors = expected_squared_errors(histogram, thresholds)

    # The lowest bins are narrow against their distance from 0, which costs the reference some digits.
    np.testing.assert_allclose(errors, [integrated_mse(histogram, t) for t in thresholds], rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_threshold_is_the_best_for_the_values_themselves(shape: str) -> None:
    """The true error under the chosen threshold is within 1 % of the best of 600 thresholds over 10 octaves."""
    values = samples(shape)
    amax = float(np.abs(values).max())
    grid = np.concatenate([amax * 2.0 ** -np.linspace(0, 1, 200), amax * 2.0 ** -np.linspace(1, 10, 400)])
    best = min(true_mse(values, threshold) for threshold in grid)

    assert true_mse(values, mse_amax(histogram_of(values))) <= best * 1.01


@pytest.mark.parametrize("shape", SHAPES)
def test_ending_the_search_early_misses_nothing(shape: str) -> None:
    """The threshold is that of trying every edge of the upper 15 octaves."""
    histogram = histogram_of(samples(shape))
    edges = lower_edges(np.arange(histogram.bins[-1] - 15 * 1024, histogram.bins[-1] + 1))
    thresholds = np.append(edges, histogram.amax)

    errors = expected_squared_errors(histogram, thresholds)

    assert mse_amax(histogram) == thresholds[np.argmin(errors)]


@pytest.mark.parametrize("factor", [1.5, 3.0, 200.0, 1e6])
def test_thresholds_beyond_the_largest_value(factor: float) -> None:
    """Nothing saturates there, and the error is that of a step too wide."""
    histogram = histogram_of(samples("laplace"))
    threshold = histogram.amax * factor

    (error,) = expected_squared_errors(histogram, np.array([threshold]))

    assert error == pytest.approx(integrated_mse(histogram, threshold))


def test_far_outlier_is_given_up() -> None:
    """One value at 150 among four million of size 1: the threshold is five octaves below the largest value."""
    values = np.random.default_rng(6).normal(size=N)

    threshold = mse_amax(histogram_of(np.array([150.0]), *[values] * 100))

    assert 3 < threshold < 150 / 2**4


def test_nothing_is_saturated_where_that_is_best() -> None:
    """A uniform tensor and a single value keep their exact maximum, or an edge just below it."""
    uniform = samples("uniform")

    assert mse_amax(histogram_of(uniform)) > uniform.max() * 0.99
    assert mse_amax(histogram_of(np.full(10, 0.7))) == np.float32(0.7)


def test_largest_value_on_the_edge_of_its_bin() -> None:
    """A bin without width, which holds the largest value alone, divides nothing by zero."""
    histogram = histogram_of(np.array([1.0, 0.5, 0.25]))

    assert expected_squared_errors(histogram, np.array([1.0]))[0] == pytest.approx(
        integrated_mse_of_points([1.0, 0.5, 0.25]), rel=0.05
    )
    assert mse_amax(histogram) <= 1.0


def integrated_mse_of_points(values: list[float]) -> float:
    """Error of values below the largest, taken as spread over their bins of 2**-10 of their size."""
    inside = [np.linspace(value, value * (1 + 2**-10), 1000) for value in values[1:]]
    return sum(true_mse(points, values[0]) for points in inside) / len(values)


def test_zeros_do_not_move_the_threshold() -> None:
    """They add no error under any threshold."""
    values = samples("laplace")

    assert mse_amax(histogram_of(values, np.zeros(10 * N))) == mse_amax(histogram_of(values))


def test_tensor_that_is_always_zero() -> None:
    """There is nothing to search."""
    assert mse_amax(histogram_of(np.zeros(5))) == 0.0


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e30, 3.4e38])
def test_extreme_sizes(size: float) -> None:
    """Subnormal and huge tensors get a threshold of their size."""
    values = np.float32(size) * np.linspace(-1, 1, 1001, dtype=np.float32)

    threshold = mse_amax(histogram_of(values))

    assert 0.5 * np.abs(values).max() <= threshold <= np.abs(values).max()
