"""Timing by an injected clock: nothing here waits, and nothing depends on how fast this machine is."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engines.errors import InferenceError
from trt_int8.benchmark_result import BenchmarkResult
from trt_int8.benchmarking import time_side_by_side
from trt_int8.errors import ConfigError, DataError
from trt_int8.timing import Speedup

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
    warm = 1 + 10  # one inference shows that it can run; warm-up ends when 20 ms have passed

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
    assert warning.startswith("median times varied from round to round: drift by ")
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


def test_a_simulated_model_gets_no_verdict(world: World) -> None:
    """Neither as a candidate nor as the reference; its figures are all there."""
    fp32, int8 = world.runner("fp32", milliseconds(1)), world.runner("int8", milliseconds(2), simulated=True)

    for runners in ((fp32, int8), (int8, fp32)):
        second = world.time(*runners).to_json()["candidates"][1]
        pair = f"{runners[1].name} against {runners[0].name}"
        assert second["verdict"] == f"{pair}: no verdict, ONNX Runtime only simulates the INT8 of int8"
        assert second["speedup"] == pytest.approx(0.5 if runners[1] is int8 else 2.0)


def test_threads_are_recorded_where_the_runner_has_them(world: World) -> None:
    """A runner's thread count is stated; one without such a setting gives None."""
    one = world.runner("one", milliseconds(1))
    one.threads = 3

    result = world.time(one, world.runner("other", milliseconds(1)))

    assert [candidate.threads for candidate in result.candidates] == [3, None]


def test_garbage_collector_is_off_meanwhile_and_on_again(world: World) -> None:
    """No collection falls into a timed call, and the program gets its collector back, also after a failure."""
    states: set[bool] = set()

    def look(count: int) -> int:
        states.add(gc.isenabled())
        return 1_000_000

    def fail(count: int) -> int:
        raise InferenceError("broken")

    world.time(world.runner("looks", look))
    assert states == {False}
    assert gc.isenabled()

    with pytest.raises(InferenceError, match="broken"):
        world.time(world.runner("fails", fail))
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
