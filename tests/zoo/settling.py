"""BatchNorm statistics as training would have left them: those of the values that really arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

EPSILON = 1e-5


def settle(model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> None:
    """Set the mean and variance of every BatchNormalization of `model` to what `feeds` bring about.

    One run does it: in a copy of the graph each BatchNormalization is written out as in training, where it takes the
    statistics of the batch, so that the next one sees values that are normalised already.

    Args:
        model: scale, bias, mean and variance are initializers; the latter two are overwritten.
        feeds: one batch.
    """
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in _typed_values(model)}
    training = onnx.ModelProto()
    training.CopyFrom(model)
    del training.graph.node[:]
    statistics: list[str] = []
    for node in model.graph.node:
        if node.op_type != "BatchNormalization":
            training.graph.node.append(node)
            continue
        statistics += node.input[3:5]
        training.graph.node.extend(_as_in_training(training, node, ranks[node.input[0]]))
    if not statistics:
        return
    del training.graph.output[:]
    training.graph.output.extend(onnx.ValueInfoProto(name=f"settled_{name}") for name in statistics)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # constants that the copy no longer reads are no news
    session = onnxruntime.InferenceSession(training.SerializeToString(), options, ["CPUExecutionProvider"])
    found = dict(zip(statistics, session.run(None, dict(feeds)), strict=True))
    for initializer in model.graph.initializer:
        if initializer.name in found:
            settled = found[initializer.name].reshape(-1).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(settled, initializer.name))


def _typed_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return [*inferred.input, *inferred.value_info, *inferred.output]


def _as_in_training(model: onnx.ModelProto, node: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
    """Return y = (x - mean) / sqrt(variance + epsilon) * scale + bias, mean and variance those of x."""
    x, scale, bias, mean, variance = node.input
    stem = f"settled_{node.output[0]}"
    axes = [0, *range(2, rank)]
    constants = {
        "shape": np.asarray([1, -1, *[1] * (rank - 2)], np.int64),
        "epsilon": np.asarray(EPSILON, np.float32),
        "axes": np.asarray(axes, np.int64),
    }
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(array, f"{stem}_{name}"))

    def made(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], **attributes)

    def averaged(source: str, output: str) -> onnx.NodeProto:
        if next(entry.version for entry in model.opset_import if entry.domain == "") >= 18:
            return made("ReduceMean", [source, f"{stem}_axes"], output)
        return made("ReduceMean", [source], output, axes=axes)

    return [
        averaged(x, f"settled_{mean}"),
        made("Sub", [x, f"settled_{mean}"], f"{stem}_centred"),
        made("Mul", [f"{stem}_centred", f"{stem}_centred"], f"{stem}_squared"),
        averaged(f"{stem}_squared", f"settled_{variance}"),
        made("Add", [f"settled_{variance}", f"{stem}_epsilon"], f"{stem}_positive"),
        made("Sqrt", [f"{stem}_positive"], f"{stem}_deviation"),
        made("Div", [f"{stem}_centred", f"{stem}_deviation"], f"{stem}_normal"),
        made("Reshape", [scale, f"{stem}_shape"], f"{stem}_scale"),
        made("Reshape", [bias, f"{stem}_shape"], f"{stem}_bias"),
        made("Mul", [f"{stem}_normal", f"{stem}_scale"], f"{stem}_scaled"),
        made("Add", [f"{stem}_scaled", f"{stem}_bias"], node.output[0]),
    ]
