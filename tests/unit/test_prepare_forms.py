"""Facts about the preparation of old and unusual exports: the same numbers as before, in the form that is wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.errors import UnsupportedModelError
from engines.graph import PreparedModel, prepare

Run = Callable[..., Any]

IMAGES = np.random.default_rng(3).normal(size=(2, 3, 8, 8)).astype(np.float32)
ROWS = np.random.default_rng(4).normal(size=(3, 4)).astype(np.float32)
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def normal(*shape: int, seed: int = 5) -> Any:
    return (np.random.default_rng(seed).normal(size=shape) * 0.3).astype(np.float32)


def batch_norm(graph: Any, x: str, channels: int, output: str | None = None) -> str:
    scale, variance = (graph.constant(graph.rng.uniform(0.5, 2, channels).astype(np.float32)) for _ in "sv")
    shift, mean = (graph.normal((channels,), 0.3) for _ in "bm")
    name: str = graph.node("BatchNormalization", [x, scale, shift, mean, variance], output, epsilon=1e-3)
    return name


class Checked:
    """Saves a drawn graph, prepares it, and compares every output with the file's in ONNX Runtime."""

    def __init__(self, folder: Path, run: Run) -> None:
        self._file, self._run = folder / "m.onnx", run

    def __call__(self, graph: Any, feeds: Mapping[str, Any], *outputs: Any, opset: int = 9, ir: int = 4) -> list[str]:
        """Return the operators of the prepared graph."""
        graph.save(self._file, outputs or ["y"], opset=opset, ir_version=ir)
        self.prepared: PreparedModel = prepare(self._file)
        expected, found = (self._run(model, feeds) for model in (self._file, self.prepared.proto))
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        return [node.op_type for node in self.prepared.proto.graph.node]

    def attributes(self, operator: str) -> dict[str, Any]:
        node = next(node for node in self.prepared.proto.graph.node if node.op_type == operator)
        return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


@pytest.fixture
def check(tmp_path: Path, run_model: Run) -> Checked:
    return Checked(tmp_path, run_model)


class TestBatchNormalization:
    """It goes into the weights before it, or after it where that is exact."""

    @pytest.mark.parametrize(("operator", "trans"), [("Gemm", 0), ("Gemm", 1), ("MatMul", 0)])
    def test_after_a_matrix_product(self, operator: str, trans: int, graph_builder: Any, check: Checked) -> None:
        """Gemm with alpha and beta, and MatMul, which becomes a Gemm to hold the bias."""
        graph = graph_builder()
        inputs = [graph.input("x", ("N", 4)), graph.normal((5, 4) if trans else (4, 5))]
        if operator == "Gemm":
            x = graph.node("Gemm", [*inputs, graph.normal((5,))], alpha=0.5, beta=2.0, transB=trans)
        else:
            x = graph.node("MatMul", inputs)
        batch_norm(graph, x, 5, "y")

        assert check(graph, {"x": ROWS}) == ["Gemm"]
        assert check.attributes("Gemm").get("beta", 1.0) == 1.0

    def test_after_matmul_and_its_bias(self, graph_builder: Any, check: Checked) -> None:
        """The Add stays and gets the new bias."""
        graph = graph_builder()
        x = graph.node("MatMul", [graph.input("x", ("N", 4)), graph.normal((4, 5))])
        batch_norm(graph, graph.node("Add", [graph.normal((5,)), x]), 5, "y")

        assert check(graph, {"x": ROWS}) == ["MatMul", "Add"]

    @pytest.mark.parametrize("group", [1, 2])
    def test_after_a_transposed_convolution(self, group: int, graph_builder: Any, check: Checked) -> None:
        """Each group has output channels of its own."""
        graph = graph_builder()
        x = graph.node("ConvTranspose", [graph.input("x", ("N", 4, 8, 8)), graph.normal((4, 3, 3, 3))], group=group)
        batch_norm(graph, x, 3 * group, "y")

        assert check(graph, {"x": normal(2, 4, 8, 8)}) == ["ConvTranspose"]

    @pytest.mark.parametrize(("group", "kernel"), [(1, 3), (2, 3), (4, 1)])
    def test_before_a_convolution_without_padding(
        self, group: int, kernel: int, graph_builder: Any, check: Checked
    ) -> None:
        """W (s x + t) + b = (W s) x + (b + W t), group by group."""
        graph = graph_builder()
        x = batch_norm(graph, graph.input("x", ("N", 4, 8, 8)), 4)
        graph.conv(x, (4, 8), "y", group=group, kernel=kernel, pads=[0] * 4)

        assert check(graph, {"x": normal(2, 4, 8, 8)}) == ["Conv"]

    def test_before_a_padded_convolution_it_stays(self, graph_builder: Any, check: Checked) -> None:
        """The padding adds zeros after it, which the folded form would shift."""
        graph = graph_builder()
        graph.conv(batch_norm(graph, graph.input(), 3), (3, 4), "y")

        assert check(graph, {"x": IMAGES}) == ["BatchNormalization", "Conv"]

    @pytest.mark.parametrize(("trans", "alpha"), [(0, 1.0), (1, 1.0), (1, 0.5)])
    def test_before_a_matrix_product(self, trans: int, alpha: float, graph_builder: Any, check: Checked) -> None:
        """Along the features that are summed over; alpha applies to the shift too."""
        graph = graph_builder()
        x = batch_norm(graph, graph.input("x", ("N", 4)), 4)
        weight = graph.normal((5, 4) if trans else (4, 5))
        graph.node("Gemm", [x, weight, graph.normal((5,))], "y", transB=trans, alpha=alpha)

        assert check(graph, {"x": ROWS}) == ["Gemm"]

    def test_a_bias_that_would_overflow_is_left_where_it_is(self, graph_builder: Any, tmp_path: Path) -> None:
        """No constant becomes infinite: the shift of 1e38, times weights of 100, is beyond FP32; so is 4 * 3e38."""
        graph = graph_builder()
        parameters = [graph.constant(np.full(4, value, np.float32)) for value in (1, 1e38, 0, 1)]
        x = graph.node("BatchNormalization", [graph.input("x", ("N", 4)), *parameters])
        x = graph.node("Gemm", [x, graph.constant(np.full((4, 5), 100, np.float32)), graph.normal((5,))])
        graph.node("Gemm", [x, graph.normal((5, 5)), graph.constant(np.full(5, 3e38, np.float32))], "y", beta=4.0)
        prepared = prepare(graph.save(tmp_path / "large.onnx", ["y"])).proto.graph

        assert [node.op_type for node in prepared.node] == ["BatchNormalization", "Gemm", "Gemm"]
        assert [attribute.f for attribute in prepared.node[2].attribute if attribute.name == "beta"] == [4.0]
        assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in prepared.initializer)

    @pytest.mark.parametrize("obstacle", ["second reader", "graph output", "time axis"])
    def test_where_it_cannot_be_folded_it_stays(self, obstacle: str, graph_builder: Any, check: Checked) -> None:
        """Another reader needs the value between; on rank 3 its channels are not those of the MatMul."""
        graph = graph_builder()
        shape = ("N", 5, 4) if obstacle == "time axis" else ("N", 4)
        x = graph.node("MatMul", [graph.input("x", shape), graph.normal((4, 5))], "product")
        batch_norm(graph, x, 5, "y")
        outputs = ["y"]
        if obstacle == "second reader":
            graph.node("Relu", [x], "z")
            outputs.append("z")
        if obstacle == "graph output":
            outputs.append(x)
        feeds = {"x": normal(3, 5, 4) if obstacle == "time axis" else ROWS}

        assert "BatchNormalization" in check(graph, feeds, *outputs)

    @pytest.mark.parametrize("opset", [9, 15])
    def test_training_mode_is_refused(self, opset: int, graph_builder: Any, tmp_path: Path) -> None:
        """Its result would depend on the other samples of a batch."""
        graph = graph_builder()
        x = graph.conv(graph.input(), (3, 4))
        parameters = [graph.constant(np.ones(4, np.float32)) for _ in range(4)]
        flag = {"training_mode": 1} if opset >= 14 else {}
        graph.nodes_of(
            "BatchNormalization", [x, *parameters], ["y", "m", "v", *(["p", "q"] if opset < 14 else [])], **flag
        )

        with pytest.raises(
            UnsupportedModelError, match=r"BatchNormalization \(n_y\) in training mode.*model\.eval\(\)"
        ):
            prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=opset))

    def test_before_a_stack_of_matrices(self, graph_builder: Any, check: Checked) -> None:
        """As many matrices as channels: their number is no axis of channels."""
        graph = graph_builder()
        normed = batch_norm(graph, graph.input("x", ("N", 4)), 4)
        graph.node("MatMul", [normed, graph.normal((4, 4, 5))], "y")

        assert check(graph, {"x": ROWS}) == ["BatchNormalization", "MatMul"]

    def test_behind_a_bias_that_adds_an_axis(self, graph_builder: Any, check: Checked) -> None:
        """The channels are not the columns of the product there."""
        graph = graph_builder()
        product = graph.node("MatMul", [graph.input("x", (3, 4)), graph.normal((4, 3))])
        batch_norm(graph, graph.node("Add", [product, graph.normal((1, 1, 3))]), 3, "y")

        assert "BatchNormalization" in check(graph, {"x": ROWS})


class TestGemm:
    """A factor between the dequantized weight and the product would keep TensorRT from INT8."""

    @pytest.mark.parametrize("trans", [0, 1])
    def test_alpha_and_beta_go_into_weight_and_bias(self, trans: int, graph_builder: Any, check: Checked) -> None:
        """Both become 1, which is the default."""
        graph = graph_builder()
        weight = graph.normal((5, 4) if trans else (4, 5))
        inputs = [graph.input("x", ("N", 4)), weight, graph.normal((5,))]
        graph.node("Gemm", inputs, "y", alpha=0.3, beta=2.0, transB=trans)

        assert check(graph, {"x": ROWS}) == ["Gemm"]
        assert not {"alpha", "beta"} & check.attributes("Gemm").keys()

    def test_a_computed_weight_keeps_its_factor(self, graph_builder: Any, check: Checked) -> None:
        """There is nothing to fold into."""
        graph = graph_builder()
        graph.node("Gemm", [graph.input("x", ("N", 4)), graph.input("w", (4, 5))], "y", alpha=0.5)
        check(graph, {"x": ROWS, "w": normal(4, 5)}, opset=11)

        assert check.attributes("Gemm")["alpha"] == 0.5


class TestResizing:
    """Upsample, and Resize before opset 11, interpolate from x / scale."""

    @pytest.mark.parametrize("opset", [7, 9, 10])
    @pytest.mark.parametrize(("mode", "scale"), [("nearest", 2.0), ("nearest", 3.0), ("nearest", 1.5), ("linear", 2.0)])
    def test_enlarging(self, opset: int, mode: str, scale: float, graph_builder: Any, check: Checked) -> None:
        """As an attribute, as an input, and as the operator's successor."""
        graph = graph_builder()
        x, scales = graph.conv(graph.input(), (3, 4)), [1.0, 1.0, scale, scale]
        if opset == 7:
            graph.node("Upsample", [x], "up", scales=scales, mode=mode)
        else:
            graph.node(
                "Upsample" if opset == 9 else "Resize",
                [x, graph.constant(np.asarray(scales, np.float32))],
                "up",
                mode=mode,
            )
        graph.conv("up", (4, 2), "y")

        assert check(graph, {"x": IMAGES}, opset=opset) == ["Conv", "Resize", "Conv"]
        assert check.prepared.proto.graph.node[1].output[0] == "up"

    def test_two_attributes_for_height_and_width(self, graph_builder: Any, tmp_path: Path, run_model: Run) -> None:
        """Up to opset 6, which ONNX Runtime does not run: nearest pixels are repeated."""
        graph = graph_builder()
        graph.node("Upsample", [graph.input("x", ("N", 3, 8, 8))], "y", height_scale=2.0, width_scale=3.0)
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=6, ir_version=4))

        expected = IMAGES.repeat(2, axis=2).repeat(3, axis=3)
        np.testing.assert_array_equal(run_model(prepared.proto, {"x": IMAGES})["y"], expected)

    @pytest.mark.parametrize("scale", [0.6, 0.5, 0.3])
    def test_shrinking_takes_the_next_value(self, scale: float, graph_builder: Any, check: Checked) -> None:
        """ONNX Runtime rounds up there."""
        graph = graph_builder()
        scales = graph.constant(np.asarray([1, 1, scale, scale], np.float32))
        graph.node("Resize", [graph.conv(graph.input(), (3, 4)), scales], "y", mode="nearest")

        check(graph, {"x": IMAGES}, opset=10)

    def test_enlarging_and_shrinking_at_once_is_refused(self, graph_builder: Any, tmp_path: Path) -> None:
        """Newer opsets have one rounding for all axes."""
        graph = graph_builder()
        graph.node(
            "Resize", [graph.input(), graph.constant(np.asarray([1, 1, 2, 0.5], np.float32))], "y", mode="nearest"
        )

        with pytest.raises(
            UnsupportedModelError, match=r"operator Resize \(n_y\) .*enlarges one axis and shrinks another"
        ):
            prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=10))

    def test_in_branches(self, graph_builder: Any, check: Checked) -> None:
        """Branches are raised with the graph around them."""
        graph = graph_builder()
        x, scales = graph.conv(graph.input(), (3, 4), "conv"), graph.constant(np.asarray([1, 1, 2, 2], np.float32))
        out = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
        then, otherwise = (
            helper.make_graph([helper.make_node("Upsample", [x, scales], ["o"], mode=mode)], mode, [], out)
            for mode in ("linear", "nearest")
        )
        graph.node("If", [graph.input("c", (), TensorProto.BOOL)], "y", then_branch=then, else_branch=otherwise)

        for choice in (True, False):
            assert check(graph, {"x": IMAGES, "c": np.asarray(choice)}) == ["Conv", "If"]

    def test_branches_of_different_sizes(self, graph_builder: Any, tmp_path: Path, run_model: Run) -> None:
        """The output's size is known at run time only, whatever one branch says."""
        graph = graph_builder()
        x, scales = graph.input("x", (2, 3, 8, 8)), graph.constant(np.asarray([1, 1, 2, 2], np.float32))
        out = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
        then = helper.make_graph([helper.make_node("Upsample", [x, scales], ["o"])], "then", [], out)
        otherwise = helper.make_graph([helper.make_node("Clip", [x], ["o"], min=0.0)], "else", [], out)
        graph.node("If", [graph.input("c", (), TensorProto.BOOL)], "y", then_branch=then, else_branch=otherwise)
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=9, ir_version=4))

        sizes = [run_model(prepared.proto, {"x": IMAGES, "c": np.asarray(c)})["y"].shape[2] for c in (True, False)]
        assert sizes == [16, 8]


class TestPadding:
    """`auto_pad` in numbers."""

    @pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
    @pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "MaxPool", "AveragePool"])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_static_sizes(self, mode: str, operator: str, stride: int, graph_builder: Any, check: Checked) -> None:
        """An even kernel, where the odd zero shows its side."""
        graph = graph_builder()
        x = graph.input("x", ("N", 3, 9, 7))
        settings: dict[str, Any] = {"auto_pad": mode, "strides": [stride, stride]}
        if operator.endswith("Pool"):
            graph.node(operator, [x], "y", kernel_shape=[4, 3], **settings)
        else:
            graph.node(operator, [x, graph.normal((3, 3, 4, 3))], "y", **settings)
        check(graph, {"x": normal(2, 3, 9, 7)}, opset=12)

        assert "auto_pad" not in check.attributes(operator)

    @pytest.mark.parametrize(("stride", "kept"), [(1, False), (2, True)])
    def test_sizes_known_at_run_time_only(self, stride: int, kept: bool, graph_builder: Any, check: Checked) -> None:
        """With a stride of 1 the padding does not depend on them; else the runtimes work it out."""
        graph = graph_builder()
        x = graph.input("x", ("N", 3, "H", "W"))
        graph.node("Conv", [x, graph.normal((4, 3, 4, 3))], "y", auto_pad="SAME_LOWER", strides=[stride, stride])
        check(graph, {"x": normal(2, 3, 9, 7)})

        assert ("auto_pad" in check.attributes("Conv")) == kept

    def test_dilation(self, graph_builder: Any, tmp_path: Path, run_model: Run) -> None:
        """ONNX Runtime refuses it together with SAME, so that ONNX's own implementation judges."""
        graph = graph_builder()
        x = graph.input("x", (2, 3, 9, 7))
        graph.node("Conv", [x, graph.normal((4, 3, 3, 3))], "y", auto_pad="SAME_UPPER", dilations=[2, 2])
        path = graph.save(tmp_path / "m.onnx", ["y"], opset=12)
        feeds = {"x": normal(2, 3, 9, 7)}
        padded = onnx.load(path)
        del padded.graph.node[0].attribute[:]
        padded.graph.node[0].attribute.extend(
            [helper.make_attribute("pads", [2, 2, 2, 2]), helper.make_attribute("dilations", [2, 2])]
        )
        expected: Any = ReferenceEvaluator(padded).run(None, feeds)

        np.testing.assert_allclose(run_model(prepare(path).proto, feeds)["y"], expected[0], rtol=1e-5, atol=1e-5)


class TestChannelsLast:
    """Transposes around convolutions."""

    def test_a_chain_needs_one_at_each_end(self, graph_builder: Any, check: Checked) -> None:
        """What lies between two convolutions is computed with the channels first, and the bias folded."""
        graph = graph_builder()
        x = graph.node("Transpose", [graph.input("x", ("N", 8, 8, 3))], perm=TO_FIRST)
        x = graph.node("Transpose", [graph.conv(x, (3, 4), bias=False)], perm=TO_LAST)
        x = graph.node("Relu", [graph.node("Add", [x, graph.normal((4,))])], "activated")
        x = graph.conv(graph.node("Transpose", [x], "first", perm=TO_FIRST), (4, 4))
        graph.node("Transpose", [x], "y", perm=TO_LAST)

        assert check(graph, {"x": normal(2, 8, 8, 3)}) == ["Transpose", "Conv", "Relu", "Conv", "Transpose"]
        assert check.prepared.proto.graph.node[2].output[0] == "first"

    def test_residuals_concatenations_and_reductions_along_an_axis(self, graph_builder: Any, check: Checked) -> None:
        """Axes move with the tensor; both branches of an Add are met."""
        graph = graph_builder()
        x = graph.node("Transpose", [graph.input("x", ("N", 8, 8, 3))], perm=TO_FIRST)
        a, b = (graph.node("Transpose", [graph.conv(x, (3, 4))], perm=TO_LAST) for _ in "ab")
        s = graph.node("Relu", [graph.node("Add", [a, b])])
        c = graph.conv(graph.node("Transpose", [s], perm=TO_FIRST), (4, 4))
        joined = graph.node("Concat", [graph.node("Transpose", [c], perm=TO_LAST), s], axis=3)
        z = graph.conv(graph.node("Transpose", [graph.node("Softmax", [joined], axis=-1)], perm=TO_FIRST), (8, 2))
        graph.node("Transpose", [z], "y", perm=TO_LAST)

        operators = Counter(check(graph, {"x": normal(2, 8, 8, 3)}, opset=13))
        assert operators["Transpose"] == 2

    def test_outputs_of_the_graph_keep_their_names_and_order(self, graph_builder: Any, check: Checked) -> None:
        """A tensor that is needed in both orders is written in both."""
        graph = graph_builder()
        x = graph.conv(graph.input(), (3, 4))
        x = graph.node("Relu", [graph.node("Transpose", [x], perm=TO_LAST)], "last")
        graph.node("Sigmoid", [graph.node("Transpose", [x], "first", perm=TO_FIRST)], "y")

        assert Counter(check(graph, {"x": IMAGES}, "last", "first", "y"))["Transpose"] == 1

    def test_what_would_need_more_of_them_stays(self, graph_builder: Any, check: Checked) -> None:
        """A head that ends in the other order is left as it was drawn."""
        graph = graph_builder()
        x = graph.node("Transpose", [graph.conv(graph.input(), (3, 4))], "turned", perm=TO_LAST)
        graph.node("Reshape", [graph.node("Relu", [x], "relu"), graph.constant(np.asarray([0, -1], np.int64))], "y")

        assert check(graph, {"x": IMAGES}) == ["Conv", "Transpose", "Relu", "Reshape"]
        assert [node.output[0] for node in check.prepared.proto.graph.node][1:3] == ["turned", "relu"]

    @settings(max_examples=15)
    @given(data=st.data())
    def test_any_element_wise_graph_between_transposes(self, data: st.DataObject, graph_builder: Any) -> None:
        """Whatever is moved, the outputs stay, and never are there more Transposes than before."""
        graph = graph_builder(data.draw(st.integers(0, 9)))
        tensors = [(graph.input("x", (2, 3, 4, 5)), 0)]  # and how many turns away from the first order it is
        for _ in range(data.draw(st.integers(2, 9))):
            (a, turned), other = (data.draw(st.sampled_from(tensors)) for _ in "ab")
            kind = data.draw(st.sampled_from(["Transpose", "Relu", "Add", "Both"]))
            if kind == "Transpose":
                tensors.append((graph.node("Transpose", [a], perm=[TO_LAST, TO_FIRST][turned]), 1 - turned))
            elif kind == "Both" and other[1] == turned:
                tensors.append((graph.node("Mul", [a, other[0]]), turned))
            elif kind == "Add":
                tensors.append((graph.node("Add", [graph.normal(((5, 3)[turned],)), a]), turned))
            else:
                tensors.append((graph.node("Relu", [a]), turned))
        names = dict.fromkeys([tensors[-1][0], data.draw(st.sampled_from(tensors[1:]))[0]])
        model = graph.model(names, opset=20)
        feeds = {"x": normal(2, 3, 4, 5)}
        expected = ReferenceEvaluator(model).run(None, feeds)
        prepared = prepare_model(model)
        found = ReferenceEvaluator(prepared.proto).run(None, feeds)

        for before, after in zip(expected, found, strict=True):
            np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
        before, after = (
            sum(node.op_type == "Transpose" for node in each.graph.node) for each in (model, prepared.proto)
        )
        assert after <= before


def prepare_model(model: onnx.ModelProto) -> PreparedModel:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.onnx"
        onnx.save(model, file)
        return prepare(file)


class TestWeights:
    """A weight is a constant, however the file spells it."""

    @pytest.mark.parametrize(
        ("operator", "stored", "attributes"),
        [
            ("Reshape", (4, 27), {}),
            ("Transpose", (3, 3, 3, 4), {"perm": [3, 2, 0, 1]}),
            ("Identity", (4, 3, 3, 3), {}),
            ("Unsqueeze", (3, 3, 3), {"axes": [0]}),
            ("Cast", (4, 3, 3, 3), {"to": TensorProto.FLOAT}),
            ("Constant", (4, 3, 3, 3), {}),
        ],
    )
    @pytest.mark.parametrize("listed", [False, True])
    def test_behind_an_operator(
        self, operator: str, stored: tuple[int, ...], attributes: dict[str, Any], listed: bool, graph_builder: Any,
        tmp_path: Path, run_model: Run,
    ) -> None:  # fmt: skip
        """Folded, also where old files list their constants among the inputs; its output channels come first."""
        graph, shape = graph_builder(), (1 if operator == "Unsqueeze" else 4, 3, 3, 3)
        x, array = graph.input(), normal(*stored)
        if operator == "Constant":
            weight = graph.node("Constant", [], value=numpy_helper.from_array(array))
        else:
            inputs = [graph.constant(array.astype(np.float16) if operator == "Cast" else array)]
            if operator == "Reshape":
                inputs.append(graph.constant(np.asarray([4, 3, 3, 3], np.int64)))
            weight = graph.node(operator, inputs, **attributes)
        graph.node("Conv", [x, weight], "y")
        model = graph.model(["y"], opset=9, ir_version=3 if listed else 4)
        if listed:
            model.graph.input.extend(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                for tensor in graph.initializers
            )
        onnx.save(model, tmp_path / "m.onnx")
        prepared = prepare(tmp_path / "m.onnx")

        assert [node.op_type for node in prepared.proto.graph.node] == ["Conv"]
        assert [tuple(tensor.dims) for tensor in prepared.proto.graph.initializer] == [shape]
        expected, found = (run_model(each, {"x": IMAGES})["y"] for each in (model, prepared.proto))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)

    def test_small_twins_are_one(self, graph_builder: Any, check: Checked) -> None:
        """Equal biases are stored once, under the name that is read first; equal numbers of another shape are not."""
        graph = graph_builder()
        zeros = [
            graph.constant(np.zeros(shape, np.float32), name) for name, shape in (("a", 4), ("b", 4), ("c", (4, 1, 1)))
        ]
        x = graph.input()
        for index, bias in enumerate(zeros[:2]):
            x = graph.node("Conv", [x, graph.normal((4, 4 if index else 3, 3, 3)), bias], pads=[1] * 4)
        graph.node("PRelu", [x, zeros[2]], "y")
        check(graph, {"x": IMAGES}, opset=20, ir=10)

        small = {tensor.name for tensor in check.prepared.proto.graph.initializer if np.prod(tensor.dims) == 4}
        assert small == {"a", "c"}


class TestOldOperators:
    """Attributes that became inputs, operators that changed their meaning, and those without a way to today."""

    @pytest.mark.parametrize(
        ("operator", "attributes", "opset"),
        [
            ("Clip", {"min": 0.0, "max": 6.0}, 9),
            ("Clip", {}, 9),
            ("Slice", {"starts": [1], "ends": [-1], "axes": [2]}, 9),
            ("Softmax", {"axis": 1}, 9),
            ("LogSoftmax", {"axis": 2}, 11),
            ("ReduceSum", {"axes": [2, 3], "keepdims": 0}, 11),
            ("ReduceL2", {"axes": [1]}, 17),
            ("Pad", {"pads": [0, 0, 1, 1, 0, 0, 2, 2], "mode": "reflect"}, 7),
            ("Dropout", {"ratio": 0.5}, 7),
            ("Dropout", {"ratio": 0.5}, 10),
            ("LRN", {"size": 3}, 7),
        ],
    )
    def test_the_same_values(
        self, operator: str, attributes: dict[str, Any], opset: int, graph_builder: Any, check: Checked
    ) -> None:
        """Whatever was an attribute then."""
        graph = graph_builder()
        graph.node(operator, [graph.conv(graph.input(), (3, 4))], "y", **attributes)
        check(graph, {"x": IMAGES}, opset=opset, ir=3)

    @pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    def test_recurrent_layers(self, operator: str, gates: int, graph_builder: Any, check: Checked) -> None:
        """They got a layout and lost nothing."""
        graph = graph_builder()
        weights = [graph.normal((1, gates * 6, width)) for width in (4, 6)]
        graph.nodes_of(operator, [graph.input("x", (5, "N", 4)), *weights], ["h", "y"], hidden_size=6)
        check(graph, {"x": normal(5, 2, 4)}, "h", "y", opset=7, ir=3)

    def test_group_normalization_of_the_opsets_in_which_it_was_withdrawn(
        self, graph_builder: Any, check: Checked
    ) -> None:
        """One scale per group is what an InstanceNormalization of the groups has."""
        graph = graph_builder()
        x = graph.conv(graph.input(), (3, 4))
        graph.node("GroupNormalization", [x, graph.normal((2,)), graph.normal((2,))], "y", num_groups=2, epsilon=1e-2)

        assert check(graph, {"x": IMAGES}, opset=18) == ["Conv", "Reshape", "InstanceNormalization", "Reshape"]

    def test_a_loop_with_old_operators_in_its_body(self, graph_builder: Any, check: Checked) -> None:
        """Loop bodies are raised with the graph around them."""
        graph = graph_builder()
        x = graph.conv(graph.input(), (3, 4))
        info = helper.make_tensor_value_info
        body = helper.make_graph(
            [
                helper.make_node("Unsqueeze", ["i"], ["row"], axes=[0]),
                helper.make_node("Cast", ["row"], ["number"], to=TensorProto.FLOAT),
                helper.make_node("Add", ["sum", "number"], ["next"]),
                helper.make_node("Identity", ["go"], ["on"]),
            ],
            "body",
            [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("sum", TensorProto.FLOAT, None)],
            [info("on", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, None)],
        )
        graph.node("Loop", [graph.constant(np.int64(3)), graph.constant(np.bool_(True)), x], "y", body=body)

        assert check(graph, {"x": IMAGES}, opset=11) == ["Conv", "Loop"]

    def test_a_scan_with_a_batch_axis_is_refused(self, graph_builder: Any, tmp_path: Path) -> None:
        """onnx's converter would leave it as it is, to fail at run time."""
        info = helper.make_tensor_value_info
        body = helper.make_graph(
            [helper.make_node("Add", ["s", "e"], ["t"]), helper.make_node("Identity", ["t"], ["o"])],
            "body",
            [info(name, TensorProto.FLOAT, [4]) for name in "se"],
            [info(name, TensorProto.FLOAT, [4]) for name in "to"],
        )
        graph = graph_builder()
        state, steps = graph.input("state", (2, 4)), graph.input("x", (2, 5, 4))
        graph.nodes_of("Scan", ["", state, steps], ["last", "y"], body=body, num_scan_inputs=1)

        with pytest.raises(UnsupportedModelError, match=r"opset 8 .*operator Scan \(n_last\) had a batch axis"):
            prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=8, ir_version=3))

    def test_a_hardmax_over_several_axes_is_refused(self, graph_builder: Any, tmp_path: Path) -> None:
        """onnx's converter would make it one over a single axis."""
        graph = graph_builder()
        graph.node("Hardmax", [graph.input()], "y")

        with pytest.raises(UnsupportedModelError, match=r"opset 12 .*operator Hardmax \(n_y\) works on all axes"):
            prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=12))

    def test_slopes_per_channel_from_before_broadcasting(
        self, graph_builder: Any, tmp_path: Path, run_model: Run
    ) -> None:
        """Up to opset 6 the slopes of PRelu lay along the channels without saying so."""
        graph = graph_builder()
        slopes = np.asarray([0.1, 0.2, 0.3], np.float32)
        graph.node("PRelu", [graph.input("x", (2, 3, 8, 8)), graph.constant(slopes)], "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"], opset=6, ir_version=3))

        expected = np.where(IMAGES < 0, IMAGES * slopes[:, None, None], IMAGES)
        np.testing.assert_allclose(run_model(prepared.proto, {"x": IMAGES})["y"], expected, rtol=1e-6)
