"""Engines timed side by side, by hand, over a GPU made of arithmetic (see conftest.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trt_int8.benchmark_result import BenchmarkResult
from trt_int8.benchmarking import built_for, time_side_by_side
from trt_int8.errors import ConfigError, UsageError
from trt_int8.timing import Speedup

FEEDS = [{"x": np.full((4, 2), value, np.float32)} for value in (0, 1, 2)]


@pytest.fixture(autouse=True)
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `fake_nvml`, a test has no NVML, whatever is installed here."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.fixture
def bench(fake_gpu: Any) -> Callable[..., BenchmarkResult]:
    def run(*runners: Any, feeds: Any = FEEDS, **how: Any) -> BenchmarkResult:
        how = {"rounds": 6, "budget_s": 1.2, "warmup_s": 0.05, **how}
        return time_side_by_side(runners, feeds, clock=fake_gpu.clock, **how)

    return run


def test_engines_are_compared_by_compute_time(fake_gpu: Any, bench: Any) -> None:
    """2 ms and 1 ms for 4 samples, without transfers: twice as fast, 2000 and 4000 samples per second."""
    result = bench(fake_gpu.engine("fp32", compute_ms=2.0), fake_gpu.engine("int8", compute_ms=1.0))

    fp32, int8 = result.candidates
    assert result.timed == "gpu compute"
    assert (fp32.latency.median_ms, int8.latency.median_ms) == (2.0, 1.0)
    assert int8.speedup == Speedup(2.0, 2.0, 2.0)
    assert int8.verdict == "int8 is faster than fp32 here: 2.00x (2.00 to 2.00)"
    assert (fp32.samples_per_s, int8.samples_per_s) == (pytest.approx(2000), pytest.approx(4000))
    assert result.warnings == ()


def test_what_else_is_known_of_an_engine(fake_gpu: Any, bench: Any) -> None:
    """Medians of every step, throughput per run and per sample, sizes; nothing from NVML without NVML."""
    engine = fake_gpu.engine(compute_ms=1.0, h2d_ms=0.2, d2h_ms=0.1, enqueue_ms=0.25, host_ms=0.5)

    gpu = bench(engine).to_json()["candidates"][0]["gpu"]

    assert {key: gpu[key] for key in ("compute_ms", "enqueue_ms", "h2d_ms", "d2h_ms")} == {
        "compute_ms": 1.0, "enqueue_ms": 0.25, "h2d_ms": 0.2, "d2h_ms": 0.1,
    }  # fmt: skip
    assert gpu["latency_ms"] == pytest.approx(0.25 + 1.0 + 0.1)  # the copy in is over before the run is queued
    assert gpu["host_ms"] == pytest.approx(0.5 + 0.25 + 1.0 + 0.1)
    assert 950 < gpu["throughput_qps"] < 1000  # each turn begins with the 0.25 ms of its first launch
    assert gpu["samples_per_s"] == 4 * gpu["throughput_qps"]
    assert (gpu["cuda_graph"], gpu["graph_fallback"]) == (True, None)
    assert gpu["engine_bytes"] > 0
    assert gpu["device_memory_bytes"] == 4096
    for key in ("energy_mj_per_inference", "power_w", "clock_sm_mhz", "clock_memory_mhz", "temperature_c"):
        assert gpu[key] is None


def test_with_transfers_a_time_is_copies_and_run(fake_gpu: Any, bench: Any) -> None:
    """0.5 + 2 + 0.5 and 0.5 + 1 + 0.5 ms: the faster kernels gain half as much."""
    copies = {"h2d_ms": 0.5, "d2h_ms": 0.5}
    result = bench(fake_gpu.engine("fp32", compute_ms=2.0, **copies), fake_gpu.engine("int8", **copies), transfers=True)

    assert result.timed == "with transfers"
    assert [row.latency.median_ms for row in result.candidates] == [3.0, 2.0]
    assert result.candidates[1].speedup == Speedup(1.5, 1.5, 1.5)
    assert result.candidates[1].samples_per_s == pytest.approx(4 / 2.0e-3)
    assert result.candidates[1].gpu is not None
    assert result.candidates[1].gpu.compute_ms == 1.0


def test_beside_another_runner_the_hosts_clock_decides(fake_gpu: Any, bench: Any, fake_runner: Any) -> None:
    """Arrays in, arrays out for both: 4 ms against 0.5 + 0.2 + 1 + 0.2 + 0.1 ms."""

    def function(x: Any) -> Any:
        fake_gpu.now += 4_000_000
        return x

    result = bench(fake_runner("onnx", function), fake_gpu.engine("int8", d2h_ms=0.3))

    onnx, int8 = result.candidates
    assert result.timed == "host"
    assert (onnx.latency.median_ms, int8.latency.median_ms) == (4.0, 2.0)
    assert onnx.gpu is None
    assert int8.gpu is not None
    assert (int8.gpu.compute_ms, int8.gpu.host_ms) == (1.0, 2.0)
    assert int8.samples_per_s == 2000.0


def test_transfers_cannot_be_left_out_where_they_cannot_be_told(fake_gpu: Any, bench: Any, fake_runner: Any) -> None:
    """ONNX Runtime's times hold their copies, so a comparison without them would not be one."""
    with pytest.raises(UsageError, match="onnx is no TensorRT engine"):
        bench(fake_gpu.engine(), fake_runner("onnx"), transfers=False)


def test_turns_alternate_and_the_compared_part_comes_first(fake_gpu: Any, bench: Any) -> None:
    """A B, B A; in a turn queued runs, then stepped ones, then calls of `infer`; a first inference is not timed."""
    a, b = fake_gpu.engine("A"), fake_gpu.engine("B")
    bench(a, b, budget_s=1e-6)

    turn = 1 + (3 + 1) + 3 + 3
    executed = [line.split()[1] for line in fake_gpu.log if line.startswith("execute")][-6 * 2 * turn :]
    assert executed == [name for name in "ABBA" * 3 for _ in range(turn)]
    infer = ["upload", "execute A", "copy_out"]
    queued = 4 * ["record", "execute A", "record"] + 4 * ["wait"]
    stepped = ["stage", *3 * ["record", "upload", "record", "execute A", "record", "copy_out", "record", "wait"]]
    last = [line.split()[0] if line.startswith(("record", "wait")) else line for line in fake_gpu.log]
    assert last[-53:-50] == infer
    assert sorted(last[-50:-34]) == sorted(queued)
    assert last[-34:] == [*stepped, *3 * infer]


def test_every_turn_feeds_another_batch(fake_gpu: Any, bench: Any) -> None:
    """The runs that the GPU times work on each batch in turn."""
    engine = fake_gpu.engine()
    bench(engine, budget_s=1e-6)

    firsts = engine.fed[-6 * (1 + 3) :: 1 + 3]
    assert [float(feeds["x"][0, 0]) for feeds in firsts] == [0, 1, 2, 0, 1, 2]


def test_the_budget_is_kept(fake_gpu: Any, bench: Any) -> None:
    """Two engines of different speed share 12 s evenly, all parts of their turns together."""
    fast, slow = fake_gpu.engine("fast", compute_ms=0.1), fake_gpu.engine("slow", compute_ms=20.0)
    bench(fast, slow, budget_s=12.0)

    assert fake_gpu.now / 1e9 == pytest.approx(12.0, rel=0.15)


def test_batches_of_another_shape_are_left_out(fake_gpu: Any, bench: Any) -> None:
    """An engine would bind its buffers anew for them, within a timed run."""
    engine = fake_gpu.engine()
    result = bench(engine, feeds=[*FEEDS, {"x": np.ones((4, 3), np.float32)}])

    assert {feeds["x"].shape for feeds in engine.fed} == {(4, 2)}
    assert result.warnings == ("1 of 4 batches do not have the first one's shapes and were left out",)


def test_energy_clocks_and_temperature_come_from_nvml(fake_gpu: Any, bench: Any, fake_nvml: Any) -> None:
    """100 W: 200 mJ for 2 ms, 100 mJ for 1 ms; clocks and temperature as their range."""
    fake_nvml.sm_clocks = [1490, 1500, 1510]
    result = bench(fake_gpu.engine("fp32", compute_ms=2.0), fake_gpu.engine("int8"))

    for row, energy in zip(result.to_json()["candidates"], (200, 100), strict=True):
        assert row["gpu"]["energy_mj_per_inference"] == pytest.approx(energy, rel=0.05)
        assert row["gpu"]["power_w"] == pytest.approx(100, rel=0.05)
        assert row["gpu"]["energy_source"] == "energy counter"
        assert row["gpu"]["clock_memory_mhz"] == [2600, 2600, 2600]
        assert 40 <= row["gpu"]["temperature_c"][0] <= row["gpu"]["temperature_c"][1]
    assert result.candidates[0].gpu is not None
    assert result.candidates[0].gpu.clock_sm_mhz == (1490, 1510, 1510)
    assert result.notes == ()
    assert fake_nvml.opened == 0


def test_without_a_counter_the_energy_says_where_it_comes_from(fake_gpu: Any, bench: Any, fake_nvml: Any) -> None:
    """Older GPUs give power alone."""
    fake_nvml.missing = {"nvmlDeviceGetTotalEnergyConsumption"}
    (row,) = bench(fake_gpu.engine()).candidates

    assert row.gpu is not None
    assert row.gpu.energy_source == "mean power"
    assert row.gpu.energy_mj_per_inference == pytest.approx(100, rel=0.05)


def test_without_nvml_one_note_says_so(fake_gpu: Any, bench: Any) -> None:
    """Figures are null, and the note names what to install; it is no warning."""
    result = bench(fake_gpu.engine("a"), fake_gpu.engine("b"))

    (note,) = result.notes
    assert "trt-int8[tensorrt11]" in note
    assert result.warnings == ()


def test_a_simulated_device_has_no_energy_and_no_verdict(fake_gpu: Any, bench: Any, fake_nvml: Any) -> None:
    """Every row is marked, NVML is not asked, and nothing is called faster."""
    result = bench(
        fake_gpu.engine("fp32", simulated=True, compute_ms=0.1, enqueue_ms=1.0), fake_gpu.engine("int8", simulated=True)
    )

    assert [row.simulated for row in result.candidates] == [True, True]
    assert result.candidates[1].verdict == "int8 against fp32: no verdict, the device is SIMULATED"
    assert all("no" not in row.note.split() and "SIMULATED" in row.note for row in result.candidates)
    assert all(row.gpu is not None and row.gpu.power_w is None for row in result.candidates)
    assert fake_nvml.opened == 0
    assert result.warnings == ()


def test_a_simulated_engine_gets_no_verdict_against_a_real_runner(fake_gpu: Any, bench: Any, fake_runner: Any) -> None:
    """The mark reaches the mixed table too."""

    def function(x: Any) -> Any:
        fake_gpu.now += 4_000_000
        return x

    result = bench(fake_runner("onnx", function), fake_gpu.engine("int8", simulated=True))

    assert "no verdict" in result.candidates[1].verdict


def test_warnings_name_what_spoils_the_times(fake_gpu: Any, bench: Any, fake_nvml: Any) -> None:
    """Host, transfers, wandering clocks, a graph that fell back, and shapes that kernels were not chosen for."""
    fake_nvml.sm_clocks = [1300, 1500]
    result = bench(
        fake_gpu.engine("queue", enqueue_ms=1.5, graph_fallback="no graphs here"),
        fake_gpu.engine("copies", h2d_ms=1.5, d2h_ms=2.5),
        fake_gpu.engine("unsteady", compute_ms=lambda run: 1.0 + 0.2 * (run % 2)),
        fake_gpu.engine("tuned", profiles=[{"x": ((1, 2), (8, 2), (16, 2))}]),
    )

    texts = "\n".join(result.warnings)
    for expected in (
        "queue ran without a CUDA graph: no graphs here",
        "queue is bound by the host: queueing a run takes 1.500 ms, computing it 1.500 ms",
        "use a CUDA graph or a larger batch",
        "copies is bound by transfers: copying its inputs takes 1.500 ms",
        "copies is bound by transfers: copying its outputs takes 2.500 ms",
        "compute times of unsteady vary by 9.1 %",
        "tuned is timed at (4, 2) for 'x', and its kernels were chosen for (8, 2)",
        "clock moved between 1300 and 1500 MHz during the runs: lock it with `nvidia-smi -lgc 1300,1300`",
    ):
        assert expected in texts
    assert len(result.warnings) == 7


def test_fp32_and_tf32_are_named_apart(fake_gpu: Any, bench: Any) -> None:
    """The precision stands in the row, and a TF32 row says what it is."""
    result = bench(fake_gpu.engine("a", precision="fp32"), fake_gpu.engine("b", precision="tf32"))

    assert [row["precision"] for row in result.to_json()["candidates"]] == ["fp32", "tf32"]
    assert result.candidates[0].note == ""
    assert result.candidates[1].note.startswith("TF32: ")


def test_models_with_other_inputs_are_refused_before_any_runs(fake_gpu: Any, bench: Any, fake_runner: Any) -> None:
    """Both sides' inputs are in the message."""
    other = fake_gpu.engine("other")
    other.inputs = tuple(type(spec)(spec.name, np.dtype(np.float16), spec.shape) for spec in other.inputs)

    with pytest.raises(ConfigError, match=r"other beside first: its inputs are x: float16 .* of x: float32"):
        bench(fake_gpu.engine("first"), other)
    assert fake_gpu.now == 0


def test_the_result_is_plain_json(fake_gpu: Any, bench: Any, fake_nvml: Any) -> None:
    """It survives the way through a file, and says what its times are."""
    data = bench(fake_gpu.engine()).to_json()

    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["timed"] == "gpu compute"


def test_shapes_that_an_engine_was_built_for(fake_gpu: Any, fake_runner: Any) -> None:
    """The optimum of the first engine's first profile; none where there is no engine."""
    engine = fake_gpu.engine(profiles=[{"x": ((1, 2), (8, 2), (16, 2))}, {"x": ((1, 2), (1, 2), (1, 2))}])

    assert built_for([fake_runner(), engine]) == {"x": (8, 2)}
    assert built_for([fake_runner()]) == {}
