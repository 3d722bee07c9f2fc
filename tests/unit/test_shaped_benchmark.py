"""Models with dynamic axes are timed at their smallest, usual and largest shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from onnx import TensorProto

from calibrators.protocols import Batch
from engines.profiles import ShapeRange
from engines.runner import TensorSpec
from trt_int8 import benchmark, calibrate, cli_measure, quantize
from trt_int8.calibration import Calibration
from trt_int8.cli import main
from trt_int8.errors import CalibrationError, UsageError
from trt_int8.images import Preprocessing
from trt_int8.shaped_benchmark import ShapesChoice, check_calibration, feeds_of_shape, points_of, time_at_shapes

QUICK: dict[str, Any] = {"rounds": 5, "budget_s": 0.05}


@pytest.fixture(scope="module")
def model(graph_builder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids, a table of 9 rows, a mask, one layer; batch and length are free."""
    graph = graph_builder()
    ids = graph.input("ids", ("batch", "length"), TensorProto.INT64)
    mask = graph.input("mask", ("batch", "length"), TensorProto.INT64)
    x = graph.node("Gather", [graph.normal((9, 8)), ids])
    weights = graph.node("Unsqueeze", [graph.node("Cast", [mask], to=1), graph.constant(np.array([2]))])
    graph.node("MatMul", [graph.node("Mul", [x, weights]), graph.normal((8, 4))], "y")
    return Path(graph.save(tmp_path_factory.mktemp("tokens") / "tokens.onnx", ["y"]))


def batch(samples: int, length: int) -> dict[str, Any]:
    ids = np.arange(samples * length).reshape(samples, length) % 9
    return {"ids": ids, "mask": np.ones_like(ids)}


@pytest.fixture(scope="module")
def calibration(model: Path) -> Calibration:
    """Two batches of (4, 6), one of (2, 10), one of (3, 5)."""
    return calibrate(model, [batch(4, 6), batch(2, 10), batch(4, 6), batch(3, 5)])


def shapes_of(result: dict[str, Any]) -> dict[str, list[int]]:
    return {part["shape"]: part["inputs"]["ids"] for part in result["shapes"]}


def test_the_shapes_of_a_calibration(model: Path, calibration: Calibration) -> None:
    """Per axis the least and the largest, a batch of 1 at the least; the usual one is that seen most often."""
    result = benchmark([model, model], shapes="all", calibration=calibration, names=["a", "b"], **QUICK).to_json()

    assert shapes_of(result) == {"min": [1, 5], "opt": [4, 6], "max": [4, 10]}
    assert result["inputs"] == {"ids": [4, 6], "mask": [4, 6]}
    assert [part["batch_size"] for part in result["shapes"]] == [1, 4, 4]
    assert result["candidates"] == result["shapes"][1]["candidates"]
    for part in result["shapes"]:
        assert [row["name"] for row in part["candidates"]] == ["a", "b"]
        assert not {"machine", "shapes"} & part.keys()


def test_one_of_them(model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The result is the one at that shape; a calibration's file will do, and alone it means the usual shape."""
    calibration.save(tmp_path / "c.npz")
    largest = benchmark(model, shapes="max", calibration=tmp_path / "c.npz", **QUICK).to_json()
    usual = benchmark(model, calibration=tmp_path / "c.npz", **QUICK).to_json()

    assert shapes_of(largest) == {"max": largest["inputs"]["ids"]} == {"max": [4, 10]}
    assert shapes_of(usual) == {"opt": [4, 6]}


def test_shapes_by_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line one shape may stand for all; what is the same is timed and shown once."""
    arguments = ["bench", str(model), "--rounds", "5", "--seconds", "0.1", "--json", str(tmp_path / "b.json")]
    arguments += ["--shapes", "all"]
    arguments += ["--shape", "ids=1x3,2x4,2x4", "--shape", "mask=1x3,2x4,2x4"]

    assert main(arguments) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    out = capsys.readouterr().out
    assert shapes_of(result) == {"min": [1, 3], "opt": [2, 4], "max": [2, 4]}
    assert "Shapes: min\n" in out
    assert "Shapes: opt, max\n" in out
    assert out.count("batch of 2") == 1
    assert main(["bench", str(model), "--shape", "ids=2x3", "--shape", "mask=2x3", *arguments[2:6]]) == 0
    assert "ids 2x3" in capsys.readouterr().out


def test_a_shape_that_comes_twice_is_timed_once() -> None:
    """What is fed has the shapes; the fixed input stays."""
    inputs = [TensorSpec("x", np.dtype(np.float32), ("n", 3)), TensorSpec("s", np.dtype(np.float32), (2,))]
    fed: list[Any] = []

    def time(batches: Sequence[Batch], *, shapes_meant: bool) -> Any:
        fed.append({name: value.shape for name, value in batches[0].items()})
        assert shapes_meant
        return len(fed)

    found = time_at_shapes(time, inputs, {"x": ShapeRange((1, 3), (4, 3), (4, 3))}, points_of("all"))

    assert found == (("min", 1), ("opt", 2), ("max", 2))
    assert fed == [{"x": (1, 3), "s": (2,)}, {"x": (4, 3), "s": (2,)}]


def test_values_of_the_data_are_repeated_or_cut() -> None:
    """Ids stay valid: those that the data hold."""
    inputs = [TensorSpec("ids", np.dtype(np.int64), ("n", "t")), TensorSpec("s", np.dtype(np.int64), (2,))]
    sample = {"ids": np.array([[1, 2, 3], [4, 5, 6]]), "s": np.array([8, 9])}
    feeds = feeds_of_shape(inputs, {"ids": (3, 2)}, sample=sample)

    np.testing.assert_array_equal(feeds["ids"], [[1, 2], [4, 5], [1, 2]])
    np.testing.assert_array_equal(feeds["s"], [8, 9])
    np.testing.assert_array_equal(feeds_of_shape(inputs, {"ids": (1, 5)}, sample=sample)["ids"], [[1, 2, 3, 1, 2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": "all"}, r"nothing tells the lengths of ids: int64 \(batch, length\).*--calibration FILE"),
        ({"shape_ranges": {"x": ShapeRange((1,), (1,), (1,))}}, "'x', which is no input"),
        ({"shape_ranges": {"ids": ShapeRange((1, 2), (1, 2), (1, 2))}}, "none is of the input 'mask'"),
        ({"shape_ranges": {"ids": ShapeRange((1,), (1,), (1,))}}, r"shape \(1,\): it does not fit the input 'ids'"),
        ({"shapes": "min", "batch_size": 2}, "--batch-size contradicts --shapes"),
    ],
)
def test_what_cannot_be_timed(options: dict[str, Any], message: str, model: Path) -> None:
    """Each refusal names the input and the next step."""
    with pytest.raises(UsageError, match=message):
        benchmark(model, **options, **QUICK)


def test_a_calibration_of_another_model(
    model: Path, calibration: Calibration, graph_builder: Any, tmp_path: Path
) -> None:
    """Refused as `quantize` refuses it; one of the FP32 models is enough, and force takes it."""
    graph = graph_builder(8)
    ids, mask = (graph.input(name, ("batch", "length"), TensorProto.INT64) for name in ("ids", "mask"))
    x = graph.node("Gather", [graph.normal((9, 8)), ids])
    weights = graph.node("Unsqueeze", [graph.node("Cast", [mask], to=1), graph.constant(np.array([2]))])
    graph.node("MatMul", [graph.node("Mul", [x, weights]), graph.normal((8, 4))], "y")
    other = Path(graph.save(tmp_path / "other.onnx", ["y"]))

    with pytest.raises(CalibrationError, match=r"does not belong to '.*other\.onnx': its weights differ"):
        benchmark(other, calibration=calibration, **QUICK)
    forced = benchmark(other, calibration=calibration, force=True, **QUICK).to_json()
    assert shapes_of(forced) == {"opt": [4, 6]}
    assert shapes_of(benchmark([other, model], calibration=calibration, **QUICK).to_json()) == {"opt": [4, 6]}


def test_a_calibration_of_other_inputs(model: Path, calibration: Calibration, tiny_model: Path, tmp_path: Path) -> None:
    """A quantized model does not tell what it was made from, but its inputs must be those that were calibrated."""
    quantize(model, calibration, output=tmp_path / "q.onnx", include=[".*"])
    images = calibrate(tiny_model, {"input": np.zeros((2, 3, 8, 8), np.float32)})

    assert shapes_of(benchmark(tmp_path / "q.onnx", calibration=calibration, **QUICK).to_json()) == {"opt": [4, 6]}
    with pytest.raises(CalibrationError, match="the calibration saw other inputs, 'input' and no 'ids'"):
        benchmark(tmp_path / "q.onnx", calibration=images, **QUICK)


def test_a_calibration_that_is_not_asked(model: Path, calibration: Calibration, fake_gpu: Any) -> None:
    """Shapes by name and those that an engine was built for go before it, so it is refused beside them."""
    ranges = {name: ShapeRange((1, 2), (1, 2), (1, 2)) for name in ("ids", "mask")}
    with pytest.raises(UsageError, match="--calibration would change nothing: --shape names the shapes"):
        benchmark(model, calibration=calibration, shape_ranges=ranges, **QUICK)
    engine = fake_gpu.engine(profiles=({"x": ((1, 2), (1, 2), (4, 2))},))
    with pytest.raises(UsageError, match=r"the shapes that fake\.engine was built for are timed"):
        check_calibration([model], [engine], engine.inputs, calibration)
    with pytest.raises(UsageError, match="--force would change nothing: it is about a calibration"):
        benchmark(model, shape_ranges=ranges, force=True, **QUICK)
    with pytest.raises(UsageError, match="--preprocessing would change nothing: there are no data"):
        benchmark(model, shape_ranges=ranges, preprocessing=Preprocessing(), **QUICK)


def test_a_model_of_fixed_shapes(graph_builder: Any, tmp_path: Path) -> None:
    """There is nothing to choose."""
    graph = graph_builder()
    graph.node("Relu", [graph.input("x", (2, 3))], "y")

    with pytest.raises(UsageError, match=r"all are fixed \(x: float32 \(2, 3\)\)"):
        benchmark(graph.save(tmp_path / "m.onnx", ["y"]), shapes="all", **QUICK)


def test_the_command_knows_the_same_words() -> None:
    """The words of the option are those of the API."""
    assert get_args(cli_measure.ShapesName) == get_args(ShapesChoice)
