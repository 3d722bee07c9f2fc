"""Comparing models on data: figures, labels, padding, memory, and every way the inputs can be wrong."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.onnxrt import OnnxRuntimeRunner
from trt_int8.accuracy import AccuracyResult, compare
from trt_int8.data import DataBatch
from trt_int8.errors import DataError, InferenceError, ModelError


def variant(model: Path, name: str, change: Callable[[onnx.ModelProto], object]) -> OnnxRuntimeRunner:
    """Make a runner of a changed copy of `model`."""
    proto = onnx.load(model)
    change(proto)
    path = model.with_name(name)
    onnx.save(proto, path)
    return OnnxRuntimeRunner(path)


def perturb(proto: onnx.ModelProto) -> None:
    """Round the weights to a coarse grid, as quantization does."""
    for weight in proto.graph.initializer:
        values = numpy_helper.to_array(weight)
        weight.CopyFrom(numpy_helper.from_array(np.round(values * 8) / 8, weight.name))


def batches(*sizes: int, labels: bool = True, seed: int = 5) -> list[DataBatch]:
    """Make random images and random labels in batches of these sizes."""
    rng = np.random.default_rng(seed)
    return [
        DataBatch(
            index=index,
            samples=size,
            feeds={"input": rng.normal(size=(size, 3, 8, 8)).astype(np.float32)},
            extras={"label": rng.integers(7, size=size)} if labels else {},
            rolling_hash="",
        )
        for index, size in enumerate(sizes)
    ]


def outputs_of(runner: OnnxRuntimeRunner, data: Sequence[DataBatch]) -> Any:
    """Run the model without Polygraphy and return all its logits."""
    with runner:
        return np.concatenate([runner.infer(batch.feeds)["logits"] for batch in data])


def one_class_per_sample(reference: OnnxRuntimeRunner, data: Sequence[DataBatch]) -> list[DataBatch]:
    """Give the data the reference's own decisions as labels."""
    chosen = iter(np.split(outputs_of(reference, data).argmax(1), np.cumsum([batch.samples for batch in data])[:-1]))
    return [DataBatch(b.index, b.samples, b.feeds, {"label": next(chosen)}, b.rolling_hash) for b in data]


def as_graph(nodes: list[Any], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], path: Path) -> Path:
    """Write a model of float inputs and outputs."""

    def describe(values: dict[str, list[Any]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]

    graph = helper.make_graph(nodes, "graph", describe(inputs), describe(outputs))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def affine(path: Path, scale: float, shape: list[Any]) -> OnnxRuntimeRunner:
    """Make a runner of y = scale * x."""
    constant = helper.make_node("Constant", [], ["scale"], value_float=scale)
    nodes = [constant, helper.make_node("Mul", ["x", "scale"], ["y"])]
    return OnnxRuntimeRunner(as_graph(nodes, {"x": shape}, {"y": shape}, path))


def of_x(*values: Any, samples: int | None = None) -> list[DataBatch]:
    """Make batches of one input `x`."""
    arrays = [np.asarray(value, np.float32) for value in values]
    return [DataBatch(i, samples or len(array), {"x": array}, {}, "") for i, array in enumerate(arrays)]


def test_figures_by_hand(tmp_path: Path) -> None:
    """y = 1.1 x against y = x: noise is 1 % of the signal, 20 dB; cosine 1; largest error a tenth of 5."""
    reference = affine(tmp_path / "one.onnx", 1.0, ["batch", 2])
    candidate = affine(tmp_path / "more.onnx", 1.1, ["batch", 2])

    result = compare(reference, [candidate], of_x([[1.0, 2.0], [3.0, 4.0]], [[-5.0, 0.0]]))

    (row,) = result.candidates
    assert row.difference.sqnr_db == pytest.approx(20.0, abs=1e-4)
    assert row.difference.cosine == pytest.approx(1.0)
    assert row.difference.max_abs == pytest.approx(0.5)
    assert row.agreement == 100.0
    assert row.scores.samples == 3
    assert (row.scores.top1, row.scores.top5) == (None, None)


def test_figures_against_numpy(tiny_model: Path) -> None:
    """All figures over uneven batches equal those of float64 numpy over the whole data at once."""
    reference = OnnxRuntimeRunner(tiny_model, name="FP32")
    candidate = variant(tiny_model, "coarse.onnx", perturb)
    data = batches(5, 16, 1, 8)

    result = compare(reference, [candidate], data, labels="label")

    r, c = outputs_of(reference, data).astype(np.float64), outputs_of(candidate, data).astype(np.float64)
    labels = np.concatenate([batch.extras["label"] for batch in data])
    (row,) = result.candidates
    assert 0 < row.agreement < 100  # else the candidate would prove nothing
    assert row.agreement == pytest.approx(100 * np.mean(r.argmax(1) == c.argmax(1)))
    assert row.scores.top1 == pytest.approx(100 * np.mean(c.argmax(1) == labels))
    best = np.argsort(-c, axis=1)[:, :5]
    assert row.scores.top5 == pytest.approx(100 * np.mean((best == labels[:, None]).any(1)))
    assert result.reference.top1 == pytest.approx(100 * np.mean(r.argmax(1) == labels))
    assert row.difference.sqnr_db == pytest.approx(10 * np.log10((r**2).sum() / ((r - c) ** 2).sum()))
    cosines = (r * c).sum(1) / (np.linalg.norm(r, axis=1) * np.linalg.norm(c, axis=1))
    assert row.difference.cosine == pytest.approx(cosines.mean())
    assert row.difference.max_abs == np.abs(r - c).max()


def test_reference_scores_are_its_own(tiny_model: Path) -> None:
    """Labelled by its own decisions, the reference is right always, and a candidate as often as it agrees."""
    reference = OnnxRuntimeRunner(tiny_model)
    data = one_class_per_sample(reference, batches(16, 16))

    result = compare(reference, [variant(tiny_model, "coarse.onnx", perturb)], data, labels="label")

    assert result.reference.top1 == 100.0
    assert result.candidates[0].scores.top1 == result.candidates[0].agreement < 100.0


def test_json_has_the_fixed_shape(tiny_model: Path) -> None:
    """`accuracy.json` holds the keys that others rely on, without NaN or infinity."""
    models = [OnnxRuntimeRunner(tiny_model, name="FP32"), OnnxRuntimeRunner(tiny_model, name="same", execution="exact")]

    data = compare(models[0], models[1:], batches(4), labels="label").to_json()

    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["reference"] == "FP32"
    assert data["reference_scores"]["samples"] == 4
    (row,) = data["candidates"]
    keys = ["name", "samples", "top1", "top5", "agreement", "sqnr_db", "cosine", "max_abs", "execution", "simulated"]
    assert set(keys) <= row.keys()
    assert (row["name"], row["execution"], row["simulated"]) == ("same", "exact", False)
    assert row["outputs"]["logits"]["cosine"] == row["cosine"]
    assert {check["metric"] for check in data["polygraphy"]["checks"]} == {"cosine_similarity", "snr"}


def test_identical_model_is_identical(tiny_model: Path) -> None:
    """The same file agrees in everything: infinite SQNR, null in JSON, and marked identical."""
    (row,) = compare(OnnxRuntimeRunner(tiny_model), [OnnxRuntimeRunner(tiny_model)], batches(3)).candidates

    assert row.difference.identical
    assert row.agreement == 100.0
    assert row.to_json()["sqnr_db"] is None


def test_target_decides_how_a_candidate_is_run(tiny_model: Path) -> None:
    """A model placed for TensorRT is simulated exactly, and the result says so."""
    placed = variant(
        tiny_model, "placed.onnx", lambda proto: helper.set_model_props(proto, {"trt_int8.target": "tensorrt"})
    )

    (row,) = compare(OnnxRuntimeRunner(tiny_model), [placed], batches(2)).candidates

    assert (row.scores.execution, row.scores.simulated) == ("exact", True)


def test_padding_is_left_out(tiny_model: Path) -> None:
    """Rows that fill up a fixed batch count nowhere: the figures are those of the real samples on the dynamic model."""

    def fix(proto: onnx.ModelProto) -> None:
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 4

    (real,) = batches(3)
    filled = np.concatenate([real.feeds["input"], np.full((1, 3, 8, 8), 1e3, np.float32)])
    padded = DataBatch(0, 3, {"input": filled}, real.extras, "")

    def both(proto: onnx.ModelProto) -> None:
        perturb(proto)
        fix(proto)

    expected = compare(OnnxRuntimeRunner(tiny_model), [variant(tiny_model, "c.onnx", perturb)], [real], labels="label")
    result = compare(
        variant(tiny_model, "fixed.onnx", fix), [variant(tiny_model, "both.onnx", both)], [padded], labels="label"
    )

    row, want = result.candidates[0], expected.candidates[0]
    assert row.scores.samples == 3
    assert row.difference.sqnr_db == pytest.approx(want.difference.sqnr_db, rel=1e-4)
    assert row.difference.max_abs == pytest.approx(want.difference.max_abs, rel=1e-4)
    assert (row.scores.top1, row.agreement) == (want.scores.top1, want.agreement)


def test_several_outputs_are_compared_together_and_alone(tmp_path: Path) -> None:
    """Float outputs count together and each by itself; the first of rank 2 decides; integers are left aside."""

    def model(name: str, factor: float) -> OnnxRuntimeRunner:
        nodes = [
            helper.make_node("Constant", [], ["factor"], value_float=factor),
            helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
            helper.make_node("Mul", ["x", "factor"], ["y"]),
            helper.make_node("ArgMax", ["y"], ["choice"], axis=1, keepdims=0),
        ]
        path = as_graph(nodes, {"x": ["batch", 2]}, {"total": [], "y": ["batch", 2]}, tmp_path / name)
        proto = onnx.load(path)
        proto.graph.output.append(helper.make_tensor_value_info("choice", TensorProto.INT64, ["batch"]))
        onnx.save(proto, path)
        return OnnxRuntimeRunner(path)

    (row,) = compare(model("a.onnx", 1.0), [model("b.onnx", -1.0)], of_x([[3.0, 4.0]])).candidates

    assert list(row.outputs) == ["total", "y"]
    assert row.outputs["total"].identical
    assert row.outputs["y"].cosine == -1.0
    assert row.difference.sqnr_db == pytest.approx(10 * np.log10((49 + 25) / 100))
    assert row.difference.cosine == 0.0
    assert row.difference.max_abs == 8.0
    assert row.agreement == 0.0


def test_regression_decides_nothing(tmp_path: Path) -> None:
    """An output of one value per sample has no arg-max worth the name: agreement is None."""
    runners = [affine(tmp_path / f"{scale}.onnx", scale, ["batch", 1]) for scale in (1.0, 2.0)]

    (row,) = compare(runners[0], runners[1:], of_x([[1.0], [2.0]])).candidates

    assert row.agreement is None


def test_overflow_is_reported(tmp_path: Path) -> None:
    """A candidate that overflows shows how many values did, and no figure pretends otherwise."""
    runners = [affine(tmp_path / f"{scale}.onnx", scale, ["batch", 2]) for scale in (1.0, 3e38)]

    (row,) = compare(runners[0], runners[1:], of_x([[1.0, 0.5], [2.0, 0.0]])).candidates

    data = row.to_json()
    assert data["nonfinite"] == 1
    assert (data["sqnr_db"], data["cosine"], data["max_abs"]) == (None, None, None)
    assert data["agreement"] == 50.0


def test_order_of_candidates_does_not_matter(tiny_model: Path) -> None:
    """Each candidate's row is its own, in the order given."""
    reference, coarse = OnnxRuntimeRunner(tiny_model), variant(tiny_model, "coarse.onnx", perturb)
    same = OnnxRuntimeRunner(tiny_model, name="same")

    forward = compare(reference, [coarse, same], batches(4, 4))
    backward = compare(reference, [same, coarse], batches(4, 4))

    assert forward.candidates == backward.candidates[::-1]
    assert [row.scores.name for row in forward.candidates] == ["coarse.onnx", "same"]


def test_saves_polygraphy_files(tiny_model: Path) -> None:
    """A run's folder gets the inputs, every model's outputs, the script and the commands; unasked, nothing is."""
    models = [OnnxRuntimeRunner(tiny_model), variant(tiny_model, "coarse.onnx", perturb)]
    before = set(tiny_model.parent.iterdir())
    compare(models[0], models[1:], batches(4, 4))
    assert set(tiny_model.parent.iterdir()) == before

    result = compare(models[0], models[1:], batches(4, 4), save_to=tiny_model.parent)

    names = {path.name for path in (tiny_model.parent / "polygraphy").iterdir()}
    assert names == {"inputs.json", "tiny_outputs.json", "coarse_outputs.json", "data_loader.py", "commands.sh"}
    assert result.polygraphy_batches == result.batches == 2


def test_nothing_is_printed(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Polygraphy's log stays silent, when all goes well and when a model fails."""
    compare(OnnxRuntimeRunner(tiny_model), [variant(tiny_model, "coarse.onnx", perturb)], batches(2))
    with pytest.raises(DataError):
        compare(OnnxRuntimeRunner(tiny_model), [OnnxRuntimeRunner(tiny_model)], batches(2), labels="nothing")

    assert capfd.readouterr() == ("", "")


def test_progress_is_handed_the_batches(tiny_model: Path) -> None:
    """The bar counts batches, towards the total where it is known."""
    shown: list[Any] = []

    def track(items: Any, description: str, total: int | None = None) -> Any:
        shown.append((description, total))
        return items

    compare(OnnxRuntimeRunner(tiny_model), [], batches(1, 1, 1), total=3, track=track)

    assert shown == [("compare", 3)]


def test_memory_does_not_grow_with_the_data(tiny_model: Path) -> None:
    """Four hundred batches of a stream need no more memory than forty."""
    models = [OnnxRuntimeRunner(tiny_model), variant(tiny_model, "coarse.onnx", perturb)]

    def stream(count: int) -> Iterator[DataBatch]:
        for index in range(count):
            yield DataBatch(index, 32, {"input": np.full((32, 3, 8, 8), index, np.float32)}, {}, "")

    def peak(count: int) -> int:
        tracemalloc.start()
        compare(models[0], models[1:], stream(count))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(20)  # imports and caches
    few, many = peak(40), peak(400)

    assert many < few + 100_000  # one batch is 24 kB, 360 of them would be 9 MB


def compared(tiny_model: Path, data: Any, **how: Any) -> AccuracyResult:
    return compare(OnnxRuntimeRunner(tiny_model), [OnnxRuntimeRunner(tiny_model, name="candidate")], data, **how)


def with_labels(labels: Any) -> list[DataBatch]:
    first, second = batches(2, 2)
    return [first, DataBatch(1, 2, second.feeds, {"label": np.asarray(labels), "weight": np.ones(2)}, "")]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 16], "sample 3 has the label 16; output 'logits' has the classes 0 to 15"),
        ([-1, 0], "sample 2 has the label -1"),
        ([0.0, 1.0], "float64"),
        ([True, False], "bool"),
        ([[0, 1], [1, 0]], r"\(2, 2\); expected one integer per sample, \(2,\)"),
        ([0], r"\(1,\); expected one integer per sample, \(2,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tiny_model: Path, labels: Any, text: str) -> None:
    """Wrong range, dtype or shape is named with the sample or batch, counted over all the data."""
    with pytest.raises(DataError, match=text):
        compared(tiny_model, with_labels(labels), labels="label")


def test_labels_in_a_column_are_taken(tiny_model: Path) -> None:
    """(samples, 1) is one label per sample."""
    column = compared(tiny_model, with_labels([[3], [4]]), labels="label")

    assert column.reference == compared(tiny_model, with_labels([3, 4]), labels="label").reference


def test_missing_labels_are_named_with_what_is_there(tiny_model: Path) -> None:
    """The message lists the arrays that the data do have."""
    with pytest.raises(DataError, match=r"'target'.*batch 0 holds no such array.*it holds label"):
        compared(tiny_model, with_labels([0, 1]), labels="target")


def test_labels_need_a_classifier(tmp_path: Path) -> None:
    """An output of another shape than (samples, classes) cannot be scored."""
    runner = affine(tmp_path / "image.onnx", 1.0, ["batch", 3, 4, 4])
    data = [DataBatch(0, 1, {"x": np.ones((1, 3, 4, 4), np.float32)}, {"label": np.array([1])}, "")]

    with pytest.raises(DataError, match=r"shape \(samples, classes\).*'y' of shape \(1, 3, 4, 4\)"):
        compare(runner, [], data, labels="label")


def test_no_data_is_an_error(tiny_model: Path) -> None:
    """An empty stream gives no figures."""
    with pytest.raises(DataError, match="no batches"):
        compared(tiny_model, [])


def test_other_outputs_are_refused_before_anything_runs(tiny_model: Path, tmp_path: Path) -> None:
    """Two different models are no reference and candidate; the data are not touched."""

    def never() -> Iterator[DataBatch]:
        raise AssertionError
        yield

    other = affine(tmp_path / "other.onnx", 1.0, ["batch", 2])

    with pytest.raises(ModelError, match=r"other\.onnx with tiny\.onnx: its outputs are y; expected logits"):
        compare(OnnxRuntimeRunner(tiny_model), [other], never())


def test_feeds_are_checked_before_polygraphy_bends_them(tiny_model: Path) -> None:
    """Polygraphy would cast float64 and reshape with a warning; here it is an error with both sides."""
    image = np.zeros((1, 3, 8, 8))
    with pytest.raises(InferenceError, match="float64; expected input: float32"):
        compared(tiny_model, [DataBatch(0, 1, {"input": image}, {}, "")])


def test_errors_of_the_data_pass_through(tiny_model: Path) -> None:
    """What the data source raises is not taken for a failure of the model, and Polygraphy's runners are left."""

    def broken() -> Iterator[DataBatch]:
        yield from batches(2)
        raise DataError("sample 2 holds NaN")

    with pytest.raises(DataError, match="sample 2 holds NaN"):
        compared(tiny_model, broken())


def test_failing_model_is_named_with_the_batch(tmp_path: Path) -> None:
    """What ONNX Runtime raises becomes one line with the model that failed, of several, and the batch."""
    nodes = [
        helper.make_node("Constant", [], ["shape"], value_ints=[2, 2]),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    path = as_graph(nodes, {"x": ["batch", 2]}, {"y": [2, 2]}, tmp_path / "stiff.onnx")
    reference = affine(tmp_path / "one.onnx", 1.0, ["batch", 2])

    with pytest.raises(
        InferenceError, match=r"^Cannot compare on batch 1: stiff\.onnx failed in ONNX Runtime: .*Reshape"
    ):
        compare(reference, [OnnxRuntimeRunner(path)], of_x(np.ones((2, 2)), np.ones((3, 2))))


def test_outputs_of_other_shapes_are_refused(tmp_path: Path) -> None:
    """Values without common positions have no difference; the message names both shapes."""
    nodes = [helper.make_node("NonZero", ["x"], ["found"]), helper.make_node("Cast", ["found"], ["y"], to=1)]
    flipped = [helper.make_node("Relu", ["x"], ["positive"]), *nodes]
    flipped[1] = helper.make_node("NonZero", ["positive"], ["found"])
    reference = as_graph(nodes, {"x": ["batch", 2]}, {"y": [2, "count"]}, tmp_path / "a.onnx")
    candidate = as_graph(flipped, {"x": ["batch", 2]}, {"y": [2, "count"]}, tmp_path / "b.onnx")

    with pytest.raises(InferenceError, match=r"shape \(2, 1\), the reference \(2, 2\)"):
        compare(OnnxRuntimeRunner(reference), [OnnxRuntimeRunner(candidate)], of_x([[1.0, -1.0]]))


def test_model_that_onnx_runtime_refuses_is_named(tiny_model: Path) -> None:
    """A candidate that cannot be loaded is a ModelError, as everywhere."""

    def break_it(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(ModelError, match="NoSuchOperator"):
        compare(OnnxRuntimeRunner(tiny_model), [variant(tiny_model, "broken.onnx", break_it)], batches(1))


def test_any_runner_is_compared(fake_runner: Any) -> None:
    """The models need no file and no ONNX Runtime: y = -x against y = -1.1 x, 20 dB."""
    reference = fake_runner("plain")
    candidate = fake_runner("scaled", lambda x: x * np.float32(-1.1), execution="exact", simulated=True)

    result = compare(reference, [candidate], of_x([[1.0, 2.0]], [[3.0, 4.0]]))

    (row,) = result.candidates
    assert row.difference.sqnr_db == pytest.approx(20.0, abs=1e-4)
    assert (row.scores.name, row.scores.execution, row.scores.simulated) == ("scaled", "exact", True)


def test_a_failing_runner_keeps_its_words(fake_runner: Any) -> None:
    """The error names the batch and the model, once each, and both models are left."""

    def fail(x: Any) -> Any:
        if len(x) == 3:
            raise InferenceError("scaled failed on the GPU: out of memory")
        return x

    models = [fake_runner("plain"), fake_runner("scaled", fail)]
    with pytest.raises(InferenceError) as caught:
        compare(models[0], models[1:], of_x(np.ones((2, 2)), np.ones((3, 2))))
    assert str(caught.value) == "Cannot compare on batch 1: scaled failed on the GPU: out of memory"
    assert not any(model._entered for model in models)


def test_ctrl_c_in_a_model_is_no_failure_of_it(fake_runner: Any) -> None:
    """It ends the comparison, and the models are left."""

    def interrupt(_: Any) -> Any:
        raise KeyboardInterrupt

    models = [fake_runner("plain"), fake_runner("slow", interrupt)]
    with pytest.raises(KeyboardInterrupt):
        compare(models[0], models[1:], of_x([[1.0, 2.0]]))
    assert not any(model._entered for model in models)


def test_rows_that_fill_up_another_models_batch_are_left_out(fake_runner: Any) -> None:
    """A candidate with a fixed batch has the reference fed its padding too: it counts in neither."""
    reference, candidate = fake_runner("plain"), fake_runner("fixed", lambda x: np.where(x == 9.0, x, -x))
    batch = DataBatch(0, 1, {"x": np.array([[1.0, 2.0], [9.0, 9.0]], np.float32)}, {}, "")

    (row,) = compare(reference, [candidate], [batch]).candidates

    assert row.difference.identical
    assert row.scores.samples == 1
