"""Affine steps that belong into the weights next to them: BatchNormalization, and alpha and beta of a Gemm.

onnxslim folds a BatchNormalization into the convolution before it. The others are folded here: after Gemm, MatMul and
MatMul + Add; before Conv, Gemm and MatMul where that is exact; and after a convolution whose weights were too large for
the simplifier. Left alone, each would stand between a weighted operator and its quantized neighbour, and TensorRT would
compute it in float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from calibrators.protocols import Array
from engines.free_names import FreeNames


@dataclass(frozen=True, slots=True)
class _Affine:
    """y = x * scale + shift per channel, in float64."""

    scale: Array
    shift: Array


def fold_affine(model: ir.Model, keep: Callable[[ir.Value], None] | None = None) -> int:
    """Fold BatchNormalization and a Gemm's alpha and beta into constant weights and biases.

    y = W (s x + t) + b = (W s) x + (b + W t), and s (W x + b) + t = (s W) x + (s b + t), in float64, rounded once. A
    BatchNormalization before a convolution is folded only where the convolution pads nothing: padding adds zeros
    after it.

    Args:
        model: with shapes and constants as initializers; edited in place, in the main graph.
        keep: called with every new constant, as soon as it is made.

    Returns:
        The number of nodes that were folded.
    """
    folder = _Folder(model.graph, keep)
    folded = 0
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "BatchNormalization":
            folded += folder.batch_norm(node)
        elif node.domain == "" and node.op_type == "Gemm":
            folded += folder.factors(node)
    return folded


class _Folder:
    """Folds nodes of one graph, and gives the new constants names of their own."""

    def __init__(self, graph: ir.Graph, keep: Callable[[ir.Value], None] | None) -> None:
        self._graph = graph
        self._keep = keep
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        self._names = FreeNames(value.name for value in values)

    def batch_norm(self, norm: ir.Node) -> bool:
        """Fold a BatchNormalization into the node before or after it."""
        affine = _affine(norm)
        if affine is None:
            return False
        source = norm.inputs[0]
        producer = source.producer() if source is not None and _only_use(source) else None
        if producer is not None and producer.graph is self._graph and self._after(producer, norm, affine):
            return True
        output = norm.outputs[0]
        uses = list(output.uses())
        if len(uses) != 1 or output.is_graph_output() or uses[0].node.graph is not self._graph or uses[0].idx != 0:
            return False
        return self._before(norm, uses[0].node, affine)

    def factors(self, gemm: ir.Node) -> bool:
        """Fold alpha into the weight and beta into the bias, where both are constants."""
        alpha, beta = _real(gemm, "alpha", 1.0), _real(gemm, "beta", 1.0)
        bias_value = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        bias = _constant(bias_value)
        fold_bias = beta != 1.0 and (bias_value is None or (bias is not None and bias.dtype.kind == "f"))
        weight = _weight(gemm) if alpha != 1.0 else None
        stem = str(gemm.outputs[0].name)
        scaled = None if weight is None else _scaled(weight, np.asarray(alpha))
        moved = _scaled(bias, np.asarray(beta)) if fold_bias and bias is not None else None
        fold_bias = fold_bias and (bias is None or moved is not None)
        if scaled is None and not fold_bias:
            return False
        if scaled is not None:
            gemm.replace_input_with(1, self._initializer(f"{stem}_weight", scaled))
            gemm.attributes.pop("alpha")
        if fold_bias:
            if moved is not None:
                gemm.replace_input_with(2, self._initializer(f"{stem}_bias", moved))
            gemm.attributes.pop("beta")
        return True

    def _after(self, node: ir.Node, norm: ir.Node, affine: _Affine) -> bool:
        """Fold into the node that computes the input."""
        if node.op_type == "Add" and node.domain == "":
            return self._after_add(node, norm, affine)
        weight = _weight(node)
        if weight is None:
            return False
        bias_value = node.inputs[2] if len(node.inputs) > 2 else None
        bias = _bias(node, bias_value, len(affine.scale))
        if bias is None or (node.op_type == "MatMul" and _rank(norm.inputs[0]) != 2):
            return False
        scaled = _scale_outputs(node, weight, affine.scale)
        moved = _rounded(bias * affine.scale + affine.shift, weight.dtype)
        if scaled is None or moved is None:
            return False
        inputs = [node.inputs[0], *self._stored(str(norm.outputs[0].name), scaled, moved)]
        self._replace(norm, node, inputs)
        return True

    def _after_add(self, add: ir.Node, norm: ir.Node, affine: _Affine) -> bool:
        """Fold into a MatMul and the bias that is added to it."""
        for index in (0, 1):
            product, bias = add.inputs[index], _constant(add.inputs[1 - index])
            matmul = product.producer() if product is not None and bias is not None and _only_use(product) else None
            if (
                product is None
                or bias is None
                or matmul is None
                or matmul.op_type != "MatMul"
                or matmul.graph is not self._graph
            ):
                continue
            weight = _weight(matmul)
            flat = _flat_bias(bias, len(affine.scale))
            if weight is None or flat is None or _rank(product) != 2 or _rank(add.outputs[0]) != 2:
                return False
            scaled = _scale_outputs(matmul, weight, affine.scale)
            moved = _rounded(flat * affine.scale + affine.shift, weight.dtype)
            if scaled is None or moved is None:
                return False
            stored, shifted = self._stored(str(norm.outputs[0].name), scaled, moved)
            matmul.replace_input_with(1, stored)
            add.replace_input_with(1 - index, shifted)
            self._take_over(add.outputs[0], norm.outputs[0])
            self._graph.remove(norm, safe=True)
            return True
        return False

    def _before(self, norm: ir.Node, node: ir.Node, affine: _Affine) -> bool:
        """Fold into the node that reads the output."""
        weight = _weight(node)
        if weight is None or node.op_type == "ConvTranspose" or (node.op_type == "Conv" and not _pads_nothing(node)):
            return False
        if node.op_type != "Conv" and (_rank(norm.inputs[0]) != 2 or _integer(node, "transA", 0)):
            return False
        axis = 1 if node.op_type == "Conv" or _integer(node, "transB", 0) else 0
        groups = _integer(node, "group", 1)
        outputs = weight.shape[1 - axis]
        if weight.shape[axis] * groups != len(affine.scale) or outputs % groups:
            return False
        # Row k of a grouped convolution reads the channels of its own group.
        shape = [outputs if axis == 1 else 1, weight.shape[axis]] if groups > 1 else [1, -1]
        if axis == 0:
            shape = [-1, 1]
        shape += [1] * (weight.ndim - 2)
        factor, shift = (_per_row(values, groups, outputs).reshape(shape) for values in (affine.scale, affine.shift))
        bias = _bias(node, node.inputs[2] if len(node.inputs) > 2 else None, outputs)
        if bias is None:
            return False
        alpha = _real(node, "alpha", 1.0)
        axes = list(range(weight.ndim))
        shifted = np.einsum(weight, axes, np.broadcast_to(shift, weight.shape), axes, [1 - axis], dtype=np.float64)
        scaled, moved = _scaled(weight, factor), _rounded(bias + alpha * shifted, weight.dtype)
        if scaled is None or moved is None:
            return False
        inputs = [norm.inputs[0], *self._stored(str(node.outputs[0].name), scaled, moved)]
        self._replace(node, node, inputs)
        self._graph.remove(norm, safe=True)
        return True

    def _replace(self, last: ir.Node, node: ir.Node, inputs: list[ir.Value | None]) -> None:
        """Write a weighted node anew with other inputs, in the place of `last`, whose output it takes over.

        A MatMul with a bias becomes a Gemm.
        """
        operator = "Gemm" if node.op_type == "MatMul" else node.op_type
        attributes = [attribute for name, attribute in node.attributes.items() if name != "beta"]
        old = last.outputs[0]
        new = ir.node(operator, inputs, name=node.name)
        for attribute in attributes:
            new.attributes.add(attribute)
        new.outputs[0].shape, new.outputs[0].type = old.shape, old.type
        self._graph.insert_before(last, new)
        self._take_over(new.outputs[0], old)
        self._graph.remove(last, safe=True)
        if node is not last:
            self._graph.remove(node, safe=True)

    def _take_over(self, new: ir.Value, old: ir.Value) -> None:
        """Let a value stand for another one: in its readers, as a graph output, and by its name."""
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name, new.shape, new.type = name, old.shape, old.type

    def _stored(self, stem: str, weight: Array, bias: Array) -> tuple[ir.Value, ir.Value]:
        return (
            self._initializer(f"{stem}_weight", weight),
            self._initializer(f"{stem}_bias", bias),
        )

    def _initializer(self, stem: str, array: Array) -> ir.Value:
        name = self._names.take(stem)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self._graph.register_initializer(value)
        if self._keep is not None:
            self._keep(value)
        return value


def _affine(norm: ir.Node) -> _Affine | None:
    """Return what a BatchNormalization computes; None where that is not fixed."""
    if _integer(norm, "training_mode", 0) or sum(bool(output.name) for output in norm.outputs) != 1:
        return None
    arrays = [array for array in map(_constant, norm.inputs[1:5]) if array is not None]
    if len(arrays) != 4:
        return None
    scale, shift, mean, variance = (np.asarray(array, np.float64) for array in arrays)
    attribute = norm.attributes.get("epsilon")
    factor = scale / np.sqrt(variance + (1e-5 if attribute is None else attribute.as_float()))
    affine = _Affine(factor, shift - mean * factor)
    return affine if np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all() else None


def _weight(node: ir.Node) -> Array | None:
    """Return the constant weight of a weighted node whose other operand is computed; None for other nodes."""
    if node.domain != "" or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    data, weight = node.inputs[0], _constant(node.inputs[1])
    if data is None or _constant(data) is not None or weight is None or weight.dtype.kind != "f":
        return None
    # A stack of matrices has no single row of factors per channel, and a Gemm takes one matrix.
    fits = weight.ndim == 2 if node.op_type in ("Gemm", "MatMul") else weight.ndim >= 3
    return weight if fits else None


def _scale_outputs(node: ir.Node, weight: Array, scale: Array) -> Array | None:
    """Multiply each output channel of a weight by its own factor."""
    shape = [1] * weight.ndim
    groups = _integer(node, "group", 1)
    if node.op_type == "ConvTranspose":  # [C, K / groups, ...], the rows of a group next to each other
        if weight.shape[1] * groups != len(scale):
            return None
        shape[:2] = [weight.shape[0] if groups > 1 else 1, weight.shape[1]]
        return _scaled(weight, _per_row(scale, groups, weight.shape[0]).reshape(shape))
    axis = 0 if node.op_type == "Conv" or _integer(node, "transB", 0) else 1
    if weight.shape[axis] != len(scale):
        return None
    shape[axis] = -1
    return _scaled(weight, scale.reshape(shape))


def _per_row(values: Array, groups: int, rows: int) -> Array:
    """Return what each row of a grouped weight takes from `values`, which has one part per group."""
    return values if groups == 1 else np.repeat(values.reshape(groups, -1), rows // groups, axis=0)


def _bias(node: ir.Node, value: ir.Value | None, channels: int) -> Array | None:
    """Return a node's bias times its beta, one number per channel; None where it is not constant or not a row."""
    if value is None:
        return np.zeros(channels)
    array = _constant(value)
    flat = None if array is None else _flat_bias(array, channels)
    return None if flat is None else flat * _real(node, "beta", 1.0)


def _flat_bias(array: Array, channels: int) -> Array | None:
    if array.size not in (1, channels) or (array.size == channels > 1 and array.shape[-1] != channels):
        return None
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (channels,))


def _pads_nothing(conv: ir.Node) -> bool:
    mode, pads = conv.attributes.get("auto_pad"), conv.attributes.get("pads")
    if mode is not None and mode.as_string() not in ("NOTSET", "VALID"):
        return False
    return pads is None or not any(pads.as_ints())


def _scaled(weight: Array, factor: Array) -> Array | None:
    """Return weight * factor, computed in float64 and rounded to the weight's type; None where that overflows.

    numpy converts a few thousand numbers at a time here, so that a large weight is in memory once.
    """
    result = np.empty_like(weight, subok=False)
    with np.errstate(over="ignore"):
        np.multiply(weight, factor, out=result, dtype=np.float64, casting="same_kind")
    return result if np.isfinite([result.min(initial=0), result.max(initial=0)]).all() else None


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array | None:
    """Return values in a type; None where one of them overflows there."""
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    return rounded if np.isfinite(rounded).all() else None


def _only_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _constant(value: ir.Value | None) -> Array | None:
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _real(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()
