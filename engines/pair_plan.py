"""The Q/DQ pairs of a graph in the making: what the rules about pairs ask, and where they put their answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from engines.epilogues import epilogues, self_gated
from engines.graph import is_activation, name_of
from engines.pair_rules_residual import residual_skips
from engines.placement import ActivationPoint, Origins, commutes

CONVOLUTIONS = ("Conv", "ConvTranspose")
"""Weighted operators that fuse with Pads before them and with pointwise operators behind them."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One edge that is to read quantized values.

    Attributes:
        node: the reader.
        index: which of its inputs.
        subject: the nodes that it is about, for the reason.
        amax: the largest magnitude where the graph guarantees one; see `ActivationPoint`.
    """

    node: ir.Node
    index: int
    subject: str
    amax: float | None = None


@dataclass(slots=True)
class _Pair:
    value: ir.Value
    rule: str
    amax: float | None
    subjects: dict[str, dict[str, None]] = field(default_factory=dict)
    uses: dict[tuple[str, int], None] = field(default_factory=dict)


class PairPlan:
    """One graph, the nodes that compute on INT8, and the edges that read quantized values so far.

    What is derived from the graph is computed once, and a question about all edges takes time linear in them.
    """

    def __init__(self, model: ir.Model, chosen: list[ir.Node]) -> None:
        """Begin without pairs.

        Args:
            model: a prepared model; it must not change meanwhile.
            chosen: its nodes that compute on INT8.
        """
        self.model = model
        self.chosen = chosen
        self.nodes = list(model.graph)
        self.names = {node.name for node in chosen}
        self.origins = Origins()
        self._pairs: dict[ir.Value, _Pair] = {}

    @cached_property
    def gated(self) -> set[ir.Node]:
        """The Muls of SiLU, HardSwish and their like."""
        return self_gated(self.nodes)

    @cached_property
    def skips(self) -> dict[ir.Node, int]:
        """The residual Adds, and the index of the skip of each."""
        return residual_skips(self.nodes, self.names, self.gated)

    @cached_property
    def by_convolution(self) -> dict[ir.Value, ir.Node]:
        """The values that the kernel of a quantized convolution gives, residual sums left out."""
        return epilogues(self.nodes, self.names, self.gated)

    @cached_property
    def by_sum(self) -> dict[ir.Value, ir.Node]:
        """The same with the residual Adds whose skip is INT8."""
        return epilogues(self.nodes, self.names, self.gated, {n: i for n, i in self.skips.items() if self.reads(n, i)})

    @cached_property
    def fusing_pads(self) -> set[ir.Node]:
        """The Pads that reach nothing but quantized convolutions, directly or across further Pads."""
        found: set[ir.Node] = set()
        for node in reversed(self.nodes):
            if node.op_type == "Pad" and commutes(node) and not node.outputs[0].is_graph_output():
                uses = node.outputs[0].uses()
                if uses and all(use.idx == 0 and (use.node in found or self._convolves(use.node)) for use in uses):
                    found.add(node)
        return found

    def add(self, rule: str, why: str, ask: Ask) -> None:
        """Let an edge read quantized values; edges of one tensor share a pair, and the first rule names it."""
        value = ask.node.inputs[ask.index]
        if value is None:
            raise AssertionError(f"{ask.node.name} has no input {ask.index}")
        pair = self._pairs.setdefault(value, _Pair(value, rule, ask.amax))
        pair.uses[(ask.node.name or "", ask.index)] = None
        pair.subjects.setdefault(why, {})[ask.subject] = None

    def reads(self, node: ir.Node, index: int) -> bool:
        """Tell whether an edge reads quantized values."""
        value = node.inputs[index]
        pair = self._pairs.get(value) if value is not None else None
        return pair is not None and (node.name or "", index) in pair.uses

    def is_quantized(self, value: ir.Value | None) -> bool:
        """Tell whether some reader of a value takes it as INT8."""
        return value in self._pairs

    def backwards(self) -> Iterator[tuple[ir.Node, bool, set[ir.Value]]]:
        """Give every node, consumers before producers, whether its outputs are read as INT8 alone, and all such values.

        Such a value reaches nothing but quantized edges, directly or across operators that move values and Concats. An
        edge that a rule quantizes on the way counts for the nodes before it.
        """
        int8: set[ir.Value] = set()
        for node in reversed(self.nodes):
            read = _read(node)
            for output in read:
                if not output.is_graph_output() and all(
                    self.reads(use.node, use.idx) or self.passes_on(use.node, use.idx, int8) for use in output.uses()
                ):
                    int8.add(output)
            yield node, bool(read) and all(output in int8 for output in read), int8

    def passes_on(self, node: ir.Node, index: int, int8: set[ir.Value]) -> bool:
        """Tell whether an edge only moves values on to where they are read as INT8, see `backwards`."""
        if node.graph is not self.model.graph:
            return False
        moves = (commutes(node) and index == 0) or (node.op_type == "Concat" and node.domain == "")
        return moves and all(output in int8 for output in _read(node))

    def points(self) -> Iterable[ActivationPoint]:
        """Give the pairs in the order of their tensors in the graph."""
        values = [*self.model.graph.inputs, *(output for node in self.nodes for output in node.outputs)]
        for value in values:
            if value in self._pairs:
                pair = self._pairs[value]
                reason = "; ".join(f"{why}: {', '.join(subjects)}" for why, subjects in pair.subjects.items())
                source = name_of(self.origins.root(value))
                yield ActivationPoint(name_of(value), source, tuple(pair.uses), pair.rule, reason, amax=pair.amax)

    def _convolves(self, node: ir.Node) -> bool:
        return node.op_type in CONVOLUTIONS and node.name in self.names


def titled(node: ir.Node | None) -> str:
    """Name a node with its operator, as reasons do."""
    return "the model's input" if node is None else f"{node.op_type} {node.name!r}"


def activations(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node that are computed at run time and hold floats."""
    return [value for value in node.inputs if value is not None and is_activation(value)]


def _read(node: ir.Node) -> list[ir.Value]:
    """Return the outputs of a node that something reads."""
    return [output for output in node.outputs if output.uses() or output.is_graph_output()]
