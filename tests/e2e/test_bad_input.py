"""Whatever a user gets wrong ends in one clear line, exit status 1, and nothing half-written."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trt_int8.cli import main

Refused = Callable[[Iterable[object]], str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run a command that must be refused; return its line. No new file may be left, finished or not."""

    def run(words: Iterable[object]) -> str:
        before = set(tmp_path.rglob("*"))
        capfd.readouterr()
        assert main([str(word) for word in words]) == 1
        captured = capfd.readouterr()
        lines = [line for line in captured.err.splitlines() if not line.startswith("INFO:")]
        assert captured.out == ""
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert set(tmp_path.rglob("*")) == before
        return lines[0]

    return run


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """Write arrays to an .npz file."""

    def write(**arrays: object) -> Path:
        path = tmp_path / "data.npz"
        np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
        return path

    return write


@pytest.fixture
def good(data: Callable[..., Path]) -> Path:
    """Data that fit `tiny_model`."""
    rng = np.random.default_rng(0)
    return data(input=rng.normal(size=(6, 3, 8, 8)).astype(np.float32), label=rng.integers(0, 7, 6))


def calibrate(model: Path, data: Path, tmp_path: Path) -> Sequence[object]:
    """Return the words of a calibration."""
    return ["calibrate", model, "--data", data, "--output", tmp_path / "c.npz"]


def images(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """Return an array of ones."""
    return np.ones(shape, dtype)


def test_missing_model(refused: Refused, good: Path, tmp_path: Path):
    """A model file that is not there is named."""
    assert "there is no file" in refused(calibrate(tmp_path / "no.onnx", good, tmp_path))


@pytest.mark.parametrize("content", [b"not a model", b"", b"\x08\x07"])
def test_not_a_model(content: bytes, refused: Refused, good: Path, tmp_path: Path):
    """A file that is no ONNX model is said to be none."""
    model = tmp_path / "wrong.onnx"
    model.write_bytes(content)

    assert "is not an ONNX model" in refused(calibrate(model, good, tmp_path))


def test_truncated_model(refused: Refused, tiny_model: Path, good: Path, tmp_path: Path):
    """Half an ONNX file is no ONNX model."""
    tiny_model.write_bytes(tiny_model.read_bytes()[:-500])

    assert "is not an ONNX model" in refused(calibrate(tiny_model, good, tmp_path))


def test_missing_data(refused: Refused, tiny_model: Path, tmp_path: Path):
    """Data that are not there are named."""
    assert "no.npz" in refused(calibrate(tiny_model, tmp_path / "no.npz", tmp_path))


def test_unreadable_data(refused: Refused, tiny_model: Path, tmp_path: Path):
    """A file that only claims to be .npz is said to be none."""
    (tmp_path / "data.npz").write_text("hello")

    assert "data.npz" in refused(calibrate(tiny_model, tmp_path / "data.npz", tmp_path))


def test_unknown_input_name(refused: Refused, tiny_model: Path, data: Callable[..., Path], tmp_path: Path):
    """Arrays under other names: the line names the model's inputs and the arrays found."""
    line = refused(calibrate(tiny_model, data(pixels=images(4, 3, 8, 8)), tmp_path))

    assert "input: float32 (batch, 3, 8, 8)" in line
    assert "pixels" in line


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (images(4, 3, 9, 8), "(3, 9, 8)"),
        (images(4, 1, 3, 8, 8), "(1, 3, 8, 8)"),
        (images(4, 3, 8, 8, dtype=np.uint8), "uint8"),
        (images(4, 3, 8, 8, dtype=np.int64), "int64"),
    ],
    ids=["shape", "rank", "uint8", "int64"],
)
def test_wrong_arrays(
    array: np.ndarray, found: str, refused: Refused, tiny_model: Path, data: Callable[..., Path], tmp_path: Path
):
    """A wrong shape, rank or dtype: the line names what was found and what the model takes."""
    line = refused(calibrate(tiny_model, data(input=array), tmp_path))

    assert found.strip("()") in line
    assert "float32 (batch, 3, 8, 8)" in line


def test_empty_data(refused: Refused, tiny_model: Path, data: Callable[..., Path], tmp_path: Path):
    """Data without samples are refused."""
    assert "sample" in refused(calibrate(tiny_model, data(input=images(0, 3, 8, 8)), tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite(
    value: float, refused: Refused, tiny_model: Path, data: Callable[..., Path], tmp_path: Path
):
    """NaN or infinity in the data: the line names the input and the sample."""
    array = images(6, 3, 8, 8)
    array[4, 1, 2, 3] = value
    line = refused(calibrate(tiny_model, data(input=array), tmp_path))

    assert "'input'" in line
    assert "sample 4" in line


def test_activation_that_overflows(refused: Refused, data: Callable[..., Path], tmp_path: Path):
    """An activation that becomes infinite: the line names the tensor, the batch and the node."""
    nodes = [
        helper.make_node("Exp", ["x"], ["grown"], "grow"),
        helper.make_node("MatMul", ["grown", "w"], ["y"], "multiply"),
    ]
    graph = helper.make_graph(
        nodes,
        "overflow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")],
    )
    path = tmp_path / "overflow.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    values = np.zeros((5, 2), np.float32)
    values[3, 1] = 1000
    line = refused(calibrate(path, data(x=values), tmp_path))

    assert "'grown'" in line
    assert "batch 3" in line
    assert "'grow'" in line


def test_calibration_of_another_model(
    refused: Refused, tiny_model: Path, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """A calibration of other weights is refused, and says that the weights differ."""
    assert main([str(word) for word in calibrate(tiny_model, good, tmp_path)]) == 0
    model = onnx.load(tiny_model)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    line = refused(["quantize", tmp_path / "other.onnx", "--calibration", tmp_path / "c.npz", "--output", "q.onnx"])

    assert "weights differ" in line


@pytest.mark.parametrize("content", [b"PK\x03\x04 and no more", b"a: 1\n", b""])
def test_damaged_calibration(content: bytes, refused: Refused, tiny_model: Path, tmp_path: Path):
    """A damaged calibration is refused by `quantize` and by `cache show`."""
    (tmp_path / "c.npz").write_bytes(content)

    assert "c.npz" in refused(["quantize", tiny_model, "--calibration", tmp_path / "c.npz"])
    assert "c.npz" in refused(["cache", "show", tmp_path / "c.npz"])


def test_expression_that_matches_nothing(refused: Refused, tiny_model: Path, good: Path, tmp_path: Path):
    """An --exclude that matches no node is refused with the names there are."""
    assert main([str(word) for word in calibrate(tiny_model, good, tmp_path)]) == 0
    line = refused(["quantize", tiny_model, "--calibration", tmp_path / "c.npz", "--exclude", "layer9.*"])

    assert "'layer9.*'" in line
    assert "conv" in line


def test_labels_that_are_not_there(refused: Refused, tiny_model: Path, good: Path):
    """A label name that the data lack is refused with the arrays there are."""
    line = refused(["compare", tiny_model, tiny_model, "--data", good, "--labels", "classes"])

    assert "'classes'" in line
    assert "label" in line


def test_output_that_is_read(refused: Refused, tiny_model: Path, good: Path, tmp_path: Path):
    """No stage writes over its own model, data or calibration."""
    words = [tiny_model, "--data", good, "--output"]
    content = tiny_model.read_bytes(), good.read_bytes()

    assert "it is read as well" in refused(["calibrate", *words, good])
    assert main([str(word) for word in calibrate(tiny_model, good, tmp_path)]) == 0
    quantized = ["quantize", tiny_model, "--calibration", tmp_path / "c.npz", "--output"]
    assert "it is read as well" in refused([*quantized, tiny_model])
    assert "it is read as well" in refused([*quantized, tmp_path / "c.npz"])
    assert "it is read as well" in refused(["export", tiny_model, "--output", tiny_model])
    assert "it is read as well" in refused(["cache", "export", tmp_path / "c.npz", "--output", tmp_path / "c.npz"])
    assert "it is read as well" in refused(["bench", tiny_model, "--json", tiny_model])
    assert "it is read as well" in refused(["compare", tiny_model, tiny_model, "--data", good, "--json", good])
    assert (tiny_model.read_bytes(), good.read_bytes()) == content


def test_runtime_that_fails_says_it_once(
    graph_builder: Any, refused: Refused, data: Callable[..., Path], tmp_path: Path
):
    """Where ONNX Runtime fails on a batch, its own log does not stand beside the one line."""
    graph = graph_builder()
    rows = graph.node("Gather", [graph.normal((5, 4)), graph.input("ids", ("N",), TensorProto.INT64)])
    graph.node("MatMul", [rows, graph.normal((4, 2))], "y")
    path = graph.save(tmp_path / "m.onnx", ["y"])
    line = refused(calibrate(path, data(ids=[1, 9, 2]), tmp_path))

    assert "batch 1" in line
    assert "out of data bounds" in line


def test_labels_for_a_model_that_does_not_classify(
    graph_builder: Any, data: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """A regression model with labels is refused before anything slow: the outputs are named."""
    graph = graph_builder()
    graph.node("MatMul", [graph.input("x", ("N", 4)), graph.normal((4, 1))], "y")
    graph.save(tmp_path / "m.onnx", [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])])
    found = data(x=images(6, 4), label=np.zeros(6))
    config = {**CONFIG, "data": {"calibration": "data.npz", "labels": "label"}, "output": "out"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))

    assert main(["run", str(tmp_path / "config.yaml")]) == 1
    assert "the outputs of model.onnx are y: float32 (N, 1)" in capfd.readouterr().err
    assert not (tmp_path / "out" / "calibration.npz").exists()
    assert main(["compare", *[str(tmp_path / "m.onnx")] * 2, "--data", str(found), "--labels", "label"]) == 1
    assert "the outputs of m.onnx" in capfd.readouterr().err.replace(str(tmp_path / "m.onnx"), "m.onnx")


def test_evaluation_data_of_another_shape(
    tiny_model: Path, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Evaluation data that do not fit are refused before the calibration."""
    np.savez(tmp_path / "other.npz", input=images(4, 3, 9, 9))
    config = {"model": {"source": str(tiny_model)}, "data": {"calibration": str(good), "evaluation": "other.npz"}}
    (tmp_path / "config.yaml").write_text(json.dumps({**config, "output": "out"}))

    assert main(["run", str(tmp_path / "config.yaml")]) == 1
    assert "other.npz" in capfd.readouterr().err
    assert not (tmp_path / "out" / "calibration.npz").exists()


def test_tensorrt_without_calibrators(refused: Refused, tiny_model: Path, good: Path, tmp_path: Path):
    """A calibration cache for TensorRT 11, which reads none, is refused with what to use instead."""
    assert main([str(word) for word in calibrate(tiny_model, good, tmp_path)]) == 0
    line = refused(["cache", "export", tmp_path / "c.npz", "--tensorrt", "11.1.0", "--output", tmp_path / "k"])

    assert "quantize" in line


def test_batch_size_of_a_folder(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Files of a folder are fed as they are: asking for a batch size of them is a usage error, status 2."""
    np.savez(tmp_path / "batch.npz", input=images(4, 3, 8, 8))
    folder = tmp_path / "batches"
    folder.mkdir()
    (tmp_path / "batch.npz").rename(folder / "batch.npz")

    assert main([*map(str, calibrate(tiny_model, folder, tmp_path)), "--batch-size", "2"]) == 2
    assert "fed as they are" in capfd.readouterr().err


CONFIG = {"model": {"source": "m.onnx"}, "data": {"calibration": "data.npz"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantise": {}}, ["quantise", "did you mean 'quantize'"]),
        ({"quantize": {"metod": "mse"}}, ["metod", "did you mean 'method'"]),
        ({"quantize": {"percentile": 250}}, ["quantize.percentile", "100"]),
        ({"data": {"calibration": "nowhere.npz"}}, ["data.calibration", "nowhere.npz"]),
        ({"model": {"source": "gone.onnx"}}, ["model.source", "gone.onnx"]),
    ],
)
def test_wrong_configuration(change: dict, words: list[str], refused: Refused, tiny_model: Path, good: Path):
    """A misspelt key, a value out of range, a missing file: the key is named with what was expected."""
    tiny_model.rename(tiny_model.with_name("m.onnx"))
    path = tiny_model.with_name("config.yaml")
    path.write_text(json.dumps(CONFIG | change))
    line = refused(["run", path])

    assert all(word in line for word in words), line


def test_pickle_that_needs_code(refused: Refused, tmp_path: Path, good: Path):
    """A checkpoint that needs more than weights is refused with the reason, and is not executed."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef net():\n    return nn.Linear(2, 2)\n")
    options = ["--input", "x:1x2", "--checkpoint", tmp_path / "weights.pt", "--output", tmp_path / "m.onnx"]
    line = refused(["export", f"{tmp_path}/net.py:net", *options])

    assert "weights.pt" in line
    assert not (tmp_path / "executed").exists()


def test_model_that_onnx_does_not_reproduce(refused: Refused, tmp_path: Path):
    """A model whose ONNX form gives other outputs is refused; the output and the difference are named."""
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.nn.functional.dropout(x, 0.5, training=True) + x.reshape(2, -1).sum()\n"
        "def net():\n"
        "    return Net()\n"
    )
    line = refused(["export", f"{tmp_path}/net.py:net", "--input", "x:1x8", "--output", tmp_path / "m.onnx"])

    assert "net" in line or "output" in line
