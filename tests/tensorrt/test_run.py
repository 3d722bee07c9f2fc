"""`trt-int8 run --backend tensorrt` over the SIMULATED TensorRT: one command, every engine, both tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt as trt

from trt_int8.cli import main

NAMES = ["FP32", "TF32", "FP16", "INT8 minmax, tensorrt", "INT8 entropy, tensorrt", "INT8+FP16 entropy, tensorrt"]
RNG = np.random.default_rng(17)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, module_tiny_model: Path) -> Path:
    """A user's folder: a model, data with labels, and a configuration that does not speak of TensorRT."""
    folder = tmp_path_factory.mktemp("project")
    onnx.save(onnx.load(module_tiny_model), folder / "net.onnx")
    np.savez(folder / "data.npz", input=RNG.normal(size=(24, 3, 8, 8)).astype(np.float32), label=RNG.integers(0, 7, 24))
    (folder / "config.yaml").write_text(
        "model: {source: net.onnx}\n"
        "data: {calibration: data.npz, evaluation: data.npz, labels: label, batch_size: 4}\n"
        "quantize: {methods: [minmax, entropy]}\n"
        "benchmark: {rounds: 5, budget_s: 0.2, warmup_s: 0.02}\n"
        "output: out\n"
    )
    return folder


@pytest.fixture(scope="module")
def finished(project: Path) -> Path:
    """The folder of a finished run."""
    assert main(["run", str(project / "config.yaml"), "--backend", "tensorrt"]) == 0
    return project / "out"


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_every_engine_is_written_with_its_sidecar(finished: Path) -> None:
    """FP32, TF32, FP16, each INT8 method and INT8+FP16; the manifest records them."""
    files = read(finished / "manifest.json")["files"]

    for stem in ("model.fp32", "model.tf32", "model.fp16", "model.int8", "model.int8+fp16", "methods/minmax.int8"):
        assert f"{stem}.engine" in files
        sidecar = read(finished / f"{stem}.engine.json")
        assert sidecar["environment"]["gpu"] == "SIMULATED"
        assert sidecar["environment"]["tensorrt"] == trt.__version__
        assert sidecar["profiles"] == [{"input": [[1, 3, 8, 8], [4, 3, 8, 8], [4, 3, 8, 8]]}]
    assert read(finished / "model.int8.engine.json")["calibration"]["method"] == "entropy"
    assert read(finished / "methods/minmax.int8.engine.json")["calibration"]["method"] == "minmax"


def test_one_table_of_times_and_one_of_accuracy_over_all_engines(finished: Path) -> None:
    """Every row is marked as simulated, and the FP32 engine is the reference of both."""
    speed, accuracy = read(finished / "benchmark.json"), read(finished / "accuracy.json")

    assert [row["name"] for row in speed["candidates"]] == NAMES
    assert all(row["simulated"] for row in speed["candidates"])
    assert accuracy["reference"] == "FP32"
    assert [row["name"] for row in accuracy["candidates"]] == NAMES[1:]
    assert all(row["simulated"] for row in accuracy["candidates"])
    assert all(row["sqnr_db"] is None or row["sqnr_db"] > 15 for row in accuracy["candidates"])
    assert [row["name"] for row in read(finished / "sizes.json")["models"]] == NAMES


def test_the_layers_of_each_engine_are_told(finished: Path) -> None:
    """layers.json holds a table for every INT8 engine, and the report shows them."""
    tables = {table["engine"]: table for table in read(finished / "layers.json")["engines"]}

    assert [name for name in NAMES if name.startswith("INT8")] == list(tables)
    intended = [row for row in tables["INT8 entropy, tensorrt"]["rows"] if row["intended"] == "int8"]
    assert intended
    assert all(row["layer"] is not None for row in intended)
    assert tables["INT8 entropy, tensorrt"]["summary"] in (finished / "report.html").read_text()


def test_the_report_says_that_the_gpu_is_simulated(finished: Path) -> None:
    """No figure from here can pass for a GPU's."""
    page = (finished / "report.html").read_text()

    assert "TensorRT and the GPU are SIMULATED" in page
    assert "as fast as FP32" not in page


def test_a_resumed_run_builds_nothing_again(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Engines whose models, options and machine are the same are kept."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.engine")}
    assert main(["run", str(finished.parent / "config.yaml"), "--backend", "tensorrt", "--resume"]) == 0

    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.engine")} == before
    assert "backend: tensorrt (" in capfd.readouterr().err


def test_auto_takes_tensorrt_where_it_is_found(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The choice and its reason are printed; over the simulation the reason says so."""
    output = project / "auto"
    arguments = ["--set", "quantize.methods=[entropy]", "--set", "build.precisions=[fp32,int8]"]
    assert main(["run", str(project / "config.yaml"), "--output", str(output), *arguments]) == 0

    shown = capfd.readouterr()
    assert "backend: tensorrt (" in shown.err
    assert "SIMULATED" in shown.err
    assert "SIMULATED" in shown.out
    assert sorted(path.name for path in output.glob("*.engine")) == ["model.fp32.engine", "model.int8.engine"]


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("build.batch=[1,1,2]", "data.batch_size = 4: build.batch builds engines that take batches of 1 to 2 for inp"),
        (
            "build.shapes={input: {min: [1,3,8,8], opt: [2,3,8,8], max: [3,3,8,8]}}",
            "data.batch_size = 4: build.shapes builds engines that take batches of 1 to 3",
        ),
        ("build.shapes={nope: {min: [1], opt: [1], max: [1]}}", "'nope'"),
        ("build.shapes={input: {min: [1,3,8,8], opt: [4,3,8,8], max: [4,1,8,8]}}", "axis 1"),
    ],
)
def test_shapes_that_do_not_fit_are_found_before_anything_slow(
    project: Path, capfd: pytest.CaptureFixture[str], setting: str, problem: str
) -> None:
    """Shapes that do not hold the batches, or are not those of the model: one line, right after the export."""
    output = project / "small"
    arguments = ["--set", setting, "--set", "quantize.methods=[entropy]"]
    status = main(["run", str(project / "config.yaml"), "--output", str(output), *arguments])

    error = capfd.readouterr().err.splitlines()[-1]
    assert status == 1
    assert error.startswith("error: ")
    assert problem in error
    assert not (output / "calibration.npz").exists()


def test_a_run_on_the_processor_takes_the_engines_away(project: Path) -> None:
    """The folder of a run holds what that run made: no engine, and no word of one in the report."""
    folder = project / "both"
    arguments = ["run", str(project / "config.yaml"), "--output", str(folder), "--set", "quantize.methods=[entropy]"]
    assert main([*arguments, "--backend", "tensorrt"]) == 0
    assert list(folder.glob("*.engine"))
    assert main([*arguments, "--backend", "onnxruntime", "--resume"]) == 0

    assert not list(folder.rglob("*.engine*"))
    assert 'id="engines"' not in (folder / "report.html").read_text()
    assert (folder / "model.int8.cpu.onnx").exists()
