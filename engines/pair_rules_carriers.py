"""Rules about operators without weights that carry INT8 on where both of their sides are INT8, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from engines.epilogues import same_shape
from engines.graph import constant_array, is_activation
from engines.pair_plan import Ask, PairPlan, activations, titled
from engines.placement import commutes, sole_consumer


def average_pool(plan: PairPlan) -> Iterator[Ask]:
    """Averages over space whose output is read as INT8 alone, and whose input is INT8 already or could be.

    It could be where the kernel of a quantized convolution gives it, and nothing reads it as float: that kernel then
    writes INT8 instead. The squeeze of a squeeze-and-excitation block is none such, since its Mul reads the same tensor
    in float; a pair would cost exactness and save nothing.
    """
    return _between_int8(plan, _averages_space)


def resize(plan: PairPlan) -> Iterator[Ask]:
    """Resizes whose output is read as INT8 alone.

    One that repeats values takes the very codes that it gives, so its input is quantized in any case; one that
    interpolates, under the same conditions as an average.
    """
    for node, output_is_int8, _ in plan.backwards():
        if output_is_int8 and _resizes(node) and commutes(node):
            yield Ask(node, 0, titled(node))
    yield from _between_int8(plan, lambda node: _resizes(node) and not commutes(node))


def element_wise(plan: PairPlan) -> Iterator[Ask]:
    """Sums and products whose output is read as INT8 alone, and whose inputs are INT8 already for other readers.

    An input that is broadcast (the gate of a squeeze-and-excitation block) may stay float. Activations that are written
    with a Mul are left alone: they belong to the convolution before them.
    """
    for node, output_is_int8, _ in plan.backwards():
        if not output_is_int8 or node.op_type not in ("Add", "Mul") or node.domain != "":
            continue
        if node in plan.gated or node in plan.skips or len(activations(node)) < len(node.inputs):
            continue
        whole = [
            index
            for index, value in enumerate(node.inputs)
            if value is not None and same_shape(value.shape, node.outputs[0].shape)
        ]
        if whole and all(plan.is_quantized(node.inputs[index]) for index in whole):
            for index in whole:
                yield Ask(node, index, titled(node))


def convolution_before_normalization(plan: PairPlan) -> Iterator[Ask]:
    """LayerNormalizations that alone read what a quantized convolution gives, across operators that move values."""
    for node in plan.nodes:
        if node.op_type != "LayerNormalization" or node.domain != "":
            continue
        value, reader = node.inputs[0], node
        while value is not None and sole_consumer(value) is reader:
            if value in plan.by_convolution:
                yield Ask(node, 0, f"{titled(plan.by_convolution[value])} before {titled(node)}")
                break
            producer = value.producer()
            if producer is None or not commutes(producer):
                break
            value, reader = producer.inputs[0], producer


def _averages_space(node: ir.Node) -> bool:
    """Tell whether a node averages over some or all axes behind batch and channel."""
    if node.domain != "" or not is_activation(node.inputs[0]):
        return False
    if node.op_type in ("AveragePool", "GlobalAveragePool"):
        return True
    data = node.inputs[0]
    if node.op_type != "ReduceMean" or data is None or data.shape is None or len(node.inputs) < 2:
        return False
    axes = constant_array(node.inputs[1])
    if axes is None or axes.size == 0:
        return False
    return all(int(axis) % len(data.shape) >= 2 for axis in axes.numpy().reshape(-1))


def _resizes(node: ir.Node) -> bool:
    return node.op_type == "Resize" and node.domain == "" and is_activation(node.inputs[0])


def _between_int8(plan: PairPlan, kind: Callable[[ir.Node], bool]) -> Iterator[Ask]:
    """Give the edges to nodes of a kind whose output is INT8, and whose input is, or could be without a float copy."""
    waiting: dict[ir.Value, dict[ir.Node, None]] = {}
    for node, output_is_int8, int8 in plan.backwards():
        for output in node.outputs:  # all that reads it has been visited
            readers = waiting.pop(output, {})
            if output in plan.by_sum and not output.is_graph_output():
                uses = output.uses()
                if all(use.node in readers or plan.passes_on(use.node, use.idx, int8) for use in uses):
                    for reader in readers:
                        yield Ask(reader, 0, f"{titled(reader)} behind {titled(plan.by_sum[output])}")
        value = node.inputs[0] if output_is_int8 and kind(node) else None
        if value is not None and plan.is_quantized(value):
            yield Ask(node, 0, f"{titled(node)} behind {titled(plan.by_sum.get(value, value.producer()))}")
        elif value is not None:
            waiting.setdefault(value, {})[node] = None
