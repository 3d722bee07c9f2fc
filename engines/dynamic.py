"""Dynamic quantization: INT8 weights in the file, activation scales found anew at every run.

No calibration is needed, and every run pays for finding the range of each input. It is what `quantize_dynamic` of
PyTorch does to Linear and LSTM layers. ONNX Runtime's CPU kernels compute it; TensorRT has none, since its INT8 kernels
want scales that are fixed when the engine is built.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from engines.cpu_sums import write_sums
from engines.errors import ModelError
from engines.graph import PreparedModel, exceeds_one_file, quiet, save_model
from engines.node_rules import weighted_nodes
from engines.onnxrt import PRECISION_KEY, TARGET_KEY
from engines.placement import Decision, Placement
from engines.placement_options import PlacementOptions

DYNAMIC_OPERATORS = ("MatMul", "Gemm", "LSTM")
"""Operators whose weights ONNX Runtime's dynamic kernels take as INT8: matrix products, and the LSTM as a whole."""


def place_dynamically(prepared: PreparedModel, options: PlacementOptions | None = None) -> Placement:
    """Decide which nodes are quantized dynamically.

    Args:
        prepared: the model.
        options: which nodes the user excludes or includes.

    Raises:
        ModelError: an expression matches nothing, or no node is left to quantize.
    """
    _, decisions = weighted_nodes(prepared.ir(), options, target="cpu")
    decided = tuple(_dynamic(decision) for decision in decisions)
    if not any(decision.quantized for decision in decided):
        kinds = ", ".join(sorted({decision.op_type for decision in decided})) or "no weighted node"
        raise ModelError(
            f"Cannot quantize {str(prepared.path)!r} dynamically: that serves {', '.join(DYNAMIC_OPERATORS)} with "
            f"constant weights, and the model holds {kinds}. Take the mode static, which quantizes convolutions too."
        )
    return Placement("cpu", (), (), decided)


def write_dynamic(
    prepared: PreparedModel,
    placement: Placement,
    *,
    per_channel: bool = True,
    reduce_range: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return the model with its chosen nodes in ONNX Runtime's dynamic form.

    Weights are symmetric INT8, [-127, 127]; activations become affine uint8 at run time: DynamicQuantizeLinear finds
    scale = (max - min) / 255 of the tensor that it is given.

    Args:
        prepared: the FP32 model.
        placement: of `place_dynamically`.
        per_channel: one weight scale for each output channel, not one for the whole.
        reduce_range: 7-bit weights, for processors whose 8-bit products saturate in pairs.
        metadata: further entries for the model's metadata.

    Raises:
        ModelError: ONNX Runtime's quantizer refuses the model.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    left = [decision.node for decision in placement.decisions if not decision.quantized]
    # The quantizer first turns each Gemm into a MatMul and an Add, and names the MatMul after it.
    left += [f"{name}_MatMul" for name in left]
    with tempfile.TemporaryDirectory() as folder, _quiet_root_logger(), quiet():
        source, written = Path(folder) / "float.onnx", Path(folder) / "dynamic.onnx"
        large = exceeds_one_file(prepared.proto)
        save_model(prepared.proto, source)
        try:
            quantize_dynamic(
                source,
                written,
                op_types_to_quantize=list(DYNAMIC_OPERATORS),
                nodes_to_exclude=left,
                per_channel=per_channel,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
                use_external_data_format=large,
                extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
            )
            model = onnx.load(written)
        except Exception as error:  # its checks raise ValueError, AssertionError, RuntimeError and more
            line = " ".join(str(error).split())[:300].rstrip(".")
            raise ModelError(
                f"Cannot quantize {str(prepared.path)!r} dynamically: {line}. Take the mode static."
            ) from error
    quantized = ir.from_proto(model)
    if write_sums(quantized):
        model = ir.to_proto(quantized)
    entries = {TARGET_KEY: "cpu", PRECISION_KEY: "int8", **(metadata or {})}
    onnx.helper.set_model_props(model, entries)
    return model


def _dynamic(decision: Decision) -> Decision:
    if not decision.quantized and decision.rule != "recurrent":
        return decision
    if decision.op_type in DYNAMIC_OPERATORS:
        reason = f"the weights of {decision.op_type} are stored as INT8, its input is quantized at every run"
        return replace(decision, quantized=True, rule="dynamic", reason=reason)
    reason = f"dynamic quantization serves {', '.join(DYNAMIC_OPERATORS)}; {decision.op_type} needs fixed scales"
    return replace(decision, quantized=False, rule="needs-scales", reason=reason)


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keep the quantizer's advice, which it gives through the root logger, away from the user's terminal."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
