"""Counting: bins, extreme values, zeros and non-finite values of every kind of array."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibrators import counter
from calibrators.counter import MagnitudeCounter, histogram_of

BLOCK = 1024


def assert_counts(values: np.ndarray) -> None:
    """Compare with statistics that numpy computes from the values."""
    finite = values[np.isfinite(values)]
    bins, counts = np.unique(np.abs(finite).view(np.uint32) >> 13, return_counts=True)

    histogram = histogram_of(values)

    np.testing.assert_array_equal(histogram.bins, bins)
    np.testing.assert_array_equal(histogram.counts, counts)
    assert histogram.minimum == finite.min(initial=np.inf) if finite.size else histogram.minimum == 0
    assert histogram.maximum == finite.max(initial=-np.inf) if finite.size else histogram.maximum == 0
    assert histogram.amax == np.abs(finite).max(initial=0.0)
    assert histogram.count == finite.size
    assert histogram.zeros == np.count_nonzero(finite == 0)
    assert histogram.nonfinite == values.size - finite.size


def test_counts_by_hand() -> None:
    """Signs share a bin, both zeros are zeros, the extremes keep their sign."""
    histogram = histogram_of(np.array([1.0, -1.0, 0.0, -0.0, 3.5, -2.0]))

    assert dict(zip(histogram.bins.tolist(), histogram.counts.tolist(), strict=True)) == {
        0: 2,  # the zeros
        130048: 2,  # 1.0 and -1.0: exponent 127
        131072: 1,  # -2.0: exponent 128
        131840: 1,  # 3.5: exponent 128, three quarters up the octave
    }
    assert (histogram.minimum, histogram.maximum, histogram.amax) == (-2.0, 3.5, 3.5)
    assert (histogram.count, histogram.zeros, histogram.nonfinite) == (6, 2, 0)


@given(hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32)))
def test_counts_are_those_of_numpy(values: np.ndarray) -> None:
    """Every float32 there is, NaN, infinities and subnormals among them."""
    assert_counts(values)


@pytest.mark.parametrize("size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 3])
def test_no_value_is_lost_between_blocks(size: int) -> None:
    """Sizes around the block of the kernel, odd and even."""
    rng = np.random.default_rng(size)
    assert_counts(rng.standard_normal(size).astype(np.float32))
    assert_counts(np.maximum(rng.standard_normal(size), 0).astype(np.float32))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extremes_of_one_sign(sign: float) -> None:
    """All positive or all negative: the extreme nearest to zero is found as well."""
    values = (sign * np.linspace(1, 2, 3 * BLOCK)).astype(np.float32)

    histogram = histogram_of(values)

    assert sorted([sign * histogram.minimum, sign * histogram.maximum]) == [1.0, 2.0]


def test_negative_zero_does_not_show() -> None:
    """The extremes of zeros are 0.0, whichever zero came first."""
    histogram = histogram_of(np.array([-0.0, -0.0]))

    assert np.signbit([histogram.minimum, histogram.maximum]).tolist() == [False, False]


@pytest.mark.parametrize("position", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK])
@pytest.mark.parametrize("pattern", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
def test_one_bad_value_is_found_anywhere(position: int, pattern: int) -> None:
    """Infinity and NaN of either sign and any payload are counted, and do not touch the extremes."""
    values = np.random.default_rng(0).uniform(-3, 5, 3 * BLOCK + 1).astype(np.float32)
    values.view(np.uint32)[position] = pattern

    assert_counts(values)
    assert histogram_of(values).nonfinite == 1


def test_nothing_but_bad_values() -> None:
    """Without a finite value the extremes are 0."""
    histogram = histogram_of(np.array([np.nan, np.inf]))

    assert (histogram.count, histogram.minimum, histogram.maximum, histogram.nonfinite) == (0, 0.0, 0.0, 2)


@pytest.mark.parametrize(
    "values",
    [
        np.float32(2.5),
        np.zeros((0, 3), dtype=np.float32),
        np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        np.arange(24, dtype=np.float64).reshape(2, 3, 4)[:, ::2, ::-1],
        np.arange(24, dtype=np.float32)[::3],
        np.arange(24, dtype=np.float32).reshape(4, 6).T,
        np.arange(24, dtype=">f4"),
        np.frombuffer(np.arange(5, dtype=np.float32).tobytes(), dtype=np.float32),
        np.frombuffer(b"\0" + np.arange(5, dtype=np.float32).tobytes(), dtype=np.float32, offset=1),
    ],
    ids=["0-d", "empty", "float16", "float64 strided", "strided", "transposed", "big-endian", "read-only", "unaligned"],
)
def test_any_array_will_do(values: np.ndarray) -> None:
    """Shape, dtype, byte order, strides and alignment make no difference."""
    before = np.array(values)

    histogram = histogram_of(np.asarray(values))

    expected = histogram_of(np.array(values, dtype=np.float32).ravel())
    assert histogram.bins.tolist() == expected.bins.tolist()
    assert histogram.counts.tolist() == expected.counts.tolist()
    assert histogram.maximum == np.max(values, initial=0)
    np.testing.assert_array_equal(values, before)


def test_values_stay_writeable() -> None:
    """The caller's array is not made read-only."""
    values = np.ones(3, dtype=np.float32)

    MagnitudeCounter().update(values)

    assert values.flags.writeable


def test_float64_beyond_float32_is_infinite() -> None:
    """What float32 cannot hold counts as not finite."""
    assert histogram_of(np.array([1e300, 1.0])).nonfinite == 1


def test_counters_never_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the 32-bit counters might be full they are emptied into 64-bit ones; nothing is lost on the way."""
    batches = [np.full(7, 3.0), np.array([np.nan, -9.0, 0.0]), np.full(25, 3.0), np.zeros(10)]
    whole = histogram_of(np.concatenate(batches))
    monkeypatch.setattr(counter, "CAPACITY", 10)
    small = MagnitudeCounter()

    for batch in batches:
        small.update(batch)

    histogram = small.histogram()
    assert int(small._counters.sum()) <= 10
    assert histogram.counts.tolist() == whole.counts.tolist() == [11, 32, 1]
    assert (histogram.minimum, histogram.maximum, histogram.zeros) == (-9.0, 3.0, 11)
    assert histogram.nonfinite == small.nonfinite == 1


def test_a_histogram_is_a_snapshot() -> None:
    """Later updates go to later histograms only."""
    growing = MagnitudeCounter()
    growing.update(np.array([1.0]))
    first = growing.histogram()

    growing.update(np.array([1.0, 2.0]))

    assert (first.count, growing.histogram().count) == (1, 3)


@given(
    st.lists(st.tuples(st.sampled_from([1, 7, 1023, 1024, 1025, 70_000]), st.integers(-149, 120)), max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_counts_across_octaves(parts: list[tuple[int, int]], seed: int) -> None:
    """Ranges that rise and fall by any number of octaves, from update to update and within one: nothing is lost."""
    rng = np.random.default_rng(seed)
    arrays = [(rng.normal(size=size) * 2.0**exponent).astype(np.float32) for size, exponent in parts]
    for array in arrays:
        array[rng.random(array.size) < 0.3] = 0

    assert_counts(np.concatenate([np.zeros(1, np.float32), *arrays]))
    values = np.concatenate([np.zeros(0, np.float32), *arrays])
    bins, counts = np.unique(np.abs(values).view(np.uint32) >> 13, return_counts=True)
    apart = histogram_of(*arrays)
    np.testing.assert_array_equal(apart.bins, bins)
    np.testing.assert_array_equal(apart.counts, counts)
    assert apart.minimum == values.min(initial=np.inf) if values.size else apart.minimum == 0


@pytest.mark.parametrize("value", [0.0, 1.0, 3e-42, 3.4e38])
def test_a_long_run_of_one_value(value: float) -> None:
    """More of them than a place of the window can hold."""
    values = np.full(200_000, value, np.float32)

    assert histogram_of(values).counts.tolist() == [200_000]
    assert histogram_of(np.append(values, np.float32(2.0))).count == 200_001


@pytest.mark.parametrize("size", [1000, 30_000, 65_536])
def test_a_long_run_in_many_updates(size: int) -> None:
    """What 16 bits do not hold comes in small pieces, between others; each histogram on the way has all so far."""
    growing = MagnitudeCounter()
    batch = np.full(size, 3.0, np.float32)
    batch[::1000] = 5.0
    rare = -(-size // 1000)

    for number in range(1, 71):
        growing.update(batch)
        if number in (1, 34, 35, 70):
            assert growing.histogram().counts.tolist() == [number * (size - rare), number * rare]


def pages_of(small: MagnitudeCounter) -> int:
    """How many pages of its counters the operating system has provided: the upper bit of their entries is set."""
    size = mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * (small._counters.ctypes.data // size))
        entries = np.frombuffer(file.read(8 * (counter.MOST_COUNTER_BYTES // size)), np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63)))


def test_memory_is_taken_at_the_beginning() -> None:
    """None by a new counter, even after others; then that of 32 octaves, so that small magnitudes need no more."""
    for _ in range(3):
        histogram_of(np.geomspace(1e-30, 1e30, 100_000))
    growing = MagnitudeCounter()
    assert pages_of(growing) == 0
    for _ in range(2):
        growing.update(np.ones(2048))
    taken = pages_of(growing)

    growing.update(np.ldexp(1.5, -np.arange(31)))
    growing.update(np.ldexp(1.5, -np.arange(31).repeat(2048)))

    assert 0 < taken <= 64
    assert pages_of(growing) == taken
    assert growing.histogram().bins.size == 32


def test_values_that_no_window_holds() -> None:
    """Twenty octaves are a window; here every octave of float32 has values, in any order."""
    exponents = np.random.default_rng(5).permutation(np.repeat(np.arange(-140, 128), 300))

    assert_counts(np.ldexp(np.float32(1.3), exponents).astype(np.float32))
