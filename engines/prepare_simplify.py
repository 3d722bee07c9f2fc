"""The simplifier, and what it leaves to us: types and shapes, shared constants, the order of the inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import onnx
import onnx.numpy_helper
import onnx.shape_inference

from engines.outside_weights import hide_outside, is_outside, restore_outside
from engines.prepare_slim import slim

_SHARED_BELOW = 1000
"""Constants of fewer elements are shared; larger ones that are equal are shared on purpose or not at all."""


def simplify(
    model: onnx.ModelProto, take: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None
) -> onnx.ModelProto:
    """Fold constants, drop what computes nothing, and infer types and shapes; inputs stay as they are.

    Args:
        model: what to simplify.
        take: moves large weights out of a model, see `engines.prepare_slim.slim`.

    Raises:
        Exception: whatever the simplifier's and the inference's parsers meet.
    """
    inputs = list(model.graph.input)
    simple = slim(model, take)
    share_constants(simple)
    hidden = {} if take is None else hide_outside(simple)
    inferred = onnx.shape_inference.infer_shapes(simple, data_prop=True)
    restore_outside(inferred, hidden)
    # Inputs that nothing reads are part of the model's interface; the simplifier drops them.
    kept = {value.name: value for value in inferred.graph.input}
    del inferred.graph.input[:]
    inferred.graph.input.extend(kept.get(value.name, value) for value in inputs)
    return inferred


def share_constants(model: onnx.ModelProto) -> None:
    """Let small constants of the same type, shape and value be one, under the name that is read first.

    Args:
        model: edited in place; initializers of the main graph only, read in the main graph only.
    """
    graph = model.graph
    small = {
        tensor.name: tensor
        for tensor in graph.initializer
        if _elements(tensor) < _SHARED_BELOW and not is_outside(tensor)
    }
    for value in graph.output:
        small.pop(value.name, None)
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    stands_for: dict[str, str] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name not in small:
                continue
            if name not in stands_for:
                tensor = small[name]
                stands_for[name] = first.setdefault((tensor.data_type, tuple(tensor.dims), _digest(tensor)), name)
            node.input[index] = stands_for[name]
    replaced = {name for name, other in stands_for.items() if name != other}
    replaced -= {name for node in graph.node for name in _names_in_bodies(node)}
    if replaced:
        kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _elements(tensor: onnx.TensorProto) -> int:
    count = 1
    for length in tensor.dims:
        count *= length
    return count


def _digest(tensor: onnx.TensorProto) -> bytes:
    if tensor.data_type == onnx.TensorProto.STRING:
        return hashlib.sha256(repr(list(tensor.string_data)).encode()).digest()
    return hashlib.sha256(onnx.numpy_helper.to_array(tensor).tobytes()).digest()


def _names_in_bodies(node: onnx.NodeProto) -> set[str]:
    """Return the names that the branches and loop bodies of a node read."""
    names: set[str] = set()
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                names.update(inner.input)
                names |= _names_in_bodies(inner)
            names.update(value.name for value in attribute.g.output)
    return names
