"""Carry out a placement: write Q/DQ nodes, INT8 weights and INT32 biases into a graph.

The type of a scale is the type of what Q reads and of what DQ gives, so the nodes are written in the types that they
meet: FP32 in an FP32 graph, and either of the two in one whose types were converted before (`engines.mixed`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibrators.errors import CalibrationError
from calibrators.numerics import fp16_scale, quantize_weights, scale_from_amax
from calibrators.protocols import Array
from engines.cpu_sums import write_sums
from engines.free_names import FreeNames
from engines.graph import PreparedModel, constant_array, name_of
from engines.onnxrt import PRECISION_KEY, TARGET_KEY
from engines.placement import ActivationPoint, Placement, WeightPoint
from engines.scale_groups import shared_scales

INT32_LIMIT = 2**31 - 1
FULL_WEIGHT_RANGE = 127
PAIR_LIMIT = 127 * 127
"""Largest product of an activation's code and a weight's where two of them are added in 16 bits, which saturate.

x86 without VNNI and AMX adds such pairs (vpmaddubsw): 2 * 127 * 127 < 2^15 <= 2 * 128 * 128.
"""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A graph with Q/DQ nodes.

    Attributes:
        model: the graph; `engines.graph.save_model` writes it.
        placement: what was done where, and why.
        scales: scale of every Q/DQ pair, by the tensor that it quantizes.
        weight_ranges: largest weight code of every quantized node: 127, or less where pairs of products would saturate.
    """

    model: ir.Model
    placement: Placement
    scales: Mapping[str, float]
    weight_ranges: Mapping[str, int]


def insert_qdq(
    prepared: PreparedModel,
    placement: Placement,
    scales: Mapping[str, float],
    *,
    typed: ir.Model | None = None,
    reduce_range: bool = False,
    largest: Mapping[str, float] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> QuantizedModel:
    """Write a placement into a copy of the graph.

    Activations: x -> QuantizeLinear(scale, zero point) -> DequantizeLinear -> the readers. Weights: an INT8
    initializer and one DequantizeLinear with explicit axis and zero point, so that the file shrinks with them. Biases
    stay float, except those that the placement gives to the CPU's integer kernels as INT32 with scale s_x * s_w.

    Args:
        prepared: the graph that the placement was made for.
        placement: which tensors.
        scales: scale (amax / 127) by tensor name; every name in `placement.tensors` is needed. The tensors of a group
            get the largest one of theirs, see `engines.scale_groups.shared_scales`.
        typed: the same graph in FP16 and FP32 (`engines.fp16.in_fp16`), edited in place of a copy of `prepared`. Q and
            DQ take over its casts: Q reads the tensor in the type that it is computed in, each DQ gives the type that
            its readers compute in. The codes of weights are made from FP32; scales that meet FP16 are rounded up to
            its grid.
        reduce_range: keep pairs of products within 16 bits: weights get codes of 7 bits, [-63, 63], where activations
            use all 256 codes (zero point 128), and more where they use fewer.
        largest: largest magnitude that calibration saw, by tensor name. Never-negative activations whose threshold is
            their maximum use half of the codes, which leaves their weights all of theirs; without it all weights get
            7 bits where `reduce_range` asks.
        metadata: further entries for the model's metadata.

    Raises:
        CalibrationError: a scale is missing, zero or not finite.
    """
    _check_scales(placement, scales)
    scales = shared_scales(placement, scales)
    model = prepared.ir() if typed is None else typed
    source = {node.name: node for node in (model if typed is None else prepared.ir()).graph}
    originals = [source[weight.node].inputs[weight.index] for weight in placement.weights]  # before they are replaced
    writer = _Writer(model.graph, source)
    halves = {point.scale_of for point in placement.activations if writer.meets_fp16(point)}
    points = {point.scale_of: point for point in reversed(placement.activations)}
    weight_ranges: dict[str, int] = {}
    for weight, original in zip(placement.weights, originals, strict=True):
        point = points.get(weight.data_scale_of)  # None where weights alone are quantized
        limit = _weight_range(point, scales, largest) if reduce_range and point is not None else FULL_WEIGHT_RANGE
        weight_ranges[weight.node] = limit
        if original is None:
            raise AssertionError(f"{weight.node} has no weight")
        writer.weight(weight, original, limit, None if point is None else point_scale(point, scales))
    pair_scales: dict[str, float] = {}
    for point in placement.activations:
        scale = point_scale(point, scales)
        pair_scales[point.tensor] = fp16_scale(scale) if point.scale_of in halves else scale
        writer.activation(point, pair_scales[point.tensor])
    if placement.target == "cpu":
        write_sums(model)
    RemoveUnusedNodesPass()(model)
    precision = "int8" if typed is None else "int8+fp16"
    model.metadata_props.update({TARGET_KEY: placement.target, PRECISION_KEY: precision, **(metadata or {})})
    return QuantizedModel(model, placement, pair_scales, weight_ranges)


def point_scale(point: ActivationPoint, scales: Mapping[str, float]) -> float:
    """Return the scale of a pair: amax / divisor, from the calibrated amax / 127, in float32's grid.

    Affine codes divide what they span among 255 steps. Where the graph guarantees a largest magnitude, that one counts.
    No scale is below the smallest normal number.
    """
    if point.span is not None:
        lowest, highest = point.span
        return scale_from_amax(highest - lowest, 255)
    if point.amax is not None:
        return scale_from_amax(point.amax, point.divisor)
    if point.divisor == 127:
        return float(np.float32(scales[point.scale_of]))
    amax = scales[point.scale_of] * 127
    return scale_from_amax(amax if point.ceiling is None else min(amax, point.ceiling), point.divisor)


class _Writer:
    """Writes into one graph, shares what several nodes read, and gives everything a name of its own.

    Args:
        graph: to write into.
        source: names of the nodes of the FP32 graph; other Casts stand between FP16 and FP32.
    """

    def __init__(self, graph: ir.Graph, source: Container[str | None]) -> None:
        self._graph = graph
        self._source = source
        self._nodes = {node.name: node for node in graph}
        self._tensors = {name_of(value): value for value in _values(graph)}
        self._weights: dict[tuple[str, ir.DataType, int | None, int, str | None], ir.Value] = {}
        nodes = list(ir.traversal.RecursiveGraphIterator(graph))
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
        self._names = FreeNames([*(value.name for value in values), *(node.name for node in nodes)])

    def meets_fp16(self, point: ActivationPoint) -> bool:
        """Tell whether the tensor of a pair, or what a reader makes of it, is FP16."""
        edges = self._edges(point)
        read = [node.inputs[index] for node, index in edges]
        return any(
            value is not None and value.dtype == ir.DataType.FLOAT16 for value in (self._tensor(point, edges), *read)
        )

    def activation(self, point: ActivationPoint, scale: float) -> None:
        """Put a pair on an activation: one Q, and one DQ for every type that its readers compute in."""
        name, edges = point.tensor, self._edges(point)
        value = self._tensor(point, edges)
        is_output = point.uses is None and value.is_graph_output()
        readers: dict[ir.DataType, list[tuple[ir.Node, int]]] = {_float_type(value): []} if is_output else {}
        for node, index in edges:
            readers.setdefault(_float_type(node.inputs[index]), []).append((node, index))
        if is_output:
            value.name = self._names.take(f"{name}_unquantized")
        scales = {
            dtype: self._constant(f"{name}_scale", np.asarray(scale, dtype.numpy()))
            for dtype in dict.fromkeys((_float_type(value), *readers))
        }
        codes = np.uint8 if point.unsigned else np.int8
        zero_point = self._constant(f"{name}_zero_point", np.asarray(point.zero_point, codes))
        quantize = self._node("QuantizeLinear", [value, scales[_float_type(value)], zero_point], name)
        code = quantize.outputs[0]
        code.name = self._names.take(f"{name}_quantized")
        written = [quantize]
        for dtype, uses in readers.items():
            written.append(self._node("DequantizeLinear", [code, scales[dtype], zero_point], name))
            real = written[-1].outputs[0]
            real.name = name if is_output else self._names.take(f"{name}_dequantized")
            for node, index in uses:
                node.replace_input_with(index, real)
            if (
                is_output
            ):  # the other tensors' types follow from their nodes; written out, they would only fill the file
                real.type, real.shape = value.type, value.shape
                outputs = self._graph.outputs
                outputs[:] = [real if output is value else output for output in outputs]
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], written)
        else:
            self._graph.insert_after(producer, written)

    def weight(self, point: WeightPoint, original: ir.Value, limit: int, activation_scale: float | None) -> None:
        """Store a weight, and the bias where the placement says so, as integers.

        Args:
            point: the weight.
            original: what the node reads in the FP32 graph.
            limit: the largest weight code.
            activation_scale: scale of the node's other input; None where that stays float.
        """
        name, constant = name_of(original), constant_array(original)
        if constant is None:
            raise AssertionError(f"the weight of {point.node} is no constant")
        node = self._nodes[point.node]
        dtype = _float_type(node.inputs[point.index])
        bias = constant_array(node.inputs[2]) if point.integer_bias and activation_scale is not None else None
        # The bias of a node bounds the scales of its weight, so such a weight is shared with no other node.
        key = (name, dtype, point.axis, limit, None if bias is None else node.name)
        if key in self._weights:
            node.replace_input_with(point.index, self._weights[key])
            return
        array = constant.numpy()
        minimum_scale: Array | None = None
        bias_array: Array | None = None
        if bias is not None and activation_scale is not None:
            bias_array = bias.numpy().astype(np.float64).reshape(-1)
            if point.axis is not None:
                bias_array = np.broadcast_to(bias_array, (array.shape[point.axis],))
            # A bias code must fit INT32: bias / (s_x * s_w) <= 2^31 - 1 bounds the weight's scale from below.
            minimum_scale = np.abs(bias_array) / (activation_scale * INT32_LIMIT)
        half = dtype == ir.DataType.FLOAT16
        codes, scale = quantize_weights(array, point.axis, limit=limit, minimum_scale=minimum_scale, half=half)
        real = self._dequantized(node, name, codes, scale.astype(dtype.numpy()), point.axis)
        self._weights[key] = real
        node.replace_input_with(point.index, real)
        if bias_array is not None and activation_scale is not None:
            bias_scale = np.float64(activation_scale) * scale.astype(np.float64)
            bias_codes = np.clip(np.rint(bias_array / bias_scale), -INT32_LIMIT, INT32_LIMIT).astype(np.int32)
            axis = None if point.axis is None else 0
            real = self._dequantized(node, f"{node.name}_bias", bias_codes, bias_scale.astype(np.float32), axis)
            node.replace_input_with(2, real)

    def _edges(self, point: ActivationPoint) -> list[tuple[ir.Node, int]]:
        """Return the (node, input index) pairs that are to read the dequantized value."""
        if point.uses is None:
            return [(use.node, use.idx) for use in self._tensors[point.tensor].uses()]
        return [(self._nodes[node], index) for node, index in point.uses]

    def _tensor(self, point: ActivationPoint, edges: Sequence[tuple[ir.Node, int]]) -> ir.Value:
        """Return the tensor of a pair in the type that it is computed in.

        Its name may have gone with a cast that became superfluous; its readers always lead to it.
        """
        value = self._tensors.get(point.tensor)
        if value is None:
            node, index = edges[0]
            value = node.inputs[index]
        while value is not None:
            producer = value.producer()
            if producer is None or producer.op_type != "Cast" or producer.name in self._source:
                return value
            value = producer.inputs[0]
        raise AssertionError(f"the graph does not hold {point.tensor!r}")

    def _dequantized(self, reader: ir.Node, stem: str, codes: Array, scale: Array, axis: int | None) -> ir.Value:
        """Write codes, scale, zero point and a DequantizeLinear before `reader`; return the real value."""
        quantized = self._constant(f"{stem}_quantized", codes)
        scale_value = self._constant(f"{stem}_scale", scale)
        zero_point = self._constant(f"{stem}_zero_point", np.zeros(scale.shape, codes.dtype))
        attributes = {"axis": axis} if axis is not None else {}
        node = self._node("DequantizeLinear", [quantized, scale_value, zero_point], stem, attributes)
        real = node.outputs[0]
        real.name = self._names.take(f"{stem}_dequantized")
        self._graph.insert_before(reader, node)
        return real

    def _node(
        self, op_type: str, inputs: list[ir.Value], stem: str, attributes: Mapping[str, int] | None = None
    ) -> ir.Node:
        return ir.node(op_type, inputs, attributes=attributes or {}, name=self._names.take(f"{stem}_{op_type}"))

    def _constant(self, stem: str, array: Array) -> ir.Value:
        name = self._names.take(stem)
        # ir.tensor would find out what it is given by isinstance() of protocols, which is what takes time here.
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        self._graph.register_initializer(value)
        return value


def _float_type(value: ir.Value | None) -> ir.DataType:
    return ir.DataType.FLOAT16 if value is not None and value.dtype == ir.DataType.FLOAT16 else ir.DataType.FLOAT


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs if output.name)]


def _weight_range(point: ActivationPoint, scales: Mapping[str, float], largest: Mapping[str, float] | None) -> int:
    """Return the largest weight code whose products with the codes of an activation cannot saturate in pairs."""
    code = 255
    if point.unsigned and point.zero_point == 0 and largest is not None and point.scale_of in largest:
        code = min(code, round(largest[point.scale_of] / point_scale(point, scales)))
    return min(FULL_WEIGHT_RANGE, PAIR_LIMIT // max(code, 1))


def _check_scales(placement: Placement, scales: Mapping[str, float]) -> None:
    missing = [name for name in placement.tensors if name not in scales]
    if missing:
        shown = ", ".join(repr(name) for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CalibrationError(
            f"Cannot quantize: the calibration has no scale for {len(missing)} of {len(placement.tensors)} tensors "
            f"({shown}). Calibrate this model again with `trt-int8 calibrate`, and without --tensors where it named "
            "another target, or options are not the default ones."
        )
    for name in placement.tensors:
        if not np.isfinite(scales[name]) or scales[name] <= 0:
            raise CalibrationError(
                f"Cannot quantize: the scale of {name!r} is {scales[name]!r}; a positive, finite number is needed. "
                "Calibrate again, or exclude the nodes that read it with --exclude."
            )
