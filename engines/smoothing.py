"""Smoothing: the difficulty of activations with a few large channels, moved into the weights before quantization.

The output X of a LayerNorm often has a few channels that are tens of times larger than the others; one scale for all of
X then leaves the others few codes. A matrix product does not change when X is divided and W multiplied by the same
factor per channel, X W = (X / s) (s W), and X / s costs nothing: s goes into the LayerNorm's own scale and bias.

    s_c = max|X_c| ** alpha / max_j |W_cj| ** (1 - alpha)

A tensor that something else reads too, as the residual Add of a post-norm block does, keeps its values; then X / s is a
product by constants of its own before the matrix products, which fuses with the Q behind it.

Source: Xiao et al., "SmoothQuant: Accurate and efficient post-training quantization for large language models", 2022,
equation 4. alpha = 0 leaves the activations' ranges to the weights' (W gets flat), 1 the other way round; 0.5 shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calibrators.protocols import Array
from engines.free_names import FreeNames
from engines.graph import constant_array, is_activation, name_of
from engines.placement import sole_consumer

SMALLEST_FACTOR = 1e-5
"""Factors are not smaller: the scale of a channel that hardly speaks must not blow up."""

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_KEEP_LAST_AXIS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Flatten")


@dataclass(frozen=True, slots=True)
class SmoothingSite:
    """A normalized tensor that can be smoothed.

    Attributes:
        tensor: its name.
        norm: the node that makes it.
        channels: length of its last axis.
        readers: the weighted nodes that read it, in graph order.
        shared: whether something else reads it too, so that the factors cannot go into the normalization.
    """

    tensor: str
    norm: str
    channels: int
    readers: tuple[str, ...]
    shared: bool


def smoothing_sites(model: ir.Model) -> tuple[SmoothingSite, ...]:
    """Find the tensors that smoothing serves: outputs of a normalization that weighted matrix products read.

    A normalization is a LayerNormalization or RMSNormalization, or the Mul and Add by constants that end one in the
    exports of old opsets.

    Args:
        model: a prepared model; it is not changed.
    """
    sites: list[SmoothingSite] = []
    for node in model.graph:
        affine = _affine_of(node)
        if affine is None:
            continue
        value = node.outputs[0]
        readers, others = _readers(value, affine.channels)
        if readers:
            names = tuple(dict.fromkeys(reader.name or "" for reader, _ in readers))
            sites.append(SmoothingSite(name_of(value), node.name or "", affine.channels, names, bool(others)))
    return tuple(sites)


def smooth(model: ir.Model, amax: Mapping[str, Array], alpha: float) -> dict[str, Array]:
    """Smooth a model in place; what it computes stays the same up to float rounding.

    Args:
        model: a prepared model.
        amax: largest magnitude of every channel, shape (channels,), by tensor name, of every site to smooth.
        alpha: in [0, 1], how much of the difficulty goes into the weights.

    Returns:
        The factors that each tensor was divided by, shape (channels,) float32, by the name of what holds the quotients:
        the tensor itself, or a new one where it is shared.
    """
    nodes = {node.name: node for node in model.graph}
    writer = _Constants(model.graph)
    factors: dict[str, Array] = {}
    for site in smoothing_sites(model):
        if site.tensor not in amax:
            continue
        node = nodes[site.norm]
        affine = _affine_of(node)
        readers, _ = _readers(node.outputs[0], site.channels)
        if affine is None:
            raise AssertionError(f"{site.norm} ends no normalization")
        weights = [_oriented(reader, index) for reader, index in readers]
        largest = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
        factor = smoothing_factors(amax[site.tensor], largest, alpha)
        divided = [site.tensor]
        if site.shared:
            divided = _divide(model.graph, [reader for reader, _ in readers], factor, writer)
        for target, index, array in affine.constants if not site.shared else ():
            scaled = (array.astype(np.float64).reshape(-1) / factor).astype(np.float32)
            target.replace_input_with(index, writer.add(target.inputs[index], scaled))
        for reader, index in readers:
            weight = _array(reader.inputs[index])
            shape = (1, -1) if _transposed(reader) else (-1, 1)
            scaled = (weight.astype(np.float64) * factor.reshape(shape)).astype(np.float32)
            reader.replace_input_with(index, writer.add(reader.inputs[index], scaled))
        factors.update(dict.fromkeys(divided, factor.astype(np.float32)))
    return factors


def _divide(graph: ir.Graph, readers: Sequence[ir.Node], factor: Array, writer: _Constants) -> list[str]:
    """Let matrix products read their data times 1 / factor; return the names of those products by constants."""
    divided: dict[ir.Value, ir.Value] = {}
    reciprocal = None
    for reader in readers:
        value = _data(reader)
        if value not in divided:
            if reciprocal is None:
                reciprocal = writer.add(value, (1.0 / factor).astype(np.float32))
            node = ir.node("Mul", [value, reciprocal], name=writer.name(f"{value.name}_divided"))
            node.outputs[0].name, node.outputs[0].type = node.name, value.type
            node.outputs[0].shape = value.shape
            graph.insert_after(_made_by(value), node)
            divided[value] = node.outputs[0]
    for reader in readers:
        reader.replace_input_with(0, divided[_data(reader)])
    return [name_of(value) for value in divided.values()]


def _made_by(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise AssertionError(f"no node makes {value.name}")
    return node


def _data(reader: ir.Node) -> ir.Value:
    value = reader.inputs[0]
    if value is None:
        raise AssertionError(f"{reader.name} has no data input")
    return value


def smoothing_factors(activations: Array, weights: Array, alpha: float) -> Array:
    """Return s = activations ** alpha / weights ** (1 - alpha), float64.

    Args:
        activations: max|X_c| of every channel, >= 0.
        weights: max_j |W_cj| of every channel, over all the matrices that read it, >= 0.
        alpha: in [0, 1].

    Returns:
        The factors; 1 for a channel that is always 0 on either side, never below `SMALLEST_FACTOR`.
    """
    x, w = np.asarray(activations, np.float64), np.asarray(weights, np.float64)
    alive = (x > 0) & (w > 0) & np.isfinite(x)
    factor = np.where(alive, x, 1.0) ** alpha / np.where(alive, w, 1.0) ** (1 - alpha)
    return np.maximum(factor, SMALLEST_FACTOR)


@dataclass(frozen=True, slots=True)
class _Affine:
    """The constants that a normalization ends with: (node, input index, array), each over the last axis."""

    channels: int
    constants: tuple[tuple[ir.Node, int, Array], ...]


def _affine_of(node: ir.Node) -> _Affine | None:
    """Return the affine part of a normalization that ends in `node`; None where it ends none."""
    if node.op_type in _NORMS:
        axis = node.attributes.get("axis")
        rank = None if node.outputs[0].shape is None else len(node.outputs[0].shape)
        if axis is not None and axis.as_int() not in (-1, None if rank is None else rank - 1):
            return None
        found = [(node, index, _vector(value)) for index, value in enumerate(node.inputs[1:3], 1) if value is not None]
    elif node.op_type == "Add" and node.domain == "":
        pair = _by_constant(node)
        product = None if pair is None else pair[0].producer()
        if pair is None or product is None or product.op_type != "Mul" or sole_consumer(product.outputs[0]) is None:
            return None
        inner = _by_constant(product)
        if inner is None or not _normalized(inner[0]):
            return None
        found = [(product, inner[1], _vector(product.inputs[inner[1]])), (node, pair[1], _vector(node.inputs[pair[1]]))]
    elif node.op_type == "Mul" and node.domain == "":
        inner = _by_constant(node)
        if inner is None or not _normalized(inner[0]):
            return None
        found = [(node, inner[1], _vector(node.inputs[inner[1]]))]
    else:
        return None
    arrays = [(target, index, array) for target, index, array in found if array is not None]
    lengths = {array.size for _, _, array in arrays}
    if not arrays or len(arrays) < len(found) or len(lengths) != 1:
        return None
    return _Affine(lengths.pop(), tuple(arrays))


def _normalized(value: ir.Value) -> bool:
    """Tell whether a value is x divided by its deviation: the Div (or Mul by the reciprocal) of a normalization."""
    producer = value.producer()
    if producer is None or producer.op_type not in ("Div", "Mul"):
        return False
    for source in producer.inputs:
        made_by = None if source is None else source.producer()
        while made_by is not None and made_by.op_type in ("Reciprocal", "Cast", "Div"):
            back = made_by.inputs[-1]
            made_by = None if back is None else back.producer()
        if made_by is not None and made_by.op_type == "Sqrt":
            return True
    return False


def _by_constant(node: ir.Node) -> tuple[ir.Value, int] | None:
    """Return the activation that a Mul or Add combines with a constant, and the index of the constant."""
    for data, constant in ((0, 1), (1, 0)):
        value = node.inputs[data]
        if value is not None and is_activation(value) and constant_array(node.inputs[constant]) is not None:
            return value, constant
    return None


def _vector(value: ir.Value | None) -> Array | None:
    """Return a float constant that spans the last axis alone; None for others."""
    constant = constant_array(value)
    if constant is None or constant.dtype != ir.DataType.FLOAT:
        return None
    *leading, last = constant.shape.numpy() or (0,)
    return None if last <= 1 or any(length != 1 for length in leading) else np.asarray(constant.numpy())


def _readers(value: ir.Value, channels: int) -> tuple[list[tuple[ir.Node, int]], list[str]]:
    """Return the (node, weight index) of the matrix products that read a tensor, and what else reads it."""
    products: list[tuple[ir.Node, int]] = []
    others = ["the model's caller"] if value.is_graph_output() else []
    for node, index in _uses(value, channels):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") and index == 0 else None
        constant = constant_array(weight)
        flipped = node.attributes.get("transA")
        if (
            constant is None
            or constant.dtype != ir.DataType.FLOAT
            or len(constant.shape) != 2
            or (flipped is not None and flipped.as_int())
            or node.graph is not value.graph
        ):
            others.append(repr(node.name))
        else:
            products.append((node, 1))
    return products, others


def _uses(value: ir.Value, channels: int) -> Iterator[tuple[ir.Node, int]]:
    """Yield the readers of a value, across operators that leave its last axis as it is."""
    for use in value.uses():
        output = use.node.outputs[0]
        last = None if output.shape is None or not len(output.shape) else output.shape[-1]
        if use.node.op_type in _KEEP_LAST_AXIS and use.idx == 0 and last == channels and not output.is_graph_output():
            yield from _uses(output, channels)
        else:
            yield use.node, use.idx


def _transposed(node: ir.Node) -> bool:
    attribute = node.attributes.get("transB")
    return attribute is not None and bool(attribute.as_int())


def _array(value: ir.Value | None) -> Array:
    constant = constant_array(value)
    if constant is None:
        raise AssertionError("a weight is no constant")
    return np.asarray(constant.numpy())


def _oriented(node: ir.Node, index: int) -> Array:
    """Return a matrix with the input channels along its first axis."""
    weight = _array(node.inputs[index])
    return weight.T if _transposed(node) else weight


class _Constants:
    """Writes changed copies of constants into a graph: others may read the originals."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        nodes = list(ir.traversal.RecursiveGraphIterator(graph))
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
        self._names = FreeNames(value.name for value in values)

    def name(self, stem: str) -> str:
        """Return a name that nothing has, and keep it."""
        return self._names.take(stem)

    def add(self, original: ir.Value | None, array: Array) -> ir.Value:
        if original is None:
            raise AssertionError("there is no constant to change")
        name = self._names.take(f"{original.name}_smoothed")
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value
