"""`trt-int8 bench` of engines, over the SIMULATED TensorRT: what is timed and how it is marked, not how fast it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.onnxrt import load_header, tensor_specs
from engines.profiles import batch_profile
from engines.sidecar import sidecar_path
from engines.trt_builder import build_engine
from engines.trt_options import BuildOptions
from trt_int8.api import benchmark, calibrate, quantize
from trt_int8.cli import main
from trt_int8.errors import ConfigError, InferenceError
from trt_int8.quantization import convert_fp16

RNG = np.random.default_rng(5)
BATCHES = [{"input": RNG.normal(size=(4, 3, 8, 8)).astype(np.float32)} for _ in range(2)]
QUICK = ("--rounds", "5", "--seconds", "0.1")

CONTRACT = {
    "name", "median_ms", "p90_ms", "p95_ms", "p99_ms", "samples_per_s", "speedup", "speedup_low", "speedup_high",
    "simulated",
}  # fmt: skip
GPU = {
    "compute_ms", "h2d_ms", "d2h_ms", "latency_ms", "enqueue_ms", "throughput_qps", "samples_per_s", "cuda_graph",
    "graph_fallback", "energy_mj_per_inference", "power_w", "clock_sm_mhz", "clock_memory_mhz", "temperature_c",
    "engine_bytes", "device_memory_bytes",
}  # fmt: skip


def build(model: Path, precision: Any, batch: tuple[int, int, int] = (1, 4, 8)) -> Path:
    inputs, _ = tensor_specs(load_header(model))
    path = model.with_name(f"{model.stem}.{precision}.engine")
    build_engine(model, path, BuildOptions(precision=precision, profiles=[batch_profile(inputs, *batch)]))
    return path


@pytest.fixture
def engine(tiny_model: Path) -> Path:
    return build(tiny_model, "fp32")


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command; return its exit status, stdout, stderr and JSON."""

    def run(*arguments: str | Path) -> tuple[int, str, str, Any]:
        file = tmp_path / "bench.json"
        status = main(["bench", *map(str, arguments), *QUICK, "--json", str(file)])
        out, err = capsys.readouterr()
        return status, out, err, json.loads(file.read_text()) if file.exists() else None

    return run


def test_engines_of_all_precisions_in_one_table(tiny_model: Path, bench: Any) -> None:
    """FP32, TF32, FP16 and INT8: one row each, marked, with the contract's keys and the GPU's figures."""
    folder = tiny_model.parent
    calibration = calibrate(tiny_model, BATCHES)
    quantize(tiny_model, calibration, output=folder / "q.onnx", target="tensorrt")
    convert_fp16(tiny_model, calibration, output=folder / "half.onnx")
    sources = {"fp32": tiny_model, "tf32": tiny_model, "fp16": folder / "half.onnx", "int8": folder / "q.onnx"}
    engines = [build(model, precision) for precision, model in sources.items()]

    status, out, _, data = bench(*engines)

    assert status == 0
    assert data["timed"] == "gpu compute"
    assert data["inputs"] == {"input": [4, 3, 8, 8]}  # what the kernels were chosen for
    assert [row["precision"] for row in data["candidates"]] == list(sources)
    for row, engine in zip(data["candidates"], engines, strict=True):
        assert row.keys() >= CONTRACT
        assert row["gpu"].keys() >= GPU
        assert row["simulated"] is True
        assert row["gpu"]["cuda_graph"] is True
        assert row["gpu"]["energy_mj_per_inference"] is None
        assert row["gpu"]["engine_bytes"] == engine.stat().st_size
        assert row["median_ms"] == pytest.approx(row["gpu"]["compute_ms"])
        assert row["name"] in out
    assert out.count(": no verdict, the device is SIMULATED") == 1
    assert "faster" not in out
    assert out.count("run on a SIMULATED device") == 1
    assert "(simulated): batch of 4, input 4x3x8x8, 5 interleaved rounds" in out
    assert out.count("(simulated)") == 1


def test_beside_an_onnx_file_all_are_timed_by_the_hosts_clock(tiny_model: Path, engine: Path, bench: Any) -> None:
    """One row is measured, one simulated; there is no verdict between them."""
    status, out, _, data = bench(tiny_model, engine)

    assert status == 0
    assert data["timed"] == "host"
    onnx, plan = data["candidates"]
    assert (onnx["simulated"], plan["simulated"]) == (False, True)
    assert onnx["gpu"] is None
    assert plan["median_ms"] == pytest.approx(plan["gpu"]["host_ms"])
    assert "no verdict" in plan["verdict"]
    assert "(simulated)" in out


def test_transfers_are_part_of_the_times_on_demand(engine: Path, tiny_model: Path, bench: Any) -> None:
    """The row's median is that of the latency; beside ONNX Runtime they cannot be left out."""
    status, _, _, data = bench(engine, "--transfers")
    assert status == 0
    assert data["timed"] == "with transfers"
    assert data["candidates"][0]["median_ms"] == pytest.approx(data["candidates"][0]["gpu"]["latency_ms"], abs=1e-5)

    status, _, err, _ = bench(tiny_model, engine, "--no-transfers")
    assert status == 2
    assert "tiny.onnx is no TensorRT engine" in err


def test_a_graph_that_falls_back_is_reported(engine: Path, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is in the row and among the warnings."""
    monkeypatch.setenv("TRTSIM_NO_GRAPHS", "1")
    status, out, err, data = bench(engine)

    gpu = data["candidates"][0]["gpu"]
    assert status == 0
    assert gpu["cuda_graph"] is False
    assert "CUDA_ERROR_NOT_SUPPORTED" in gpu["graph_fallback"]
    assert out.count("tiny.fp32.engine ran without a CUDA graph") == 1
    assert "without a CUDA graph" not in err


def test_graphs_can_be_switched_off(engine: Path, bench: Any) -> None:
    """Then there is nothing to fall back from."""
    _, _, _, data = bench(engine, "--no-cuda-graph")

    gpu = data["candidates"][0]["gpu"]
    assert (gpu["cuda_graph"], gpu["graph_fallback"]) == (False, None)


def test_batches_outside_of_the_profile_name_the_profile(engine: Path, bench: Any) -> None:
    """One line, nothing timed; another batch within the profile is timed, with a warning."""
    status, _, err, data = bench(engine, "--batch-size", "9")
    assert (status, data) == (1, None)
    assert "shape (9, 3, 8, 8); the engine was built for min (1, 3, 8, 8)" in err
    assert len(err.strip().splitlines()) == 1

    _, _, _, data = bench(engine, "--batch-size", "2")
    assert data["batch_size"] == 2
    assert any("kernels were chosen for (4, 3, 8, 8)" in warning for warning in data["warnings"])


def test_a_second_engine_that_does_not_take_the_batch_is_found_before_timing(tiny_model: Path, engine: Path) -> None:
    """No progress was shown by then."""
    small = build(tiny_model, "tf32", (1, 1, 2))
    shown: list[str] = []

    def track(items: Any, description: str, total: int | None = None) -> Any:
        shown.append(description)
        return items

    with pytest.raises(InferenceError, match=r"tiny\.tf32\.engine: input 'input' has shape \(4, 3, 8, 8\)"):
        benchmark([engine, small], rounds=5, budget_s=0.1, track=track)
    assert shown == []


def test_an_engine_of_one_shape_decides_the_batch(tiny_model: Path, bench: Any) -> None:
    """Beside a model that takes any batch, the one that both take is fed."""
    status, _, _, data = bench(tiny_model, build(tiny_model, "fp32", (8, 8, 8)))

    assert status == 0
    assert data["inputs"] == {"input": [8, 3, 8, 8]}


@pytest.mark.parametrize("failure", ["enqueue", "context"])
def test_a_failing_engine_is_one_line(engine: Path, bench: Any, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    """Exit status 1, with TensorRT's own words."""
    monkeypatch.setenv("TRTSIM_FAIL", failure)
    status, out, err, data = bench(engine)

    assert (status, data, out) == (1, None, "")
    assert "SIMULATED" in err
    assert len(err.strip().splitlines()) == 1


def test_an_engine_without_a_sidecar_needs_trust(engine: Path, bench: Any) -> None:
    """With it the engine itself tells its profiles; its precision is not known."""
    sidecar_path(engine).unlink()
    status, _, err, _ = bench(engine)
    assert status == 1
    assert "--trust" in err

    status, _, _, data = bench(engine, "--trust")
    assert status == 0
    assert data["inputs"] == {"input": [4, 3, 8, 8]}
    assert data["candidates"][0]["precision"] is None
    assert data["candidates"][0]["simulated"] is True


def test_models_with_other_inputs_are_refused(tmp_path: Path, engine: Path, graph_builder: Any) -> None:
    """The inputs of both are named."""
    builder = graph_builder()
    builder.input("image", ("N", 3, 8, 8))
    model = builder.save(tmp_path / "other.onnx", [builder.node("Relu", ["image"])])

    with pytest.raises(ConfigError, match=r"other\.onnx beside tiny\.fp32\.engine.*image: float32.*input: float32"):
        benchmark([engine, model], rounds=5, budget_s=0.1)


def test_data_are_fed_to_engines(engine: Path, tmp_path: Path, bench: Any) -> None:
    """Batches of the user's own, cut to the size asked for."""
    np.savez(tmp_path / "data.npz", input=RNG.normal(size=(16, 3, 8, 8)).astype(np.float32))
    status, _, _, data = bench(engine, "--data", tmp_path / "data.npz", "--batch-size", "8")

    assert status == 0
    assert data["batch_size"] == 8
