"""Names for the nodes and tensors of an exported graph, taken from the modules that compute them.

PyTorch's exporter numbers tensors as it meets them (`getitem_33`). Calibrations, reports and `--exclude` go by name, so
nodes and their outputs are called after their module here, as a user would look for them: `layer2.0.conv1/Conv`.
"""

from __future__ import annotations

import ast

import onnx_ir as ir

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Node metadata of PyTorch's exporter: the names of the modules around a node, outermost first, then its own."""


def name_after_modules(model: ir.Model) -> None:
    """Name nodes and activations of the main graph `module/Operator`, in place, and drop the exporter's metadata.

    Doubles are numbered: `layer1.0/Relu`, `layer1.0/Relu_1`. Inputs, outputs, weights, and what lies in subgraphs keep
    their names. The metadata go because they hold source paths of the machine that exported the model.

    Args:
        model: a model fresh from `torch.onnx.export(dynamo=True)`.
    """
    graph = model.graph
    every_node = list(ir.traversal.RecursiveGraphIterator(graph))
    kept = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    kept |= {value.name for node in every_node if node.graph is not graph for value in node.outputs}
    taken: set[str | None] = set(kept)
    for node in graph:
        base = "/".join(filter(None, (_module_of(node), node.op_type)))
        name, number = base, 0
        outputs = [name]
        while True:
            outputs = [name, *(f"{name}_output_{index}" for index in range(1, len(node.outputs)))]
            if taken.isdisjoint(outputs):
                break
            number += 1
            name = f"{base}_{number}"
        node.name = name
        taken.update(outputs)
        for value, output in zip(node.outputs, outputs, strict=True):
            if value.name and value.name not in kept:
                value.name = output
    for node in every_node:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()


def _module_of(node: ir.Node) -> str:
    """Return the dotted path of the module that a node belongs to, empty for the model itself."""
    for value in node.inputs[1:2]:
        # A BatchNorm that was folded leaves its own scope on the convolution; the weight still tells whose it is.
        if value is not None and value.is_initializer() and value.name and value.name.endswith(".weight"):
            return value.name.removesuffix(".weight")
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "[]"))
    module = scopes[-2] if len(scopes) > 1 else ""
    return "" if module.startswith("_") else str(module)
