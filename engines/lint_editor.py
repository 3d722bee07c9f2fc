"""Small edits of a graph that the fixes of `engines.lint_fixes` are made of.

An edit leaves the rest of the file alone: names, nodes that nothing reads, and types that the file states stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from calibrators.protocols import Array
from engines.free_names import FreeNames
from engines.lint_graph import LintGraph, Quantizer
from engines.lint_reading import read_for_editing


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one place.

    Attributes:
        rule: the rule that found it.
        node: name of the node.
        mended: whether it was mended.
        what: what was done, or why nothing was.
    """

    rule: str
    node: str
    mended: bool
    what: str


class Editor:
    """A model that is being mended.

    Args:
        model: the file, or the model in memory; neither is changed.
    """

    def __init__(self, model: onnx.ModelProto | str | os.PathLike[str]) -> None:
        self.graph, self._borrowed = read_for_editing(model)
        self.model = self.graph.model
        self._root = self.model.graph
        self._names = FreeNames(
            [*(value.name for value in _all_values(self.model)), *(node.name for node in self.graph.nodes)]
        )
        self._constants: dict[tuple[bytes, str, tuple[int, ...]], ir.Value] = {}

    def look_again(self) -> None:
        """Let `graph` see what was edited."""
        self.graph = LintGraph(self.model)

    def constant(self, array: Array, like: ir.Value) -> ir.Value:
        """Return an initializer of an array, named after `like`; small ones are shared."""
        key = (array.tobytes(), str(array.dtype), array.shape) if array.size <= 4096 else None
        if key is not None and key in self._constants:
            return self._constants[key]
        name = self._names.take(f"{like.name}_mended")
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self._root.register_initializer(value)
        if key is not None:
            self._constants[key] = value
        return value

    def set_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Let a node read another value, and drop the old one where nothing reads it any more."""
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        node.replace_input_with(index, value)
        self.drop(old)

    def set_scale(self, record: Quantizer, scale: Array) -> None:
        """Give a Q or DQ another scale, in the shape of its own, in the type of `scale`."""
        old = record.node.inputs[1]
        if old is None:
            raise AssertionError(f"{record.node.name} has no scale")
        shape = self.scale_shape(record)
        self.set_input(record.node, 1, self.constant(np.asarray(scale).reshape(shape), old))

    def set_zero_point(self, record: Quantizer) -> None:
        """Give a Q or DQ an INT8 zero point of 0 for each scale, and let its codes be INT8."""
        zeros = np.zeros(self.scale_shape(record), np.int8)
        self.set_input(record.node, 2, self.constant(zeros, record.output))
        record.node.attributes.pop("output_dtype", None)
        if record.quantizes:
            record.output.type = ir.TensorType(ir.DataType.INT8)

    def scale_shape(self, record: Quantizer) -> tuple[int, ...]:
        """Return the shape of a scale that is known."""
        array = self.graph.array(record.node.inputs[1])
        if array is None:
            raise AssertionError(f"the scale of {record.node.name} is not known")
        return tuple(array.shape)

    def skip_pair(self, first: Quantizer, last: Quantizer) -> str | None:
        """Let whatever reads a DQ read what its Q reads; return why that cannot be."""
        source, value, graph = first.data, last.output, last.node.graph
        if graph is None or not self.same_type(source, value):
            return "its values before and after the pair have different types"
        if value.is_graph_output():
            self._take_over_output(graph, value, source)
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, source)
        self.drop(value)
        return None

    def same_type(self, one: ir.Value, other: ir.Value) -> bool:
        """Tell whether two values have the same type, as far as it is known."""
        return one.dtype is None or other.dtype is None or one.dtype == other.dtype

    def drop(self, value: ir.Value | None) -> None:
        """Remove a value that nothing reads, and what nothing reads without it; what the model declares stays."""
        waiting = [value]
        while waiting:
            current = waiting.pop()
            if current is None or current.is_graph_input() or current.is_graph_output() or any(current.uses()):
                continue
            node = current.producer()
            if node is None:
                if current.is_initializer() and current.graph is not None and current.name is not None:
                    del current.graph.initializers[current.name]
            elif node.graph is not None and not any(
                any(output.uses()) or output.is_graph_output() for output in node.outputs
            ):
                waiting.extend(node.inputs)
                node.graph.remove(node, safe=True)

    def finish(self) -> ir.Model:
        """Return the model as it is to be written: without the types and shapes that the file did not state."""
        for value in self._borrowed:
            if not (value.is_graph_output() or value.is_graph_input()):
                value.type = None
                value.shape = None
        return self.model

    def _take_over_output(self, graph: ir.Graph, output: ir.Value, source: ir.Value) -> None:
        """Let `source` leave the graph in the place and under the name of `output`."""
        name, producer = output.name, source.producer()
        output.name = self._names.take(f"{name}_quantized")
        taken = source
        if producer is None or producer.graph is not graph or source.is_graph_output():
            copy = ir.node("Identity", [source], name=self._names.take(f"{name}_Identity"))
            graph.append(copy)
            taken = copy.outputs[0]
        taken.name, taken.type, taken.shape = name, output.type, output.shape
        graph.outputs[:] = [taken if value is output else value for value in graph.outputs]


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in [model.graph, *model.graph.subgraphs()]:
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs
