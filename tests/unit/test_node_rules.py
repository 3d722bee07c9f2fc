"""Facts about `engines.node_rules`: which nodes are quantized, on graphs drawn by hand, one group for each rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import ModelError
from engines.graph import prepare
from engines.node_facts import gemm_size
from engines.node_rules import RULES, weighted_nodes
from engines.node_rules_kernels import few_channels, few_channels_per_group
from engines.placement import Decision, Target, operands
from engines.placement_options import PlacementOptions
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import insert_qdq


def decided(
    graph: Any, folder: Path, outputs: list[str], *, target: Target = "tensorrt", **options: Any
) -> dict[str, Decision]:
    """Decisions by node, of the graph as it is prepared."""
    model = prepare(graph.save(folder / "m.onnx", outputs)).ir()
    chosen, decisions = weighted_nodes(model, PlacementOptions(**options), target=target)
    assert [node.name for node in chosen] == [d.node for d in decisions if d.quantized]
    return {decision.node: decision for decision in decisions}


def as_drawn(graph: Any, outputs: list[str]) -> ir.Model:
    """The graph as it stands, not prepared, with its types inferred."""
    proto = graph.model([onnx.ValueInfoProto(name=name) for name in outputs])
    proto.opset_import.add(domain="com.microsoft", version=1)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def only(decisions: dict[str, Decision] | list[Decision]) -> Decision:
    (decision,) = decisions.values() if isinstance(decisions, dict) else decisions
    return decision


class TestRules:
    """The list of rules as a whole."""

    def test_every_rule_says_what_it_is_for(self) -> None:
        """Names are unique words, `why` is one sentence, a source is given, and kernels concern TensorRT alone."""
        assert len({rule.name for rule in RULES}) == len(RULES)
        for rule in RULES:
            assert rule.name == rule.name.lower().replace(" ", "-")
            assert rule.why.endswith(".")
            assert rule.why.count(". ") == 0
            assert rule.source
        assert [rule.name for rule in RULES if rule.targets == ("tensorrt",)] == [
            "few-channels", "few-channels-per-group", "matrix-vector", "small-product"
        ]  # fmt: skip

    def test_the_first_rule_that_answers_decides(self, graph_builder: Any, tmp_path: Path) -> None:
        """A convolution with few channels and a computed kernel cannot be quantized: that comes first."""
        graph = graph_builder()
        graph.node("Conv", [graph.input(), graph.input("kernel", (5, 3, 3, 3))], "y")

        assert only(decided(graph, tmp_path, ["y"])).rule == "not-quantizable"


class TestFewChannels:
    """Convolutions that do not fill a tensor core."""

    @pytest.mark.parametrize(
        ("channels", "kernel", "first", "reason"),
        [
            ((16, 16), (3, 3), False, None),
            ((3, 16), (3, 3), False, None),
            ((64, 5), (1, 1), False, None),
            ((3, 8), (3, 3), True, None),
            ((8, 5), (3, 3), True, None),
            (
                (3, 8), (3, 3), False,
                "Conv with 3 input channels and 8 output channels: neither reaches 16, and it is not the first layer",
            ),
            ((3, 5), (3, 3), True, "Conv with 3 input channels and 5 output channels: neither is a multiple of 8"),
            ((17, 12), (3, 3), False, "Conv with 17 input channels and 12 output channels: neither is a multiple of 8"),
            (
                (1, 8), (5, 4), True,
                (
                    "Conv with 1 input channel and 8 output channels: fewer than 16 of one, and its kernel 5 x 4 is "
                    "not square"
                ),
            ),
            ((16, 32), (1, 7), False, None),
        ],
    )  # fmt: skip
    def test_convolutions(
        self,
        channels: tuple[int, int],
        kernel: tuple[int, int],
        first: bool,
        reason: str | None,
        graph_builder: Any,
        tmp_path: Path,
    ) -> None:
        """16 on both sides; else a multiple of 8, one side of 16 or the first layer, and a square kernel."""
        graph = graph_builder()
        x = graph.input("x", ("N", channels[0], 16, 16))
        x = x if first else graph.node("Sigmoid", [x])
        graph.node("Conv", [x, graph.normal((channels[1], channels[0], *kernel))], "y")
        decision = only(decided(graph, tmp_path, ["y"]))

        assert decision.quantized == (reason is None)
        assert (decision.rule, decision.reason) == (("few-channels", reason) if reason else decision_of_all())
        assert only(decided(graph, tmp_path, ["y"], target="cpu")).quantized

    @pytest.mark.parametrize(
        ("operator", "arguments", "attributes"),
        [("Transpose", [], {"perm": [0, 3, 1, 2]}), ("Pad", [np.int64([0, 0, 0, 1, 0, 0, 0, 1])], {"mode": "edge"})],
    )
    def test_the_first_layer_may_stand_behind_operators_that_move_values(
        self, operator: str, arguments: list[Any], attributes: Any, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Images that come with their channels last, or are padded, are still images."""
        graph = graph_builder()
        shape = (1, 9, 8, 3) if operator == "Transpose" else (1, 3, 9, 8)
        inputs = [graph.input("x", shape), *map(graph.constant, arguments)]
        graph.conv(graph.node(operator, inputs, **attributes), (3, 8), "y", auto_pad="SAME_UPPER", pads=[0] * 4)
        graph.nodes[-1].attribute.remove(next(a for a in graph.nodes[-1].attribute if a.name == "pads"))

        assert decided(graph, tmp_path, ["y"])["n_y"].quantized

    @pytest.mark.parametrize(
        ("channels", "groups", "expected"),
        [
            ((16, 4), 1, None), ((8, 8), 1, "neither reaches 16"), ((3, 8), 1, "neither reaches 16"),
            ((20, 12), 1, "neither is a multiple of 8"), ((32, 32), 2, None),
            ((16, 16), 16, "ConvTranspose in 16 groups of 1 input channel and 1 output channel: INT8 takes 16 of each"),
            ((32, 16), 2, "2 groups of 16 input channels and 8 output channels"),
        ],
    )  # fmt: skip
    def test_transposed_convolutions(
        self, channels: tuple[int, int], groups: int, expected: str | None, graph_builder: Any, tmp_path: Path
    ) -> None:
        """The same for [C, K, ...] weights, the first layer no exception; with groups 16 on both sides of each."""
        graph = graph_builder()
        x = graph.input("x", ("N", channels[0], 8, 8))
        graph.node("ConvTranspose", [x, graph.normal((channels[0], channels[1] // groups, 2, 2))], "y", group=groups)
        decision = only(decided(graph, tmp_path, ["y"]))

        assert decision.quantized == (expected is None)
        assert expected is None or expected in decision.reason

    @pytest.mark.parametrize(
        ("channels", "groups", "kernel", "expected"),
        [
            ((8, 8), 8, (3, 3), None), ((24, 24), 24, (5, 5), None), ((8, 8), 8, (3,), None),
            ((64, 64), 4, (1, 1), None),
            ((12, 12), 12, (3, 3), "12 groups of 1 input channel with 12 output channels in all: the outputs are no"),
            ((32, 32), 32, (1, 1), "its kernel 1 x 1 is smaller than 3"),
            ((32, 32), 32, (1, 7), "its kernel 1 x 7 is smaller than 3"),
        ],
    )  # fmt: skip
    def test_grouped_convolutions(
        self,
        channels: tuple[int, int],
        groups: int,
        kernel: tuple[int, ...],
        expected: str | None,
        graph_builder: Any,
        tmp_path: Path,
    ) -> None:
        """Depthwise 3 x 3 with a multiple of 8 stays; without, or with a smaller kernel, it does not."""
        graph = graph_builder()
        x = graph.node("Sigmoid", [graph.input("x", ("N", channels[0], *(16 for _ in kernel)))])
        graph.node("Conv", [x, graph.normal((channels[1], channels[0] // groups, *kernel))], "y", group=groups)
        decision = only(decided(graph, tmp_path, ["y"]))

        assert (decision.quantized, decision.rule == "few-channels-per-group") == (
            expected is None,
            expected is not None,
        )
        assert expected is None or expected in decision.reason
        assert only(decided(graph, tmp_path, ["y"], target="cpu")).quantized

    @given(
        outputs=st.integers(1, 40),
        inputs=st.integers(1, 40),
        groups=st.sampled_from([1, 2, 4, 8]),
        kernel=st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=3),
        first=st.booleans(),
    )
    def test_they_are_modelopts(self, outputs: int, inputs: int, groups: int, kernel: list[int], first: bool) -> None:
        """The condition that ModelOpt's find_nodes_from_convs_to_exclude states, for convolutions of any size."""
        outputs *= groups
        x = ir.val("x", ir.DataType.FLOAT, [1, inputs * groups, *(8 for _ in kernel)])
        before = [] if first else [ir.node("Relu", [x])]
        weight = ir.val("w", const_value=ir.tensor(np.zeros((outputs, inputs, *kernel), np.float32)))
        node = ir.node("Conv", [x if first else before[0].outputs[0], weight], attributes={"group": groups})
        ir.Graph([x], node.outputs, nodes=[*before, node])

        enough = outputs >= 16 and inputs >= 16
        plain = (outputs % 8 == 0 or inputs % 8 == 0) and (first or outputs >= 16 or inputs >= 16)
        square = len(set(kernel)) == 1
        grouped = outputs % 8 == 0 and min(kernel) >= 3
        stays = enough or (plain and square if groups == 1 else grouped)
        context: Any = None
        assert (few_channels(node, context) is None and few_channels_per_group(node, context) is None) == stays


def decision_of_all() -> tuple[str, str]:
    return "weighted-inputs", "all inputs of weighted operators are quantized"


class TestMatrixVector:
    """Products that read every weight for one multiplication."""

    @pytest.mark.parametrize(
        ("data", "weight", "expected"),
        [
            ((1, 64), (64, 32), "MatMul of [1, 64] x [64, 32]: with a single row"),
            (("N", 64), (64, 32), None), ((2, 64), (64, 32), None),
            ((1, 1, 64), (64, 32), "[1, 64] x [64, 32]: with a single row"), ((1, 5, 64), (64, 32), None),
            (("N", 1, 64), (64, 32), None), ((64,), (64, 32), "[1, 64] x [64, 32]: with a single row"),
            (("N", 64), (64, 1), "[?, 64] x [64, 1]: with a single column"),
            ((8, 64), (64,), "[8, 64] x [64, 1]: with a single column"),
            ((3, 1, 64), (3, 64, 32), "[1, 64] x [64, 32]: with a single row"),
        ],
    )  # fmt: skip
    def test_matrix_products(
        self, data: tuple[Any, ...], weight: tuple[int, ...], expected: str | None, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Leading axes are rows, and an open size does not count as 1."""
        graph = graph_builder()
        graph.node("MatMul", [graph.input("x", data), graph.normal(weight)], "y")
        decision = only(decided(graph, tmp_path, ["y"]))

        assert (decision.quantized, decision.rule == "matrix-vector") == (expected is None, expected is not None)
        assert expected is None or expected in decision.reason
        assert only(decided(graph, tmp_path, ["y"], target="cpu")).quantized

    def test_the_classifier_of_a_fixed_batch_of_one(self, graph_builder: Any, tmp_path: Path) -> None:
        """It is such a product whatever its number of classes; with an open batch it is none."""
        for batch, quantized in ((1, False), ("N", True), (8, True)):
            graph = graph_builder()
            graph.gemm(graph.input("x", (batch, 512)), (512, 1000), "logits")
            assert only(decided(graph, tmp_path, ["logits"])).quantized == quantized

    @pytest.mark.parametrize(
        ("left", "right", "size"),
        [
            ((20, 16), "x", "[20, 16] x [16, 24]"),
            ((1, 16), "x", "[1, 16] x [16, 24]"),
            ((16,), "x", "[1, 16] x [16, 24]"),
        ],
    )
    def test_a_weight_on_the_left(
        self, left: tuple[int, ...], right: str, size: str, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Then the weight has the rows."""
        graph = graph_builder()
        graph.input("x", (3, 16, 24))
        graph.node("MatMul", [graph.normal(left), right], "y")
        model = prepare(graph.save(tmp_path / "m.onnx", ["y"])).ir()

        assert str(gemm_size(model.graph[0])) == size
        assert (weighted_nodes(model)[1][0].rule == "matrix-vector") == size.startswith("[1,")

    @pytest.mark.parametrize("transposed_data", [0, 1])
    @pytest.mark.parametrize("transposed_weight", [0, 1])
    def test_the_sizes_of_a_gemm(
        self, transposed_data: int, transposed_weight: int, graph_builder: Any, tmp_path: Path
    ) -> None:
        """transA and transB swap the axes of their operands."""
        graph = graph_builder()
        x = graph.input("x", (64, 30) if transposed_data else (30, 64))
        weight = graph.normal((40, 64) if transposed_weight else (64, 40))
        graph.node("Gemm", [x, weight], "y", transA=transposed_data, transB=transposed_weight)
        model = prepare(graph.save(tmp_path / "m.onnx", ["y"])).ir()

        assert str(gemm_size(model.graph[0])) == "[30, 64] x [64, 40]"


class TestSmallProduct:
    """Products that do not fill a tensor core."""

    @pytest.mark.parametrize(
        ("features", "expected"),
        [
            ((64, 16), None), ((16, 64), None),
            ((64, 10), "Gemm of [?, 64] x [64, 10]: INT8 tensor cores want 16 columns or more"),
            ((8, 64), "Gemm of [?, 8] x [8, 64]: INT8 tensor cores want 16 inner size or more"),
        ],
    )  # fmt: skip
    def test_inner_size_and_columns(
        self, features: tuple[int, int], expected: str | None, graph_builder: Any, tmp_path: Path
    ) -> None:
        """16 of each; the CPU's kernels do not mind."""
        graph = graph_builder()
        graph.gemm(graph.input("x", ("N", features[0])), features, "y")
        decision = only(decided(graph, tmp_path, ["y"]))

        assert (decision.rule, decision.reason) == (("small-product", expected) if expected else decision_of_all())
        assert only(decided(graph, tmp_path, ["y"], target="cpu")).quantized


def attention(graph: Any, *, keys: int | str = 64, mask: str | None = None, scaled: bool = True) -> str:
    """One head: project, scores, (scale), (mask), Softmax, values."""
    x = graph.input("x", (2, keys, 32))
    query, key, value = (graph.node("MatMul", [x, graph.normal((32, 32))], name) for name in ("q", "k", "v"))
    scores = graph.node("MatMul", [query, graph.node("Transpose", [key], perm=[0, 2, 1])], "scores")
    if scaled:
        scores = graph.node("Div", [scores, graph.constant(np.float32(5.6))])
    if mask is not None:
        scores = graph.node("Add", [scores, mask], "masked")
    return str(graph.node("MatMul", [graph.node("Softmax", [scores]), value], "context"))


class TestAttention:
    """Products of two activations."""

    def test_they_stay_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """On both targets; the projections around them do not, and `include` does not change that."""
        for options in ({}, {"target": "cpu"}, {"target": "cpu", "attention": "int8"}, {"include": [".*"]}):
            graph = graph_builder()
            found = decided(graph, tmp_path, [attention(graph)], **options)
            assert [name for name, decision in found.items() if not decision.quantized] == ["n_scores", "n_context"]
            assert {found[name].rule for name in ("n_scores", "n_context")} == {"attention"}
            assert found["n_scores"].reason.startswith("both operands are activations")

    @pytest.mark.parametrize(("mask", "scaled"), [(None, True), (None, False), ("mask", True)])
    def test_the_option_quantizes_them(
        self, mask: str | None, scaled: bool, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Both products of a plain attention, and of one whose scaled scores get a mask."""
        graph = graph_builder()
        if mask is not None:
            graph.input(mask, (2, 1, 64))
        found = decided(graph, tmp_path, [attention(graph, mask=mask, scaled=scaled)], attention="int8")

        assert all(decision.quantized for decision in found.values())
        assert (found["n_scores"].rule, found["n_context"].rule) == ("attention", "attention")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"mask": "mask", "scaled": False}, "'n_masked' adds a computed mask to the bare scores"),
            ({"keys": 513}, "attention over 513 keys"),
            ({"keys": 1}, "MatMul of [1, 32] x [32, 1]: with a single row"),
            ({"keys": 8}, "MatMul of [8, 32] x [32, 8]: INT8 tensor cores want 16 columns or more"),
        ],
    )
    def test_where_the_option_does_not_reach(
        self, options: dict[str, Any], expected: str, graph_builder: Any, tmp_path: Path
    ) -> None:
        """A mask right on the scores, long sequences, and products too small for a tensor core."""
        graph = graph_builder()
        if "mask" in options:
            graph.input("mask", (2, 1, 64))
        found = decided(graph, tmp_path, [attention(graph, **options)], attention="int8")

        assert not found["n_scores"].quantized
        assert not found["n_context"].quantized
        assert expected in found["n_scores"].reason

    def test_a_product_away_from_any_softmax(self, graph_builder: Any, tmp_path: Path) -> None:
        """Masks of an instance segmentation, say: the option is about attention alone."""
        graph = graph_builder()
        x = graph.input("x", (2, 64, 64))
        graph.node("MatMul", [graph.node("Sigmoid", [x]), graph.node("Tanh", [x])], "y")
        decision = only(decided(graph, tmp_path, ["y"], attention="int8"))

        assert not decision.quantized
        assert "there is no Softmax beside it" in decision.reason


class TestTables:
    """Embeddings."""

    @pytest.fixture
    def tied(self, graph_builder: Any) -> Any:
        """Token embedding, and logits from the same table."""
        graph = graph_builder()
        table = graph.normal((48, 32), name="table")
        tokens = graph.node("Gather", [table, graph.input("ids", ("N",), onnx.TensorProto.INT64)], "tokens")
        graph.node("Gemm", [graph.node("Tanh", [tokens], "hidden"), table], "logits", transB=1)
        return graph

    def test_the_look_up_stays_float_and_the_product_does_not(self, tied: Any, tmp_path: Path) -> None:
        """Both are listed; the product's reason tells of the look-up."""
        found = decided(tied, tmp_path, ["logits"])

        assert (found["n_tokens"].op_type, found["n_tokens"].rule) == ("Gather", "embedding")
        assert "a table of 48 x 32 computes nothing" in found["n_tokens"].reason
        assert found["n_logits"].quantized
        assert found["n_logits"].reason.endswith(
            "'n_tokens' looks up in the same weight, and goes on reading it in float"
        )

    def test_the_file_holds_both_forms(self, tied: Any, tmp_path: Path) -> None:
        """The Gather reads the FP32 table, the Gemm reads INT8 codes of it."""
        prepared = prepare(tied.save(tmp_path / "m.onnx", ["logits"]))
        placement = place_for_tensorrt(prepared.ir())
        model = insert_qdq(prepared, placement, dict.fromkeys(placement.tensors, 0.1)).model
        nodes = {node.name: node for node in model.graph}
        table, codes = nodes["n_tokens"].inputs[0], nodes["n_logits"].inputs[1].producer().inputs[0]

        assert (table.name, table.const_value.dtype) == ("table", ir.DataType.FLOAT)
        assert (codes.const_value.dtype, list(codes.const_value.shape)) == (ir.DataType.INT8, [48, 32])

    def test_other_gathers_are_no_embeddings(self, graph_builder: Any, tmp_path: Path) -> None:
        """A selection from an activation, or from a vector, is not listed."""
        graph = graph_builder()
        ids = graph.input("ids", ("N",), onnx.TensorProto.INT64)
        graph.node("Gather", [graph.input("x", (48, 32)), ids], "a")
        graph.node("Gather", [graph.normal((48,)), ids], "b")

        assert decided(graph, tmp_path, ["a", "b"]) == {}


class TestUnquantizable:
    """What Q/DQ cannot reach, whatever is asked for."""

    @pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
    def test_recurrent_layers(self, operator: str, graph_builder: Any, tmp_path: Path) -> None:
        """They are listed, with a reason for each target."""
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator] * 16
        graph = graph_builder()
        weights = [graph.normal((1, gates, size)) for size in (24, 16)]
        graph.nodes_of(operator, [graph.input("x", (5, "N", 24)), *weights], ["y"], hidden_size=16)
        decision = only(decided(graph, tmp_path, ["y"], include=[".*"]))

        assert (decision.op_type, decision.quantized, decision.rule) == (operator, False, "recurrent")
        assert f"{operator} carries a state" in decision.reason

    def test_operators_without_a_kernel(self, graph_builder: Any) -> None:
        """Einsum and ConvInteger with constants of their own, and another domain; two activations are not listed."""
        graph = graph_builder()
        x, weight = graph.input("x", (2, 16, 16)), graph.normal((16, 16))
        image = graph.input("image", (1, 1, 4, 4), onnx.TensorProto.UINT8)
        graph.node("Einsum", [x, weight], "einsum", equation="bij,jk->bik")
        graph.node("Einsum", [x, x], "free", equation="bij,bjk->bik")
        graph.node("FusedMatMul", [x, weight], "fused", domain="com.microsoft")
        graph.node("ConvInteger", [image, graph.constant(np.ones((1, 1, 2, 2), np.uint8))], "integers")
        _, decisions = weighted_nodes(
            as_drawn(graph, ["einsum", "free", "fused", "integers"]), PlacementOptions(include=[".*"])
        )

        assert [(decision.node, decision.rule) for decision in decisions] == [
            ("n_einsum", "unsupported-operator"), ("n_fused", "unsupported-operator"),
            ("n_integers", "unsupported-operator"),
        ]  # fmt: skip
        assert "Einsum is no operator that computes on INT8 between Q and DQ" in decisions[0].reason
        assert "FusedMatMul belongs to the domain 'com.microsoft'" in decisions[1].reason

    def test_weights_that_cannot_become_int8(self, graph_builder: Any) -> None:
        """Computed at run time, of another type, with constant data, or behind an operator of unknown type."""
        graph = graph_builder()
        x, weight = graph.input("x", (2, 16)), graph.normal((16, 16))
        half = graph.input("half", (2, 16), onnx.TensorProto.FLOAT16)
        graph.node("Gemm", [x, graph.input("computed", (16, 16))], "a")
        graph.node("MatMul", [half, graph.constant(np.ones((16, 16), np.float16))], "b")
        graph.node("MatMul", [weight, weight], "c")
        graph.node("MatMul", [graph.node("Unheard", [x], domain="com.microsoft"), weight], "d")
        _, decisions = weighted_nodes(as_drawn(graph, ["a", "b", "c", "d"]), PlacementOptions(include=[".*"]))

        assert {decision.rule for decision in decisions} == {"not-quantizable"}
        assert [decision.reason.split(":")[0] for decision in decisions] == [
            "its weight is computed at run time", "its weight is FLOAT16, not FLOAT", "its data input is a constant",
            "the type of its data input is unknown",
        ]  # fmt: skip

    def test_bodies_come_last(self) -> None:
        """Nodes of branches are listed behind those of the main graph, and no expression reaches them."""
        model = ir.from_proto(
            onnx.parser.parse_model(
                """<ir_version: 10, opset_import: ["" : 20]>
                g (bool c, float[2,2] x) => (float[2,2] y, float[2,2] z) <float[2,2] w = {1., 2., 3., 4.}> {
                  y = If (c) <then_branch = t () => (float[2,2] p) { [inner] p = MatMul (x, w) },
                              else_branch = e () => (float[2,2] q) { [other] q = Exp (x) }>
                  [outer] z = MatMul (x, w)
                }"""
            )
        )
        _, decisions = weighted_nodes(model, PlacementOptions(include=[".*"]))

        assert [(decision.node, decision.rule) for decision in decisions] == [
            ("outer", "included"), ("inner", "subgraph")
        ]  # fmt: skip
        with pytest.raises(ModelError, match=r"Cannot exclude 'inner': .* none of the 1 weighted nodes"):
            weighted_nodes(model, PlacementOptions(exclude=["inner"]))


class TestExpectation:
    """Fixed averages over bins."""

    @pytest.mark.parametrize(
        ("weights", "softmax", "quantized"),
        [
            (np.arange(32), True, False),
            (np.arange(32) * 0.5 + 3, True, False),
            (np.arange(32), False, True),
            (np.arange(32) ** 1.5, True, True),
            (np.ones(32), True, True),
        ],
    )
    def test_a_progression_behind_a_softmax(
        self, weights: Any, softmax: bool, quantized: bool, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Equal steps and a Softmax, also across a Transpose; a trained filter and a sum are neither."""
        graph = graph_builder()
        x = graph.node("Softmax" if softmax else "Sigmoid", [graph.input("x", (2, 4, 20, 32))], "p")
        x = graph.node("Transpose", [x], perm=[0, 3, 1, 2])
        graph.node("Conv", [x, graph.constant(weights.astype(np.float32).reshape(1, 32, 1, 1))], "y")
        for target in ("tensorrt", "cpu"):
            decision = only(decided(graph, tmp_path, ["y"], target=target))
            assert decision.quantized == quantized
            assert quantized or decision.rule == "expectation"
            assert quantized or "the 32 equally spaced bins of a Softmax" in decision.reason

    def test_as_a_matrix_product(self, graph_builder: Any, tmp_path: Path) -> None:
        """The other form that exporters write; the better reason comes before that of a single column."""
        graph = graph_builder()
        x = graph.node("Softmax", [graph.input("x", (2, 4, 20, 32))])
        graph.node("MatMul", [x, graph.constant(np.arange(32, dtype=np.float32))], "y")

        assert only(decided(graph, tmp_path, ["y"])).rule == "expectation"


class TestExpressions:
    """`exclude` and `include`."""

    def chain(self, graph_builder: Any) -> Any:
        """Three convolutions: enough channels, few, few."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input(), (3, 16), "stem")])
        graph.conv(graph.conv(x, (16, 5), "a"), (5, 3), "b")
        return graph

    def test_include_overrules_a_rule_about_kernels(self, graph_builder: Any, tmp_path: Path) -> None:
        """The decision names the expression, the rule and its reason; what needed no permission is left as it was."""
        found = decided(self.chain(graph_builder), tmp_path, ["b"], include=["n_(b|stem)"])

        assert [(d.quantized, d.rule) for d in found.values()] == [
            (True, "weighted-inputs"), (True, "weighted-inputs"), (True, "included")
        ]  # fmt: skip
        assert found["n_b"].reason == (
            "included by the expression 'n_(b|stem)' against the rule few-channels: "
            "Conv with 5 input channels and 3 output channels: neither is a multiple of 8"
        )

    def test_exclude_wins(self, graph_builder: Any, tmp_path: Path) -> None:
        """`--include .* --exclude head` means everything but the head."""
        found = decided(self.chain(graph_builder), tmp_path, ["b"], include=[".*"], exclude=["n_b"])

        assert [(d.quantized, d.rule) for d in found.values()][1:] == [(True, "weighted-inputs"), (False, "excluded")]

    @pytest.mark.parametrize(
        ("expressions", "expected"),
        [
            (["["], r"Cannot include '\[': not a regular expression"),
            (
                ["n_b", "head"],
                r"Cannot include 'head': it matches .* none of the 3 weighted nodes \(n_stem, n_a, n_b\)",
            ),
        ],
    )
    def test_expressions_that_cannot_be_meant(
        self, expressions: Sequence[str], expected: str, graph_builder: Any, tmp_path: Path
    ) -> None:
        """A misspelt expression must not pass silently."""
        with pytest.raises(ModelError, match=expected):
            decided(self.chain(graph_builder), tmp_path, ["b"], include=expressions)

    def test_the_chosen_nodes_are_ready_to_be_placed(self, graph_builder: Any, tmp_path: Path) -> None:
        """Every chosen node has a constant weight where `operands` says it is."""
        model = prepare(self.chain(graph_builder).save(tmp_path / "m.onnx", ["b"])).ir()
        chosen, _ = weighted_nodes(model, PlacementOptions(include=[".*"]))

        assert [node.inputs[operands(node)[1]].const_value is not None for node in chosen] == [True, True, True]
