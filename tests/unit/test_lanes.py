"""Sifting: places, extremes and the values left out, with the processor's own shuffle and without."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators import lanes
from calibrators.lanes import LANES, STEP, sift

FIRST = 1000
NOTHING = np.repeat(np.array([0x80000000, 0, 0xFFFFFFFF], np.uint32), LANES)


@pytest.fixture(scope="module", params=["shuffle of bytes", "LLVM's own"])
def sifted(request: pytest.FixtureRequest) -> Any:
    """A compiled loop over `sift`, for the processor at hand or for any."""
    patch = pytest.MonkeyPatch()
    if request.param == "LLVM's own":
        patch.setattr(lanes, "_shuffles_bytes", lambda _: False)

    @numba.njit
    def loop(values: Any, places: Any, extremes: Any) -> int:
        kept = 0
        for start in range(0, values.size, STEP):
            kept = sift(values, start, 13, FIRST, places, kept, extremes)
        return kept

    loop(np.zeros(STEP, np.uint32), np.zeros(2 * STEP, np.uint16), NOTHING.copy())
    yield loop
    patch.undo()


def test_the_two_ways_are_two(sifted: Any, request: pytest.FixtureRequest) -> None:
    """Without the processor's shuffle there is none in the code."""
    code = next(iter(sifted.inspect_llvm().values()))

    assert ("compressstore" in code) == ("own" in request.node.name)


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 4), share=st.sampled_from([0.0, 0.3, 0.9, 1.0]), seed=st.integers(0, 2**32 - 1))
def test_places_and_extremes(sifted: Any, steps: int, share: float, seed: int) -> None:
    """Any bit patterns, any share of zeros of either sign: the places of the others in order, clamped at both ends."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**32, steps * STEP, dtype=np.uint32)
    values[rng.random(values.size) < 0.5] = (rng.integers(990, 67_000) << 13) | 5  # near the ends of the places
    values[rng.random(values.size) < share] = rng.choice(np.array([0, 0x80000000], np.uint32))
    places, extremes = np.zeros(values.size + LANES, np.uint16), NOTHING.copy()

    kept = sifted(values, places, extremes)

    magnitudes = values & 0x7FFFFFFF
    wanted = (magnitudes[magnitudes != 0] >> 13).astype(np.int64) - FIRST
    assert kept == wanted.size
    np.testing.assert_array_equal(places[:kept], np.clip(wanted, 0, 65535))
    largest, highest, lowest = extremes.reshape(3, LANES)
    assert largest.view(np.int32).max() == values.view(np.int32).max()
    assert (highest.max(), lowest.min()) == (values.max(), values.min())
