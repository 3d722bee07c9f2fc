"""Facts about `engines.graph` and `engines.opset`: one file, one prepared graph, with its names and its numbers."""

from __future__ import annotations

import cProfile
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibrators.errors import FileAccessError
from engines import graph as graph_module
from engines.errors import ModelError, UnsupportedModelError
from engines.graph import (
    exceeds_one_file,
    float_activations,
    open_session,
    prepare,
    save_model,
)
from engines.opset import MINIMUM_OPSET, RAISED_OPSET

IMAGES = np.random.default_rng(3).normal(size=(2, 3, 8, 8)).astype(np.float32)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def external(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


@pytest.fixture
def conv_norm_relu(graph_builder: Any) -> Any:
    """Conv -> BatchNormalization -> Relu -> Conv, drawn."""
    graph = graph_builder()
    x = graph.conv(graph.input(), (3, 4), "conv")
    parameters = [graph.constant(graph.rng.uniform(0.5, 2, 4).astype(np.float32), f"bn.{part}") for part in "sbmv"]
    x = graph.node("BatchNormalization", [x, *parameters], "norm", epsilon=1e-3)
    graph.conv(graph.node("Relu", [x], "relu"), (4, 2), "y")
    return graph


class TestHashes:
    """What calibrations are recognised by."""

    def test_same_file_gives_the_same_graph_in_every_process(self, conv_norm_relu: Any, tmp_path: Path) -> None:
        """Preparation does not depend on the order in which Python hashes strings."""
        path = conv_norm_relu.save(tmp_path / "m.onnx", ["y"])
        code = (
            "import sys; from engines.graph import prepare; p = prepare(sys.argv[1]);"
            "print(p.graph_hash, p.weights_hash, [n.name for n in p.proto.graph.node])"
        )
        answers = {
            subprocess.run(
                [sys.executable, "-c", code, str(path)],
                env=os.environ | {"PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        }
        here = prepare(path)

        assert len(answers) == 1
        assert answers.pop().startswith(f"{here.graph_hash} {here.weights_hash} ")

    def test_a_copy_of_the_file_hashes_alike(self, tiny_model: Path, tmp_path: Path) -> None:
        """The hashes know nothing of the file's name and place."""
        copy = tmp_path / "elsewhere" / "copy.onnx"
        copy.parent.mkdir()
        copy.write_bytes(tiny_model.read_bytes())
        first, second = prepare(tiny_model), prepare(copy)

        assert (first.graph_hash, first.weights_hash) == (second.graph_hash, second.weights_hash)

    def test_a_changed_weight_changes_the_hash_of_the_weights_only(self, tiny_model: Path, tmp_path: Path) -> None:
        """One weight's last bit is enough."""
        model = onnx.load(tiny_model)
        bias = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.bias")
        values = numpy_helper.to_array(bias).copy()
        values[3] = np.nextafter(values[3], np.float32(9))
        bias.CopyFrom(numpy_helper.from_array(values, "fc.bias"))
        onnx.save(model, tmp_path / "changed.onnx")
        first, second = prepare(tiny_model), prepare(tmp_path / "changed.onnx")

        assert first.graph_hash == second.graph_hash
        assert first.weights_hash != second.weights_hash

    def test_a_changed_attribute_changes_the_hash_of_the_graph_only(self, graph_builder: Any, tmp_path: Path) -> None:
        """LeakyRelu's slope is structure, not a weight."""
        prepared = []
        for slope in (0.1, 0.2):
            graph = graph_builder(1)
            graph.node("LeakyRelu", [graph.conv(graph.input(), (3, 4))], "y", alpha=slope)
            prepared.append(prepare(graph.save(tmp_path / f"{slope}.onnx", ["y"])))

        assert prepared[0].graph_hash != prepared[1].graph_hash
        assert prepared[0].weights_hash == prepared[1].weights_hash

    def test_the_shape_of_a_weight_is_part_of_its_hash(self, graph_builder: Any, tmp_path: Path) -> None:
        """The same 16 numbers as a 4 x 4 and as a 2 x 8 matrix are other weights."""
        hashes = set()
        for rows in (4, 2):
            graph = graph_builder(1)
            weight = graph.constant(np.arange(16, dtype=np.float32).reshape(rows, -1), "w")
            graph.node("MatMul", [graph.input("x", ("N", rows)), weight], "y")
            hashes.add(prepare(graph.save(tmp_path / f"{rows}.onnx", ["y"])).weights_hash)

        assert len(hashes) == 2

    def test_external_data_hashes_like_the_same_weights_in_the_file(self, tiny_model: Path, tmp_path: Path) -> None:
        """How a file stores its weights is no part of them."""
        first, second = prepare(tiny_model), prepare(external(onnx.load(tiny_model), tmp_path / "external.onnx"))

        assert (first.graph_hash, first.weights_hash) == (second.graph_hash, second.weights_hash)


class TestFolding:
    """Fewer nodes, the same numbers, the same names."""

    def test_batch_norm_is_folded_into_the_convolution(
        self, conv_norm_relu: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """No BatchNormalization is left, and the outputs are those of the file to float rounding."""
        path = conv_norm_relu.save(tmp_path / "m.onnx", ["y"])
        prepared = prepare(path)

        assert operators(prepared.proto) == ["Conv", "Relu", "Conv"]
        expected = run_model(path, {"x": IMAGES}, fetch=["norm", "relu", "y"])
        found = run_model(prepared.proto, {"x": IMAGES}, fetch=["norm", "relu", "y"])
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)

    def test_batch_norm_stays_where_the_convolution_is_read_elsewhere(
        self, conv_norm_relu: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """A convolution that is an output itself must keep its own values."""
        path = conv_norm_relu.save(tmp_path / "m.onnx", ["y", "conv"])
        prepared = prepare(path)

        assert "BatchNormalization" in operators(prepared.proto)
        expected, found = (run_model(model, {"x": IMAGES}) for model in (path, prepared.proto))
        assert list(found) == ["y", "conv"]
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)

    def test_tensor_names_survive(self, tiny_model: Path) -> None:
        """What the calibration names is what the user's file names."""
        prepared = prepare(tiny_model)

        assert [output for node in prepared.proto.graph.node for output in node.output] == [
            "conv", "relu", "flat", "logits"
        ]  # fmt: skip
        assert float_activations(prepared.ir()) == ["input", "conv", "relu", "flat", "logits"]

    def test_unused_inputs_and_the_order_of_inputs_and_outputs_stay(self, graph_builder: Any, tmp_path: Path) -> None:
        """The interface of the model is the file's, so that the same feeds fit."""
        graph = graph_builder()
        graph.input("mask", ("N", 4))
        graph.node("Relu", [graph.input("x")], "b")
        graph.input("step", (), TensorProto.INT64)
        graph.node("Sigmoid", ["b"], "a")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["b", "a"]))

        assert [value.name for value in prepared.proto.graph.input] == ["mask", "x", "step"]
        assert [value.name for value in prepared.proto.graph.output] == ["b", "a"]

    def test_local_functions_are_inlined(self, tmp_path: Path, run_model: Callable[..., Any]) -> None:
        """A function of the model becomes the standard operators in it."""
        model = onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
            g (float[2] x) => (float[2] y) { y = own.twice (x) }
            <domain: "own", opset_import: ["" : 20]>
            twice (a) => (b) { s = Relu (a)  b = Add (s, s) }"""
        )
        onnx.save(model, tmp_path / "m.onnx")
        prepared = prepare(tmp_path / "m.onnx")

        assert operators(prepared.proto) == ["Relu", "Add"]
        found = run_model(prepared.proto, {"x": np.float32([-1, 3])})
        np.testing.assert_array_equal(found["y"], np.float32([0, 6]))

    def test_editing_the_ir_leaves_the_prepared_model_alone(self, tiny_model: Path) -> None:
        """Every stage gets a copy of its own."""
        prepared = prepare(tiny_model)
        before = prepared.proto.SerializeToString()
        model = prepared.ir()
        model.graph.outputs[0].name = "renamed"

        assert prepared.proto.SerializeToString() == before


class TestLargeGraphs:
    """Thousands of nodes."""

    def test_the_work_grows_as_the_graph_does(self, graph_builder: Any, tmp_path: Path) -> None:
        """Four times the nodes of a residual chain cost about four times the calls of Python functions."""
        calls = []
        for blocks in (30, 120):
            graph = graph_builder()
            x = graph.input("x", ("N", 2, 4, 4))
            for _ in range(blocks):
                y = graph.node("Relu", [graph.conv(x, (2, 2), kernel=1)])
                x = graph.node("Relu", [graph.node("Add", [graph.conv(y, (2, 2), kernel=1), x])])
            path = graph.save(tmp_path / f"{blocks}.onnx", [x])
            profile = cProfile.Profile()
            profile.enable()
            prepared = prepare(path)
            profile.disable()
            assert len(prepared.proto.graph.node) == 5 * blocks
            calls.append(sum(entry.callcount for entry in profile.getstats()))

        assert calls[1] < 5 * calls[0]


class TestNames:
    """Decisions and exclusions speak of nodes by name."""

    def test_every_node_gets_a_unique_name(self, tmp_path: Path) -> None:
        """Unnamed nodes and doubles are named after their first output; other names stay."""
        nodes = [
            helper.make_node("Relu", ["x"], ["a"], name="twin"),
            helper.make_node("Sigmoid", ["a"], ["b"], name="twin"),
            helper.make_node("Tanh", ["b"], ["y"]),
        ]
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
        graph = helper.make_graph(nodes, "g", value[:1], value[1:])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m")

        assert [node.name for node in prepare(tmp_path / "m").proto.graph.node] == ["twin", "Sigmoid:b", "Tanh:y"]

    def test_documentation_and_source_paths_are_dropped_in_subgraphs_too(self, tmp_path: Path) -> None:
        """Exporters write the paths of the user's sources into nodes; a published model must not tell them."""
        model = onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 20]>
            g (bool c, float[2] x) => (float[2] y) {
              a = Relu (x)
              y = If (c) <then_branch = t () => (float[2] p) { p = Neg (a) },
                          else_branch = e () => (float[2] q) { q = Exp (a) }>
            }"""
        )
        inner = model.graph.node[1].attribute[0].g
        for item in (model.graph.node[0], inner.node[0], inner.output[0], model.graph.input[1]):
            item.doc_string = "/home/someone/net.py"
            item.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File /home/someone/net.py")
        inner.doc_string = model.graph.doc_string = model.doc_string = "/home/someone/net.py"
        onnx.save(model, tmp_path / "m.onnx")
        prepared = prepare(tmp_path / "m.onnx")

        assert operators(prepared.proto) == ["Relu", "If"]
        assert b"someone" not in prepared.proto.SerializeToString()


class TestOpsets:
    """Old graphs are raised, new ones left, impossible ones refused by the operator's name."""

    @pytest.mark.parametrize("opset", [7, 9, 12])
    def test_older_opsets_are_raised(
        self, opset: int, tmp_path: Path, graph_builder: Any, run_model: Callable[..., Any]
    ) -> None:
        """Attributes that became inputs (ReduceMean, Squeeze, Pad) give the same values after raising."""
        graph = graph_builder()
        x = graph.input()
        if opset < 11:
            x = graph.node("Pad", [x], pads=[0, 0, 1, 1, 0, 0, 1, 1])
        x = graph.node("Relu", [graph.conv(x, (3, 4), pads=[0] * 4)])
        x = graph.node("ReduceMean", [x], axes=[2], keepdims=1)
        graph.node("Squeeze", [x], "y", axes=[2])
        path = graph.save(tmp_path / "m.onnx", ["y"], opset=opset, ir_version=4)
        prepared = prepare(path)

        assert [entry.version for entry in prepared.proto.opset_import] == [RAISED_OPSET]
        expected, found = (run_model(model, {"x": IMAGES})["y"] for model in (path, prepared.proto))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("opset", [MINIMUM_OPSET, 20, 21])
    def test_opsets_from_19_on_are_left(self, opset: int, graph_builder: Any, tmp_path: Path) -> None:
        """Raising what need not be raised would only risk something."""
        graph = graph_builder()
        graph.conv(graph.input(), (3, 4), "y")

        assert prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=opset)).proto.opset_import[0].version == opset

    def test_an_operator_that_cannot_be_raised_is_named(self, graph_builder: Any, tmp_path: Path) -> None:
        """BatchNormalization with spatial=0 exists up to opset 8 and has no newer form."""
        graph = graph_builder()
        graph.conv(graph.input("x", (1, 3, 4, 4)), (3, 3), "a")
        parameters = [graph.constant(np.ones((3, 4, 4), np.float32)) for _ in range(4)]
        graph.node("BatchNormalization", ["a", *parameters], "y", spatial=0)
        path = graph.save(tmp_path / "m.onnx", ["y"], opset=8, ir_version=4)

        with pytest.raises(
            UnsupportedModelError, match=r"opset 8 .*BatchNormalization cannot be converted \(.*spatial"
        ):
            prepare(path)

    @pytest.mark.parametrize(
        ("operator", "opset", "expected"),
        [
            ("Affine", 7, "the operator Affine, which ONNX opset 7 does not have"),  # experimental, withdrawn
            ("Upsample", 11, "the operator Upsample, which was removed before its opset 11"),
            ("Frobnicate", 20, "the operator Frobnicate, which ONNX opset 20 does not have"),
        ],
    )
    def test_unknown_operators_are_named(
        self, operator: str, opset: int, expected: str, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Withdrawn, removed and invented operators are refused before any work."""
        graph = graph_builder()
        graph.node(operator, [graph.input()], "y")

        with pytest.raises(UnsupportedModelError, match=expected):
            prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=opset, ir_version=4))

    def test_operators_of_an_extension_library_are_named(self, graph_builder: Any, tmp_path: Path) -> None:
        """ONNX Runtime could not run them, and would say so only when the calibration starts."""
        graph = graph_builder()
        graph.node("DecodeImage", [graph.input()], "y", domain="com.microsoft.extensions")
        model = graph.model(["y"])
        model.opset_import.add(domain="com.microsoft.extensions", version=1)
        onnx.save(model, tmp_path / "m.onnx")

        with pytest.raises(UnsupportedModelError, match=r"DecodeImage of the domain 'com\.microsoft\.extensions'"):
            prepare(tmp_path / "m.onnx")

    def test_opsets_from_the_future_are_refused(self, graph_builder: Any, tmp_path: Path) -> None:
        """Both numbers are named."""
        graph = graph_builder()
        graph.node("Relu", [graph.input()], "y")
        newest = onnx.defs.onnx_opset_version()

        with pytest.raises(UnsupportedModelError, match=f"opset {newest + 1}; .* up to {newest}"):
            prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=newest + 1))

    @pytest.mark.parametrize("opset", [8, 19])
    def test_initializers_that_are_inputs_become_constants(
        self, opset: int, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """IR version 3 lists every weight among the inputs; only the image remains one."""
        graph = graph_builder()
        graph.conv(graph.input(), (3, 4), "y")
        model = graph.model(["y"], opset=opset, ir_version=3)
        for tensor in graph.initializers:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        onnx.save(model, tmp_path / "m.onnx")
        prepared = prepare(tmp_path / "m.onnx")

        assert [value.name for value in prepared.proto.graph.input] == ["x"]
        assert prepared.proto.ir_version >= 4
        expected, found = (run_model(each, {"x": IMAGES})["y"] for each in (model, prepared.proto))
        np.testing.assert_array_equal(found, expected)


class TestBadFiles:
    """One error that says what is wrong with the file."""

    @pytest.mark.parametrize(("missing", "found"), [("nothing.onnx", "there is no file"), (".", "is a folder")])
    def test_a_missing_file_or_a_folder(self, missing: str, found: str, tmp_path: Path) -> None:
        """There is no file to read."""
        with pytest.raises(FileAccessError, match=found):
            prepare(tmp_path / missing)

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.999])
    def test_a_truncated_file(self, share: float, tiny_model: Path, tmp_path: Path) -> None:
        """An interrupted download is not an ONNX model."""
        whole = tiny_model.read_bytes()
        (tmp_path / "m.onnx").write_bytes(whole[: int(len(whole) * share)])

        with pytest.raises(ModelError, match=r"m\.onnx' is not an ONNX model"):
            prepare(tmp_path / "m.onnx")

    def test_other_kinds_of_files(self, tmp_path: Path) -> None:
        """Text and archives (a .pt file is one) are told apart from models."""
        (tmp_path / "m.onnx").write_text("model: resnet\n" * 20)
        with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
            archive.writestr("data.pkl", b"\x80\x02}q\x00.")

        for name in ("m.onnx", "m.pt"):
            with pytest.raises(ModelError, match="is not an ONNX model"):
                prepare(tmp_path / name)

    def test_a_graph_that_reads_an_undefined_tensor(self, graph_builder: Any, tmp_path: Path) -> None:
        """The checker's own words name it."""
        graph = graph_builder()
        graph.input()
        graph.node("Relu", ["nowhere"], "y")

        with pytest.raises(ModelError, match=r"is not a valid ONNX model: .*nowhere"):
            prepare(graph.save(tmp_path / "m.onnx", ["y"]))

    def test_a_sequence_output(self, graph_builder: Any, tmp_path: Path) -> None:
        """Inputs and outputs are tensors; anything else is named with its kind."""
        graph = graph_builder()
        graph.node("SplitToSequence", [graph.input()], "pieces")
        output = helper.make_tensor_sequence_value_info("pieces", TensorProto.FLOAT, None)

        with pytest.raises(UnsupportedModelError, match="'pieces' has the type sequence; expected a tensor"):
            prepare(graph.save(tmp_path / "m.onnx", [output]))

    def test_missing_external_data(self, tiny_model: Path, tmp_path: Path) -> None:
        """The file that is missing is named."""
        path = external(onnx.load(tiny_model), tmp_path / "e.onnx")
        (tmp_path / "e.onnx.data").unlink()

        with pytest.raises(FileAccessError, match=r"its external data 'e\.onnx\.data' is missing"):
            prepare(path)

    def test_short_external_data(self, tiny_model: Path, tmp_path: Path) -> None:
        """A cut weight file is no model."""
        path = external(onnx.load(tiny_model), tmp_path / "e.onnx")
        data = tmp_path / "e.onnx.data"
        data.write_bytes(data.read_bytes()[:100])

        with pytest.raises(ModelError, match=r"Cannot read the model .*100"):
            prepare(path)

    def test_external_data_outside_the_folder_is_not_read(self, tiny_model: Path, tmp_path: Path) -> None:
        """A model must not read other files of the user."""
        (tmp_path / "sub").mkdir()
        path = external(onnx.load(tiny_model), tmp_path / "sub" / "e.onnx")
        (tmp_path / "sub" / "e.onnx.data").rename(tmp_path / "e.onnx.data")
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            tensor.external_data[0].value = "../e.onnx.data"
        path.write_bytes(model.SerializeToString())

        with pytest.raises(ModelError, match="outside the directory"):
            prepare(path)


class TestSaving:
    """One file, or a file and its weights."""

    def test_a_saved_model_prepares_to_itself(self, tiny_model: Path, tmp_path: Path) -> None:
        """Preparation is idempotent, and nothing else lies in the folder."""
        prepared = prepare(tiny_model)
        save_model(prepared.proto, tmp_path / "out" / "m.onnx")
        again = prepare(tmp_path / "out" / "m.onnx")

        assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.onnx"]
        assert (again.graph_hash, again.weights_hash) == (prepared.graph_hash, prepared.weights_hash)

    def test_models_beyond_the_limit_of_one_file(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_model: Callable[..., Any]
    ) -> None:
        """Weights go to NAME.data beside the model; the model in memory, its session and its copy stay the same."""
        whole = prepare(tiny_model)
        monkeypatch.setattr(graph_module, "PROTOBUF_LIMIT_BYTES", 2000)
        prepared = prepare(tiny_model)
        assert exceeds_one_file(prepared.proto)
        before = prepared.proto.SerializeToString()
        save_model(prepared.proto, tmp_path / "out" / "m.onnx")
        session = open_session(prepared.proto, execution="exact")

        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["m.onnx", "m.onnx.data"]
        assert (tmp_path / "out" / "m.onnx").stat().st_size < 2000
        assert prepared.proto.SerializeToString() == before
        assert (prepared.graph_hash, prepared.weights_hash) == (whole.graph_hash, whole.weights_hash)
        expected = run_model(tiny_model, {"input": IMAGES})["logits"]
        np.testing.assert_allclose(session.run(None, {"input": IMAGES})[0], expected, rtol=1e-6, atol=1e-6)
        found = run_model(tmp_path / "out" / "m.onnx", {"input": IMAGES})["logits"]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
