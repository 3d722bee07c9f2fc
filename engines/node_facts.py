"""Facts about single nodes that several rules ask for: what holds weights, of which shape, and what it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from engines.graph import constant_array
from engines.placement import WEIGHTED, operands, root

RECURRENT = ("LSTM", "GRU", "RNN")
"""Operators that hold weights and carry a state from step to step."""

WITHOUT_INT8 = (
    "Einsum", "DeformConv", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "MatMulNBits",
)  # fmt: skip
"""Operators of ONNX that may hold weights, and that neither target computes on INT8 between Q and DQ."""

BINS = range(3, 257)
"""Numbers of bins of which a distribution over distances is taken for one."""


@dataclass(frozen=True, slots=True)
class GemmSize:
    """Sizes of a matrix product [rows, inner] x [inner, columns]; None where a size is only known at run time."""

    rows: int | None
    inner: int | None
    columns: int | None

    def __str__(self) -> str:
        """Write it as people do, with ? for what is open."""
        rows, inner, columns = ("?" if size is None else size for size in (self.rows, self.inner, self.columns))
        return f"[{rows}, {inner}] x [{inner}, {columns}]"


def holds_weights(node: ir.Node) -> bool:
    """Tell whether a decision is due on a node: it multiplies, looks up or convolves with constants of its own.

    The operators of `WEIGHTED` always count; of a domain that ONNX does not define, those with a constant matrix.
    """
    if node.domain != "":
        return any(_is_matrix(value) for value in node.inputs)
    if node.op_type in WEIGHTED or node.op_type in RECURRENT:
        return True
    return is_embedding(node) or (node.op_type in WITHOUT_INT8 and any(_is_matrix(value) for value in node.inputs))


def is_embedding(node: ir.Node) -> bool:
    """Tell whether a node looks rows up in a constant matrix of floats, by indices that are computed at run time."""
    if node.op_type != "Gather" or node.domain != "":
        return False
    table = constant_array(node.inputs[0])
    return (
        table is not None
        and len(table.shape) == 2
        and table.dtype.is_floating_point()
        and constant_array(node.inputs[1]) is None
    )


def weight_shape(node: ir.Node) -> tuple[int, ...] | None:
    """Return the shape of a weighted node's constant weight; None where it is computed at run time."""
    _, index = operands(node)
    tensor = constant_array(node.inputs[index])
    return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())


def operands_are_activations(node: ir.Node) -> bool:
    """Tell whether neither of the first two inputs of a node is a constant."""
    return all(constant_array(value) is None for value in node.inputs[:2])


def gemm_size(node: ir.Node) -> GemmSize:
    """Return the sizes of the product that a Gemm or MatMul computes.

    A weight of rank 2 or less meets all leading axes of its data as rows of one product; with more axes every matrix of
    the stack is a product of its own.
    """
    data_index, weight_index = operands(node)
    data = _sizes(node.inputs[data_index])
    weight = weight_shape(node)
    if node.op_type == "Gemm":
        rows_axis, inner_axis = (1, 0) if int_attribute(node, "transA", 0) else (0, 1)
        inner, columns = (None, None) if weight is None else weight[:2]
        if weight is not None and int_attribute(node, "transB", 0):
            inner, columns = columns, inner
        rows = None if data is None else data[rows_axis]
        return GemmSize(rows, inner if inner is not None or data is None else data[inner_axis], columns)
    other: tuple[int | None, ...] | None = weight if weight is not None else _sizes(node.inputs[weight_index])
    left, right = (data, other) if weight_index == 1 else (other, data)
    inner = None if left is None else left[-1]
    if inner is None and right is not None:
        inner = right[0] if len(right) == 1 else right[-2]
    columns = None if right is None else (1 if len(right) == 1 else right[-1])
    if left is None:
        return GemmSize(None, inner, columns)
    if weight is not None and weight_index == 1 and len(weight) <= 2:
        leading = left[:-1]
        known = [size for size in leading if size is not None]
        return GemmSize(math.prod(known) if len(known) == len(leading) else None, inner, columns)
    return GemmSize(1 if len(left) == 1 else left[-2], inner, columns)


def is_expectation(node: ir.Node) -> bool:
    """Tell whether a weighted node averages equally spaced numbers with the probabilities that a Softmax gives it.

    Its weight is an arithmetic progression with one output channel, set by whoever drew the graph and never trained:
    the integral over bins of Generalized Focal Loss (Li et al., 2020, arXiv:2006.04388).
    """
    shape = weight_shape(node) if node.op_type in ("Conv", "Gemm", "MatMul") and node.domain == "" else None
    if shape is None or math.prod(shape) not in BINS or max(shape) != math.prod(shape):
        return False
    data, weight = operands(node)
    source = node.inputs[data]
    producer = root(source).producer() if source is not None else None
    if producer is None or producer.op_type != "Softmax":
        return False
    tensor = constant_array(node.inputs[weight])
    if tensor is None:
        return False
    steps = np.diff(tensor.numpy().astype(np.float64).reshape(-1))
    return bool(steps[0] != 0 and np.allclose(steps, steps[0], rtol=1e-4, atol=0))


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def ints_attribute(node: ir.Node, name: str) -> tuple[int, ...]:
    """Return a list of integers; empty where it is left out."""
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(int(value) for value in attribute.as_ints())


def _sizes(value: ir.Value | None) -> tuple[int | None, ...] | None:
    if value is None or value.shape is None or len(value.shape) == 0:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _is_matrix(value: ir.Value | None) -> bool:
    tensor = constant_array(value)
    return tensor is not None and len(tensor.shape) >= 2
