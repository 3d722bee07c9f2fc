"""The residual rule: of an Add that a convolution feeds, the skip input is quantized and the convolution's is not."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from engines.epilogues import epilogues, same_shape, self_gated
from engines.graph import is_activation
from engines.placement import sole_consumer


def residual_skips(
    nodes: Sequence[ir.Node], quantized: Collection[str | None], gated: Collection[ir.Node] | None = None
) -> dict[ir.Node, int]:
    """Find the residual Adds, and which of their inputs is the skip.

    One input of a residual Add comes from a quantized convolution, through nothing but what fuses with it (bias, scale
    for each channel, batch norm, activation), and nothing else reads it on the way: the branch. The other one, of the
    same shape, is the skip; an Add that broadcasts does not fuse.

    Where both inputs are such branches (a projection shortcut), one kernel can take only one of them in. That is the
    one that is ready last: the longer way from the model's inputs, or the later node where they are equally long.

    So an Add whose convolution is read by the other input too (the first block of a ConvNeXt) is none, and neither is
    one behind a Gemm or MatMul: in a transformer the sum goes into a normalization in float, no kernel reads or writes
    it as INT8, and a pair would only round the stream that carries everything.

    Args:
        nodes: of the main graph, producers before consumers.
        quantized: names of the nodes that compute on INT8.
        gated: what `engines.epilogues.self_gated` finds, if it is known already.
    """
    branches = epilogues(nodes, quantized, self_gated(nodes) if gated is None else gated)
    depths = _depths(nodes)
    order = {node: position for position, node in enumerate(nodes)}
    skips: dict[ir.Node, int] = {}
    for node in nodes:
        if node.op_type != "Add" or node.domain != "":
            continue
        left, right = node.inputs
        if left is None or right is None or not (is_activation(left) and is_activation(right)):
            continue
        found = [value in branches and sole_consumer(value) is node for value in (left, right)]
        if not any(found) or not same_shape(left.shape, right.shape):
            continue
        if all(found):
            ready = [
                (depths.get(value, 0), order[producer]) for value in (left, right) if (producer := value.producer())
            ]
            skips[node] = 1 if ready[0] > ready[1] else 0
        else:
            skips[node] = 1 if found[0] else 0
    return skips


def _depths(nodes: Sequence[ir.Node]) -> dict[ir.Value, int]:
    """Count the nodes on the longest way from the model's inputs to each value."""
    depths: dict[ir.Value, int] = {}
    for node in nodes:
        depth = 1 + max((depths.get(value, 0) for value in node.inputs if value is not None), default=0)
        depths.update(dict.fromkeys(node.outputs, depth))
    return depths
