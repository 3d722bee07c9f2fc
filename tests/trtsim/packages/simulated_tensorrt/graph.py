"""The ONNX side of the simulation: what the parser refuses, types and shapes, and INT8 by calibration. SIMULATED."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)  # TensorRT's DataType, the same in 10 and 11
DATA_TYPES = {
    TensorProto.FLOAT: FLOAT, TensorProto.FLOAT16: HALF, TensorProto.INT8: INT8, TensorProto.INT32: INT32,
    TensorProto.BOOL: BOOL, TensorProto.UINT8: UINT8, TensorProto.INT64: INT64,
}  # fmt: skip
NUMPY_TYPES = {FLOAT: "f4", HALF: "f2", INT8: "i1", INT32: "i4", BOOL: "?", UINT8: "u1", INT64: "i8"}
TYPE_NAMES = {FLOAT: "FP32", HALF: "FP16", INT8: "Int8", INT32: "Int32", BOOL: "Bool", UINT8: "UInt8", INT64: "Int64"}
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
UNSUPPORTED = (
    "ConvInteger", "Det", "DFT", "DynamicQuantizeLinear", "MatMulInteger", "MaxUnpool", "Multinomial", "QLinearConv",
    "QLinearMatMul", "Unique",
)  # fmt: skip
"""Some of the operators that TensorRT's parser has no importer for."""


class ParseFailure(Exception):
    """What TensorRT's parser refuses."""

    def __init__(self, text: str, index: int = -1, node: onnx.NodeProto | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.index = index
        self.node_name = node.name if node else ""
        self.operator = node.op_type if node else ""


class Graph:
    """A model as a network: inputs without initializers, types and shapes of all tensors; -1 is a dynamic dimension."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in self.constants]
        for value in inputs:
            for dimension, size in zip(
                value.type.tensor_type.shape.dim, (shapes or {}).get(value.name, ()), strict=False
            ):
                dimension.dim_value = size
        if shapes:  # what was inferred or declared for other shapes
            del graph.value_info[:]
            for value in graph.output:
                value.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        self.inputs = [value.name for value in inputs]
        self.outputs = [value.name for value in graph.output]
        self.types: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for value in [*inferred.value_info, *inferred.input, *inferred.output]:
            kind = value.type.tensor_type
            self.types[value.name] = DATA_TYPES.get(kind.elem_type, FLOAT)
            if kind.HasField("shape"):
                self.shapes[value.name] = tuple(
                    size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim
                )

    @property
    def explicit(self) -> bool:
        """Whether it holds Q/DQ nodes."""
        return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in self.model.graph.node)

    def activations(self) -> list[str]:
        """Floating-point tensors in the order of the network: those that a calibration gives scales to."""
        names = [*self.inputs, *(name for node in self.model.graph.node for name in node.output if name)]
        return [name for name in names if self.types.get(name, FLOAT) in (FLOAT, HALF)]

    def inputs_of(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name and name not in self.constants]

    def with_outputs(self, names: Sequence[str]) -> onnx.ModelProto:
        """The model with exactly these tensors as outputs."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        declared = {value.name: value for value in self.model.graph.output}
        del model.graph.output[:]
        model.graph.output.extend(declared.get(name) or onnx.ValueInfoProto(name=name) for name in names)
        return model


def load(data: bytes, path: str | None) -> onnx.ModelProto:
    """Read a model as TensorRT's parser does, and refuse what it refuses.

    Raises:
        ParseFailure: the node, where it is one, is named.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        if path:
            onnx.load_external_data_for_model(model, path.rpartition("/")[0] or ".")
    except Exception as error:
        raise ParseFailure(f"Failed to parse the ONNX model: {str(error).splitlines()[0]}") from error
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for index, node in enumerate(model.graph.node):
        if node.domain not in ("", "ai.onnx") or node.op_type in UNSUPPORTED:
            raise ParseFailure(f"No importer registered for op: {node.op_type}", index, node)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _check_quantization(index, node, constants)
    return model


def _check_quantization(index: int, node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> None:
    data, scale = constants.get(node.input[0]), constants.get(node.input[1])
    zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero_point is not None and numpy_helper.to_array(zero_point).any():
        raise ParseFailure("Assertion failed: shiftIsAllZeros: Non-zero zero point is not supported", index, node)
    if zero_point is not None and zero_point.data_type == TensorProto.UINT8:
        raise ParseFailure("Assertion failed: UINT8 zero points are supported on DLA only", index, node)
    if scale is None:
        return
    scales = numpy_helper.to_array(scale)
    if not (scales > 0).all():
        raise ParseFailure("Assertion failed: scaleAllPositive: Scale coefficients must be positive", index, node)
    if data is None and scales.size > 1:
        raise ParseFailure("Activations are quantized per tensor only", index, node)
    if data is not None and data.data_type == TensorProto.INT32:
        raise ParseFailure("DequantizeLinear: input must have type FP8, FP4, Int4 or Int8, not Int32", index, node)


def fake_quantize(graph: Graph, scales: Mapping[str, float]) -> tuple[onnx.ModelProto, list[str], list[str]]:
    """Quantize the layers with weights by the scales of a calibration: activations per tensor, weights per channel.

    Returns:
        The model with Q/DQ nodes; the names of the nodes that run in INT8; the tensors without a scale.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    nodes: list[onnx.NodeProto] = []
    quantized: list[str] = []
    missing: list[str] = []
    for node in model.graph.node:
        if node.op_type in WEIGHTED and node.input[1] in graph.constants:
            name = node.input[0]
            if name in scales:
                node.input[0] = f"{name}_simulated_dequantized_for_{node.name}"
                scale, zero, codes = (f"{node.input[0]}_{part}" for part in ("scale", "zero", "codes"))
                model.graph.initializer.append(numpy_helper.from_array(np.float32(scales[name]), scale))
                model.graph.initializer.append(numpy_helper.from_array(np.int8(0), zero))
                nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [codes]))
                nodes.append(helper.make_node("DequantizeLinear", [codes, scale, zero], [node.input[0]]))
                weight = f"{node.input[1]}_simulated_dequantized_for_{node.name}"
                model.graph.initializer.append(
                    numpy_helper.from_array(_rounded_weights(node, graph.constants[node.input[1]]), weight)
                )
                node.input[1] = weight
                quantized.append(node.name)
            else:
                missing.append(name)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model, quantized, missing


def _rounded_weights(node: onnx.NodeProto, tensor: TensorProto) -> Any:
    weights = numpy_helper.to_array(tensor)
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1}.get(node.op_type, weights.ndim - 1)
    others = tuple(i for i in range(weights.ndim) if i != axis)
    scale = np.maximum(np.abs(weights).max(others, keepdims=True), 1e-12) / 127
    return (np.rint(weights / scale) * scale).astype(np.float32)


def open_session(model: onnx.ModelProto | bytes) -> onnxruntime.InferenceSession:
    """Run the model node by node as it is written, Q/DQ in floating point."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    blob = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
