"""Sifting and pouring: places, extremes, values left out or outside, and counts, in each way a processor may have."""

from __future__ import annotations

from typing import Any, get_args

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.registry import cpu_target

from calibrators import lanes
from calibrators.lanes import LANES, NO_EXTREMES, STEP, UNIT, WINDOW, Packing, pour, sift

FIRST = 1000
IN_THE_CODE = {"compress": "avx512.mask.compress", "shuffle": "pshuf.b", "store": "compressstore"}


@pytest.fixture(scope="module", params=get_args(Packing))
def sifted(request: pytest.FixtureRequest) -> Any:
    """A compiled `sift`, with one of the ways to move values together."""
    best: str = lanes._packing(cpu_target.target_context)
    if request.param == "compress" != best:
        pytest.skip("this processor has no AVX-512 VBMI2")
    patch = pytest.MonkeyPatch()
    patch.setattr(lanes, "_packing", lambda _: request.param)

    @numba.njit
    def loop(values: Any, places: Any, extremes: Any, first: Any, counts: Any, earlier: Any, rate: int) -> int:
        return sift(values, 0, values.size, 13, first, places, extremes, counts, earlier, rate)

    sift_alone(loop, np.zeros(STEP, np.uint32))
    yield loop
    patch.undo()


def test_the_ways_are_different_ones(sifted: Any, request: pytest.FixtureRequest) -> None:
    """Each has its own operation in the code, and no other's."""
    code = next(iter(sifted.inspect_llvm().values()))

    assert [way for way, operation in IN_THE_CODE.items() if operation in code] == [
        request.node.callspec.params["sifted"]
    ]


def sift_alone(sifted: Any, values: np.ndarray, first: int = FIRST) -> tuple[int, np.ndarray, np.ndarray]:
    """Sift without counting; return the number of places, the places, and the extremes."""
    places, extremes = np.zeros(values.size + LANES, np.uint16), NO_EXTREMES.copy()
    counts = np.zeros(WINDOW, np.uint16)
    kept = sifted(values, places, extremes, first, counts, places[:0], 0)
    assert not counts.any()
    return kept, places[: max(kept, 0)], extremes


def test_places_by_hand(sifted: Any) -> None:
    """1.0 lies in bin 130048 of 2**13 patterns each, 2.0 is 1024 bins on; zeros of both signs are left out."""
    values = np.zeros(STEP, np.float32)
    values[[3, 20, 21, 31]] = [1.0, -2.0, -0.0, 1.5]

    kept, places, extremes = sift_alone(sifted, values.view(np.uint32), 130_000)

    assert (kept, places.tolist()) == (3, [48, 48 + 1024, 48 + 512])
    signed, unsigned, least = extremes.reshape(3, LANES)
    assert signed.view(np.int32).max().view(np.float32) == 1.5
    assert unsigned.max().view(np.float32) == -2
    assert (least.min() + np.uint32(1)).view(np.float32) == 1


@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    first=st.sampled_from([0, 1, FIRST, (0x7F800000 >> 13) - WINDOW]),
    seed=st.integers(0, 2**32 - 1),
)
def test_places_and_extremes(sifted: Any, steps: int, share: float, first: int, seed: int) -> None:
    """Values anywhere in the window, of either sign, any share of zeros: the places of the others in order."""
    rng = np.random.default_rng(seed)
    ends = (max(first << 13, 1), ((first + WINDOW) << 13) - 1)
    values = rng.integers(*ends, steps * STEP, dtype=np.uint32, endpoint=True)
    values[rng.random(values.size) < 0.1] = rng.choice(np.array(ends, np.uint32))
    values |= rng.choice(np.array([0, 0x80000000], np.uint32), values.size)
    values[rng.random(values.size) < share] = rng.choice(np.array([0, 0x80000000], np.uint32))

    kept, places, extremes = sift_alone(sifted, values, first)

    magnitudes = values & 0x7FFFFFFF
    np.testing.assert_array_equal(places, (magnitudes[magnitudes != 0] >> 13).astype(np.int64) - first)
    assert kept == places.size
    signed, unsigned, least = extremes.reshape(3, LANES)
    assert signed.view(np.int32).max() == values.view(np.int32).max()
    assert unsigned.max() == values.max()
    assert least.min() == (magnitudes - np.uint32(1)).min()


@pytest.mark.parametrize("at", [0, LANES, STEP + 7, 2 * STEP - 1])
@pytest.mark.parametrize("sign", [0, 0x80000000])
@pytest.mark.parametrize(
    ("first", "pattern"),
    [
        (FIRST, (FIRST << 13) - 1),
        (FIRST, 1),
        (FIRST, (FIRST + WINDOW) << 13),
        (FIRST, 0x7F800000),
        (0, WINDOW << 13),
        ((0x7F800000 >> 13) - WINDOW, 0x7F800000),
        ((0x7F800000 >> 13) - WINDOW, 0x7FC00000),
        (0, 0x7FFFFFFF),
    ],
)
def test_one_value_outside_is_told(sifted: Any, first: int, pattern: int, sign: int, at: int) -> None:
    """Below, above, infinite or NaN, of either sign, anywhere: there are no places, and the extremes do not change."""
    values = np.full(2 * STEP, (first + 5) << 13, np.uint32)
    assert sift_alone(sifted, values, first)[0] == 2 * STEP
    values[at] = pattern | sign

    kept, _, extremes = sift_alone(sifted, values, first)

    assert kept == -1
    np.testing.assert_array_equal(extremes, NO_EXTREMES)


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(1, 5), units=st.integers(0, 9), outside=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_earlier_places_are_counted(sifted: Any, steps: int, units: int, outside: bool, seed: int) -> None:
    """As many as are asked for, those that come several times too, whatever becomes of the values."""
    rng = np.random.default_rng(seed)
    earlier = rng.choice(rng.integers(0, WINDOW, 20), steps * units * UNIT + 3).astype(np.uint16)
    values = np.full(steps * STEP, 1 if outside else (FIRST + 9) << 13, np.uint32)
    counts = rng.integers(0, 100, WINDOW).astype(np.uint16)
    expected = counts + np.bincount(earlier[:-3], minlength=WINDOW)
    places = np.zeros(values.size + LANES, np.uint16)

    sifted(values, places, NO_EXTREMES.copy(), FIRST, counts, earlier, units * UNIT)

    np.testing.assert_array_equal(counts, expected)


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(0, 6), share=st.sampled_from([0.0, 0.05, 1.0]), seed=st.integers(0, 2**32 - 1))
def test_pouring_adds_and_empties(steps: int, share: float, seed: int) -> None:
    """What lies between start and end is added and becomes zero; the rest of both arrays stays as it is."""
    rng = np.random.default_rng(seed)
    counts = (rng.integers(0, 2**16, 8 * STEP) * (rng.random(8 * STEP) < share)).astype(np.uint16)
    counters = rng.integers(0, 2**31, counts.size, dtype=np.uint32)
    start = STEP + int(rng.integers(0, 2)) * 5
    inside = np.zeros(counts.size, np.bool_)
    inside[start : start + steps * STEP] = True
    expected = counters + np.where(inside, counts, 0).astype(np.uint32)
    left = np.where(inside, 0, counts)

    _poured(counts, start, steps * STEP, counters)

    np.testing.assert_array_equal(counters, expected)
    np.testing.assert_array_equal(counts, left)


@numba.njit
def _poured(counts: Any, start: int, size: int, counters: Any) -> None:
    pour(counts, start, size, counters)
