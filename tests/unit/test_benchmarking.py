"""Timing by an injected clock: nothing here waits, and nothing depends on how fast this machine is."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import InferenceError
from trt_int8.benchmarking import BenchmarkResult, Speedup, estimate_speedup, percentile, summarize, time_side_by_side
from trt_int8.errors import ConfigError, DataError

FEEDS = {"x": np.ones((4, 2), np.float32)}


class World:
    """A clock that only inferences move, and a log of which runner inferred what."""

    def __init__(self, fake_runner: Any) -> None:
        self.now = 0
        self.log: list[str] = []
        self._fake_runner = fake_runner

    def clock(self) -> int:
        return self.now

    def runner(self, name: str, time_ns: Callable[[int], int], **how: Any) -> Any:
        """Make a runner whose n-th inference, counted from 0, takes `time_ns(n)`."""
        count = 0

        def function(x: Any) -> Any:
            nonlocal count
            self.now += time_ns(count)
            self.log.append(name)
            count += 1
            return x

        return self._fake_runner(name, function, **how)

    def time(self, *runners: Any, **how: Any) -> BenchmarkResult:
        how = {"rounds": 6, "budget_s": 0.1, "warmup_s": 0.01, **how}
        return time_side_by_side(runners, how.pop("feeds", [FEEDS]), clock=self.clock, **how)


@pytest.fixture
def world(fake_runner: Any) -> World:
    return World(fake_runner)


def milliseconds(value: float) -> Callable[[int], int]:
    return lambda count: int(value * 1e6)


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [(100, 90, 90), (100, 95, 95), (100, 99, 99), (10, 90, 9), (10, 99, 10), (1, 50, 1), (20, 95, 19), (3, 0, 1)],
)
def test_percentile_is_trtexecs(count: int, percent: int, expected: int) -> None:
    """Of 1 .. n, the p-th percentile leaves out the floor((1 - p) n) largest, exactly."""
    assert percentile(np.arange(1.0, count + 1), percent) == expected


def test_summary_by_hand() -> None:
    """1, 2, 3 and 10 ms: median 2.5, mean 4, population deviation sqrt(12.5), percentiles the largest value."""
    latency = summarize(np.array([[10_000_000, 1_000_000], [3_000_000, 2_000_000]]))

    assert latency.median_ms == 2.5
    assert latency.mean_ms == 4.0
    assert latency.cv_percent == pytest.approx(100 * 12.5**0.5 / 4)
    assert (latency.p90_ms, latency.p95_ms, latency.p99_ms) == (10.0, 10.0, 10.0)
    assert latency.iterations == 4


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_occur(times: list[int]) -> None:
    """Percentiles never fall with the percentage, and each is a time that was measured."""
    latency = summarize(np.array(times))

    assert latency.p90_ms <= latency.p95_ms <= latency.p99_ms <= max(times) / 1e6
    assert {latency.p90_ms, latency.p95_ms, latency.p99_ms} <= {time / 1e6 for time in times}


def test_speedup_of_constant_times_is_exact() -> None:
    """Half the time in every round is 2.0, with an interval of no width."""
    assert estimate_speedup(np.full(20, 8.0), np.full(20, 4.0), seed=0) == Speedup(2.0, 2.0, 2.0)


def test_speedup_is_paired_by_round() -> None:
    """A machine that slows down tenfold for half of the rounds slows both: the ratio stays 2.0 throughout."""
    load = np.where(np.arange(20) % 2 == 0, 1.0, 10.0)

    assert estimate_speedup(3.0 * load, 1.5 * load, seed=0) == Speedup(2.0, 2.0, 2.0)


def test_speedup_interval_against_all_resamples() -> None:
    """For three rounds the bootstrap has 27 equally likely draws; the interval is their 2.5 % and 97.5 % quantile."""
    ratios = np.array([1.0, 2.0, 4.0])
    draws = np.stack(np.meshgrid(ratios, ratios, ratios), axis=-1).reshape(-1, 3)
    exact = np.quantile(np.median(draws, axis=1), [0.025, 0.975])

    speedup = estimate_speedup(ratios, np.ones(3), seed=0)

    assert speedup.ratio == 2.0
    np.testing.assert_allclose([speedup.low, speedup.high], exact)


def test_interval_covers_the_true_ratio() -> None:
    """Of 200 experiments on noisy rounds with a true ratio of 1, at least 90 % of the intervals hold 1."""
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        reference, candidate = rng.lognormal(0, 0.1, (2, 20))
        speedup = estimate_speedup(reference, candidate, seed)
        covered += speedup.low <= 1.0 <= speedup.high

    assert covered >= 180


@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=20), st.integers(0, 99))
def test_interval_holds_the_estimate(ratios: list[float], seed: int) -> None:
    """The estimate lies inside its interval, and the interval inside the rounds' own range."""
    speedup = estimate_speedup(np.array(ratios), np.ones(len(ratios)), seed)

    assert min(ratios) <= speedup.low <= speedup.ratio <= speedup.high <= max(ratios)


@pytest.mark.parametrize(
    ("speedup", "expected"),
    [
        (Speedup(1.85, 1.80, 1.92), "INT8 is faster than FP32 here: 1.85x (1.80 to 1.92)"),
        (Speedup(0.60, 0.58, 0.61), "INT8 is slower than FP32 here: 0.60x (0.58 to 0.61)"),
        (
            Speedup(0.98, 0.95, 1.02),
            "INT8 is not faster than FP32 here, the two cannot be told apart: 0.98x (0.95 to 1.02)",
        ),
        (
            Speedup(1.012, 1.003, 1.02),
            "INT8 is not faster than FP32 here, the two cannot be told apart: 1.01x (1.00 to 1.02)",
        ),
    ],
)
def test_verdict_is_plain(speedup: Speedup, expected: str) -> None:
    """An interval that holds 1.0 as printed is never called a speed-up."""
    assert speedup.verdict("INT8", "FP32") == expected


def test_times_and_throughput_by_hand(world: World) -> None:
    """2 ms and 1 ms for 4 samples: medians, 2000 and 4000 samples per second, twice as fast."""
    result = world.time(world.runner("fp32", milliseconds(2)), world.runner("int8", milliseconds(1)))

    fp32, int8 = result.candidates
    assert (fp32.latency.median_ms, int8.latency.median_ms) == (2.0, 1.0)
    assert (fp32.samples_per_s, int8.samples_per_s) == (2000.0, 4000.0)
    assert (fp32.speedup, int8.speedup) == (Speedup(1.0, 1.0, 1.0), Speedup(2.0, 2.0, 2.0))
    assert fp32.verdict == ""
    assert int8.verdict == "int8 is faster than fp32 here: 2.00x (2.00 to 2.00)"
    assert result.warnings == ()


def test_late_calls_lower_the_throughput_and_not_the_median(world: World) -> None:
    """Every tenth inference takes 11 ms instead of 1: the median stays 1 ms, throughput follows the mean of 2 ms."""
    late = world.runner("late", lambda count: int(11e6 if count % 10 == 0 else 1e6))

    candidate = world.time(late, budget_s=60.0).candidates[0]

    assert candidate.latency.median_ms == 1.0
    assert candidate.samples_per_s == pytest.approx(2000.0, rel=0.01)


def test_runners_take_turns_in_alternating_order(world: World) -> None:
    """A B C, then C B A: no candidate always runs first or after the same neighbour."""
    runners = [world.runner(name, milliseconds(1)) for name in "ABC"]

    world.time(*runners, rounds=6, budget_s=1e-6)

    turn = 1 + 3  # the dropped inference and the least number of timed ones
    rounds = world.log[-6 * 3 * turn :]
    assert rounds[::turn] == list("ABCCBA" * 3)
    assert rounds == [name for name in "ABCCBA" * 3 for _ in range(turn)]


def test_warm_up_and_first_inferences_are_dropped(world: World) -> None:
    """Slow first inferences, of the run and of every turn, leave no trace in the times."""
    turn = 1 + 3
    warm = 10  # warm-up ends when 10 ms have passed: one inference of 10 ms is followed by two of 1 ms at least

    def time_ns(count: int) -> int:
        if count < warm:
            return 2_000_000
        return 50_000_000 if (count - warm) % turn == 0 else 1_000_000

    result = world.time(world.runner("cold", time_ns), warmup_s=0.02, budget_s=1e-6)

    assert result.candidates[0].latency.p99_ms == 1.0
    assert result.candidates[0].latency.iterations == 6 * 3


def test_budget_is_shared_evenly(world: World) -> None:
    """0.6 s over 6 rounds of two candidates is 50 ms a turn: 50 inferences of 1 ms, 5 of 10 ms."""
    result = world.time(world.runner("fast", milliseconds(1)), world.runner("slow", milliseconds(10)), budget_s=0.6)

    assert [candidate.latency.iterations for candidate in result.candidates] == [6 * 50, 6 * 5]


def test_slow_model_still_gets_its_iterations(world: World) -> None:
    """A model of 10 s per inference has three in each turn, whatever the budget."""
    result = world.time(world.runner("slow", milliseconds(10_000)))

    assert result.candidates[0].latency.iterations == 6 * 3


def test_wandering_clock_is_reported(world: World) -> None:
    """Medians that drift by 10 % from round to round are said to, with the figure."""
    result = world.time(world.runner("drift", lambda count: 1_000_000 + 20_000 * count), budget_s=1e-6)

    (warning,) = result.warnings
    assert warning.startswith("drift: its median time varied by ")
    assert "2.5 %" in warning


def test_all_feeds_take_part_and_other_batch_sizes_do_not(fake_runner: Any) -> None:
    """Batches of the first one's size are fed in turn; others are left out with a warning, and counted nowhere."""
    seen: list[float] = []

    def function(x: Any) -> Any:
        seen.append(float(x[0, 0]))
        return x

    now = iter(range(0, 10**9, 10**5))
    feeds = [{"x": np.full((rows, 2), value, np.float32)} for value, rows in [(1.0, 4), (2.0, 4), (3.0, 1)]]

    result = time_side_by_side(
        [fake_runner("feeds", function)], feeds, rounds=5, budget_s=1e-3, warmup_s=1e-3, clock=lambda: next(now)
    )

    assert set(seen) == {1.0, 2.0}
    assert result.batch_size == 4
    assert result.warnings == ("1 of 3 batches do not have 4 samples and were left out",)


def test_result_states_how_it_was_measured(world: World) -> None:
    """The JSON holds the fixed keys, and beside them threads, execution, inputs and the machine."""
    simulated = world.runner("int8", milliseconds(1), execution="exact", simulated=True)
    plain = world.runner("exact", milliseconds(1), execution="exact")

    data = world.time(world.runner("fp32", milliseconds(2)), simulated, plain).to_json()

    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["rounds"] == 6
    assert data["reference"] == "fp32"
    assert data["inputs"] == {"x": [4, 2]}
    assert data["machine"]["versions"]["onnxruntime"]
    fp32, int8, exact = data["candidates"]
    assert {
        "name",
        "median_ms",
        "p90_ms",
        "p95_ms",
        "p99_ms",
        "samples_per_s",
        "speedup",
        "speedup_low",
        "speedup_high",
        "simulated",
    } <= fp32.keys()
    assert fp32["note"] == ""
    assert "nothing about TensorRT" in int8["note"]
    assert "optimizations off" in exact["note"]


def test_threads_are_recorded_where_the_runner_has_them(world: World) -> None:
    """A runner's thread count is stated; one without such a setting gives None."""
    one = world.runner("one", milliseconds(1))
    one.threads = 3

    result = world.time(one, world.runner("other", milliseconds(1)))

    assert [candidate.threads for candidate in result.candidates] == [3, None]


def test_same_seed_gives_the_same_interval() -> None:
    """The bootstrap is reproducible."""
    rng = np.random.default_rng(0)
    reference, candidate = rng.lognormal(0, 0.1, (2, 20))

    assert estimate_speedup(reference, candidate, seed=5) == estimate_speedup(reference, candidate, seed=5)


def test_garbage_collector_is_off_meanwhile_and_on_again(fake_runner: Any) -> None:
    """No collection falls into a timed call, and the program gets its collector back, also after a failure."""
    states: set[bool] = set()

    def function(x: Any) -> Any:
        states.add(gc.isenabled())
        if len(states) and x[0, 0] == 7.0:
            raise InferenceError("broken")
        return x

    now = iter(range(0, 10**9, 10**5))
    settings: dict[str, Any] = {"rounds": 5, "budget_s": 1e-3, "warmup_s": 1e-3, "clock": lambda: next(now)}
    time_side_by_side([fake_runner("gc", function)], [FEEDS], **settings)
    assert states == {False}
    assert gc.isenabled()

    with pytest.raises(InferenceError, match="broken"):
        time_side_by_side([fake_runner("gc", function)], [{"x": np.full((1, 2), 7.0, np.float32)}], **settings)
    assert gc.isenabled()


def test_progress_counts_the_rounds(world: World) -> None:
    """The bar has one step per round."""
    shown: list[Any] = []

    def track(items: Any, description: str, total: int | None = None) -> Any:
        shown.append((description, total))
        return items

    world.time(world.runner("one", milliseconds(1)), track=track)

    assert shown == [("benchmark", 6)]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rounds": 4}, ConfigError, "4 rounds: expected at least 5"),
        ({"budget_s": 0.0}, ConfigError, "expected times above 0"),
        ({"feeds": []}, DataError, "no batches"),
        ({"feeds": [{"z": np.ones((1, 2), np.float32)}]}, InferenceError, "no input 'z'"),
    ],
)
def test_bad_settings_are_refused(world: World, change: dict[str, Any], error: type[Exception], text: str) -> None:
    """What cannot be measured is refused with what was found and what was expected."""
    with pytest.raises(error, match=text):
        world.time(world.runner("one", milliseconds(1)), **change)


def test_no_runners_are_refused() -> None:
    """There is nothing to time."""
    with pytest.raises(ConfigError, match="no models"):
        time_side_by_side([], [FEEDS])
