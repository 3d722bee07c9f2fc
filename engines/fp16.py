"""FP16 models whose range is guarded by what calibration saw.

FP16 ends at 65504. ONNX Runtime's converter turns a whole FP32 graph into FP16 and keeps the nodes of a block list in
FP32; this module decides that list: a node stays FP32 when one of its weights, or a value that it reads or writes,
would leave the range. Values are taken from the calibration where it saw them, and bounded from those elsewhere
(`engines.magnitude`): a value whose bound stays inside the range is safe; one that may leave it is held in FP32. No
pass over the data is needed beside the calibration's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibrators.numerics import FP16_MAX
from engines.fp16_masks import make_masks_shallow, mask_inputs
from engines.graph import PreparedModel, constant_array, is_activation, quiet
from engines.magnitude import magnitude_bounds
from engines.onnxrt import PRECISION_KEY
from engines.outside_weights import hide_outside

UNCALIBRATED = "was not calibrated"
"""Stands in the reason of a node that is held for a value whose range calibration does not tell."""

MARGIN = 2.0
"""Values seen in calibration may be this much larger in use before they overflow."""


@dataclass(frozen=True, slots=True)
class HeldNode:
    """A node that stays FP32.

    Attributes:
        node: its name.
        op_type: its operator.
        reason: which value is too large, and how large.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fp16Model:
    """An FP16 model with FP32 inputs and outputs.

    Attributes:
        model: the model.
        held: the nodes kept in FP32, and why.
        nodes: number of nodes of the FP32 graph.
    """

    model: onnx.ModelProto
    held: tuple[HeldNode, ...]
    nodes: int


def convert_to_fp16(prepared: PreparedModel, amax: Mapping[str, float]) -> Fp16Model:
    """Convert a prepared FP32 model to FP16.

    Args:
        prepared: the model.
        amax: largest magnitude that calibration saw, by tensor name; tensors that are missing are bounded from the
            others.

    Returns:
        The model; inputs and outputs keep FP32, so that it is a drop-in replacement.
    """
    held = held_in_fp32(prepared, amax)
    model = in_fp16(prepared, held)
    model.metadata_props[PRECISION_KEY] = "fp16"
    return Fp16Model(ir.to_proto(model), held, len(prepared.proto.graph.node))


def in_fp16(prepared: PreparedModel, held: Sequence[HeldNode]) -> ir.Model:
    """Return a copy of a model in FP16, with FP32 inputs and outputs.

    Nodes keep their names, and every Cast whose name the FP32 model does not hold stands between FP16 and FP32.

    Args:
        prepared: the FP32 model.
        held: the nodes that stay FP32; see `held_in_fp32`.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    shallow = prepared.ir()
    make_masks_shallow(shallow, infinite=False)
    proto = ir.to_proto(shallow)
    _forget_types_of_weights(proto)
    hidden = hide_outside(proto)  # the converter takes them for FP32 inputs
    with quiet():  # preparation has inferred all types already
        converted: onnx.ModelProto = convert_float_to_float16(
            proto, keep_io_types=True, node_block_list=[node.node for node in held], disable_shape_infer=True
        )
    model = _mended(converted, {node.name for node in prepared.proto.graph.node})
    _restore_outside(model.graph, hidden)
    return model


def held_in_fp32(prepared: PreparedModel, amax: Mapping[str, float]) -> tuple[HeldNode, ...]:
    """Decide which nodes stay FP32: those with a weight or value that leaves, or may leave, the FP16 range.

    Constants that hide keys from attention do not count, see `engines.fp16_masks`.

    Nodes with a branch or loop body stay FP32 as a whole, since no calibration sees inside, and so do the operators
    that the converter always leaves alone.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST

    model = prepared.ir()
    make_masks_shallow(model, infinite=True)
    amax = {**dict.fromkeys(mask_inputs(model), 1.0), **amax}
    bounds = magnitude_bounds(model, amax)
    held: list[HeldNode] = []
    for node in model.graph:
        reason = _too_large(node, bounds, amax)
        if _subgraphs(node):
            reason = "the values inside its branches or loop body are not calibrated"
        elif reason is None and node.op_type in DEFAULT_OP_BLOCK_LIST and any(map(is_activation, node.inputs)):
            reason = f"ONNX Runtime's converter has no FP16 form of {node.op_type}"
        if reason is not None:
            held.append(HeldNode(node.name or "", node.op_type, reason))
    return tuple(held)


def _too_large(node: ir.Node, bounds: Mapping[str, float], amax: Mapping[str, float]) -> str | None:
    for value in node.inputs:
        constant = constant_array(value)
        if value is not None and constant is not None and constant.dtype == ir.DataType.FLOAT and constant.size:
            largest = float(np.abs(constant.numpy()).max())
            if largest > FP16_MAX:
                return f"its constant {value.name!r} reaches {largest:.4g}; FP16 ends at {FP16_MAX:.0f}"
    for value in [*node.inputs, *node.outputs]:
        if value is None or not value.name or not is_activation(value):
            continue
        bound = bounds.get(value.name, math.inf)
        if value.name in amax and bound * MARGIN > FP16_MAX:
            return f"calibration saw {bound:.4g} in {value.name!r}; FP16 ends at {FP16_MAX:.0f} (margin {MARGIN:g}x)"
        if value.name not in amax and bound > FP16_MAX:
            size = "no bound" if math.isinf(bound) else f"a bound of {bound:.4g}"
            return f"{value.name!r} {UNCALIBRATED} and has {size}; FP16 ends at {FP16_MAX:.0f}"
    return None


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs


def _mended(converted: onnx.ModelProto, originals: set[str]) -> ir.Model:
    """Mend what the converter leaves around the nodes that stay FP32.

    It writes the same cast once per reader, appends casts behind the nodes that read them, takes a value from one FP32
    node to the next (or from an FP32 input, or to an FP32 output) through FP16, where it would overflow, and forgets
    that branches and loop bodies read values from outside.

    Args:
        converted: the converter's result.
        originals: names of the nodes of the FP32 model; other Casts are the converter's.
    """
    _drop_doubles(converted)
    model = ir.from_proto(converted)
    graph = model.graph
    graph.sort()
    added = [node for node in graph if node.op_type == "Cast" and node.name not in originals]
    for node in added:
        half = node.inputs[0]
        source = half.producer() if half is not None else None
        exact = source.inputs[0] if source is not None and source in added else None
        if exact is None or node.outputs[0].dtype != ir.DataType.FLOAT:
            continue
        if node.outputs[0].is_graph_output():
            _make_output(graph, node.outputs[0], exact)
        else:
            node.outputs[0].replace_all_uses_with(exact)
    widened: dict[ir.Value, ir.Value] = {}
    for inner in ir.traversal.RecursiveGraphIterator(graph):
        for index, value in enumerate(inner.inputs):
            if inner.graph is graph or value is None or value.graph is not graph:
                continue
            if value.dtype == ir.DataType.FLOAT16:
                if value not in widened:
                    widened[value] = _widen(graph, value)
                inner.replace_input_with(index, widened[value])
    RemoveUnusedNodesPass()(model)
    return model


def _restore_outside(graph: ir.Graph, hidden: Mapping[str, onnx.TensorProto]) -> None:
    """Make weights again of inputs that stand for them: as they are for FP32 nodes, rounded for the others.

    They are rounded when they are written, one at a time, so that no copy of them stays in memory.
    """
    inputs = {value.name: value for value in graph.inputs}
    graph.inputs[:] = [value for value in graph.inputs if value.name not in hidden]
    for name, tensor in hidden.items():
        value, exact = inputs[name], ir.serde.deserialize_tensor(tensor)
        casts = [use.node for use in value.uses() if use.node.outputs[0].dtype == ir.DataType.FLOAT16]
        for node in casts:
            if node.op_type != "Cast" or value.dtype != ir.DataType.FLOAT:
                continue
            half = ir.Value(name=f"{name}_fp16" if len(value.uses()) > 1 else name, shape=value.shape)
            half.dtype = ir.DataType.FLOAT16
            half.const_value = _rounded(exact, str(half.name))
            node.outputs[0].replace_all_uses_with(half)
            graph.remove(node, safe=True)
            graph.register_initializer(half)
        if value.uses():
            value.const_value = exact
            graph.register_initializer(value)


def _rounded(exact: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    def make() -> ir.TensorProtocol:
        return ir.tensor(exact.numpy().astype(np.float16), name=name)

    return ir.LazyTensor(make, dtype=ir.DataType.FLOAT16, shape=ir.Shape(exact.shape.numpy()), name=name)


def _forget_types_of_weights(model: onnx.ModelProto) -> None:
    """Drop what is noted of initializers' types: the converter changes it even for weights that stay FP32."""
    weights = {initializer.name for initializer in model.graph.initializer}
    noted = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(noted)


def _drop_doubles(model: onnx.ModelProto) -> None:
    """Keep the first of several nodes that write the same tensor; the converter's doubles are alike."""
    written: set[str] = set()
    for index in reversed(range(len(model.graph.node))):
        output = model.graph.node[index].output[:1]
        if written.issuperset(output):
            del model.graph.node[index]
        written.update(output)


def _make_output(graph: ir.Graph, output: ir.Value, exact: ir.Value) -> None:
    """Put a value in the place of a graph output, under its name."""
    name, output.name = output.name, f"{output.name}_cast"
    exact.name, exact.type, exact.shape = name, output.type, output.shape
    graph.outputs[:] = [exact if value is output else value for value in graph.outputs]


def _widen(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Add a cast to FP32 behind a value."""
    node = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}_widened")
    real = node.outputs[0]
    real.name, real.shape, real.dtype = f"{value.name}_widened", value.shape, ir.DataType.FLOAT
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return real
