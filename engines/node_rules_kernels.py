"""Where TensorRT has no INT8 kernel that is faster than its FP16 ones: too few channels, too small a product.

Each function gives the reason why a node stays float, with the numbers that decided, or None where it does not apply.
"""

from __future__ import annotations

import onnx_ir as ir

from engines.node_facts import gemm_size, int_attribute, weight_shape
from engines.node_rules_context import NodeContext
from engines.placement import root

FULL_CHANNELS = 16
"""Channels that an INT8 tensor core takes at once."""

PACKED_CHANNELS = 8
"""The smaller packing that some kernels know; channels are padded to a multiple of it."""

LEAST_GEMM = 16
"""Inner size and columns that an INT8 matrix product needs to fill a tensor core."""

GROUPED_KERNEL = 3
"""Least extent of the kernels for which there are INT8 depthwise and grouped convolutions."""


def few_channels(node: ir.Node, context: NodeContext) -> str | None:
    """Ungrouped convolutions and transposed ones with fewer than 16 channels on a side.

    They stay in INT8 where one side is a multiple of 8, one side has 16 or the convolution is the first layer, and the
    kernel has the same extent along all axes.
    """
    shape = _ungrouped(node)
    if shape is None:
        return None
    outputs, inputs = shape[:2] if node.op_type == "Conv" else (shape[1], shape[0])
    if min(outputs, inputs) >= FULL_CHANNELS:
        return None
    what = f"{node.op_type} with {_channels(inputs, 'input')} and {_channels(outputs, 'output')}"
    if outputs % PACKED_CHANNELS and inputs % PACKED_CHANNELS:
        return f"{what}: neither is a multiple of {PACKED_CHANNELS}"
    if max(outputs, inputs) < FULL_CHANNELS and not (node.op_type == "Conv" and _is_first(node)):
        return f"{what}: neither reaches {FULL_CHANNELS}, and it is not the first layer"
    if len(set(shape[2:])) > 1:
        return f"{what}: fewer than {FULL_CHANNELS} of one, and its kernel {_extent(shape)} is not square"
    return None


def few_channels_per_group(node: ir.Node, context: NodeContext) -> str | None:
    """Depthwise and grouped convolutions with fewer than 16 input channels per group, or 16 outputs.

    They stay in INT8 where the outputs are a multiple of 8 and the kernel reaches 3 along every axis, as the depthwise
    3 x 3 convolutions of mobile networks do. Transposed ones have no such kernel.
    """
    groups = int_attribute(node, "group", 1)
    shape = weight_shape(node) if node.op_type in ("Conv", "ConvTranspose") and groups > 1 else None
    if shape is None:
        return None
    if node.op_type == "ConvTranspose":
        inputs, outputs = shape[0] // groups, shape[1]
        if min(inputs, outputs) >= FULL_CHANNELS:
            return None
        return (
            f"ConvTranspose in {groups} groups of {_channels(inputs, 'input')} and {_channels(outputs, 'output')}: "
            f"INT8 takes {FULL_CHANNELS} of each per group"
        )
    outputs, inputs = shape[:2]
    if min(outputs, inputs) >= FULL_CHANNELS:
        return None
    what = f"Conv in {groups} groups of {_channels(inputs, 'input')} with {_channels(outputs, 'output')} in all"
    if outputs % PACKED_CHANNELS:
        return f"{what}: the outputs are no multiple of {PACKED_CHANNELS}"
    if min(shape[2:]) < GROUPED_KERNEL:
        return f"{what}: its kernel {_extent(shape)} is smaller than {GROUPED_KERNEL} along an axis"
    return None


def matrix_vector(node: ir.Node, context: NodeContext) -> str | None:
    """Products with a single row or a single column; a size that is only known at run time does not count as 1."""
    if node.op_type not in ("Gemm", "MatMul"):
        return None
    size = gemm_size(node)
    for count, what in ((size.rows, "row"), (size.columns, "column")):
        if count == 1:
            return f"{node.op_type} of {size}: with a single {what} every weight is read for one multiplication"
    return None


def small_product(node: ir.Node, context: NodeContext) -> str | None:
    """Products whose inner size or number of columns is below 16; rows may be as few as they like."""
    if node.op_type not in ("Gemm", "MatMul"):
        return None
    size = gemm_size(node)
    for count, what in ((size.inner, "inner size"), (size.columns, "columns")):
        if count is not None and count < LEAST_GEMM:
            return f"{node.op_type} of {size}: INT8 tensor cores want {LEAST_GEMM} {what} or more"
    return None


def _ungrouped(node: ir.Node) -> tuple[int, ...] | None:
    if node.op_type not in ("Conv", "ConvTranspose") or int_attribute(node, "group", 1) != 1:
        return None
    return weight_shape(node)


def _is_first(node: ir.Node) -> bool:
    """Tell whether a convolution reads an input of the model, across operators that only move values."""
    source = node.inputs[0]
    return source is not None and root(source).is_graph_input()


def _extent(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape[2:])


def _channels(count: int, side: str) -> str:
    return f"{count} {side} channel{'' if count == 1 else 's'}"
