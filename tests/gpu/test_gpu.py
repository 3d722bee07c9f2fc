"""Engines on a real GPU: what no simulation can show. `pytest -m gpu --require-gpu` where there is one.

The simulated TensorRT runs them too, started by tests/tensorrt/test_simulated.py; what holds on a GPU alone is asked
where the device is not simulated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from calibrators.counter import histogram_of
from calibrators.histogram import MagnitudeHistogram
from engines.device import SIMULATED, Device, DeviceArray, DeviceLibrary, open_device
from engines.errors import EngineBuildError, EngineLoadError
from engines.histogram_kernel import TILE_BYTES, DeviceHistograms
from engines.optional import require
from engines.sidecar import read_sidecar
from engines.trt_builder import BuiltEngine
from engines.trt_profile import inspect_engine
from engines.trt_runner import TensorRTRunner
from engines.trt_timing import EngineTimer
from trt_int8 import Calibration, benchmark, build_engine, calibrate
from trt_int8.building import kept_model
from trt_int8.machine import read_cuda_driver

pytestmark = [
    pytest.mark.gpu,
    # The bindings warn of each use of a calibrator, and go on with the exception pending where a warning is an error.
    pytest.mark.filterwarnings("ignore:.*Deprecated in TensorRT:DeprecationWarning"),
]

LIBRARIES = ["cuda", pytest.param("pycuda", marks=pytest.mark.pycuda)]
RNG = np.random.default_rng(17)
SAMPLES = RNG.normal(size=(64, 3, 32, 32)).astype(np.float32)
BATCH = 8
FEEDS = MappingProxyType({"x": SAMPLES[:BATCH]})
PRECISIONS: list[Any] = ["fp32", "tf32", "fp16", "int8", "int8+fp16"]

# Relative error of the answers, as lengths of vectors. FP32 differs by the order of its sums; TF32 and FP16 have
# mantissas of 10 bits. INT8 is compared with its own Q/DQ model: only values that lie near a tie round differently.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "int8": 5e-2, "int8+fp16": 1e-1}


@pytest.fixture(scope="module")
def trt() -> Any:
    return require("tensorrt", "test it")


@pytest.fixture(scope="module")
def simulated() -> bool:
    return read_cuda_driver().gpus[0].name == SIMULATED


@pytest.fixture(scope="module")
def model(graph_builder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolutions wide enough for INT8 kernels, a residual addition, and a classifier."""
    builder = graph_builder(3)
    stem = builder.node("Relu", [builder.conv(builder.input("x", ("N", 3, 32, 32)), (3, 32))])
    body = builder.conv(builder.node("Relu", [builder.conv(stem, (32, 32))]), (32, 32))
    sum_of_both = builder.node("Relu", [builder.node("Add", [body, stem])])
    wide = builder.node("Relu", [builder.conv(sum_of_both, (32, 64), strides=[2, 2])])
    pooled = builder.node("Flatten", [builder.node("GlobalAveragePool", [wide])])
    return builder.save(tmp_path_factory.mktemp("model") / "net.onnx", [builder.gemm(pooled, (64, 10), "logits")])


@pytest.fixture(scope="module")
def calibration(model: Path) -> Calibration:
    return calibrate(model, {"x": SAMPLES}, batch_size=BATCH)


@pytest.fixture(scope="module")
def engines(model: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One engine for each precision, for batches of 1 to 16."""
    folder = tmp_path_factory.mktemp("engines")
    return {
        precision: build_engine(model, folder, precision=precision, calibration=calibration, batch=(1, BATCH, 16)).path
        for precision in PRECISIONS
    }


def answers(plan: Path, feeds: Any = FEEDS, **options: Any) -> Any:
    with TensorRTRunner(plan, **options) as runner:
        return runner.infer(feeds)["logits"]


def relative_error(answer: Any, expected: Any) -> float:
    return float(np.linalg.norm(answer - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_answer_as_onnx_runtime_does(
    model: Path, engines: dict[str, Path], run_model: Callable[..., Any], precision: str
) -> None:
    """At several batch sizes, to the precision's own accuracy."""
    reference = kept_model(engines[precision]) if precision == "int8" else model
    for size in (1, BATCH, 13):
        feeds = {"x": SAMPLES[:size]}
        answer = answers(engines[precision], feeds)

        assert answer.shape == (size, 10)
        assert relative_error(answer, run_model(reference, feeds)["logits"]) < TOLERANCE[precision]


def test_precisions_really_differ(engines: dict[str, Path], simulated: bool) -> None:
    """An engine that fell back to FP32 would give FP32's answers."""
    exact = answers(engines["fp32"])
    errors = {name: relative_error(answers(engines[name]), exact) for name in ("fp16", "int8")}

    assert errors["int8"] > 1e-3
    if not simulated:
        assert errors["int8"] > errors["fp16"] > 0


def test_int8_kernels_run(engines: dict[str, Path]) -> None:
    """The inspector shows layers that compute in INT8 in the INT8 engine, and none in the FP32 engine."""
    precisions = {
        name: {layer.precision for layer in inspect_engine(engines[name], FEEDS, runs=0)} for name in ("fp32", "int8")
    }

    assert "int8" in precisions["int8"]
    assert "int8" not in precisions["fp32"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_profiler_and_the_inspector_name_layers_alike(trt: Any, engines: dict[str, Path], precision: str) -> None:
    """Times are joined with layers by name: every name of a profile is one of the inspector's."""

    class Names(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.seen: set[str] = set()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.seen.add(layer_name)

    profiler = Names()
    with TensorRTRunner(engines[precision]) as runner:
        runner.session.context.profiler = profiler
        runner.infer(FEEDS)
    layers = inspect_engine(engines[precision], FEEDS, runs=3)

    assert profiler.seen
    assert profiler.seen <= {layer.name for layer in layers}
    assert all(layer.time_ms is not None and layer.time_ms >= 0 for layer in layers if layer.name in profiler.seen)


def test_runs_are_captured_as_a_cuda_graph(engines: dict[str, Path]) -> None:
    """A graph gives the answers of the runs that it was captured from, for inputs that change."""
    plan = engines["int8"]
    with TensorRTRunner(plan, cuda_graph=True) as runner:
        for start in (0, 8, 16):
            feeds = {"x": SAMPLES[start : start + BATCH]}
            np.testing.assert_array_equal(runner.infer(feeds)["logits"], answers(plan, feeds))
        assert runner.graph_fallback is None


def test_events_agree_with_the_hosts_clock(engines: dict[str, Path], simulated: bool) -> None:
    """Runs queued back to back take the GPU as long as the host sees them take, but for what launching costs."""
    with TensorRTRunner(engines["fp32"], cuda_graph=True) as runner:
        runner.infer(FEEDS)
        timer = EngineTimer(runner.session)
        timer.pipelined(5)
        runs = timer.pipelined(10 if simulated else 500)

    assert (runs.compute_ms >= 0).all()
    if not simulated:
        assert runs.compute_ms.min() > 0
        assert 0.2 * runs.wall_ms < runs.compute_ms.sum() < 1.1 * runs.wall_ms


def test_all_precisions_are_timed_side_by_side(engines: dict[str, Path], simulated: bool) -> None:
    """One table, by CUDA events, marked if it is no GPU's."""
    result = benchmark(list(engines.values()), rounds=5, budget_s=0.1 if simulated else 2.0)

    rows = result.to_json()["candidates"]
    assert [row["precision"] for row in rows] == PRECISIONS
    assert all(row["simulated"] is simulated for row in rows)
    assert all(row["gpu"]["cuda_graph"] for row in rows)
    if not simulated:
        assert all(row["median_ms"] > 0 for row in rows)


@pytest.mark.parametrize("library", LIBRARIES)
def test_both_libraries_run_engines(engines: dict[str, Path], library: DeviceLibrary) -> None:
    """pycuda and cuda-python give the same answers, as a CUDA graph too."""
    for name in ("fp32", "int8"):
        expected = answers(engines[name])
        for graph in (False, True):
            np.testing.assert_array_equal(answers(engines[name], library=library, cuda_graph=graph), expected)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("calibrator", ["entropy2", "minmax"])
def test_tensorrt_calibrates_on_every_batch(
    trt: Any, model: Path, run_model: Callable[..., Any], tmp_path: Path, library: DeviceLibrary, calibrator: Any
) -> None:
    """The batches arrive, the cache spares the second build a pass, and no CUDA kernel is compiled for it."""

    def build() -> BuiltEngine:
        with open_device(library) as device:
            return build_engine(
                model, tmp_path, implicit=True, calibrator=calibrator, data={"x": SAMPLES}, data_id="samples",
                batch_size=BATCH, device=device,
            )  # fmt: skip

    if not hasattr(trt, "IInt8Calibrator"):
        with pytest.raises(EngineBuildError, match="removed in TensorRT 11"):
            build()
        return
    first, second = build(), build()

    assert first.sidecar.options["calibration_batches"] == len(SAMPLES) // BATCH
    assert second.sidecar.options["calibration_batches"] == 0
    assert (tmp_path / f"net.{calibrator}.cache").read_bytes().startswith(b"TRT-")
    assert "pycuda.compiler" not in sys.modules
    expected = run_model(model, FEEDS)["logits"]
    assert relative_error(answers(second.path), expected) < 0.3


def test_the_sidecar_tells_this_gpu_and_refuses_a_changed_plan(engines: dict[str, Path], tmp_path: Path) -> None:
    """One changed byte is enough, and TensorRT never sees it."""
    plan = tmp_path / "net.engine"
    content = bytearray(engines["fp32"].read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    plan.with_name("net.engine.json").write_bytes(Path(f"{engines['fp32']}.json").read_bytes())
    sidecar = read_sidecar(engines["fp32"])

    assert sidecar is not None
    assert sidecar.environment.gpu == read_cuda_driver().gpus[0].name
    with pytest.raises(EngineLoadError, match="changed after it was built"):
        TensorRTRunner(plan)


def count_on(device: Device, arrays: dict[str, np.ndarray], times: int) -> dict[str, MagnitudeHistogram]:
    """Count arrays on the GPU, some times over."""
    histograms = DeviceHistograms(device, list(arrays))
    where = {
        name: DeviceArray(device.allocate(array.nbytes), array.shape, array.dtype) for name, array in arrays.items()
    }
    for name, array in arrays.items():
        device.to_device(where[name].address, array)
    for _ in range(times):
        histograms.count(where)
    return histograms.histograms()


def assert_same(found: MagnitudeHistogram, expected: MagnitudeHistogram, times: int = 1) -> None:
    np.testing.assert_array_equal(found.bins, expected.bins)
    np.testing.assert_array_equal(found.counts, times * expected.counts)
    assert (found.minimum, found.maximum) == (expected.minimum, expected.maximum)
    assert (found.zeros, found.nonfinite) == (times * expected.zeros, times * expected.nonfinite)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_gpu_counts_as_the_processor_does(library: DeviceLibrary, simulated: bool) -> None:
    """Every bin of every tensor, to the last count: blocks, warps and their races leave no trace."""
    rng = np.random.default_rng(23)
    size = 40_000 if simulated else 5_000_000
    values = rng.normal(size=size)
    arrays = {
        "normal": values,
        "relu": np.maximum(values, 0),
        "wide": values * np.exp(rng.normal(0, 4, size)),
        "outliers": np.where(rng.random(size) < 1e-4, 300 * values, values),
        "one value": np.full(size, -0.37),
        "zeros": np.zeros(size),
        "dead channels": np.where(np.arange(size) < size // 2, 0, values),
        "nothing": np.empty(0),
        **{f"of {n}": rng.normal(size=n) for n in (1, 3, 1023, TILE_BYTES // 4 + 1)},
    }
    exact = {name: array.astype(np.float32) for name, array in arrays.items()}
    exact["patterns"] = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
    exact["halves"] = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with open_device(library) as device:
        found = count_on(device, exact, times=3)

    for name, array in exact.items():
        assert_same(found[name], histogram_of(array), times=3)


def test_calibrating_by_tensorrt_gives_the_processors_scales(model: Path, calibration: Calibration) -> None:
    """The input, which both are fed, to the bit; the activations but for the order of sums."""
    on_gpu = calibrate(model, {"x": SAMPLES}, batch_size=BATCH, backend="tensorrt")

    assert on_gpu.tensors == calibration.tensors
    assert_same(on_gpu.histogram("x"), calibration.histogram("x"))
    for name in calibration.tensors:
        found, expected = on_gpu.histogram(name), calibration.histogram(name)
        assert found.count == expected.count
        assert found.amax == pytest.approx(expected.amax, rel=1e-4)
    for method in ("minmax", "percentile", "mse"):  # the entropy search may jump between two equally good thresholds
        expected_scales = calibration.scales(method)
        assert on_gpu.scales(method) == pytest.approx(expected_scales, rel=5e-3)
