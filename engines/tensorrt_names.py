"""Which tensor of a calibration cache is which tensor of a graph.

TensorRT names a tensor as the ONNX file did from which the cache was made. Today's file of the same model may differ
from it: BatchNorm folded or not, another exporter, a tool that added Q/DQ. The rules here find a tensor under another
name only where both are sure to hold the same values, or where TensorRT gives both one scale:

1. The same name, or one that the user gave.
2. The same name but for what tools append: TensorFlow's ":0", "_dequantized" of a Q/DQ model.
3. Across operators that keep the set of values (Reshape, Transpose, Identity, Dropout, ..., and the Relu of a tensor
   that is never negative), and across MaxPool, whose input and output TensorRT gives one scale.
4. The output of a BatchNorm behind a convolution, under the convolution's name where the cache does not hold the
   BatchNorm's: the cache was made from a file in which the two were folded. From one in which they were not, it would
   hold both.
5. `(Unnamed Layer* N) [Kind]_output` by the order of the layers, see `engines.layer_order`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from engines.graph import is_activation, name_of
from engines.layer_order import CachedLayer, match_layers
from engines.placement import never_negative

KEEPING = frozenset(
    {
        "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Dropout", "Expand", "DepthToSpace",
        "SpaceToDepth",
    }
)  # fmt: skip
"""Operators whose output holds the values of their first input: none is new, none is left out."""

_UNNAMED = re.compile(r"\(Unnamed Layer\* ?([0-9]+)\) \[([^\]]+)\]_output(?:_[0-9]+)?")
_PARSERS_OWN = re.compile(r"ONNXTRT_.*")
_APPENDED = (":0", "_dequantized", "_DequantizeLinear_Output", "_DequantizeLinear_Output_0")


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """A tensor of the graph that the cache holds.

    Attributes:
        tensor: its name in the graph.
        cached: its name in the cache.
        rule: short name of the rule that found it: "name", "renamed", "spelling", "same values", "MaxPool",
            "folded BatchNorm" or "layer order".
    """

    tensor: str
    cached: str
    rule: str


@dataclass(frozen=True, slots=True)
class MissingTensor:
    """A tensor of the graph that the cache lacks, or that cannot be told.

    Attributes:
        tensor: its name in the graph.
        reason: what is known about it.
    """

    tensor: str
    reason: str


def is_tensorrts_own(name: str) -> bool:
    """Tell whether TensorRT or its ONNX parser made a name up; the graph has none for that tensor."""
    return _UNNAMED.fullmatch(name) is not None or _PARSERS_OWN.fullmatch(name) is not None


def find_tensors(
    wanted: Iterable[str],
    cached: Mapping[str, float],
    prepared: ir.Model,
    original: ir.Model,
    renamed: Mapping[str, str] | None = None,
) -> tuple[list[FoundTensor], list[MissingTensor]]:
    """Find tensors of a graph in a cache; what cannot be told for certain is missing.

    Args:
        wanted: names of the prepared graph's tensors.
        cached: the cache's scales, in its order, which is that of the network's layers.
        prepared: the graph.
        original: the file before its preparation, with types: its BatchNorms still stand.
        renamed: name in the cache to name in the graph, from the user.
    """
    given = {tensor: name for name, tensor in (renamed or {}).items()}
    graphs = [_Neighbours(original, cached), _Neighbours(prepared, cached)]
    found: list[FoundTensor] = []
    rest: list[str] = []
    for tensor in wanted:
        match = _by_name(tensor, cached, given)
        for graph in graphs:
            match = match or graph.search(tensor)
        if match is None:
            rest.append(tensor)
        else:
            found.append(match)
    if not rest:
        return found, []
    ordered, reason = _by_order(cached, [prepared, original])
    missing: list[MissingTensor] = []
    for tensor in rest:
        if tensor in ordered:
            found.append(FoundTensor(tensor, ordered[tensor], "layer order"))
            continue
        hint = graphs[1].hint(tensor)
        missing.append(MissingTensor(tensor, hint or reason or "no name in the cache stands for it"))
    return found, missing


def contradictions(cached: Mapping[str, float], model: ir.Model) -> list[str]:
    """Name the tensors of a graph that a cache of its names contradicts.

    A cache stands in the order of the network, and what only moves values has the scale of what it moves. A tensor that
    comes before the ones from which it is computed, or differs from the one that it repeats, is another one: exporters
    that number their tensors give the same number to different ones.
    """
    position = {name: index for index, name in enumerate(cached)}
    found: list[str] = []
    for node in model.graph:
        for output in node.outputs:
            name = output.name or ""
            if name not in position:
                continue
            sources = [value.name for value in node.inputs if value is not None and value.name in position]
            early = any(position[str(source)] > position[name] for source in sources)
            moved = node.op_type in KEEPING and node.domain == "" and bool(sources) and sources[0] == _first(node)
            # TensorRT's scales of moved tensors are equal; a few steps of its search are allowed for.
            if early or (moved and not 0.9 < _ratio(cached[name], cached[str(sources[0])]) < 1.1):
                found.append(name)
    return found


class _Neighbours:
    """The tensors of a graph that hold the same values under other names."""

    def __init__(self, model: ir.Model, cached: Mapping[str, float]) -> None:
        self._cached = cached
        self._values = {value.name: value for value in model.graph.inputs}
        for node in model.graph:
            self._values.update({value.name: value for value in node.outputs})

    def search(self, tensor: str) -> FoundTensor | None:
        """Look for a tensor under the names of its neighbours, the nearest first."""
        start = self._values.get(tensor)
        queue: deque[tuple[ir.Value, str]] = deque([(start, "")] if start is not None else [])
        seen = {tensor}
        while queue:
            value, rule = queue.popleft()
            if rule and value.name in self._cached:
                return FoundTensor(tensor, str(value.name), rule)
            for neighbour, step in _steps(value):
                if neighbour.name not in seen:
                    seen.add(str(neighbour.name))
                    queue.append((neighbour, step if rule in ("", "same values") else rule))
        return None

    def hint(self, tensor: str) -> str:
        """Say what the cache holds beside a tensor, where that explains why the tensor itself is not there."""
        value = self._values.get(tensor)
        producer = value.producer() if value is not None else None
        source = _first(producer) if producer is not None else None
        if producer is not None and source in self._cached:
            return f"the cache holds only {source!r}, from which {producer.op_type} computes it"
        return ""


def _by_name(tensor: str, cached: Mapping[str, float], given: Mapping[str, str]) -> FoundTensor | None:
    if tensor in given:
        return FoundTensor(tensor, given[tensor], "renamed")
    if tensor in cached:
        return FoundTensor(tensor, tensor, "name")
    spellings = [f"{tensor}{suffix}" for suffix in _APPENDED]
    spellings += [tensor.removesuffix(":0")] if tensor.endswith(":0") else []
    present = [name for name in spellings if name in cached]
    return FoundTensor(tensor, present[0], "spelling") if len(present) == 1 else None


def _steps(value: ir.Value) -> Iterator[tuple[ir.Value, str]]:
    """Yield the tensors beside one that are sure to have its scale, with the rule."""
    producer = value.producer()
    if producer is not None and producer.domain == "" and producer.outputs[0] is value and producer.inputs:
        source = producer.inputs[0]
        rule = _rule(producer)
        if source is not None and rule:
            yield source, rule
        elif source is not None and _is_folded(producer, source):
            yield source, "folded BatchNorm"
    for use in value.uses():
        rule = _rule(use.node) if use.idx == 0 and use.node.domain == "" else ""
        if rule:
            yield use.node.outputs[0], rule


def _rule(node: ir.Node) -> str:
    if node.op_type == "MaxPool":
        return "MaxPool"
    source = node.inputs[0] if node.inputs else None
    keeps = node.op_type in KEEPING or (node.op_type == "Relu" and source is not None and never_negative(source))
    return "same values" if keeps else ""


def _is_folded(node: ir.Node, source: ir.Value) -> bool:
    """Tell whether a node is the BatchNorm of a convolution that nothing else reads."""
    producer = source.producer()
    return (
        node.op_type == "BatchNormalization"
        and producer is not None
        and producer.op_type in ("Conv", "ConvTranspose", "Gemm")
        and len(list(source.uses())) == 1
        and not source.is_graph_output()
    )


def _by_order(cached: Mapping[str, float], models: Sequence[ir.Model]) -> tuple[dict[str, str], str]:
    """Find the tensors of unnamed layers; in the first graph that has the layers of the cache."""
    numbers = [int(match[1]) for name in cached if (match := _UNNAMED.fullmatch(name))]
    if not numbers:
        return {}, ""
    if numbers != sorted(numbers):
        return {}, "its unnamed layers are not in the order of their numbers"
    reason = ""
    for model in models:
        inputs = {value.name for value in model.graph.inputs}
        outputs = {value.name for node in model.graph for value in node.outputs}
        items: list[CachedLayer] = []
        for name, scale in cached.items():
            match = _UNNAMED.fullmatch(name)
            if match is not None:
                items.append(CachedLayer(name, scale, kind=match[2]))
            elif name in outputs:
                items.append(CachedLayer(name, scale, tensor=name))
            elif name not in inputs and _PARSERS_OWN.fullmatch(name) is None:
                items.append(CachedLayer(name, scale))
        matched, why = match_layers(model, items)
        if matched:
            matched |= _input(cached, model)
            return matched, f"the unnamed layers of the cache do not tell: {why}" if why else ""
        reason = reason or (why and f"the unnamed layers of the cache do not tell: {why}")
    return {}, reason


def _input(cached: Mapping[str, float], model: ir.Model) -> dict[str, str]:
    """Return the only input of a graph under the name of the only tensor that stands before layer 0."""
    inputs = [name_of(value) for value in model.graph.inputs if is_activation(value)]
    first, second, *_ = [*cached, "", ""]
    layer = _UNNAMED.fullmatch(second)
    known = {value.name for node in model.graph for value in node.outputs}
    if len(inputs) != 1 or layer is None or int(layer[1]) != 0 or first in known or _UNNAMED.fullmatch(first):
        return {}
    return {inputs[0]: first}


def _first(node: ir.Node) -> str | None:
    return node.inputs[0].name if node.inputs and node.inputs[0] is not None else None


def _ratio(one: float, other: float) -> float:
    return one / other if other else 0.0
