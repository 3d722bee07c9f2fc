"""Accuracy of engines beside ONNX files; the libraries beneath are SIMULATED, and no figure is a GPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engines.onnxrt import load_header, tensor_specs
from engines.profiles import ShapeRange, batch_profile
from engines.sidecar import read_sidecar, sidecar_path, write_sidecar
from engines.trt_builder import build_engine
from engines.trt_options import BuildOptions
from trt_int8 import building
from trt_int8.api import benchmark, calibrate, compare, quantize
from trt_int8.cli import main
from trt_int8.errors import EngineLoadError, InferenceError, ModelError
from trt_int8.quantization import convert_fp16

RNG = np.random.default_rng(3)
DATA = {"input": RNG.normal(size=(11, 3, 8, 8)).astype(np.float32), "label": RNG.integers(7, size=11)}


def build(model: Path, engine: str, *batches: int, **options: Any) -> Path:
    """Build an engine beside its model, for batches from, best, to; several threes are several profiles."""
    inputs, _ = tensor_specs(load_header(model))
    profiles = [batch_profile(inputs, *batches[start : start + 3]) for start in range(0, len(batches), 3)]
    return build_engine(model, model.with_name(engine), BuildOptions(profiles=profiles, **options)).path


@pytest.fixture
def models(tiny_model: Path) -> dict[str, Path]:
    """The tiny model in three types, each as an ONNX file and as an engine for batches of 1 to 8."""
    folder = tiny_model.parent
    calibration = calibrate(tiny_model, [{"input": DATA["input"]}])
    quantize(tiny_model, calibration, output=folder / "int8.onnx", method="minmax", target="tensorrt")
    convert_fp16(tiny_model, calibration, output=folder / "fp16.onnx")
    files = {"fp32": tiny_model, "fp16": folder / "fp16.onnx", "int8": folder / "int8.onnx"}
    engines = {
        f"{name}.engine": build(file, f"m.{name}.engine", 1, 4, 8, precision=name) for name, file in files.items()
    }
    return files | engines


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **DATA)
    return path


def test_an_engine_has_its_models_figures(models: dict[str, Path]) -> None:
    """Q/DQ as TensorRT computes it and as ONNX Runtime does: one SQNR, the same answers; FP16 loses less."""
    result = compare(
        models["fp32"],
        [models["int8"], models["int8.engine"], models["fp16.engine"]],
        DATA,
        labels="label",
        batch_size=4,
    )

    onnx_row, engine, half = result.candidates
    assert engine.difference.sqnr_db == pytest.approx(onnx_row.difference.sqnr_db, abs=1e-3)
    assert 20 < engine.difference.sqnr_db < half.difference.sqnr_db - 20
    assert engine.scores.top1 == onnx_row.scores.top1
    assert [row.scores.simulated for row in result.candidates] == [True, True, True]
    assert [row.scores.samples for row in result.candidates] == [11, 11, 11]


def test_an_engine_is_a_reference_too(models: dict[str, Path]) -> None:
    """The FP32 engine against the FP32 model: rounding alone. It is shown as simulated."""
    result = compare(models["fp32.engine"], [models["fp32"], models["int8.engine"]], DATA, batch_size=8)

    assert result.candidates[0].difference.sqnr_db > 100
    assert result.candidates[1].difference.sqnr_db < 60
    assert result.reference.simulated


def fix_batch(model: Path, name: str, size: int) -> Path:
    """Copy a model with a fixed batch."""
    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    onnx.save(proto, model.with_name(name))
    return model.with_name(name)


def test_an_engine_with_a_fixed_batch_fixes_it_for_all(tiny_model: Path) -> None:
    """Built for batches of 4, by its model or by its profile: 11 samples are three batches; one row counts nowhere."""
    static = build_engine(fix_batch(tiny_model, "static.onnx", 4), tiny_model.with_name("static.engine")).path
    pinned = build(tiny_model, "pinned.engine", 4, 4, 4)

    for engine in (static, pinned):
        result = compare(tiny_model, engine, DATA)
        assert result.batches == 3
        assert result.candidates[0].scores.samples == 11
        assert result.candidates[0].difference.sqnr_db > 100


def test_two_engines_of_other_batches_are_refused(tiny_model: Path) -> None:
    """No batch fits both: said before data are read."""
    engines = [build(tiny_model, f"{size}.engine", size, size, size) for size in (2, 4)]

    with pytest.raises(ModelError, match=r"Cannot feed 2\.engine and 4\.engine the same data"):
        compare(tiny_model, engines, DATA)


def test_batches_outside_of_the_profile_name_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first batch runs, and before the engine is loaded: the message holds min, opt and max."""
    engine = build(tiny_model, "narrow.engine", 2, 4, 8)
    monkeypatch.setenv("TRTSIM_FAIL", "context")  # loading it would say something else

    with pytest.raises(
        InferenceError, match=r"^Cannot compare on batch 0: narrow\.engine: input 'input' has shape \(1, 3.*min \(2, 3"
    ):
        compare(tiny_model, engine, DATA)


def test_a_failure_on_the_device_names_batch_and_engine(models: dict[str, Path]) -> None:
    """The text is the runner's, once."""
    script = (
        "import sys, numpy as np\n"
        "from trt_int8.api import compare\n"
        "try:\n"
        "    compare(sys.argv[1], sys.argv[2], {'input': np.zeros((1, 3, 8, 8), np.float32)})\n"
        "except Exception as caught:\n"
        "    print(type(caught).__name__, caught)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(models["fp32"]), str(models["int8.engine"])],
        env=os.environ | {"TRTSIM_FAIL": "enqueue"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("InferenceError Cannot compare on batch 0: m.int8.engine failed in TensorRT: ")


def test_saved_files_run_in_polygraphy(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """The command line saves them; the commands build the Q/DQ model, load the engine, and pass."""
    arguments = [models["fp32"], models["int8"], models["int8.engine"]]
    assert (
        main(["compare", *map(str, arguments), "--data", str(data), "--batch-size", "8", "--save", str(tmp_path)]) == 0
    )

    done = run_commands(tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED | Runtime") == 5


def run_commands(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a folder's commands.sh with the `polygraphy` of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = folder / "polygraphy" / "commands.sh"
    return subprocess.run(
        ["bash", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )


def test_engines_tell_of_their_calibration(models: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """What the model they were built from says, or the calibration they were built with; other data are warned of."""
    calibration = calibrate(tiny_model, [{"input": DATA["input"]}])
    built = [
        building.build_engine(tiny_model, tmp_path, precision=precision, calibration=calibration).path
        for precision in ("fp32", "fp16", "int8")
    ]
    unlike = {"input": DATA["input"] * np.float32(255)}

    for engine in (models["int8.engine"], models["fp16.engine"], *built):
        assert compare(models["fp32.engine"], engine, DATA).warnings == ()
        (line,) = compare(models["fp32.engine"], engine, unlike).warnings
        assert f"looks unlike what {engine.name} was calibrated on" in line
        found = benchmark([models["fp32.engine"], engine], unlike, rounds=5, budget_s=0.05).warnings
        assert sum("looks unlike" in line for line in found) == 1
    assert compare(models["fp32.engine"], models["fp32"], unlike).warnings == ()


def test_engines_alone_are_served_and_the_right_profile_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    """An engine as reference reproduces itself; of two profiles the one that holds the batches is named."""
    reference = build(tiny_model, "reference.engine", 1, 4, 8)
    split = build(tiny_model, "split.engine", 1, 1, 2, 3, 4, 8)
    compare(reference, split, {"input": DATA["input"][:8]}, batch_size=4, save_to=tmp_path)

    done = run_commands(tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED | Runtime") == 3
    assert "--optimization-profile 1" in (tmp_path / "polygraphy" / "commands.sh").read_text()


def test_an_engine_that_needs_two_profiles_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """Polygraphy runs all batches in one profile; the script says so in its place."""
    split = build(tiny_model, "split.engine", 1, 1, 3, 4, 4, 8)
    compare(tiny_model, split, {"input": DATA["input"][:6]}, batch_size=4, save_to=tmp_path)

    script = (tmp_path / "polygraphy" / "commands.sh").read_text()
    assert "echo 'split.engine is left out: no profile of it holds all the batches.'" in script
    assert "split.engine --model-type" not in script


def test_the_result_tells_simulated_engines(models: dict[str, Path], data: Path, tmp_path: Path, capfd: Any) -> None:
    """On the terminal as in the file."""
    file = tmp_path / "accuracy.json"
    arguments = ["compare", str(models["fp32.engine"]), str(models["int8.engine"]), "--data", str(data)]
    assert main([*arguments, "--json", str(file)]) == 0

    out, _ = capfd.readouterr()
    assert out.startswith("Accuracy (simulated)")
    assert "m.fp32.engine (reference)" in out
    result = json.loads(file.read_text())
    assert result["reference_scores"]["simulated"]
    assert result["candidates"][0]["simulated"]


def no_sidecar(engine: Path) -> None:
    sidecar_path(engine).unlink()


def truncated(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-9])


def another_release(engine: Path) -> None:
    sidecar = read_sidecar(engine)
    assert sidecar is not None
    write_sidecar(engine, replace(sidecar, environment=replace(sidecar.environment, tensorrt="9.3.0.1")))


def another_gpu(engine: Path) -> None:
    sidecar = read_sidecar(engine)
    assert sidecar is not None
    write_sidecar(engine, replace(sidecar, environment=replace(sidecar.environment, gpu="NVIDIA T4")))


BROKEN = [
    (no_sidecar, "there is no 'm.int8.engine.json' beside it"),
    (truncated, "it is truncated"),
    (another_release, "it was built with TensorRT 9.3.0.1"),
    (another_gpu, "it was built for NVIDIA T4"),
]


@pytest.mark.parametrize(("harm", "text"), BROKEN)
def test_an_engine_that_cannot_be_loaded_is_one_line(
    models: dict[str, Path], data: Path, capfd: Any, harm: Callable[[Path], None], text: str
) -> None:
    """Exit status 1, with what was found."""
    harm(models["int8.engine"])

    assert main(["compare", str(models["fp32"]), str(models["int8.engine"]), "--data", str(data)]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert text in line


def test_a_trusted_engine_needs_no_sidecar(models: dict[str, Path], data: Path) -> None:
    """--trust reaches the engines; its axes have no names then, and batches are checked all the same."""
    no_sidecar(models["int8.engine"])
    arguments = ["compare", str(models["fp32"]), str(models["int8.engine"]), "--data", str(data), "--trust"]

    assert main(arguments) == 0
    assert main([*arguments, "--batch-size", "9"]) == 1
    with pytest.raises(EngineLoadError, match="--trust"):
        compare(models["fp32"], models["int8.engine"], DATA)


def test_a_dynamic_axis_beside_the_batch(tmp_path: Path, graph_builder: Any) -> None:
    """Batches of other lengths each: the engine takes those within its profile, and the one that is not is named."""
    builder = graph_builder()
    builder.input("x", ("N", "T"))
    builder.node("Relu", ["x"], "y")
    model = builder.save(tmp_path / "m.onnx", [onnx.helper.make_tensor_value_info("y", 1, ["N", "T"])])
    engine = tmp_path / "m.engine"
    build_engine(model, engine, BuildOptions(profiles=[{"x": ShapeRange((1, 1), (2, 4), (4, 9))}]))
    batches = [{"x": RNG.normal(size=shape).astype(np.float32)} for shape in ((1, 3), (4, 9), (2, 4))]

    assert compare(model, engine, batches).candidates[0].difference.identical
    with pytest.raises(InferenceError, match=r"batch 1: m\.engine: input 'x' has shape \(4, 10\)"):
        compare(model, engine, [batches[0], {"x": np.zeros((4, 10), np.float32)}])
