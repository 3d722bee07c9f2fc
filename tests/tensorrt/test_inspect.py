"""`trt-int8 inspect` over the SIMULATED TensorRT: what it finds, says and refuses; no figure is a GPU's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt as trt

from engines.onnxrt import load_header, tensor_specs
from engines.profiles import batch_profile
from engines.sidecar import read_sidecar, sidecar_path, write_sidecar
from engines.trt_builder import build_engine
from engines.trt_options import BuildOptions
from trt_int8.api import calibrate, quantize
from trt_int8.cli import main
from trt_int8.errors import ConfigError, DeviceError, InferenceError, ModelError
from trt_int8.inspection import inspect
from trt_int8.quantization import convert_fp16

IMAGE = (3, 8, 8)
SAMPLES = np.random.default_rng(5).normal(size=(8, *IMAGE)).astype(np.float32)


@pytest.fixture
def engines(tiny_model: Path) -> dict[str, Path]:
    """INT8 and FP16 engines of the tiny model, for batches of 2 to 8, beside the models that they were built from."""
    folder = tiny_model.parent
    calibration = calibrate(tiny_model, [{"input": SAMPLES}])
    quantize(tiny_model, calibration, output=folder / "int8.onnx", method="minmax", target="tensorrt")
    convert_fp16(tiny_model, calibration, output=folder / "fp16.onnx")
    profile = batch_profile(tensor_specs(load_header(tiny_model))[0], 2, 4, 8)
    built = {}
    for name in ("int8", "fp16"):
        options = BuildOptions(profiles=[profile], precision=name)
        built[name] = build_engine(folder / f"{name}.onnx", folder / f"m.{name}.engine", options).path
    return built


def test_layers_are_put_beside_the_model(engines: dict[str, Path]) -> None:
    """Convolution and product are meant to run in INT8 and do; layers are timed in the shape of the optimum."""
    found = inspect(engines["int8"], runs=3)

    rows = {row.node: row for row in found.table.rows}
    assert {name: (row.intended, row.precision) for name, row in rows.items()} == {
        "conv": ("int8", "int8"),
        "relu": ("fp32", "fp32"),
        "flatten": ("fp32", "fp32"),
        "fc": ("int8", "int8"),
    }
    assert all(row.layer_ms is not None for row in rows.values())
    assert found.shapes == {"input": (4, *IMAGE)}
    assert (found.model, found.runs, found.simulated, found.notes) == ("int8.onnx", 3, True, ())


def test_json_never_passes_a_simulation_for_a_gpu(engines: dict[str, Path]) -> None:
    """Its summary starts with it, it has no share of INT8, and the device is called so."""
    data = inspect(engines["int8"], against=engines["fp16"], runs=1).to_json()

    assert json.dumps(data, allow_nan=False)
    for table in (data, data["against"]):
        assert table["summary"].startswith("SIMULATED")
        assert table["int8_share"] is None
    assert (data["device"], data["simulated"], data["tensorrt"]) == ("SIMULATED", True, trt.__version__)


def test_two_engines_are_joined_by_their_nodes(engines: dict[str, Path]) -> None:
    """The FP16 engine has casts of its own, and FP16 kernels where the other has INT8."""
    found = inspect(engines["int8"], against=engines["fp16"], runs=1)

    groups = {item.nodes: item for item in found.differences}
    assert groups["conv",].second_precisions == ("int8",)
    assert groups["conv",].first_precisions == ("fp16",)
    cast = next(item for nodes, item in groups.items() if "cast" in nodes[0])
    assert (cast.second_layers, cast.second_ms) == ((), 0.0)
    times = [abs(item.difference_ms or 0.0) for item in found.differences]
    assert times == sorted(times, reverse=True)


def test_nothing_is_timed_on_request(engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No run is made: one that would fail does no harm."""
    monkeypatch.setenv("TRTSIM_FAIL", "enqueue")
    with pytest.raises(InferenceError, match="wanted by TRTSIM_FAIL"):
        inspect(engines["int8"], runs=1)
    found = inspect(engines["int8"], runs=0)

    assert {row.layer_ms for row in found.table.rows} == {None}
    assert found.table.int8_share is None


def test_data_settle_the_batch(engines: dict[str, Path]) -> None:
    """The first batch is fed; one that the engine was not built for is refused by its profile."""
    assert inspect(engines["int8"], data={"input": SAMPLES}, batch_size=8, runs=1).shapes == {"input": (8, *IMAGE)}
    assert inspect(engines["int8"], batch_size=2, runs=1).shapes == {"input": (2, *IMAGE)}
    with pytest.raises(InferenceError, match=r"shape \(1, 3, 8, 8\).*min \(2, 3"):
        inspect(engines["int8"], data={"input": SAMPLES})


def test_without_a_model_the_layers_are_shown_alone(engines: dict[str, Path], capfd: Any) -> None:
    """It says which file it missed, and where. With --model it is read from elsewhere."""
    model = engines["int8"].with_name("int8.onnx")
    moved = model.rename(model.with_name("moved.onnx"))

    assert main(["inspect", str(engines["int8"])]) == 0
    out = capfd.readouterr().out
    assert (
        "The model that m.int8.engine was built from was not found (int8.onnx is not beside it, nor in the folder "
        "above or the current one): its layers alone are shown."
    ) in out
    assert "conv.weight_DequantizeLinear" in out
    assert "intended" not in out

    assert main(["inspect", str(engines["int8"]), "--model", str(moved)]) == 0
    assert "2 of 2 intended layers run INT8" in capfd.readouterr().out


def test_one_model_is_enough_for_two_engines(engines: dict[str, Path]) -> None:
    """Their nodes have the same names. Without any, there is nothing to join them by."""
    engines["fp16"].with_name("fp16.onnx").unlink()
    found = inspect(engines["int8"], against=engines["fp16"], runs=1)
    assert found.against is not None
    assert found.against.rows == ()
    assert ("conv",) in {item.nodes for item in found.differences}

    engines["int8"].with_name("int8.onnx").unlink()
    with pytest.raises(ConfigError, match=r"Cannot put m\.int8\.engine beside m\.fp16\.engine: .*--model"):
        inspect(engines["int8"], against=engines["fp16"])


@pytest.mark.parametrize("above", [True, False])
def test_the_model_is_found_in_other_folders(
    engines: dict[str, Path], above: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder above the engine's and in the current one, by its hash; a model of that name alone is not it."""
    folder = tmp_path / "deep" / "engines"
    folder.mkdir(parents=True)
    engine = shutil.copy(engines["int8"], folder)
    shutil.copy(sidecar_path(engines["int8"]), folder)
    shutil.copy(engines["fp16"].with_name("fp16.onnx"), folder / "int8.onnx")
    right = engines["int8"].with_name("int8.onnx")
    if above:
        shutil.move(right, folder.parent)
    else:
        monkeypatch.chdir(right.parent)

    found = inspect(engine, runs=0)

    assert (found.model, found.notes) == ("int8.onnx", ())
    assert len(found.table.intended_int8) == 2


def test_another_model_is_refused(engines: dict[str, Path], graph_builder: Any, capfd: Any) -> None:
    """One line of what was found and expected. Without a sidecar, and not named, it is left out."""
    builder = graph_builder()
    builder.input("input", ("N", *IMAGE))
    nodes = [builder.node("Sigmoid", ["input"]), builder.node("Neg", ["input"])]
    other = builder.save(engines["int8"].with_name("other.onnx"), nodes)

    assert main(["inspect", str(engines["int8"]), "--model", str(other)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Cannot show m.int8.engine beside other.onnx: it was built from another model, as only 0% of" in line
    assert "expected int8.onnx" in line

    sidecar_path(engines["int8"]).unlink()
    other.rename(engines["int8"].with_name("m.int8.engine.onnx"))
    found = inspect(engines["int8"], trust=True, runs=0)
    assert (found.model, found.table.rows) == (None, ())
    assert "m.int8.engine.onnx is another one" in found.notes[0]


def test_a_changed_model_that_is_named_is_shown(engines: dict[str, Path]) -> None:
    """Its nodes are the engine's; the note says that they may not fit."""
    model = engines["int8"].with_name("int8.onnx")
    proto = onnx.load(model)
    proto.doc_string = "changed"
    onnx.save(proto, model)

    found = inspect(engines["int8"], model=model, runs=0)

    assert len(found.table.intended_int8) == 2
    assert "int8.onnx is not the model that m.int8.engine was built from, or was changed since" in found.notes[0]


def test_a_failure_on_the_device_names_the_engine(engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And what can be done."""
    monkeypatch.setattr("engines.trt_session.EngineSession.synchronize", lost)
    with pytest.raises(InferenceError, match=r"^m\.int8\.engine failed on the GPU: gone"):
        inspect(engines["int8"], runs=1)


def lost(self: Any) -> None:
    raise DeviceError("gone")


def test_ctrl_c_in_a_callback_ends_the_inspection(engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT would swallow it."""

    class Interrupting(dict[str, float]):
        def __init__(self, _: Any) -> None:
            super().__init__()

        def __missing__(self, name: str) -> float:
            raise KeyboardInterrupt

    monkeypatch.setattr("engines.trt_profile.defaultdict", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        inspect(engines["int8"], runs=1)


def test_a_changed_model_is_told(engines: dict[str, Path], capfd: Any) -> None:
    """It is not shown: the layers are, alone."""
    model = engines["int8"].with_name("int8.onnx")
    proto = onnx.load(model)
    proto.doc_string = "changed"
    onnx.save(proto, model)

    assert main(["inspect", str(engines["int8"]), "--no-profile"]) == 0
    out = capfd.readouterr().out
    assert "int8.onnx beside it was changed since: its SHA-256 is not the one in the sidecar" in out
    assert "intended" not in out


def test_a_trusted_engine_has_the_model_beside_it(engines: dict[str, Path]) -> None:
    """Without a sidecar it is NAME.engine.onnx that is looked for, and nobody knows whether it is the right one."""
    engine = engines["int8"]
    sidecar_path(engine).unlink()
    engine.with_name("int8.onnx").rename(engine.with_name("m.int8.engine.onnx"))

    found = inspect(engine, trust=True, runs=1)

    assert found.table.summary == "2 of 2 intended layers run INT8; 0 reformat layers"
    assert "has no sidecar that covers it" in found.notes[0]
    assert found.shapes == {"input": (4, *IMAGE)}


@pytest.mark.tensorrt(10)
def test_a_calibrator_intends_int8_for_every_weighted_node(tiny_model: Path) -> None:
    """An implicit engine's model is FP32; what its sidecar says of it is what counts."""
    from calibrators.tensorrt import scales_calibrator

    profile = batch_profile(tensor_specs(load_header(tiny_model))[0], 1, 1, 1)
    scales = {"input": 0.1, "conv": 0.1, "relu": 0.1, "flat": 0.1, "logits": 0.1}
    engine = build_engine(
        tiny_model,
        tiny_model.with_name("m.engine"),
        BuildOptions(profiles=[profile], precision="int8"),
        calibrator=scales_calibrator(trt, scales),
    ).path

    assert len(inspect(engine, runs=1).table.intended_int8) == 2


def test_the_tables_are_printed(engines: dict[str, Path], tmp_path: Path, capfd: Any) -> None:
    """Titles say what is simulated; times come with what they are good for; the file holds the same."""
    file = tmp_path / "layers.json"
    arguments = ["inspect", str(engines["int8"]), "--against", str(engines["fp16"]), "--runs", "2", "--json", str(file)]

    assert main(arguments) == 0

    out = capfd.readouterr().out
    assert "Layers of m.int8.engine (SIMULATED)" in out
    assert "m.int8.engine against m.fp16.engine (SIMULATED)" in out
    assert "Times are means of 2 runs in which each layer was waited for" in out
    assert "their sum is no run time" in out
    assert f"TensorRT {trt.__version__} on SIMULATED; inputs: input (4, 3, 8, 8)" in out
    assert json.loads(file.read_text())["against"]["engine"] == "m.fp16.engine"


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


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (no_sidecar, "there is no 'm.int8.engine.json' beside it"),
        (truncated, "it is truncated"),
        (another_release, "it was built with TensorRT 9.3.0.1"),
        (another_gpu, "it was built for NVIDIA T4"),
        (Path.unlink, "there is no file"),
    ],
)
def test_an_engine_that_cannot_be_loaded_is_one_line(
    engines: dict[str, Path], capfd: Any, harm: Callable[[Path], None], text: str
) -> None:
    """Exit status 1, with what was found."""
    harm(engines["int8"])

    assert main(["inspect", str(engines["int8"])]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert text in line


def test_what_is_no_engine_is_refused(engines: dict[str, Path], tmp_path: Path, capfd: Any) -> None:
    """By its name, by its content, and a model that is none."""
    model = engines["int8"].with_name("int8.onnx")
    with pytest.raises(ConfigError, match=r"no TensorRT engine; expected \.engine"):
        inspect(model)
    with pytest.raises(ModelError, match="not an ONNX model"):
        inspect(engines["int8"], model=engines["int8"])
    fake = tmp_path / "fake.engine"
    fake.write_bytes(b"this is no plan" * 10)
    assert main(["inspect", str(fake), "--trust"]) == 1
    assert "cannot load the engine" in capfd.readouterr().err
    assert main(["inspect", str(engines["int8"]), "--json", str(engines["int8"])]) == 1
    assert "it is read as well" in capfd.readouterr().err
