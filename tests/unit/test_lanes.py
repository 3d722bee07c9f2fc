"""Sifting and pouring: places, extremes, the values left out, and counts, in each way that a processor may have."""

from __future__ import annotations

from typing import Any, get_args

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.registry import cpu_target

from calibrators import lanes
from calibrators.lanes import LANES, LAST_PLACE, STEP, Packing, pour, sift

FIRST = 1000
NOTHING = np.repeat(np.array([0x80000000, 0, 0xFFFFFFFF], np.uint32), LANES)
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
    def loop(values: Any, places: Any, extremes: Any) -> int:
        return sift(values, 0, values.size, 13, FIRST, places, extremes)

    loop(np.zeros(STEP, np.uint32), np.zeros(2 * STEP, np.uint16), NOTHING.copy())
    yield loop
    patch.undo()


def test_the_ways_are_different_ones(sifted: Any, request: pytest.FixtureRequest) -> None:
    """Each has its own operation in the code, and no other's."""
    code = next(iter(sifted.inspect_llvm().values()))

    assert [way for way, operation in IN_THE_CODE.items() if operation in code] == [
        request.node.callspec.params["sifted"]
    ]


def test_places_by_hand(sifted: Any) -> None:
    """1.0 lies in bin 130048 of 2**13 patterns each, 2.0 is 1024 bins on; zeros of both signs are left out."""
    values = np.zeros(STEP, np.float32)
    values[[3, 20, 21, 31]] = [1.0, -2.0, -0.0, np.float32(2.0**-120)]
    places, extremes = np.zeros(STEP + LANES, np.uint16), NOTHING.copy()

    kept = sifted(values.view(np.uint32), places, extremes)

    bins = np.array([127 * 1024, 128 * 1024, 7 * 1024])
    assert places[:kept].tolist() == [LAST_PLACE, LAST_PLACE, *(bins[2:] - FIRST)]
    signed, unsigned, least = extremes.reshape(3, LANES)
    assert signed.view(np.int32).max().view(np.float32) == 1
    assert unsigned.max().view(np.float32) == -2
    assert (least.min() + np.uint32(1)).view(np.float32) == np.float32(2.0**-120)


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 4), share=st.sampled_from([0.0, 0.3, 0.9, 1.0]), seed=st.integers(0, 2**32 - 1))
def test_places_and_extremes(sifted: Any, steps: int, share: float, seed: int) -> None:
    """Any bit patterns, any share of zeros of either sign: the places of the others in order, the last outside."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**32, steps * STEP, dtype=np.uint32)
    near = rng.random(values.size) < 0.5
    values[near] = (rng.integers(990, 67_000, np.count_nonzero(near)) << 13) | 5  # about the ends of the places
    values[rng.random(values.size) < share] = rng.choice(np.array([0, 0x80000000], np.uint32))
    places, extremes = np.zeros(values.size + LANES, np.uint16), NOTHING.copy()

    kept = sifted(values, places, extremes)

    magnitudes = values & 0x7FFFFFFF
    wanted = (magnitudes[magnitudes != 0] >> 13).astype(np.int64) - FIRST
    assert kept == wanted.size
    np.testing.assert_array_equal(places[:kept], np.where((wanted >= 0) & (wanted < 65535), wanted, 65535))
    signed, unsigned, least = extremes.reshape(3, LANES)
    assert signed.view(np.int32).max() == values.view(np.int32).max()
    assert unsigned.max() == values.max()
    assert least.min() == (magnitudes - np.uint32(1)).min()


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
