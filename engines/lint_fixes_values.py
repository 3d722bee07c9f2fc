"""Fixes of numbers and types: zero points, scales, axes, biases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from calibrators.errors import CalibrationError
from calibrators.numerics import fp16_scale
from calibrators.protocols import Array
from engines.lint_editor import Editor, Outcome
from engines.lint_graph import Quantizer
from engines.lint_rules_types import leaves_half, meets_half
from engines.lint_rules_weights import bias_pairs
from engines.opset import MINIMUM_OPSET


def fold_parameters(editor: Editor) -> Iterator[Outcome]:
    """Turn scales and zero points behind nodes into initializers. Exact."""
    graph = editor.graph
    for record in graph.quantizers:
        for index, name in ((1, "scale"), (2, "zero point")):
            value = record.node.inputs[index] if len(record.node.inputs) > index else None
            if value is None or value not in graph.constants:
                continue
            if [node.op_type for node in graph.steps(value)] in ([], ["Cast"]):
                continue
            array = graph.array(value)
            if array is None:
                yield _left("scale-behind-nodes", record, f"its {name} cannot be computed here")
                continue
            editor.set_input(record.node, index, editor.constant(array, value))
            yield _done("scale-behind-nodes", record, f"its {name} is an initializer")


def write_axis(editor: Editor) -> Iterator[Outcome]:
    """Write the axis that ONNX means by leaving it out: 1, or the only one that the scales fit. Exact."""
    for record in editor.graph.quantizers:
        if not record.per_channel or record.axis is not None or record.scale is None or editor.graph.opset < 13:
            continue
        shape, size = record.data.shape, record.scale.size
        fits = [] if shape is None else [axis for axis, length in enumerate(shape) if length == size]
        if 1 not in fits and len(fits) != 1:
            yield _left("missing-axis", record, f"its {size} scales fit {len(fits)} axes of its data")
            continue
        axis = 1 if 1 in fits else fits[0]
        record.node.attributes["axis"] = ir.AttrInt64("axis", axis)
        yield _done("missing-axis", record, f"axis {axis} is written")


def write_zero_point(editor: Editor) -> Iterator[Outcome]:
    """Write INT8 zero points. Exact for INT8 codes; a Q without a type becomes what TensorRT takes it for."""
    graph = editor.graph
    for record in graph.heads:
        readers = graph.dequantizers(record) if record.quantizes else []
        bare = [item for item in (record, *readers) if not item.has_zero_point]
        if not bare or record.codes not in (ir.DataType.INT8, ir.DataType.UINT8):
            continue
        if record.has_zero_point and record.codes != ir.DataType.INT8:
            continue
        if not record.quantizes and record.codes == ir.DataType.UINT8:
            continue
        if any(item.scale is None for item in bare):
            yield _left("missing-zero-point", record, "its scale is not known")
        elif any(item.has_zero_point and item.codes == ir.DataType.UINT8 for item in readers) and record in bare:
            yield _left("missing-zero-point", record, "its DequantizeLinear says UINT8")
        elif record.quantizes and len(readers) != len(list(record.output.uses())):
            yield _left("missing-zero-point", record, "others than DequantizeLinear read its codes")
        else:
            for item in bare:
                editor.set_zero_point(item)
            yield _done("missing-zero-point", record, "an INT8 zero point of 0 is written")


def widen_zero_point(editor: Editor) -> Iterator[Outcome]:
    """Write as many zero points of 0 as there are scales. Exact."""
    for record in editor.graph.quantizers:
        scale, zero = record.scale, record.zero_point
        if scale is None or zero is None or scale.size == zero.size:
            continue
        old = record.node.inputs[2]
        if zero.any() or old is None or record.codes is None:
            yield _left("zero-point-size", record, "its zero points are not all 0")
            continue
        zeros = np.zeros(editor.scale_shape(record), record.codes.numpy())
        editor.set_input(record.node, 2, editor.constant(zeros, old))
        yield _done("zero-point-size", record, f"{scale.size} zero points of 0 are written")


def shift_codes(editor: Editor) -> Iterator[Outcome]:
    """Turn codes into INT8 with zero point 0 where each keeps its value. Exact."""
    graph = editor.graph
    for record in graph.heads:
        unsigned = record.codes == ir.DataType.UINT8 and (record.has_zero_point or not record.quantizes)
        zero = np.zeros(1) if record.zero_point is None else record.zero_point
        if record.codes not in (ir.DataType.INT8, ir.DataType.UINT8) or not (unsigned or zero.any()):
            continue
        rule = "uint8-codes" if unsigned else "zero-point"
        if record.scale is None:
            yield _left(rule, record, "its scale is not known")
        elif not record.quantizes:
            yield _shift_constant(editor, record, rule, zero)
        elif not (unsigned and (zero == 128).all()):
            yield _left(rule, record, "only UINT8 with zero point 128 has the values of INT8; calibrate again")
        else:
            readers = graph.dequantizers(record)
            alike = all(item.zero_point is not None and (item.zero_point == 128).all() for item in readers)
            if not alike or len(readers) != len(list(record.output.uses())) or record.output.is_graph_output():
                yield _left(rule, record, "its codes are read by others than DequantizeLinear with zero point 128")
                continue
            for item in (record, *readers):
                editor.set_zero_point(item)
            yield _done(rule, record, "UINT8 - 128 is INT8: the same values")


def fold_int32(editor: Editor) -> Iterator[Outcome]:
    """Turn INT32 initializers behind a DQ into floats: code * scale, as the DQ computes it. Exact."""
    for record in editor.graph.quantizers:
        if not record.quantizes and record.codes == ir.DataType.INT32:
            yield _fold(editor, record, "int32-dq")


def float_bias(editor: Editor) -> Iterator[Outcome]:
    """Turn quantized biases into floats: code * scale, exact; a float behind Q and DQ itself, closer to the model."""
    for _, record in list(bias_pairs(editor.graph)):
        first = editor.graph.source(record)
        if first is None:
            yield _fold(editor, record, "quantized-bias")
            continue
        why = editor.skip_pair(first, record)
        yield Outcome("quantized-bias", str(record.node.name), why is None, why or "the float bias is read")


def match_scale_type(editor: Editor) -> Iterator[Outcome]:
    """Store the scale of a Q in the type that the Q reads; to FP16 it is rounded up."""
    for record in editor.graph.quantizers:
        read = record.data.dtype
        if editor.graph.opset < MINIMUM_OPSET or not record.quantizes or read in (None, record.scale_type):
            continue
        if record.scale is None or read not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            yield _left("scale-type", record, "its scale is not known, or it reads neither FP32 nor FP16")
            continue
        try:
            scale = fp16_scale(record.scale) if read == ir.DataType.FLOAT16 else record.scale
        except CalibrationError as error:
            yield _left("scale-type", record, str(error))
            continue
        editor.set_scale(record, scale.astype(read.numpy()))
        yield _done("scale-type", record, f"its scale is {read.name}")


def halve_scales(editor: Editor) -> Iterator[Outcome]:
    """Store scales between casts from and to FP16 in FP16, rounded up, and drop the casts."""
    graph = editor.graph
    for record in graph.heads:
        group = [record, *(graph.dequantizers(record) if record.quantizes else [])]
        found = [
            item for item in group if item.scale_type == ir.DataType.FLOAT and (meets_half(item) or leaves_half(item))
        ]
        if not graph.half or not found:
            continue
        if graph.opset < MINIMUM_OPSET:
            yield _left("fp32-scales", record, f"opset {graph.opset} has FP32 scales only; export with 19 or above")
            continue
        if any(item.scale is None or (item.scale != record.scale).any() for item in group):
            yield _left("fp32-scales", record, "the scales of its pair are not known, or differ")
            continue
        try:
            scale = fp16_scale(np.asarray(record.scale))
        except CalibrationError as error:
            yield _left("fp32-scales", record, str(error))
            continue
        for item in group:
            half = item in found
            editor.set_scale(item, scale.astype(np.float16 if half else np.float32))
            if half:
                _drop_casts(editor, item)
        yield _done("fp32-scales", record, "its scales are FP16, and the casts are gone")


def _drop_casts(editor: Editor, record: Quantizer) -> None:
    if record.quantizes:
        cast = record.data.producer()
        source = cast.inputs[0] if cast is not None else None
        if source is not None:
            editor.set_input(record.node, 0, source)
        return
    record.output.type = ir.TensorType(ir.DataType.FLOAT16)
    for use in list(record.output.uses()):
        given = use.node.outputs[0]
        if given.is_graph_output():
            continue  # a Cast of FP16 to FP16 keeps the name of the output
        for reader in list(given.uses()):
            reader.node.replace_input_with(reader.idx, record.output)
        editor.drop(given)


def _shift_constant(editor: Editor, record: Quantizer, rule: str, zero: Array) -> Outcome:
    codes = editor.graph.array(record.data)
    if codes is None:
        return _left(rule, record, "its codes are computed at run time by another operator than QuantizeLinear")
    shifted = codes.astype(np.int32) - _along_axis(zero.astype(np.int32), record, codes.ndim)
    low, high = int(shifted.min(initial=0)), int(shifted.max(initial=0))
    if low < -128 or high > 127:
        return _left(rule, record, f"its codes less their zero point are {low} to {high}, more than INT8 holds")
    editor.set_input(record.node, 0, editor.constant(shifted.astype(np.int8), record.data))
    editor.set_zero_point(record)
    return _done(rule, record, "the codes are INT8 with zero point 0: the same values")


def _fold(editor: Editor, record: Quantizer, rule: str) -> Outcome:
    codes, scale, kind = editor.graph.array(record.data), record.scale, record.scale_type
    if codes is None or scale is None or kind is None or record.output.is_graph_output():
        return _left(rule, record, "its codes are computed at run time, or it is an output of the model")
    zero = np.zeros(1) if record.zero_point is None else record.zero_point
    shifted = codes.astype(np.int64) - _along_axis(zero.astype(np.int64), record, codes.ndim)
    real = shifted.astype(np.float32) * _along_axis(scale, record, codes.ndim)
    value = editor.constant(real.astype(kind.numpy()), record.output)
    for use in list(record.output.uses()):
        use.node.replace_input_with(use.idx, value)
    editor.drop(record.output)
    return _done(rule, record, "code * scale is stored as a float")


def _along_axis(values: Array, record: Quantizer, rank: int) -> Array:
    """Shape (channels,) so that it broadcasts along the axis of a Q or DQ, whose default is 1."""
    if values.size == 1:
        return values.reshape(())
    axis = 1 if record.axis is None else record.axis
    axis = min(axis % rank if rank else 0, max(rank - 1, 0)) if axis < rank else 0
    return values.reshape([-1 if index == axis else 1 for index in range(rank)])


def _done(rule: str, record: Quantizer, what: str) -> Outcome:
    return Outcome(rule, str(record.node.name), True, what)


def _left(rule: str, record: Quantizer, why: str) -> Outcome:
    return Outcome(rule, str(record.node.name), False, why)
