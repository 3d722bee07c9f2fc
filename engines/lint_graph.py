"""A model as the linter sees it: the file as it is, whatever tool wrote it, with every Q and DQ and their constants.

Nothing is folded, raised or simplified: what `engines.graph.prepare` would repair is what a linter has to find.
`engines.lint_reading` makes it of a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import onnx_ir as ir

from calibrators.protocols import Array
from engines.graph import FLOAT_TYPES
from engines.one_node import evaluate
from engines.opset import STANDARD_DOMAINS
from engines.placement import WEIGHTED, commutes

Answer = TypeVar("Answer")

_INTEGER_PRODUCT = re.compile(
    r"QLinear(Conv\w*|MatMul)|(Conv|MatMul)Integer\w*|QGemm|DynamicQuantize(MatMul|LSTM)|QAttention|"
    r"QOrdered(MatMul|Attention|LongformerAttention)"
)
"""Convolutions and matrix products of ONNX and ONNX Runtime that read integers themselves, in place of Q/DQ."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantizer:
    """A QuantizeLinear or a DequantizeLinear.

    Attributes:
        node: the node.
        quantizes: whether it is a QuantizeLinear.
        data: what it reads: reals, or codes.
        output: what it gives.
        scale: float32, (channels,) or (1,); None where it is not known before run time.
        scale_type: type of the scale.
        zero_point: float64, flat; None where it is not given, or not known before run time.
        has_zero_point: whether one is given.
        axis: the attribute; None where it is not given.
        codes: type of the integers; UINT8 for a QuantizeLinear that does not say, as ONNX defines it.
    """

    node: ir.Node
    quantizes: bool
    data: ir.Value
    output: ir.Value
    scale: Array | None
    scale_type: ir.DataType | None
    zero_point: Array | None
    has_zero_point: bool
    axis: int | None
    codes: ir.DataType | None

    @property
    def per_channel(self) -> bool:
        """Whether it has more than one scale."""
        return self.scale is not None and self.scale.size > 1


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """An input of a weighted node.

    Attributes:
        index: which input.
        value: what the node reads.
        dequantizer: where it comes from, directly or across operators that only move values; None: it is float.
        path: the nodes between them, from the weighted node back.
    """

    index: int
    value: ir.Value
    dequantizer: Quantizer | None
    path: tuple[ir.Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WeightedNode:
    """A Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        node: the node.
        activation: its data input; the first one of a product of two activations.
        weight: its weight; the second one of a product of two activations.
        constant_weight: whether the weight is known before run time.
    """

    node: ir.Node
    activation: Operand
    weight: Operand
    constant_weight: bool

    @property
    def quantized(self) -> bool:
        """Whether both operands come from integers."""
        return self.activation.dequantizer is not None and self.weight.dequantizer is not None


class LintGraph:
    """Answers the rules' questions about a model. Treat the model as read-only, or make a new one after an edit.

    Args:
        model: with types where they can be inferred; nodes and values are named.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        versions = [model.graph.opset_imports.get(domain) for domain in STANDARD_DOMAINS]
        self.opset = next((version for version in versions if version is not None), 1)
        self._arrays: dict[ir.Value, Array | None] = {}
        self.constants = self._find_constants()
        self.quantizers = [record for node in self.nodes if (record := self._quantizer(node)) is not None]
        self.by_output = {record.output: record for record in self.quantizers}

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata."""
        return dict(self.model.metadata_props)

    def source(self, record: Quantizer) -> Quantizer | None:
        """Return the Q that a DQ directly reads."""
        found = self.by_output.get(record.data)
        return found if found is not None and found.quantizes and not record.quantizes else None

    def dequantizers(self, record: Quantizer) -> list[Quantizer]:
        """Return the DQs that directly read a Q."""
        readers = (self.by_output.get(use.node.outputs[0]) for use in record.output.uses() if use.idx == 0)
        return [reader for reader in readers if reader is not None and not reader.quantizes]

    @cached_property
    def heads(self) -> list[Quantizer]:
        """Where codes begin: every Q, and every DQ that reads no Q."""
        return [record for record in self.quantizers if record.quantizes or self.source(record) is None]

    @cached_property
    def activation_pairs(self) -> list[tuple[Quantizer, Quantizer]]:
        """All (Q, DQ) on tensors that are computed or fed at run time."""
        return [
            (first, record)
            for record in self.quantizers
            if (first := self.source(record)) is not None and first.data not in self.constants
        ]

    @cached_property
    def weighted(self) -> list[WeightedNode]:
        """All weighted nodes, with the origin of their operands."""
        return [
            found
            for node in self.nodes
            if node.op_type in WEIGHTED and node.domain in STANDARD_DOMAINS and (found := self._weighted(node))
        ]

    @cached_property
    def integer_products(self) -> list[ir.Node]:
        """All convolutions and matrix products, and layers made of them, that are operators on integers themselves."""
        return [
            node
            for node in self.nodes
            if (node.domain in STANDARD_DOMAINS or node.domain.startswith("com.microsoft"))
            and _INTEGER_PRODUCT.fullmatch(node.op_type)
        ]

    @cached_property
    def half(self) -> bool:
        """Whether operators compute in FP16."""
        beside = ("Cast", "Constant", "QuantizeLinear", "DequantizeLinear")
        return any(
            node.op_type not in beside and any(value.dtype == ir.DataType.FLOAT16 for value in node.outputs)
            for node in self.nodes
        )

    def array(self, value: ir.Value | None) -> Array | None:
        """Return a constant: an initializer, a Constant node, or what nodes make of them alone.

        None where it is computed at run time, or too large to be read.
        """
        if value is None or value not in self.constants:
            return None
        if value not in self._arrays:
            self._arrays[value] = self._read(value)
        return self._arrays[value]

    def steps(self, value: ir.Value) -> list[ir.Node]:
        """Return the nodes between a constant and the initializer or Constant that it is made of, backwards."""
        found: list[ir.Node] = []
        producer = value.producer()
        while producer is not None and producer.op_type != "Constant":
            found.append(producer)
            source = producer.inputs[0] if producer.inputs else None
            producer = source.producer() if source is not None else None
        return found

    def origin(self, value: ir.Value) -> tuple[Quantizer | None, tuple[ir.Node, ...]]:
        """Follow a value back to its DQ across casts between float types and operators that only move values."""
        path: list[ir.Node] = []
        while True:
            producer = value.producer()
            if producer is None:
                return None, ()
            record = self.by_output.get(value)
            if record is not None:
                return (None, ()) if record.quantizes else (record, tuple(path))
            source = producer.inputs[0] if producer.inputs else None
            if source is None or not moves(producer):
                return None, ()
            path.append(producer)
            value = source

    def readers(self, value: ir.Value) -> tuple[list[tuple[ir.Node, int]], bool]:
        """Return the (node, input index) that compute with a value, across operators that only move values.

        Returns:
            The readers, and whether the value leaves the graph too.
        """
        found: list[tuple[ir.Node, int]] = []
        leaves = False
        waiting = [value]
        while waiting:
            current = waiting.pop()
            leaves = leaves or current.is_graph_output()
            for use in current.uses():
                if use.idx == 0 and moves(use.node):
                    waiting.extend(use.node.outputs)
                else:
                    found.append((use.node, use.idx))
        return found, leaves

    def _find_constants(self) -> set[ir.Value]:
        """Collect what is known before run time: initializers, and what nodes compute from nothing else."""
        graphs = [self.model.graph, *self.model.graph.subgraphs()]
        constants = {value for graph in graphs for value in graph.initializers.values()}
        for node in self.nodes:
            inputs = [value for value in node.inputs if value is not None]
            made = all(value in constants for value in inputs) if inputs else node.op_type == "Constant"
            if made and not any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
                constants.update(node.outputs)
        return constants

    def _read(self, value: ir.Value) -> Array | None:
        tensor = value.const_value if value.const_value is not None else ir.convenience.get_const_tensor(value)
        if tensor is not None:
            outside = isinstance(tensor, ir.ExternalTensor) and not Path(tensor.path).is_file()
            if outside or tensor.dtype == ir.DataType.STRING:
                return None
            found: Array = np.array(tensor.numpy())  # a copy: a view of external data would keep their file mapped
            return found
        node = value.producer()
        if node is None or value.name is None:
            return None
        read = [(source, self.array(source)) for source in node.inputs if source is not None]
        inputs = {str(source.name): array for source, array in read if array is not None}
        if len(inputs) < len({source for source, _ in read}):
            return None
        if node.op_type == "Cast" and node.domain in STANDARD_DOMAINS:
            (source,) = inputs.values()
            return source.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
        return evaluate(node, inputs, value.name, self.opset)

    def _quantizer(self, node: ir.Node) -> Quantizer | None:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain not in STANDARD_DOMAINS:
            return None
        data, scale = (*node.inputs, None, None)[:2]
        if data is None or scale is None:
            return None
        quantizes = node.op_type == "QuantizeLinear"
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        values, zeros = self.array(scale), self.array(zero)
        axis = node.attributes.get("axis")
        return Quantizer(
            node=node,
            quantizes=quantizes,
            data=data,
            output=node.outputs[0],
            scale=None if values is None else np.asarray(values, np.float32).reshape(-1),
            scale_type=_type_of(scale),
            zero_point=None if zeros is None else np.asarray(zeros, np.float64).reshape(-1),
            has_zero_point=zero is not None,
            axis=None if axis is None else axis.as_int(),
            codes=_code_type(node, zero) if quantizes else _type_of(data) or _type_of(zero),
        )

    def _weighted(self, node: ir.Node) -> WeightedNode | None:
        if len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
            return None
        operands = [
            Operand(index, value, *self.origin(value))
            for index, value in enumerate(node.inputs[:2])
            if value is not None
        ]
        data, weight = operands
        if node.op_type == "MatMul" and data.value in self.constants and weight.value not in self.constants:
            data, weight = weight, data
        return WeightedNode(node, data, weight, weight.value in self.constants)


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def once_per_graph(question: Callable[[LintGraph], Answer]) -> Callable[[LintGraph], Answer]:
    """Let a question that several rules ask about a graph be answered once."""
    answers: WeakKeyDictionary[LintGraph, Answer] = WeakKeyDictionary()

    @wraps(question)
    def ask(graph: LintGraph) -> Answer:
        if graph not in answers:
            answers[graph] = question(graph)
        return answers[graph]

    return ask


def moves(node: ir.Node) -> bool:
    """Tell whether a node only moves, selects or casts the floats of its first input."""
    if node.op_type == "Cast" and node.domain in STANDARD_DOMAINS:
        source, target = node.inputs[0], ir.DataType(node.attributes["to"].as_int())
        return target in FLOAT_TYPES and (source is None or source.dtype is None or source.dtype in FLOAT_TYPES)
    return commutes(node)


def _type_of(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    tensor = value.const_value if value.const_value is not None else ir.convenience.get_const_tensor(value)
    return value.dtype if tensor is None else tensor.dtype


def _code_type(node: ir.Node, zero_point: ir.Value | None) -> ir.DataType | None:
    if zero_point is not None:
        return _type_of(zero_point)
    stated = node.attributes.get("output_dtype")
    return ir.DataType(stated.as_int()) if stated is not None and stated.as_int() else ir.DataType.UINT8
