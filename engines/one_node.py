"""One node computed by itself: constants that a file leaves to be computed, such as scales and weights behind nodes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.helper
import onnx.reference
import onnx_ir as ir

from calibrators.protocols import Array
from engines.opset import STANDARD_DOMAINS


def evaluate(node: ir.Node, inputs: Mapping[str, Array], output: str, opset: int) -> Array | None:
    """Return an output of a node that reads constants alone; None where onnx's reference cannot compute it.

    Args:
        node: the node, of the standard operators, without subgraphs.
        inputs: what it reads, by name.
        output: name of the output.
        opset: the model's opset.
    """
    if node.domain not in STANDARD_DOMAINS:
        return None
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    graph = onnx.helper.make_graph([ir.to_proto(node)], "constant", values, [onnx.ValueInfoProto(name=output)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        (found,) = onnx.reference.ReferenceEvaluator(model).run(None, dict(inputs))
    except Exception:  # the reference raises whatever its operators meet; what it cannot compute stays unknown
        return None
    return np.asarray(found) if isinstance(found, np.ndarray | np.generic) else None
