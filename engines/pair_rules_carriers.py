"""Rules about operators without weights that carry INT8 on where both of their sides are INT8, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from engines.epilogues import same_shape
from engines.graph import constant_array, is_activation
from engines.pair_plan import Ask, PairPlan, activations, titled
from engines.placement import commutes, sole_consumer
from engines.value_bounds import largest_magnitude


def average_pool(plan: PairPlan) -> Iterator[Ask]:
    """Averages over space whose output is read as INT8 alone, and whose input is INT8 already or could be.

    It could be where the kernel of a quantized convolution gives it, and nothing reads it as float: that kernel then
    writes INT8 instead. The squeeze of a squeeze-and-excitation block is left to `channel_gate`.
    """
    return _between_int8(plan, lambda node: 0 if _averages_space(node) else None)


def channel_gate(plan: PairPlan) -> Iterator[Ask]:
    """Products of a convolution's map and a gate that is broadcast over it, with what they are made of.

    That is squeeze-and-excitation (Hu et al., 2018), and attention over space. The product is read as INT8 alone; the
    map is INT8, or could be as for `average_pool`, in view of its averages and its gates together. Then all of them
    are: the map that the convolution writes, the average that the gate comes from, and the gate, without which the
    product is no INT8 operator.

    The graph has to bound the gate, as a Sigmoid does; that bound gives its scale. The values of a gate often lie close
    together, which calibration methods that compare shapes take for a reason to clip it.
    """

    def kind(node: ir.Node) -> int | None:
        if _averages_space(node):
            return 0
        index = gated_map(node)
        return None if index is None or _gate_bound(plan, node, index) is None else index

    yield from _between_int8(plan, kind)
    for node in plan.nodes:
        index = gated_map(node)
        bound = None if index is None or not plan.reads(node, index) else _gate_bound(plan, node, index)
        if index is not None and bound is not None:
            yield Ask(node, 1 - index, f"the gate of {titled(node)}, which is at most {bound:g}", amax=bound)


def resize(plan: PairPlan) -> Iterator[Ask]:
    """Resizes whose output is read as INT8 alone.

    One that repeats values takes the very codes that it gives, so its input is quantized in any case; one that
    interpolates, under the same conditions as an average.
    """
    for node, output_is_int8, _ in plan.backwards():
        if output_is_int8 and _resizes(node) and commutes(node):
            yield Ask(node, 0, titled(node))
    yield from _between_int8(plan, lambda node: 0 if _resizes(node) and not commutes(node) else None)


def element_wise(plan: PairPlan) -> Iterator[Ask]:
    """Sums and products whose output is read as INT8 alone, and whose inputs are INT8 already for other readers.

    An input that is broadcast (a gate without a bound, see `channel_gate`) may stay float. Activations that are written
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


def gated_map(node: ir.Node) -> int | None:
    """Return which input of a Mul is a map that the other one, computed too, is broadcast over; None for other nodes.

    Both have the same number of axes, and the gate has more than one value for a sample: it is no factor for the whole.
    """
    if node.op_type != "Mul" or node.domain != "" or len(activations(node)) < 2:
        return None
    left, right = (value.shape for value in activations(node))
    given = node.outputs[0].shape
    if left is None or right is None or given is None or not len(left) == len(right) == len(given) > 2:
        return None
    whole = [same_shape(shape, given) for shape in (left, right)]
    gate = right if whole[0] else left
    return whole.index(True) if whole.count(True) == 1 and any(size != 1 for size in gate[1:]) else None


def _gate_bound(plan: PairPlan, node: ir.Node, index: int) -> float | None:
    """Return the bound of what a map, which a Mul reads as an input of this index, is multiplied by."""
    gate = node.inputs[1 - index]
    return None if gate is None else largest_magnitude(gate, plan.origins)


def _between_int8(plan: PairPlan, kind: Callable[[ir.Node], int | None]) -> Iterator[Ask]:
    """Give the edges to nodes of a kind whose output is INT8, and whose input is, or could be without a float copy.

    Args:
        plan: the pairs so far.
        kind: returns which input of a node of the kind that is; None for other nodes.
    """
    waiting: dict[ir.Value, dict[ir.Node, int]] = {}
    for node, output_is_int8, int8 in plan.backwards():
        for output in node.outputs:  # all that reads it has been visited
            readers = waiting.pop(output, {})
            if output in plan.by_sum and not output.is_graph_output():
                uses = output.uses()
                if all(use.node in readers or plan.passes_on(use.node, use.idx, int8) for use in uses):
                    for reader, index in readers.items():
                        yield Ask(reader, index, f"{titled(reader)} behind {titled(plan.by_sum[output])}")
        place = kind(node) if output_is_int8 else None
        value = node.inputs[place] if place is not None else None
        if place is None or value is None:
            continue
        if plan.is_quantized(value):
            yield Ask(node, place, f"{titled(node)} behind {titled(plan.by_sum.get(value, value.producer()))}")
        else:
            waiting.setdefault(value, {})[node] = place
