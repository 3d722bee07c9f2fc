"""What a prepared graph is told apart by: names for every node, no notes, and hashes."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnx.numpy_helper

from engines.opset import nested_graphs
from engines.outside_weights import is_outside, read_chunks


def drop_initializers_from_inputs(model: onnx.ModelProto) -> None:
    """Before IR version 4 every initializer had to be an input too; as inputs they would not be constants."""
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = max(model.ir_version, 4)


def drop_notes(model: onnx.ModelProto) -> None:
    """Clear documentation strings and metadata of nodes and values, in branches and loop bodies too."""
    for graph in nested_graphs(model.graph):
        for item in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            item.ClearField("doc_string")
            item.ClearField("metadata_props")
        graph.ClearField("doc_string")
        graph.ClearField("metadata_props")
    model.ClearField("doc_string")


def name_nodes(model: onnx.ModelProto) -> None:
    """Give unnamed nodes and doubles a unique name, made from the first output: unique, and known to the user."""
    taken: set[str] = set()
    for node in (node for graph in nested_graphs(model.graph) for node in graph.node):
        if not node.name or node.name in taken:
            first = next((output for output in node.output if output), "")
            name = candidate = f"{node.op_type}:{first}"
            number = 1
            while candidate in taken:
                number += 1
                candidate = f"{name}:{number}"
            node.name = candidate
        taken.add(node.name)


def graph_hash(model: onnx.ModelProto) -> str:
    """Hash the structure: nodes, attributes, inputs, outputs, opsets."""
    digest = hashlib.sha256()
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for value in [*model.graph.input, *model.graph.output]:
        digest.update(value.SerializeToString(deterministic=True))
    for opset in sorted(model.opset_import, key=lambda entry: entry.domain):
        digest.update(opset.SerializeToString(deterministic=True))
    return digest.hexdigest()


def weights_hash(model: onnx.ModelProto) -> str:
    """Hash the initializers: names, types, shapes and values, wherever they are stored."""
    digest = hashlib.sha256()
    for initializer in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
        digest.update(repr((initializer.name, initializer.data_type, list(initializer.dims))).encode())
        if initializer.data_type == onnx.TensorProto.STRING:
            digest.update(b"".join(initializer.string_data))
        elif is_outside(initializer):
            for chunk in read_chunks(initializer):
                digest.update(chunk)
        else:  # the values, however the file stores them: the same weights in external data are the same weights
            digest.update(np.ascontiguousarray(onnx.numpy_helper.to_array(initializer)).tobytes())
    return digest.hexdigest()
