"""Facts about models whose weights stay in their files: held once, and the same model for every stage."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibrators.errors import FileAccessError
from engines import graph as graph_module
from engines import outside_weights
from engines.errors import ModelError
from engines.fp16 import HeldNode, in_fp16
from engines.graph import exceeds_one_file, open_session, prepare, save_model
from engines.outside_weights import is_outside
from engines.placement import Target
from trt_int8.api import calibrate, quantize
from trt_int8.quantize_result import Int8Precision

Run = Callable[..., Any]

IMAGES = np.random.default_rng(3).normal(size=(2, 3, 8, 8)).astype(np.float32)


def external(model: onnx.ModelProto, path: Path, location: str = "w.bin") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / location).parent.mkdir(parents=True, exist_ok=True)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save_model(copy, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def drawn(graph_builder: Any, *, norm: bool = False, opset: int = 17) -> onnx.ModelProto:
    """Conv (BatchNormalization) Relu, then two MatMuls, the second with a transposed weight."""
    graph = graph_builder(1)
    x = graph.conv(graph.input(), (3, 8), "conv")
    if norm:
        parameters = [graph.constant(graph.rng.uniform(0.5, 2, 8).astype(np.float32)) for _ in "sbmv"]
        x = graph.node("BatchNormalization", [x, *parameters], "norm")
    x = graph.node("Flatten", [graph.node("Relu", [x], "relu")], "flat")
    x = graph.node("Relu", [graph.node("MatMul", [x, graph.normal((512, 16), 0.1, "w1")], "hidden")], "active")
    turned = graph.node("Transpose", [graph.normal((6, 16), 0.2, "w2")], "w2_turned", perm=[1, 0])
    graph.node("MatMul", [x, turned], "y")
    model: onnx.ModelProto = graph.model(["y"], opset=opset)
    return model


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is prepared, whatever was prepared before, and goes when nothing here holds it."""
    graph_module._last.forget()
    monkeypatch.setattr(graph_module._last, "keep", lambda *_: None)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a model of a few kilobytes as one of many gigabytes."""
    monkeypatch.setattr(graph_module, "PROTOBUF_LIMIT_BYTES", 20_000)
    monkeypatch.setattr(outside_weights, "OUTSIDE_BYTES", 300)


@pytest.mark.usefixtures("small_limits")
class TestLargeModels:
    """Beyond the limit of one message."""

    def test_large_weights_are_not_loaded(self, graph_builder: Any, tmp_path: Path) -> None:
        """The description names their place; small ones are read."""
        prepared = prepare(external(drawn(graph_builder), tmp_path / "m.onnx"))
        outside = {tensor.name: is_outside(tensor) for tensor in prepared.proto.graph.initializer}

        assert sum(outside.values()) == 3
        assert outside["w1"]
        assert prepared.proto.ByteSize() < 4000
        assert exceeds_one_file(prepared.proto)

    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("opset", [9, 17])
    def test_the_graph_is_the_one_of_a_small_model(
        self, norm: bool, opset: int, graph_builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Folded, transposed and raised as if the simplifier had seen the weights; every stage finds its tensors."""
        model = drawn(graph_builder, norm=norm, opset=opset)
        large = prepare(external(model, tmp_path / "m.onnx"))
        session = open_session(large.proto, execution="native")
        monkeypatch.setattr(graph_module, "PROTOBUF_LIMIT_BYTES", 2**31)
        onnx.save(model, tmp_path / "whole.onnx")
        small = prepare(tmp_path / "whole.onnx")

        def nodes(proto: onnx.ModelProto) -> list[tuple[str, str, str]]:
            return [(node.op_type, node.input[0], node.output[0]) for node in proto.graph.node]

        assert nodes(large.proto) == nodes(small.proto)
        assert [node[0] for node in nodes(large.proto)] == ["Conv", "Relu", "Flatten", "MatMul", "Relu", "MatMul"]
        expected = open_session(small.proto, execution="exact").run(None, {"x": IMAGES})[0]
        np.testing.assert_allclose(session.run(None, {"x": IMAGES})[0], expected, rtol=1e-5, atol=1e-5)

    def test_the_hash_does_not_depend_on_the_storage(
        self, graph_builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A calibration of one is one of the other."""
        graph = graph_builder(1)
        graph.gemm(graph.node("Relu", [graph.gemm(graph.input("x", ("N", 64)), (64, 64))]), (64, 32), "y")
        model = graph.model(["y"])
        large = prepare(external(model, tmp_path / "m.onnx"))
        monkeypatch.setattr(graph_module, "PROTOBUF_LIMIT_BYTES", 2**31)
        onnx.save(model, tmp_path / "whole.onnx")
        small = prepare(tmp_path / "whole.onnx")

        assert (large.graph_hash, large.weights_hash) == (small.graph_hash, small.weights_hash)

    def test_calibrate_and_quantize(self, graph_builder: Any, tmp_path: Path, run_model: Run) -> None:
        """Both targets, and FP16 beside INT8; what is left fits one file, which holds everything."""
        path = external(drawn(graph_builder, norm=True), tmp_path / "m.onnx")
        calibration = calibrate(path, [{"x": IMAGES}])
        prepared = prepare(path)
        expected = open_session(prepared.proto, execution="exact").run(None, {"x": IMAGES})[0]
        kinds: tuple[tuple[Target, Int8Precision], ...]
        kinds = (("tensorrt", "int8"), ("cpu", "int8"), ("tensorrt", "int8+fp16"))
        for target, precision in kinds:
            output = tmp_path / f"{target}.{precision}.onnx"
            quantize(path, calibration, method="minmax", target=target, precision=precision, output=output)

            assert not (tmp_path / f"{output.name}.data").exists()
            found = run_model(output, {"x": IMAGES}, optimized=target == "cpu")["y"]
            assert 10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum()) > 25

    def test_fp16_rounds_them(self, graph_builder: Any, tmp_path: Path) -> None:
        """A weight that an FP32 node reads too is kept in both."""
        graph = graph_builder(1)
        x = graph.node("MatMul", [graph.input("x", ("N", 96)), graph.normal((96, 96), 0.1, "w")], "first")
        graph.node("MatMul", [graph.node("Relu", [x]), "w"], "second")
        graph.node("MatMul", ["second", graph.normal((96, 96), 0.1, "v")], "y")
        prepared = prepare(external(graph.model(["y"]), tmp_path / "m.onnx"))
        model = in_fp16(prepared, [HeldNode("n_second", "MatMul", "held")])

        stored = {name: value.dtype.name for name, value in model.graph.initializers.items() if value.dtype is not None}
        assert stored == {"w": "FLOAT", "w_fp16": "FLOAT16", "v": "FLOAT16"}
        assert [value.name for value in model.graph.inputs] == ["x"]
        save_model(model, tmp_path / "half.onnx", loads=True)
        rows = np.random.default_rng(2).normal(size=(3, 96)).astype(np.float32)
        half = onnx.load(tmp_path / "half.onnx")
        expected = open_session(prepared.proto, execution="exact").run(None, {"x": rows})[0]
        found = open_session(half, execution="exact").run(None, {"x": rows})[0]
        np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)

    def test_saved_again_the_weights_lie_beside_it(self, graph_builder: Any, tmp_path: Path) -> None:
        """Under a relative name, and not as a reference to where they came from."""
        prepared = prepare(external(drawn(graph_builder), tmp_path / "here" / "m.onnx", "part/w.bin"))
        save_model(prepared.proto, tmp_path / "there" / "m.onnx", loads=True)
        (tmp_path / "here" / "part" / "w.bin").unlink()

        assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["m.onnx", "m.onnx.data"]
        again = prepare(tmp_path / "there" / "m.onnx")
        assert (again.graph_hash, again.weights_hash) == (prepared.graph_hash, prepared.weights_hash)

    def test_the_folder_of_changed_weights_goes_with_the_model(self, graph_builder: Any, tmp_path: Path) -> None:
        """Nothing is left behind."""
        prepared = prepare(external(drawn(graph_builder, norm=True), tmp_path / "m.onnx"))
        folder = prepared.scratch.folder if prepared.scratch is not None else None
        assert folder is not None
        assert folder.is_dir()
        del prepared

        assert not folder.exists()

    @pytest.mark.parametrize(("harm", "error"), [("cut", "holds 100 from byte"), ("outside", "outside the directory")])
    def test_bad_external_data(self, harm: str, error: str, graph_builder: Any, tmp_path: Path) -> None:
        """Short files, and files that are none of the model's business."""
        path = external(drawn(graph_builder), tmp_path / "sub" / "m.onnx")
        if harm == "cut":
            data = path.parent / "w.bin"
            data.write_bytes(data.read_bytes()[:100])
        else:
            (path.parent / "w.bin").rename(tmp_path / "w.bin")
            model = onnx.load(path, load_external_data=False)
            for tensor in model.graph.initializer:
                tensor.external_data[0].value = "../w.bin"
            path.write_bytes(model.SerializeToString())

        with pytest.raises(ModelError, match=error):
            prepare(path)

    def test_missing_external_data(self, graph_builder: Any, tmp_path: Path) -> None:
        """Said before anything is read."""
        path = external(drawn(graph_builder), tmp_path / "m.onnx")
        (tmp_path / "w.bin").unlink()

        with pytest.raises(FileAccessError, match=r"external data 'w\.bin' is missing"):
            prepare(path)


def test_preparation_holds_one_large_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 MB of weights, each folded with a BatchNormalization or transposed, never more than one is in memory."""
    monkeypatch.setattr(graph_module, "PROTOBUF_LIMIT_BYTES", 2**24)
    rng, size, count = np.random.default_rng(0), 1448, 5
    nodes, weights = [], []
    for index in range(count):
        weights.append(numpy_helper.from_array(rng.normal(size=(size, size)).astype(np.float32), f"w{index}"))
        nodes.append(helper.make_node("Transpose", [f"w{index}"], [f"t{index}"], perm=[1, 0]))
        nodes.append(helper.make_node("Gemm", [f"x{index}", f"t{index}", "bias"], [f"g{index}"], alpha=0.5))
        nodes.append(helper.make_node("Relu", [f"g{index}"], [f"x{index + 1}"]))
    weights.append(numpy_helper.from_array(np.zeros(size, np.float32), "bias"))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name in ("x0", f"x{count}")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    path = external(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m"
    )
    del graph, weights
    tracemalloc.start()
    try:
        prepared = prepare(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert [node.op_type for node in prepared.proto.graph.node] == ["Gemm", "Relu"] * count
    assert peak < 2.5 * size * size * 4


@pytest.fixture
def spilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a model of a few kilobytes as one of a hundred megabytes."""
    monkeypatch.setattr(graph_module, "SPILLED_MODEL_BYTES", 10_000)
    monkeypatch.setattr(graph_module, "SPILLED_BYTES", 300)


@pytest.mark.usefixtures("spilled")
class TestSpilledModels:
    """Beyond 32 MiB of weights, and within the limit of one message."""

    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("opset", [9, 17])
    def test_the_graph_and_its_hashes_are_those_of_a_model_in_memory(
        self, norm: bool, opset: int, graph_builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Folded and transposed to the bit, with the large weights in a file, aligned to 64 bytes."""
        onnx.save(drawn(graph_builder, norm=norm, opset=opset), tmp_path / "m.onnx")
        found = prepare(tmp_path / "m.onnx")
        monkeypatch.setattr(graph_module, "SPILLED_MODEL_BYTES", 2**31)
        expected = prepare(tmp_path / "m.onnx")

        assert (found.graph_hash, found.weights_hash) == (expected.graph_hash, expected.weights_hash)
        outside = [tensor for tensor in found.proto.graph.initializer if is_outside(tensor)]
        assert len(outside) == 3
        assert not any(map(is_outside, expected.proto.graph.initializer))
        assert found.proto.ByteSize() < 4000 < expected.proto.ByteSize()
        assert all(int(entry.value) % 64 == 0 for t in outside for entry in t.external_data if entry.key == "offset")
        answers = [
            open_session(prepared.proto, execution="exact").run(None, {"x": IMAGES})[0]
            for prepared in (found, expected)
        ]
        np.testing.assert_array_equal(*answers)

    def test_the_file_goes_with_the_model(self, graph_builder: Any, tmp_path: Path) -> None:
        """Nothing is left in the temporary folder once nothing refers to it, a copy in onnx-ir's form included."""
        onnx.save(drawn(graph_builder), tmp_path / "m.onnx")
        prepared = prepare(tmp_path / "m.onnx")
        assert prepared.scratch is not None
        folder = prepared.scratch.folder

        assert folder is not None
        model = prepared.ir()
        del prepared
        gc.collect()
        assert folder.is_dir()
        del model
        gc.collect()
        assert not folder.exists()

    def test_a_full_temporary_folder_is_told_of(
        self, graph_builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With what the system says, and the way out."""
        onnx.save(drawn(graph_builder), tmp_path / "m.onnx")

        def full(**_: Any) -> str:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("engines.outside_weights.tempfile.mkdtemp", full)
        with pytest.raises(FileAccessError, match=r"No space left on device.*TMPDIR"):
            prepare(tmp_path / "m.onnx")

    def test_equal_weights_have_one_place(self, graph_builder: Any, tmp_path: Path) -> None:
        """So that the simplifier sees that two products are one, as it does in memory."""
        graph = graph_builder(1)
        x, values = graph.input("x", ("N", 96)), graph.rng.normal(size=(96, 96)).astype(np.float32)
        first, second = (graph.node("MatMul", [x, graph.constant(values)]) for _ in "ab")
        graph.node("Add", [first, second], "y")
        onnx.save(graph.model(["y"]), tmp_path / "m.onnx")

        assert [node.op_type for node in prepare(tmp_path / "m.onnx").proto.graph.node] == ["MatMul", "Add"]

    def test_what_branches_read_stays_in_memory(self, tmp_path: Path) -> None:
        """A model with branches is not spilled."""
        value = helper.make_tensor_value_info
        branches = {
            f"{name}_branch": helper.make_graph(
                [helper.make_node("MatMul", ["x", weight], [name])], name, [], [value(name, TensorProto.FLOAT, None)]
            )
            for name, weight in (("then", "a"), ("else", "b"))
        }
        weights = [numpy_helper.from_array(np.full((64, 64), k, np.float32), name) for k, name in enumerate("ab")]
        graph = helper.make_graph(
            [helper.make_node("If", ["which"], ["y"], **branches)],
            "g",
            [value("x", TensorProto.FLOAT, [1, 64]), value("which", TensorProto.BOOL, [])],
            [value("y", TensorProto.FLOAT, [1, 64])],
            weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, tmp_path / "m.onnx")

        assert not any(map(is_outside, prepare(tmp_path / "m.onnx").proto.graph.initializer))

    def test_calibrate_and_quantize_as_in_memory(
        self, graph_builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same scales to the bit, and the same file."""
        path = tmp_path / "m.onnx"
        onnx.save(drawn(graph_builder, norm=True), path)
        written = []
        for least in (10_000, 2**31):
            monkeypatch.setattr(graph_module, "SPILLED_MODEL_BYTES", least)
            calibration = calibrate(path, [{"x": IMAGES}])
            quantize(path, calibration, method="minmax", output=tmp_path / f"{least}.onnx")
            written.append((calibration.scales("entropy"), onnx.load(tmp_path / f"{least}.onnx").graph))

        (scales, found), (expected_scales, expected) = written
        assert scales == expected_scales
        assert list(found.node) == list(expected.node)
        constants = [{t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in (found, expected)]
        assert constants[0].keys() == constants[1].keys()
        for name, array in constants[0].items():
            np.testing.assert_array_equal(array, constants[1][name])
