"""Operators in the form that the rules of placement and the integer kernels know: Sum as Add, spatial means as pools.

PyTorch exports global average pooling as ReduceMean, for which ONNX Runtime has no integer kernel, and old exports
write residual Adds as Sum.
"""

from __future__ import annotations

import onnx_ir as ir

_WEIGHTED = ("Conv", "Gemm", "MatMul")

_MOVING = ("Flatten", "Reshape", "Squeeze", "Dropout", "Identity")
"""What stands between a global pool and the layer that reads it."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def rename_operators(model: ir.Model) -> int:
    """Replace Sum by Add, and ReduceMean over all spatial axes by GlobalAveragePool.

    Sum(a, b, c) = (a + b) + c, in the order in which ONNX Runtime adds. A mean is replaced where a layer with weights
    reads it, directly or behind a Flatten, and the data have two spatial axes or more: that is a global pool, and no
    part of a normalization. Without `keepdims` a Flatten behind the pool takes the axes away. Names of tensors stay.

    Args:
        model: with shapes and constants as initializers; edited in place, in the main graph.

    Returns:
        The number of nodes that were replaced.
    """
    graph = model.graph
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken.update(value.name for node in graph for value in node.outputs)
    replaced = 0
    for node in list(graph):
        if node.domain != "" or not node.outputs:
            continue
        if node.op_type == "Sum" and len(node.inputs) > 1 and node.outputs[0].dtype in _FLOATS:
            _replace(graph, node, _sums(node, taken))
            replaced += 1
        elif node.op_type == "ReduceMean" and _pools(node):
            _replace(graph, node, _pool(node, taken))
            replaced += 1
    return replaced


def _sums(node: ir.Node, taken: set[str | None]) -> list[ir.Node]:
    """Return the chain of Adds that a Sum stands for."""
    total, *others = node.inputs
    nodes: list[ir.Node] = []
    for index, other in enumerate(others):
        last = index == len(others) - 1
        name = f"{node.name}_{index}" if node.name and not last else node.name
        add = ir.node("Add", [total, other], name=name)
        if not last:
            total = _named(add.outputs[0], node.outputs[0], taken)
        nodes.append(add)
    return nodes


def _pool(node: ir.Node, taken: set[str | None]) -> list[ir.Node]:
    """Return the pool that a ReduceMean stands for, with a Flatten where it drops the axes."""
    pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
    keep = node.attributes.get("keepdims")
    if keep is None or keep.as_int():
        return [pool]
    pooled = _named(pool.outputs[0], node.outputs[0], taken)
    source = node.inputs[0]
    if source is not None and source.shape is not None and node.outputs[0].shape is not None:
        pooled.shape = ir.Shape([*node.outputs[0].shape, *[1] * (len(source.shape) - 2)])
    return [pool, ir.node("Flatten", [pooled], {"axis": 1}, name=f"{node.name}_flatten" if node.name else None)]


def _pools(node: ir.Node) -> bool:
    """Tell whether a ReduceMean averages all axes behind batch and channel, for a layer with weights to read."""
    data = node.inputs[0]
    axes = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    if data is None or data.shape is None or axes is None or data.dtype not in _FLOATS:
        return False
    rank = len(data.shape)
    named = {int(axis) % rank for axis in axes.numpy().reshape(-1)}
    return rank >= 4 and named == set(range(2, rank)) and _feeds_weights(node)


def _feeds_weights(node: ir.Node) -> bool:
    """Tell whether all that reads a node is a layer with weights, or hands its values on to one."""
    output = node.outputs[0]
    readers = [use.node for use in output.uses() if use.idx == 0]
    return (
        bool(readers)
        and len(readers) == len(output.uses())
        and not output.is_graph_output()
        and all(
            reader.domain == ""
            and (reader.op_type in _WEIGHTED or (reader.op_type in _MOVING and _feeds_weights(reader)))
            for reader in readers
        )
    )


def _named(value: ir.Value, like: ir.Value, taken: set[str | None]) -> ir.Value:
    """Give a new value a name of its own, and the type and shape of another one."""
    number = 0
    while (name := f"{like.name}_part_{number}") in taken:
        number += 1
    taken.add(name)
    value.name, value.type = name, like.type
    return value


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put nodes in the place of another one; the last gives its output."""
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, nodes[-1].outputs)
