"""The types of an engine: those that its model holds, and those that its precision asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from engines.errors import EngineBuildError
from engines.onnxrt import PRECISION_KEY, TARGET_KEY
from engines.opset import nested_graphs
from engines.runner import TensorSpec

Precision = Literal["fp32", "tf32", "fp16", "int8", "int8+fp16"]
"""What an engine computes in. "tf32" is an FP32 model whose products TensorRT may round to TF32."""


def check_types(file: Path, header: onnx.ModelProto, precision: Precision, *, implicit: bool) -> None:
    """Check that a model holds the types that its engine is to have; a strongly typed engine takes them as they are.

    Args:
        file: the model's file, for messages.
        header: the model, with or without its weights.
        precision: of the engine.
        implicit: whether a calibrator is to bring INT8 into an FP32 model.

    Raises:
        EngineBuildError: says what the model holds and what was expected.
    """
    metadata = {entry.key: entry.value for entry in header.metadata_props}
    if metadata.get(TARGET_KEY) == "cpu":
        raise EngineBuildError(
            f"Cannot build {str(file)!r}: its Q/DQ nodes were placed for ONNX Runtime's CPU kernels. "
            "Quantize the FP32 model again with --target tensorrt."
        )
    quantized, half = held_types(header)
    if implicit:
        if precision not in ("int8", "int8+fp16"):
            raise EngineBuildError(f"A calibrator serves the precisions int8 and int8+fp16, not {precision}.")
        if quantized or half:
            raise EngineBuildError(
                f"Cannot calibrate {str(file)!r}: it holds {_named(quantized, half)}, and TensorRT ignores calibrators "
                "where a model has types of its own. Give the FP32 model, or build without --implicit."
            )
        return
    expected = (precision in ("int8", "int8+fp16"), precision in ("fp16", "int8+fp16"))
    if expected[0] and not quantized and metadata.get(PRECISION_KEY) in ("int8", "int8+fp16"):
        raise EngineBuildError(
            f"Cannot build {str(file)!r} as {precision}: it was quantized, and none of its nodes gains from INT8 on "
            "TensorRT, so it holds no Q/DQ nodes. `trt-int8 quantize --explain` gives the reason for each, --include "
            "overrules it; or build fp16."
        )
    if (quantized, half) != expected:
        raise EngineBuildError(
            f"Cannot build {str(file)!r} as {precision}: it holds {_named(quantized, half)}; expected "
            f"{_named(*expected)}. An engine takes its types from the model, so convert the model first "
            "(trt-int8 quantize writes int8 and int8+fp16)."
        )


def held_types(header: onnx.ModelProto) -> tuple[bool, bool]:
    """Tell whether a model holds Q/DQ nodes, and whether it holds FP16 tensors."""
    quantized = half = False
    for graph in nested_graphs(header.graph):
        half |= any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
        for node in graph.node:
            quantized |= node.op_type in ("QuantizeLinear", "DequantizeLinear")
            half |= any(
                (attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT16)
                or attribute.t.data_type == onnx.TensorProto.FLOAT16
                for attribute in node.attribute
            )
    half |= any(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for value in header.graph.input)
    return quantized, half


def _named(quantized: bool, half: bool) -> str:
    parts = [name for name, present in (("Q/DQ nodes", quantized), ("FP16 tensors", half)) if present]
    return " and ".join(parts) or "float32 alone"


def network_specs(trt: Any, tensors: Sequence[Any], header: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Describe a network's inputs or outputs: dtype and lengths as TensorRT sees them, symbols as in the ONNX file.

    Args:
        trt: the module `tensorrt`.
        tensors: the network's inputs, or its outputs.
        header: the same as the ONNX file states them.

    Raises:
        EngineBuildError: one of them has no NumPy type, or its values are read as a shape.
    """
    written = {spec.name: spec for spec in header}
    specs = []
    for tensor in tensors:
        if tensor.is_shape_tensor:
            raise EngineBuildError(
                f"Cannot build an engine with {tensor.name!r}: TensorRT reads its values as a shape while it sets up "
                "a run. Export the model with that shape fixed, or computed from another input's shape."
            )
        lengths = tuple(int(length) for length in tensor.shape)
        symbols = written[tensor.name].shape if tensor.name in written else None
        if symbols is None or len(symbols) != len(lengths):
            symbols = (None,) * len(lengths)
        shape = tuple(
            length if length >= 0 else (symbol if isinstance(symbol, str) else None)
            for length, symbol in zip(lengths, symbols, strict=True)
        )
        specs.append(TensorSpec(tensor.name, numpy_dtype(trt, tensor.name, tensor.dtype), shape))
    return tuple(specs)


def numpy_dtype(trt: Any, name: str, dtype: Any) -> np.dtype[np.generic]:
    """Return NumPy's dtype for one of TensorRT's.

    Raises:
        EngineBuildError: NumPy has none, for BF16 and FP8.
    """
    try:
        found: np.dtype[np.generic] = np.dtype(trt.nptype(dtype))
    except TypeError as error:
        raise EngineBuildError(
            f"The input or output {name!r} has the type {dtype.name}, which NumPy does not have. "
            "Let the model keep float32 there."
        ) from error
    return found
