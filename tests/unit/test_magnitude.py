"""Facts about `engines.magnitude`: bounds never underestimate what a graph computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from engines.magnitude import magnitude_bounds


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model)


SHAPE = (1, 2, 4, 4)
LIMIT = 2.0
EXTREMES = np.float32([-LIMIT, LIMIT, 0, -0.001, 0.001, 1, -1, 1.7]).repeat(4).reshape(SHAPE)
"""|x| <= 2, both ends reached."""

ONE_OPERATOR = [
    # operator, further inputs, attributes, bound for |x| <= 2 computed by hand
    ("Relu", [], {}, 2),
    ("Neg", [], {}, 2),
    ("Gelu", [], {}, 2),
    ("HardSwish", [], {}, 2),
    ("Mish", [], {}, 2),
    ("Elu", [], {}, 2),
    ("Elu", [], {"alpha": 3.0}, 6),
    ("LeakyRelu", [], {}, 2),
    ("LeakyRelu", [], {"alpha": -5.0}, 10),
    ("PRelu", [np.float32([[[0.5]], [[-4]]])], {}, 8),
    ("Sigmoid", [], {}, 1),
    ("Tanh", [], {}, 1),
    ("Softmax", [], {}, 1),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}, 2),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1] * 4, "ceil_mode": 1, "strides": [2, 2]}, 2),
    ("MaxPool", [], {"kernel_shape": [2, 2]}, 2),
    ("ReduceMean", [np.int64([2, 3])], {}, 2),
    ("ReduceSum", [np.int64([2, 3])], {}, math.inf),
    ("Exp", [], {}, math.inf),
    ("Clip", [np.float32(-9), np.float32(1.5)], {}, 2),
    ("Clip", [np.float32(-1), np.float32(1)], {}, 1),
    ("Clip", [np.float32(5), np.float32(9)], {}, 5),
    ("Clip", [np.float32(-9), np.float32(-5)], {}, 5),
    ("Clip", [np.float32(3)], {}, 3),
    ("Pad", [np.int64([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(-7)], {}, 7),
    ("Pad", [np.int64([0, 0, 1, 1, 0, 0, 1, 1])], {}, 2),
    ("Pad", [np.int64([0, 0, 1, 1, 0, 0, 1, 1])], {"mode": "reflect"}, 2),
    ("Resize", [np.float32([]), np.float32([1, 1, 2, 2])], {"mode": "linear"}, 2),
    ("Resize", [np.float32([]), np.float32([1, 1, 2, 2])], {}, 2),
    ("Resize", [np.float32([]), np.float32([1, 1, 2, 2])], {"mode": "cubic"}, math.inf),
    (
        "Resize",
        [np.float32([0, 0, -1, -1, 1, 1, 2, 2]), np.float32([1, 1, 2, 2])],
        {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 99.0},
        math.inf,
    ),
    ("Add", [np.float32([[[0.5]], [[-3]]])], {}, 5),
    ("Sub", [np.float32(-3)], {}, 5),
    ("Mul", [np.float32(-3)], {}, 6),
    ("Div", [np.float32([[[0.5]], [[-4]]])], {}, 4),
    ("Div", [np.float32([[[0.5]], [[0]]])], {}, math.inf),
    ("Max", [np.float32(-3)], {}, 3),
    ("Mean", [np.float32(6)], {}, 6),
    ("Concat", [np.full(SHAPE, -8, np.float32)], {"axis": 1}, 8),
    ("Gather", [np.int64([1, 0, 1])], {"axis": 2}, 2),
    ("Transpose", [], {}, 2),
    # per output channel |w|: 1 + 2, 3 + 0.5; times 2, plus the largest bias
    ("Conv", [np.float32([[1, -2], [3, 0.5]]).reshape(2, 2, 1, 1), np.float32([0.5, -1])], {}, 8),
    # a scalar sum over all weights
    ("ConvTranspose", [np.float32([[1, -2], [3, 0.5]]).reshape(2, 2, 1, 1)], {}, 13),
    ("MatMul", [np.float32([[1, -1], [2, 1], [3, 0], [-4, 0.5]])], {}, 20),
    # sqrt(4 values) * 3 + 0.5; sqrt(16) * 2 + 1 for a channel, or a group of one
    ("LayerNormalization", [np.float32([1, -3, 2, 1]), np.float32([0.5, 0, 0, 0])], {"axis": -1}, 6.5),
    ("LayerNormalization", [np.ones((4, 4), np.float32)], {"axis": 2}, 4),
    ("InstanceNormalization", [np.float32([1, 2]), np.float32([-1, 0])], {}, 9),
    ("GroupNormalization", [np.float32([1, 2]), np.float32([-1, 0])], {"num_groups": 2}, 9),
    # scale 3, variance 4 -> 3 / 2 * (2 + mean 1) + 2; the other channel: 1 * (2 + 0) + 1
    (
        "BatchNormalization",
        [np.float32([-3, 1]), np.float32([-2, 1]), np.float32([1, 0]), np.float32([4, 1])],
        {"epsilon": 0.0},
        6.5,
    ),
]


@pytest.mark.parametrize(("operator", "inputs", "attributes", "expected"), ONE_OPERATOR)
def test_one_operator(
    operator: str,
    inputs: list[Any],
    attributes: Any,
    expected: float,
    graph_builder: Any,
    run_model: Callable[..., Any],
) -> None:
    """The bound is the one worked out by hand, and the operator stays within it at the ends of its input's range."""
    graph = graph_builder()
    graph.node(operator, [graph.input("x", SHAPE), *map(graph.constant, inputs)], "y", **attributes)
    model = typed(graph.model(["y"]))
    bound = magnitude_bounds(ir.from_proto(model), {"x": LIMIT})["y"]

    assert bound == pytest.approx(expected)
    assert np.abs(run_model(model, {"x": EXTREMES})["y"]).max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("softmax", "inner", "expected"), [(None, 3, 18.0), (None, "K", math.inf), (-1, "K", 3.0), (1, 3, 9.0)]
)
def test_products_of_activations(softmax: int | None, inner: int | str, expected: float, graph_builder: Any) -> None:
    """3 products of 2 and 3; an average by probabilities along the last axis is no larger than what is averaged."""
    graph = graph_builder()
    left, right = graph.input("a", (2, 4, inner)), graph.input("b", (2, inner, 5))
    if softmax is not None:
        left = graph.node("Softmax", [left], axis=softmax)
    graph.node("MatMul", [left, right], "y")
    model = typed(graph.model(["y"]))

    assert magnitude_bounds(ir.from_proto(model), {"a": 2.0, "b": 3.0})["y"] == expected


@pytest.mark.parametrize(("batch", "expected"), [("N", 16 * 2.0 * 3.0), (2, math.inf)])
def test_the_size_of_a_head_whose_reshape_leaves_it_open(batch: int | str, expected: float, graph_builder: Any) -> None:
    """64 features in 4 heads: 16 each, where the open first axis is the batch on both sides of the Reshape."""
    graph = graph_builder()
    shape = graph.input("shape", (4,), TensorProto.INT64)
    heads = []
    for name in "ab":
        x = graph.node("Reshape", [graph.input(name, (batch, 17, 64)), shape], f"{name}_split")
        heads.append(graph.node("Transpose", [x], perm=[0, 2, 1, 3] if name == "a" else [0, 2, 3, 1]))
    graph.node("MatMul", heads, "y")
    model = graph.model(["y"])
    for name in "ab":
        open_shape = helper.make_tensor_value_info(f"{name}_split", TensorProto.FLOAT, ["M", 17, 4, None])
        model.graph.value_info.append(open_shape)

    assert magnitude_bounds(ir.from_proto(typed(model)), {"a": 2.0, "b": 3.0})["y"] == expected


def test_scaled_gemm(graph_builder: Any, run_model: Callable[..., Any]) -> None:
    """alpha scales the product, beta the bias: 0.5 * (1 + 2) * 2 + 3 * 4 = 15, and the second column reaches it."""
    graph = graph_builder()
    weight, bias = graph.constant(np.float32([[0, 1], [0.5, -2]])), graph.constant(np.float32([1, 4]))
    graph.node("Gemm", [graph.input("x", (1, 2)), weight, bias], "y", alpha=-0.5, beta=3.0)
    model = typed(graph.model(["y"]))

    assert magnitude_bounds(ir.from_proto(model), {"x": 2.0})["y"] == 15.0
    assert np.abs(run_model(model, {"x": np.float32([[-2, 2]])})["y"]).max() == 15.0


@pytest.mark.parametrize(
    ("to", "fed", "expected"),
    [
        (TensorProto.BOOL, 0.001, 1.0),  # everything but zero becomes one
        (TensorProto.INT8, 100.7, 100.7),
        (TensorProto.INT8, 300.0, math.inf),  # wraps around
        (TensorProto.UINT8, 3.0, math.inf),  # negative values wrap around
        (TensorProto.DOUBLE, 3.0, 3.0),
    ],
)
def test_casts(to: int, fed: float, expected: float, graph_builder: Any, run_model: Callable[..., Any]) -> None:
    """A value that travels through another type and back is bounded by what that type makes of it."""
    graph = graph_builder()
    graph.node("Cast", [graph.input("x", (1,))], "other", to=to)
    graph.node("Cast", ["other"], "y", to=TensorProto.FLOAT)
    model = typed(graph.model(["y"]))

    assert magnitude_bounds(ir.from_proto(model), {"x": fed})["y"] == expected
    assert abs(run_model(model, {"x": np.float32([fed])})["y"][0]) <= expected


def test_integer_constants_count(graph_builder: Any, run_model: Callable[..., Any]) -> None:
    """A table of integers that is looked up and cast to float is as large as its entries."""
    graph = graph_builder()
    graph.node("Gather", [graph.constant(np.int64([5, -70000])), graph.input("x", (1,), TensorProto.INT64)], "entry")
    graph.node("Cast", ["entry"], "y", to=TensorProto.FLOAT)
    model = typed(graph.model(["y"]))

    assert magnitude_bounds(ir.from_proto(model), {})["y"] == 70000
    assert run_model(model, {"x": np.int64([1])})["y"][0] == -70000


def test_indices_of_max_pool_are_not_its_values(graph_builder: Any, run_model: Callable[..., Any]) -> None:
    """The second output counts positions in the whole tensor."""
    graph = graph_builder()
    graph.nodes_of("MaxPool", [graph.input("x", SHAPE)], ["values", "indices"], kernel_shape=[2, 2])
    graph.node("Cast", ["indices"], "y", to=TensorProto.FLOAT)
    model = typed(graph.model(["y"]))
    bounds = magnitude_bounds(ir.from_proto(model), {"x": LIMIT})

    assert bounds["values"] == LIMIT
    assert run_model(model, {"x": EXTREMES})["y"].max() <= bounds["y"] == math.inf


def test_where_takes_either_side(graph_builder: Any, run_model: Callable[..., Any]) -> None:
    """The condition has no magnitude; both sides do."""
    graph = graph_builder()
    condition = graph.input("c", (2,), TensorProto.BOOL)
    graph.node("Where", [condition, graph.input("x", (2,)), graph.constant(np.float32([9, -7]))], "y")
    model = typed(graph.model(["y"]))
    feeds = {"c": np.array([True, False]), "x": np.float32([2, 2])}

    assert magnitude_bounds(ir.from_proto(model), {"x": 2.0})["y"] == 9.0
    assert np.abs(run_model(model, feeds)["y"]).max() == 7.0


def test_split_bounds_every_output(graph_builder: Any) -> None:
    """All pieces come from the first input."""
    graph = graph_builder()
    graph.nodes_of("Split", [graph.input("x", SHAPE)], ["a", "b"], axis=1, num_outputs=2)
    bounds = magnitude_bounds(ir.from_proto(typed(graph.model(["a", "b"]))), {"x": 3.0})

    assert (bounds["a"], bounds["b"]) == (3.0, 3.0)


def test_what_calibration_saw_counts_before_arithmetic(graph_builder: Any) -> None:
    """A measured maximum replaces the looser bound, and what follows builds on it; unknown inputs are unbounded."""
    graph = graph_builder()
    graph.node("Mul", [graph.input("x", (1,)), graph.constant(np.float32(10))], "a")
    graph.node("Add", ["a", graph.input("z", (1,))], "b")
    graph.node("Mul", ["b", graph.constant(np.float32(0))], "nothing")
    model = ir.from_proto(typed(graph.model(["b", "nothing"])))

    assert magnitude_bounds(model, {"x": 2.0, "z": 1.0}) == {"x": 2, "z": 1, "a": 20, "b": 21, "nothing": 0}
    assert magnitude_bounds(model, {"x": 2.0, "a": 7.0})["b"] == math.inf
    assert magnitude_bounds(model, {"x": 2.0, "a": 7.0})["nothing"] == 0
    assert magnitude_bounds(model, {"x": 2.0, "a": 7.0, "z": 1.0})["b"] == 8.0


def test_operators_of_other_domains_have_no_rule(graph_builder: Any) -> None:
    """An operator that shares only its name with a standard one may do anything."""
    graph = graph_builder()
    graph.node("Relu", [graph.input("x", (1,))], "y", domain="com.microsoft")
    model = graph.model(["y"])
    model.opset_import.add(domain="com.microsoft", version=1)

    assert magnitude_bounds(ir.from_proto(model), {"x": 1.0})["y"] == math.inf


LAYERS = ("conv", "grouped", "up", "relu", "leaky", "clip", "residual", "pool", "average", "gate", "norm", "pad")


def add_layer(graph: Any, x: str, layer: str) -> str:
    """One layer on four channels."""
    rng, axes = graph.rng, (0, 0, 1, 1, 0, 0, 1, 1)
    match layer:
        case "conv":
            return str(graph.conv(x, (4, 4)))
        case "grouped":
            return str(graph.conv(x, (4, 4), group=int(rng.choice([2, 4]))))
        case "up":
            weight, bias = graph.normal((4, 2, 3, 3)), graph.normal((4,))
            return str(graph.node("ConvTranspose", [x, weight, bias], group=2))
        case "leaky":
            return str(graph.node("LeakyRelu", [x], alpha=float(rng.normal(0, 2))))
        case "clip":
            low, high = sorted(rng.normal(0, 2, 2))
            return str(graph.clip(x, low, high))
        case "residual":
            return str(graph.node("Add", [x, graph.conv(x, (4, 4), kernel=1)]))
        case "pool":
            return str(graph.node("MaxPool", [x], kernel_shape=[2, 2], pads=[1] * 4))
        case "average":
            include = int(rng.integers(2))
            return str(graph.node("AveragePool", [x], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=include))
        case "gate":
            return str(graph.node("Mul", [x, graph.node("Sigmoid", [x])]))
        case "norm":
            parts = [graph.normal((4,)), graph.normal((4,)), graph.normal((4,))]
            variance = graph.constant(rng.uniform(0.01, 2, 4).astype(np.float32))
            return str(graph.node("BatchNormalization", [x, *parts, variance]))
        case "pad":
            return str(graph.node("Pad", [x, graph.constant(np.int64(axes)), graph.constant(np.float32(rng.normal()))]))
        case _:
            return str(graph.node("Relu", [x]))


@settings(max_examples=40)
@given(
    layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    seen=st.sets(st.integers(0, 12)),
)
def test_random_nets_stay_within_their_bounds(
    layers: list[str], seed: int, seen: set[int], graph_builder: Any, run_model: Callable[..., Any]
) -> None:
    """No tensor of a random net exceeds its bound, whichever tensors calibration saw; and no bound is infinite."""
    graph = graph_builder(seed)
    x = graph.input("x", (1, 4, 6, 6))
    for layer in layers:
        x = add_layer(graph, x, layer)
    rows = graph.node("ReduceMean", [x, graph.constant(np.int64([2, 3]))], keepdims=0)
    graph.gemm(rows, (4, 3), "y")
    model = typed(graph.model(["y"]))
    tensors = [output for node in model.graph.node for output in node.output]
    image = graph.rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    real = {name: float(np.abs(v).max()) for name, v in run_model(model, {"x": image}, fetch=tensors).items()}
    measured = {name: real[name] for index, name in enumerate(tensors) if index in seen}
    bounds = magnitude_bounds(ir.from_proto(model), {"x": float(np.abs(image).max()), **measured})

    for name, largest in real.items():
        assert largest <= bounds[name] * (1 + 1e-5) + 1e-6, name
        assert math.isfinite(bounds[name]), name


def test_values_of_a_gather_node_bound_its_output(graph_builder: Any, run_model: Callable[..., Any]) -> None:
    """The indices, however large, do not: an embedding is bounded by its table."""
    table = np.float32([[1, -3], [2, 2]])
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    graph = graph_builder()
    graph.constant(table, "table")
    graph.input("ids", (2,), TensorProto.INT64)
    graph.nodes.extend(nodes)
    model = typed(graph.model(["y"]))

    assert magnitude_bounds(ir.from_proto(model), {})["y"] == 3.0
    assert np.abs(run_model(model, {"ids": np.int64([0, 1])})["y"]).max() == 3.0
