"""The entropy search, against a direct evaluation of its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators.counter import histogram_of
from calibrators.entropy import entropy_amax, is_within_noise, kl_divergences, least_divergent

LEVELS = 128


def direct_divergence(counts: np.ndarray, kept: int) -> float:
    """KL(P || Q) of one candidate, straight from the definition: O(bins), no prefix sums, in float64."""
    p = counts[:kept].astype(np.float64)
    p[-1] += counts[kept:].sum()
    level_of = np.arange(kept) * LEVELS // kept
    mass = np.bincount(level_of, weights=counts[:kept], minlength=LEVELS)
    filled = np.bincount(level_of, weights=counts[:kept] > 0, minlength=LEVELS)
    mean = np.divide(mass, filled, out=np.zeros(LEVELS), where=filled > 0)
    q = np.where(counts[:kept] > 0, mean[level_of], 0.0)
    support = p > 0
    if np.any(q[support] == 0):
        return math.inf
    p /= p.sum()
    q /= q.sum()
    return float(np.sum(p[support] * np.log(p[support] / q[support])))


def assert_divergences_are_direct(counts: np.ndarray) -> None:
    expected = [direct_divergence(counts, kept) for kept in range(LEVELS, counts.size + 1)]

    # Sums over the whole histogram are subtracted from each other: the rounding is relative to them, not to the result.
    divergences = kl_divergences(counts)
    np.testing.assert_allclose(divergences, expected, rtol=1e-9, atol=1e-12)
    # Ruling candidates out by a bound must not rule out the winner, nor a smaller one that equals it.
    assert least_divergent(counts) == LEVELS + np.argmin(divergences)


def test_divergence_by_hand() -> None:
    """129 bins of one value each: saturated at 128 the last bin doubles, unsaturated P and Q are the same."""
    divergences = kl_divergences(np.ones(129, dtype=np.int64))

    saturated = 127 / 129 * math.log((1 / 129) / (1 / 128)) + 2 / 129 * math.log((2 / 129) / (1 / 128))
    assert divergences == pytest.approx([saturated, 0.0], abs=1e-15)


def test_levels_cost_when_they_merge_unequal_bins() -> None:
    """256 bins that alternate between 1 and 3: each level holds both, and the codes cannot tell them apart."""
    divergences = kl_divergences(np.tile([1, 3], 128))

    assert divergences[-1] == pytest.approx(1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2))


def test_outliers_on_an_empty_bin_are_infinite() -> None:
    """Where P has mass and Q has none the candidate is out of the question."""
    counts = np.ones(200, dtype=np.int64)
    counts[139] = 0

    infinite = np.flatnonzero(np.isinf(kl_divergences(counts)))

    assert (infinite + LEVELS).tolist() == [140]


@pytest.mark.parametrize("shape", ["laplace", "normal", "relu", "uniform", "bimodal", "heavy tail", "few values"])
def test_divergences_of_real_shapes_are_direct(shape: str) -> None:
    """For every candidate of a whole histogram, the prefix sums give the value that the definition gives."""
    rng = np.random.default_rng(3)
    n = 50_000
    values = {
        "laplace": lambda: rng.laplace(size=n),
        "normal": lambda: rng.normal(size=n),
        "relu": lambda: np.maximum(rng.normal(size=n), 0),
        "uniform": lambda: rng.uniform(-1, 1, n),
        "bimodal": lambda: np.concatenate([rng.normal(0, 0.1, n), rng.normal(3, 0.1, 500)]),
        "heavy tail": lambda: rng.standard_t(2, n),
        "few values": lambda: rng.integers(0, 40, n) / 7,
    }[shape]()

    assert_divergences_are_direct(histogram_of(values).linear().counts)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(128, 400).flatmap(
        lambda size: st.tuples(
            st.just(size), st.dictionaries(st.integers(0, size - 1), st.integers(1, 10**12), max_size=30)
        )
    )
)
def test_divergences_of_sparse_histograms_are_direct(drawn: tuple[int, dict[int, int]]) -> None:
    """Mostly empty bins, with counts from one to a million millions."""
    size, filled = drawn
    counts = np.zeros(size, dtype=np.int64)
    counts[list(filled)] = list(filled.values())
    counts[-1] += 1

    assert_divergences_are_direct(counts)


def test_threshold_is_the_centre_of_the_first_saturated_bin() -> None:
    """A tensor that is best left whole gets half a bin more than the bins it fills, as TensorRT's caches show."""
    edge = 2047 / 2048
    uniform = (np.arange(2048) + 0.5) / 2048 * 1.0

    assert entropy_amax(histogram_of(uniform)) == pytest.approx(2048.5 / 2048)
    assert edge < uniform.max() < 1


def test_threshold_is_that_of_the_least_divergence() -> None:
    """The winner of the direct evaluation decides, where the values are many enough to tell."""
    values = np.random.default_rng(8).laplace(size=20_000) ** 3
    linear = histogram_of(values).linear()
    direct = [direct_divergence(linear.counts, kept) for kept in range(LEVELS, linear.counts.size + 1)]

    assert entropy_amax(histogram_of(values)) == (LEVELS + np.argmin(direct) + 0.5) * linear.width


def test_an_outlier_is_saturated() -> None:
    """One value at 50 beside 100,000 from a normal distribution does not stretch the range."""
    values = np.append(np.random.default_rng(1).normal(size=100_000), 50.0)

    assert 3 < entropy_amax(histogram_of(values)) < 8


def test_the_smallest_of_equal_minima_wins() -> None:
    """Two spikes: saturated at the lower one, P and Q are both a single spike, as exact as the full range."""
    counts = np.zeros(200, dtype=np.int64)
    counts[[150, 199]] = 1

    assert least_divergent(counts) == 151


def repeated(counts: np.ndarray) -> np.ndarray:
    """Values whose linear histogram has these counts, in bins of 2**-11; at least 1025 of them."""
    return np.repeat((np.arange(counts.size) + 0.5) * 2.0**-11, counts)


def direct_noise(counts: np.ndarray) -> float:
    """What chance leaves on average of the full range: (non-empty bins - non-empty levels) / 2 N."""
    level_of = np.arange(counts.size) * LEVELS // counts.size
    return float((np.count_nonzero(counts) - len(set(level_of[counts > 0]))) / (2 * counts.sum()))


@pytest.mark.parametrize(
    ("bins", "divergence", "noise"),
    [
        ((1, 3), 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2), 128 / 1024),  # 0.1308 > 0.125
        ((1, 2), 1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(4 / 3), 128 / 768),  # 0.0566 < 0.1667
        ((2, 4), 1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(4 / 3), 128 / 1536),  # 0.0566 < 0.0833
        ((4, 8), 1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(4 / 3), 128 / 3072),  # 0.0566 > 0.0417
    ],
)
def test_noise_by_hand(bins: tuple[int, int], divergence: float, noise: float) -> None:
    """256 bins, two to a level, so that 128 counts are free: the same shape is noise in few values and none in many."""
    counts = np.tile(bins, 128)

    assert kl_divergences(counts)[-1] == pytest.approx(divergence)
    assert direct_noise(counts) == noise
    assert is_within_noise(counts) is (divergence <= noise)


def test_chance_takes_what_it_is_said_to_take() -> None:
    """Evenly spread values lose (K - L) / 2 N on average, as 2 N KL has a chi-squared distribution."""
    rng = np.random.default_rng(6)
    drawn = [rng.multinomial(100_000, np.full(2048, 1 / 2048)) for _ in range(200)]
    losses = [kl_divergences(counts)[-1] for counts in drawn]

    # The mean of 200 has a standard error of sqrt(2 / 1920 / 200) = 0.0023; small counts add about 0.2 % to the mean.
    assert np.mean(losses) / (1920 / 200_000) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_few_values_are_not_saturated(seed: int) -> None:
    """A classifier's input on ten samples: 640 values whose raggedness would cost a third of the range."""
    values = np.random.default_rng(seed).exponential(size=640).astype(np.float32)
    linear = histogram_of(values).linear()

    assert entropy_amax(histogram_of(values)) == (linear.counts.size + 0.5) * linear.width
    assert values.max() < entropy_amax(histogram_of(values)) < 1.002 * values.max()


@given(st.lists(st.integers(0, 1), min_size=1024, max_size=2047))
@settings(max_examples=20, deadline=None)
def test_single_values_are_never_saturated(filled: list[int]) -> None:
    """Where no bin holds two values, nothing says that one is more frequent than its neighbour."""
    counts = np.array([*filled, 1])

    assert is_within_noise(counts)
    assert entropy_amax(histogram_of(repeated(counts))) == (counts.size + 0.5) * 2.0**-11


@given(st.integers(0, 2**32 - 1), st.integers(1025, 2048), st.floats(0.2, 3))
@settings(max_examples=30, deadline=None)
def test_many_values_leave_the_search_as_it_is(seed: int, size: int, spread: float) -> None:
    """With enough values of any shape the guard steps aside, and the threshold is that of the least divergence."""
    counts = np.random.default_rng(seed).lognormal(0, spread, size).astype(np.int64)
    counts[-1] = max(counts[-1], 1)
    lost, noise = direct_divergence(counts, size), direct_noise(counts)
    assert is_within_noise(counts) is (lost <= noise)

    enough = counts * (math.ceil(noise / lost) + 1) if lost > 1e-9 else counts
    assert lost <= 1e-9 or not is_within_noise(enough)
    if not is_within_noise(enough):
        assert entropy_amax(histogram_of(repeated(enough))) == (least_divergent(enough) + 0.5) * 2.0**-11


def test_zeros_have_no_say() -> None:
    """A million exact zeros leave the threshold where it was."""
    values = np.random.default_rng(2).normal(size=10_000)

    assert entropy_amax(histogram_of(values, np.zeros(10**6))) == entropy_amax(histogram_of(values))


def test_tensor_that_is_always_zero() -> None:
    """There is nothing to search."""
    assert entropy_amax(histogram_of(np.zeros(5))) == 0.0


def test_tensor_with_fewer_bins_than_levels() -> None:
    """A subnormal tensor of 3 bins is kept whole."""
    assert entropy_amax(histogram_of(np.array([2.5 * 2**-136]))) == 3.5 * 2**-136
    assert kl_divergences(np.array([0, 0, 1])).size == 0
