"""What every calibration method promises, whatever its algorithm."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibrators.calibration import METHODS, Calibration, Fingerprint
from calibrators.collector import collect
from calibrators.counter import histogram_of
from calibrators.numerics import scale_from_amax
from calibrators.protocols import Activations

FINGERPRINT = Fingerprint(graph="g", weights="w", data=("d",), preprocessing="", tool="0", batches=1, samples=1)
PERCENTILE = 99.9

SHAPES = {
    "normal": lambda rng: rng.normal(0, 2, 3000),
    "relu": lambda rng: np.maximum(rng.laplace(size=3000), 0),
    "heavy tail": lambda rng: rng.standard_t(1.5, 3000),
    "outlier": lambda rng: np.append(rng.normal(size=3000), 1e4),
    "constant": lambda rng: np.full(50, -0.3),
    "few values": lambda rng: rng.integers(-3, 9, 3000) / 3,
    "one value": lambda rng: np.array([0.0, 5e-5, 0.0]),
    "sparse": lambda rng: np.where(rng.uniform(size=30_000) < 0.001, rng.normal(size=30_000), 0.0),
}

every_method = pytest.mark.parametrize("method", METHODS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


class Replay:
    """An `ActivationSource` of one tensor that hands out the given batches."""

    tensors = ("x",)

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self._batches = batches

    def activations(self) -> Iterator[Activations]:
        for index, values in enumerate(self._batches):
            yield Activations(batch=index, samples=len(values), values={"x": values})

    def producer(self, tensor: str) -> str:
        return "node"


def calibrate(batches: Iterable[np.ndarray]) -> Calibration:
    return Calibration(collect(Replay(batches)).histograms, FINGERPRINT)


def amax_of(values: np.ndarray, method: str) -> float:
    return Calibration({"x": histogram_of(values)}, FINGERPRINT).amax(method, percentile=PERCENTILE)["x"]


def values_of(shape: str) -> np.ndarray:
    return SHAPES[shape](np.random.default_rng(12)).astype(np.float32)


@every_method
@every_shape
def test_threshold_is_positive_and_within_the_data(method: str, shape: str) -> None:
    """A tensor with a non-zero value gets a threshold above 0 and at most two bins beyond its largest magnitude."""
    values = values_of(shape)

    amax = amax_of(values, method)

    assert isinstance(amax, float)
    assert 0 < amax <= float(np.abs(values).max()) * (1 + 2 / 1024)


@every_method
@settings(max_examples=30, deadline=None)
@given(
    values=hnp.arrays(
        np.float32, st.integers(1, 30), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_any_values_get_a_usable_scale(method: str, values: np.ndarray) -> None:
    """Subnormal, huge, all alike or all zero: the scale is finite and above 0."""
    amax = amax_of(values, method)

    assert 0 <= amax <= max(float(np.abs(values).max()) * (1 + 2 / 1024), 2**-126)
    assert (amax == 0) == (not values.any())
    assert 0 < scale_from_amax(amax) < np.inf


@every_method
@every_shape
@pytest.mark.parametrize("exponent", [-40, -3, 1, 60])
def test_threshold_scales_with_the_data(method: str, shape: str, exponent: int) -> None:
    """Data times a power of two gives exactly the threshold times that power."""
    values = values_of(shape)

    assert amax_of(np.ldexp(values, exponent), method) == amax_of(values, method) * 2.0**exponent


@every_method
@every_shape
def test_sign_does_not_matter(method: str, shape: str) -> None:
    """Symmetric quantization looks at magnitudes only."""
    values = values_of(shape)

    assert amax_of(-values, method) == amax_of(values, method)


@every_method
@every_shape
def test_answers_repeat(method: str, shape: str) -> None:
    """The same values give the same threshold, bit by bit."""
    assert amax_of(values_of(shape), method) == amax_of(values_of(shape), method)


@every_method
@every_shape
def test_order_of_the_data_does_not_matter(method: str, shape: str) -> None:
    """The same activations in another order, and cut into other batches, give identical scales."""
    values = values_of(shape)
    shuffled = np.random.default_rng(1).permutation(values)

    one_pass = calibrate([values]).scales(method, percentile=PERCENTILE)
    batches = calibrate(np.array_split(shuffled, 7)).scales(method, percentile=PERCENTILE)

    assert batches == one_pass


@every_method
@every_shape
def test_merged_calibrations_are_one_calibration(method: str, shape: str) -> None:
    """Split over calibrations that are merged, in any order and grouping, the scales are identical."""
    values = values_of(shape)
    expected = calibrate([values]).scales(method, percentile=PERCENTILE)
    parts = [calibrate([part]) for part in np.array_split(values, 3)]

    for a, b, c in itertools.permutations(parts):
        assert a.merge(b).merge(c).scales(method, percentile=PERCENTILE) == expected
        assert a.merge(b.merge(c)).scales(method, percentile=PERCENTILE) == expected


@every_method
def test_a_tensor_that_is_always_zero(method: str) -> None:
    """Its threshold is 0, its scale 1, and it is reported."""
    calibration = calibrate([np.zeros(4), np.array([-0.0])])

    assert calibration.amax(method) == {"x": 0.0}
    assert calibration.scales(method) == {"x": 1.0}
    assert calibration.always_zero == ("x",)


@every_method
def test_zeros_in_between_do_not_stop_anything(method: str) -> None:
    """A tensor that is non-zero once in a million still gets a threshold of the size of that value."""
    values = np.zeros(10**6)
    values[777] = 3.0

    assert amax_of(values, method) == pytest.approx(3.0, rel=2 / 1024)


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    """A thousand batches need no more memory than fifty."""

    def batches(number: int) -> Iterator[np.ndarray]:
        for _ in range(number):
            # The same values in fresh memory, so that the number of non-empty bins is the same.
            yield np.random.default_rng(0).standard_normal((2, 5000), dtype=np.float32)

    def peak(number: int) -> int:
        tracemalloc.reset_peak()
        collect(Replay(batches(number)))
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        peak(1)  # compiles the counting loop
        few = peak(50)
        many = peak(1000)
    finally:
        tracemalloc.stop()

    one_batch = 2 * 5000 * np.float32().itemsize
    assert many < few + one_batch
