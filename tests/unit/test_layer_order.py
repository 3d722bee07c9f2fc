"""Layers of a TensorRT network matched with a graph's nodes by kind and order."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.layer_order import CachedLayer, match_layers

KINDS = {
    "Conv": "Convolution", "Relu": "Activation", "Add": "ElementWise", "MaxPool": "Pooling", "Softmax": "Softmax",
    "Concat": "Concatenation", "BatchNormalization": "Scale",
}  # fmt: skip


def typed(builder: Any, outputs: Sequence[str]) -> ir.Model:
    """Return a drawn graph with types."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(builder.model(outputs)))


def unnamed(*kinds: str) -> list[CachedLayer]:
    """Return layers of these kinds, each with a scale of its own."""
    return [
        CachedLayer(f"(Unnamed Layer* {index}) [{kind}]_output", 0.01 * (index + 1), kind=kind)
        for index, kind in enumerate(kinds)
    ]


def layer(index: int, kind: str) -> str:
    """Return the name of an unnamed layer's output."""
    return f"(Unnamed Layer* {index}) [{kind}]_output"


def residual_block(builder: Any, *, projected: bool) -> list[str]:
    """Draw conv, relu, conv, (projection), add, relu; return what it computes, in that order."""
    x = builder.input(shape=("N", 4, 8, 8))
    names = [builder.conv(x, (4, 4), "a")]
    names.append(builder.node("Relu", ["a"], "b"))
    names.append(builder.conv("b", (4, 4), "c"))
    skip = "b"
    if projected:
        skip = builder.conv(x, (4, 4), "p", kernel=1)
        names.append(skip)
    names.append(builder.node("Add", ["c", skip], "d"))
    names.append(builder.node("Relu", ["d"], "e"))
    return names


def test_chain(graph_builder: Any):
    """In a chain every layer has one node."""
    builder = graph_builder()
    builder.conv(builder.input(), (3, 4), "a")
    builder.node("Relu", ["a"], "b")
    builder.node("MaxPool", ["b"], "c", kernel_shape=[2, 2])
    matched, reason = match_layers(typed(builder, ["c"]), unnamed("Convolution", "Activation", "Pooling"))

    assert matched == {"a": layer(0, "Convolution"), "b": layer(1, "Activation"), "c": layer(2, "Pooling")}
    assert reason == ""


def test_layers_that_move_data_are_passed_over(graph_builder: Any):
    """Constants and shuffles stand for nothing, whatever their number; they count in the numbers of the others."""
    builder = graph_builder()
    builder.conv(builder.input(), (3, 4), "a")
    builder.node("Relu", ["a"], "b")
    items = unnamed("Constant", "Convolution", "Shuffle", "Shuffle", "Activation", "Identity")

    assert match_layers(typed(builder, ["b"]), items)[0] == {
        "a": layer(1, "Convolution"),
        "b": layer(4, "Activation"),
    }


def test_side_by_side_is_not_guessed(graph_builder: Any):
    """Two convolutions that may come in either order are left out; what is the same in both orders is found."""
    builder = graph_builder()
    residual_block(builder, projected=True)
    items = unnamed("Convolution", "Activation", "Convolution", "Convolution", "ElementWise", "Activation")
    matched, _ = match_layers(typed(builder, ["e"]), items)

    # Convolution 0 is a, as the activation behind it reads it; 2 and 3 are c and p, or p and c.
    assert matched == {
        "a": layer(0, "Convolution"),
        "b": layer(1, "Activation"),
        "d": layer(4, "ElementWise"),
        "e": layer(5, "Activation"),
    }


def test_side_by_side_with_equal_scales(graph_builder: Any):
    """Convolutions that cannot be told apart are found where their scales are equal."""
    builder = graph_builder()
    residual_block(builder, projected=True)
    items = unnamed("Convolution", "Activation", "Convolution", "Convolution", "ElementWise", "Activation")
    items[3] = CachedLayer(items[3].name, items[2].scale, kind="Convolution")
    matched, _ = match_layers(typed(builder, ["e"]), items)

    assert {matched["c"], matched["p"]} <= {items[2].name, items[3].name}


def test_a_named_tensor_decides(graph_builder: Any):
    """A tensor with the graph's own name between unnamed ones tells the others apart."""
    builder = graph_builder()
    residual_block(builder, projected=True)
    items = unnamed("Convolution", "Activation", "Convolution", "Convolution", "ElementWise", "Activation")
    items[2] = CachedLayer("p", 0.5, tensor="p")
    matched, _ = match_layers(typed(builder, ["e"]), items)

    assert matched["c"] == layer(3, "Convolution")


def test_names_of_a_stranger_stand_for_one_layer_or_none(graph_builder: Any):
    """A tensor with a name that the graph has not (an output of the network) may be any layer, and is not resolved."""
    builder = graph_builder()
    builder.conv(builder.input(), (3, 4), "a")
    builder.node("Relu", ["a"], "b")
    builder.node("Softmax", ["b"], "c")
    items = [*unnamed("Convolution", "Activation"), CachedLayer("prob", 0.1)]

    assert match_layers(typed(builder, ["c"]), items)[0] == {
        "a": layer(0, "Convolution"),
        "b": layer(1, "Activation"),
    }


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (("Convolution", "Convolution", "Activation"), "2 of kind convolution where the graph has 1"),
        (("Convolution",), "0 of kind activation where the graph has 1"),
        (("Convolution", "Scale", "Activation"), "1 of kind scale where the graph has 0"),
        (("Activation", "Convolution"), "no order of the graph's nodes has its layers in their order"),
        (("Convolution", "PluginV2"), "kind PluginV2, which stand for no operator of ONNX"),
        (("Constant", "Shuffle"), ""),
    ],
)
def test_other_networks(kinds: tuple[str, ...], reason: str, graph_builder: Any):
    """A network with other layers, or in another order, is matched nowhere, with the reason."""
    builder = graph_builder()
    builder.conv(builder.input(), (3, 4), "a")
    builder.node("Relu", ["a"], "b")
    matched, why = match_layers(typed(builder, ["b"]), unnamed(*kinds))

    assert matched == {}
    assert reason in why


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        (("Convolution", "Fully Connected"), layer(1, "Fully Connected")),
        (("Convolution", "Constant", "Matrix Multiply", "Constant", "ElementWise"), layer(4, "ElementWise")),
    ],
)
def test_gemm_in_two_forms(kinds: tuple[str, ...], name: str, graph_builder: Any):
    """A Gemm with a bias is one fully connected layer, or a product and a sum, whose output is the sum's."""
    builder = graph_builder()
    builder.conv(builder.input(), (3, 4), "a")
    flat = builder.node("Flatten", ["a"], "f")
    builder.gemm(flat, (256, 5), "g")

    assert match_layers(typed(builder, ["g"]), unnamed(*kinds))[0] == {"a": layer(0, "Convolution"), "g": name}


def test_batch_norm_is_a_scale(graph_builder: Any):
    """In a graph whose BatchNorm stands, the convolution and the BatchNorm are layers of their own."""
    builder = graph_builder()
    builder.conv(builder.input(), (3, 4), "a", bias=False)
    parameters = [builder.normal((4,)) for _ in range(3)]
    variance = builder.constant(abs(builder.rng.normal(size=4)).astype("float32"))
    builder.node("BatchNormalization", ["a", *parameters, variance], "n")

    assert match_layers(typed(builder, ["n"]), unnamed("Convolution", "Scale"))[0] == {
        "a": layer(0, "Convolution"),
        "n": layer(1, "Scale"),
    }


def test_too_many_orders_are_given_up(graph_builder: Any):
    """A graph with very many independent branches is given up, not followed for ever."""
    builder = graph_builder()
    x = builder.input(shape=("N", 3, 4, 4))
    names = [builder.node("Relu", [x], f"r{index}") for index in range(20)]
    builder.node("Concat", names, "out", axis=1)
    matched, reason = match_layers(typed(builder, ["out"]), unnamed(*["Activation"] * 20, "Concatenation"))

    assert matched == {}
    assert "too many orders" in reason


@given(data=st.data())
def test_certain_is_what_all_orders_have_in_common(data: st.DataObject, graph_builder: Any):
    """Against all orders of a small graph, one by one: found is exactly what is the same in every one that fits."""
    builder = graph_builder()
    tensors = [builder.input(shape=("N", 4, 8, 8))]
    sources: list[list[int]] = []
    operators = data.draw(st.lists(st.sampled_from(["Conv", "Relu", "Add", "MaxPool"]), min_size=1, max_size=6))
    for number, operator in enumerate(operators):
        count = 2 if operator == "Add" else 1
        picked = data.draw(st.lists(st.integers(0, number), min_size=count, max_size=count))
        inputs = [tensors[index] for index in picked]
        name = f"t{number}"
        if operator == "Conv":
            builder.conv(inputs[0], (4, 4), name)
        elif operator == "MaxPool":
            builder.node(operator, inputs, name, kernel_shape=[3, 3], pads=[1] * 4)
        else:
            builder.node(operator, inputs, name)
        tensors.append(name)
        sources.append([index - 1 for index in picked if index > 0])
    orders = [
        order
        for order in itertools.permutations(range(len(operators)))
        if all(order.index(source) < order.index(node) for node in order for source in sources[node])
    ]
    taken = data.draw(st.sampled_from(orders))
    items = unnamed(*(KINDS[operators[node]] for node in taken))
    fitting = [order for order in orders if [operators[n] for n in order] == [operators[n] for n in taken]]
    possible: dict[int, set[str]] = defaultdict(set)
    for order in fitting:
        for position, node in enumerate(order):
            possible[node].add(items[position].name)
    expected = {f"t{node}": next(iter(names)) for node, names in possible.items() if len(names) == 1}

    assert match_layers(typed(builder, tensors[-1:]), items)[0] == expected
