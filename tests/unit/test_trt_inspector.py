"""engines.trt_inspector: layers beside the nodes of their model, and two engines beside each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engines.trt_inspector import LayerTable, compare_tables, intended_precisions, layer_table
from engines.trt_layers import EngineLayer


def quantized_model() -> onnx.ModelProto:
    """conv1 with both inputs dequantized, relu1, conv2 with float weights."""
    weights = {name: numpy_helper.from_array(np.ones((8, 8, 1, 1), np.int8), name) for name in ("w1",)}
    constants = [
        *weights.values(),
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
        numpy_helper.from_array(np.ones((8, 8, 1, 1), np.float32), "w2"),
    ]
    pair = ["scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *pair], ["xq"], "q1"),
        helper.make_node("DequantizeLinear", ["xq", *pair], ["xd"], "d1"),
        helper.make_node("DequantizeLinear", ["w1", *pair], ["wd"], "dw1"),
        helper.make_node("Conv", ["xd", "wd"], ["c1"], "conv1"),
        helper.make_node("Relu", ["c1"], ["r"], "relu1"),
        helper.make_node("Conv", ["r", "w2"], ["c2"], "conv2"),
        helper.make_node("Identity", ["c2"], ["y"], "last"),
    ]
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 8, 8]) for name in ("x", "y")}
    graph = helper.make_graph(nodes, "quantized", [value["x"]], [value["y"]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_the_intended_precision_is_read_off_the_model() -> None:
    """INT8 where data and weights are dequantized; the type of the output elsewhere; Q/DQ nodes are no rows."""
    assert intended_precisions(quantized_model()) == {
        "conv1": ("Conv", "int8"),
        "relu1": ("Relu", "fp32"),
        "conv2": ("Conv", "fp32"),
        "last": ("Identity", "fp32"),
    }


def test_the_table_says_what_became_of_each_node() -> None:
    """A node is shown in the layer that computes it, not in the copy before; a removed one has no layer."""
    found = table(
        quantized_model(),
        layer("conv1 + relu1", 0.5, "q1", "conv1", "relu1"),
        layer(
            "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1", 0.1, "conv1", precision="fp32", kind="Reformat"
        ),
        layer("conv2", 0.25, precision="fp16"),
    )
    rows = {row.node: row for row in found.rows}

    assert (rows["conv1"].precision, rows["conv1"].layer_ms) == ("int8", 0.5)
    assert rows["conv1"].as_intended
    assert rows["relu1"].layer == rows["conv1"].layer
    assert not rows["conv2"].as_intended  # fp32 was intended, the kernel takes fp16
    assert rows["last"].layer is None
    assert [layer.kind for layer in found.reformats] == ["Reformat"]
    assert found.summary == "1 of 1 intended layers run INT8; 1 reformat layer"
    assert found.to_json()["layers"][1]["reformat"] is True


def table(model: onnx.ModelProto, *layers: EngineLayer) -> LayerTable:
    return layer_table("e", model, layers)


def layer(name: str, time: float | None, *nodes: str, precision: str | None = "int8", **how: Any) -> EngineLayer:
    return EngineLayer(
        name, how.pop("kind", ""), precision, nodes or (name,), (), (), how.pop("tactic", ""), time, **how
    )


def test_two_engines_are_compared_by_what_they_fuse() -> None:
    """conv1 and relu1 are one layer in the first engine and two in the second: 2.0 ms against 0.5 + 0.25 ms."""
    model = quantized_model()
    first = table(model, layer("a", 2.0, "conv1", "relu1"), layer("b", 1.0, "conv2"))
    second = table(
        model, layer("c", 0.5, "conv1"), layer("d", 0.25, "relu1", precision="fp16"), layer("e", 4.0, "conv2")
    )

    large, small = compare_tables(first, second)

    assert (large.nodes, large.first_ms, large.second_ms, large.difference_ms) == (("conv2",), 1.0, 4.0, 3.0)
    assert (small.nodes, small.first_ms, small.second_ms) == (("conv1", "relu1"), 2.0, 0.75)
    assert (small.first_layers, small.second_layers) == (("a",), ("c", "d"))
    assert (small.first_precisions, small.second_precisions) == (("int8",), ("int8", "fp16"))
    assert small.to_json()["difference_ms"] == -1.25


def test_groups_that_a_layer_joins_become_one() -> None:
    """Three layers of a node each in the first engine; two of the nodes are one layer in the second."""
    model = quantized_model()
    first = table(model, layer("a", 1.0, "conv1"), layer("b", 1.0, "relu1"), layer("c", 1.0, "conv2"))
    second = table(model, layer("x", 1.5, "conv1", "conv2"), layer("y", 0.5, "relu1"))

    both, alone = compare_tables(first, second)

    assert (both.nodes, both.first_ms, both.second_ms) == (("conv1", "conv2"), 2.0, 1.5)
    assert (alone.nodes, alone.difference_ms) == (("relu1",), -0.5)


def test_what_was_removed_takes_no_time_and_what_was_not_timed_has_none() -> None:
    """A node that one engine removed counts as zero; without times there are no differences."""
    model = quantized_model()
    first = table(model, layer("a", 1.0, "conv1"))
    second = table(model, layer("b", 0.5, "conv1"), layer("c", 0.25, "relu1"))

    assert [(item.nodes, item.difference_ms) for item in compare_tables(first, second)] == [
        (("conv1",), -0.5),
        (("relu1",), 0.25),
    ]
    assert compare_tables(first, table(model, layer("b", None, "conv1")))[0].difference_ms is None


@given(
    fusions=st.lists(
        st.lists(st.integers(0, 3), min_size=8, max_size=8),
        min_size=2,
        max_size=2,
    )
)
def test_no_time_is_lost_or_counted_twice(fusions: list[list[int]]) -> None:
    """However two engines fuse eight nodes into up to four layers, the groups hold every node and all the time once."""
    names = [f"n{index}" for index in range(8)]
    nodes = [helper.make_node("Relu", [f"t{index}"], [f"t{index + 1}"], name) for index, name in enumerate(names)]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("t0", "t8")]
    model = helper.make_model(helper.make_graph(nodes, "chain", value[:1], value[1:]))
    tables = []
    for fused in fusions:
        parts = {index: [name for name, where in zip(names, fused, strict=True) if where == index] for index in fused}
        tables.append(table(model, *(layer(f"layer {index}", 2.0**index, *part) for index, part in parts.items())))

    groups = compare_tables(*tables)

    assert sorted(name for group in groups for name in group.nodes) == names
    for side, fused in zip(("first_ms", "second_ms"), fusions, strict=True):
        assert sum(getattr(group, side) for group in groups) == sum(2.0**index for index in set(fused))


def test_the_kernel_that_multiplies_is_the_one_to_show() -> None:
    """A node in a copy, in a quantizing kernel and in a matrix product is shown in the product, in whatever order."""
    product = layer("gemm", 1.0, "conv1", tactic="sm80_xmma_gemm_i8i8_i8i32_f32_tn")
    others = [layer("copy", 1.0, "conv1", kind="Reformat"), layer("quantize", 1.0, "conv1", precision="fp32")]
    for layers in ([product, *others], [*others, product]):
        rows = {row.node: row for row in table(quantized_model(), *layers).rows}
        assert rows["conv1"].layer == "gemm"


def test_names_in_another_spelling_are_found() -> None:
    """A compiler behind the parser writes `/block.0/conv` as `_block_0_conv`."""
    model = quantized_model()
    model.graph.node[3].name = "/block.0/conv"

    rows = table(model, layer("k", 1.0, "_block_0_conv")).rows

    assert rows[0].layer == "k"


def test_nodes_in_a_region_are_not_claimed() -> None:
    """From conv1 to relu1 nothing is told of the kernels: neither INT8 nor not; conv2 after it is told."""
    region = layer(
        "{ForeignNode[d1...relu1]}", 3.0, "d1", "relu1", precision=None, kind="Myelin", region=("d1", "relu1")
    )
    found = table(quantized_model(), region, layer("k", 1.0, "conv2", precision="fp32"))
    rows = {row.node: row for row in found.rows}

    assert [rows[name].in_region for name in ("conv1", "relu1", "conv2", "last")] == [True, True, False, False]
    assert (rows["conv1"].precision, rows["conv1"].as_intended, rows["conv1"].wider) == (None, False, False)
    assert rows["conv1"].layer_ms == 3.0
    assert found.summary == (
        "0 of 1 intended layers run INT8; 1 in regions whose kernels TensorRT does not tell; 0 reformat layers"
    )
    assert (found.int8_share, found.unknown_share) == (0.0, 0.75)


def test_a_region_with_an_unknown_end_claims_its_other_end_alone() -> None:
    """Where the first node is none of the model's, what lies before the last is not guessed."""
    region = layer("{ForeignNode[x...relu1]}", 3.0, "x", "relu1", precision=None, region=("x", "relu1"))
    rows = {row.node: row for row in table(quantized_model(), region).rows}

    assert rows["relu1"].in_region
    assert rows["conv1"].layer is None


def test_shares_of_the_time() -> None:
    """Of 10 ms 4 are in INT8 layers; a copy of INT8 data is none. Without times there are no shares."""
    layers = [layer("a", 4.0), layer("b", 5.0, precision="fp16"), layer("c", 1.0, kind="Reformat")]

    assert table(quantized_model(), *layers).int8_share == 0.4
    assert table(quantized_model(), layer("a", None)).int8_share is None


def test_wider_than_intended_is_told_from_narrower() -> None:
    """FP16 where INT8 was asked for is wider; INT8 for what FP32 was asked of comes of fusing, and is not."""
    layers = [layer("a", 1.0, "conv1", precision="fp16"), layer("b", 1.0, "relu1", precision="int8")]
    rows = {row.node: row for row in table(quantized_model(), *layers).rows}

    assert (rows["conv1"].wider, rows["relu1"].wider) == (True, False)


def test_a_calibrator_intends_int8_for_all_weighted_nodes() -> None:
    """The model of an implicit engine has no Q/DQ nodes to tell it by."""
    assert intended_precisions(quantized_model(), implicit=True)["conv2"] == ("Conv", "int8")


def test_nodes_without_names_have_the_parsers() -> None:
    """TensorRT's ONNX parser names a nameless node after its first output; conversions are meant to run in no type."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Relu", ["half"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "nameless", values[:1], values[1:]))

    assert intended_precisions(model) == {"node_of_half": ("Cast", None), "node_of_y": ("Relu", "fp16")}


def test_layers_alone_have_a_summary() -> None:
    """Without a model no intention is known, so nothing is said of one."""
    found = LayerTable("e", (), (layer("a", 1.0), layer("c", 1.0, kind="Reformat")))

    assert found.summary == "2 layers; 1 reformat layer"
    assert found.to_json()["rows"] == []
