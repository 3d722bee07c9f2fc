"""What became of each node of a model in an engine: the layer that it is in, and what that computes in.

TensorRT fuses, removes and inserts layers, and takes INT8 where the model asks for it and a kernel exists. Its engine
inspector tells what came out (`engines.trt_layers`); here that is put beside the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx
import onnx.shape_inference

from engines.placement import WEIGHTED
from engines.trt_layers import EngineLayer, nodes_in_name

_ONNX_PRECISIONS = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp32",  # TensorRT has no double
}
_BITS = {"int4": 4, "fp4": 4, "int8": 8, "fp8": 8, "fp16": 16, "bf16": 16, "fp32": 32}


@dataclass(frozen=True, slots=True)
class NodeRow:
    """What became of one node of the model.

    Attributes:
        node: its name.
        op_type: its operator.
        intended: precision that the model asks for; None where its types do not tell.
        layer: the engine's layer that it is in; None where TensorRT removed it.
        precision: of that layer; None where TensorRT does not tell.
        layer_ms: mean time of that layer, which all nodes in it share.
        in_region: whether that layer is a region whose kernels TensorRT does not tell.
    """

    node: str
    op_type: str
    intended: str | None
    layer: str | None
    precision: str | None
    layer_ms: float | None
    in_region: bool = False

    @property
    def as_intended(self) -> bool:
        """Whether the layer computes in the intended precision."""
        return self.precision is not None and self.precision == self.intended

    @property
    def wider(self) -> bool:
        """Whether the layer computes in a wider type than intended; a narrower one comes of fusing it into others."""
        bits = [_BITS.get(name or "", 0) for name in (self.intended, self.precision)]
        return 0 < bits[0] < bits[1]


@dataclass(frozen=True, slots=True)
class LayerTable:
    """An engine beside its model.

    Attributes:
        engine: name of the engine.
        rows: one for each node of the model but Q/DQ and constants, in the model's order; none without a model.
        layers: the engine's layers, in its order.
    """

    engine: str
    rows: tuple[NodeRow, ...]
    layers: tuple[EngineLayer, ...]

    @property
    def reformats(self) -> tuple[EngineLayer, ...]:
        """The layers that only copy data into another layout or type."""
        return tuple(layer for layer in self.layers if layer.is_reformat)

    @property
    def overlap(self) -> float:
        """How well the model fits the engine, 0 to 1: the share of nodes found in both, of the side that has fewer.

        TensorRT takes nodes away, and an FP32 model lacks the Q/DQ nodes of an INT8 engine; a model that the engine has
        nothing to do with shares few names. 1 where either side names no node.
        """
        known = {_letters(row.node) for row in self.rows}
        named = {_letters(node) for layer in self.layers for node in layer.nodes}
        if not known or not named:
            return 1.0
        found = sum(row.layer is not None for row in self.rows)
        return max(found / len(known), len(known & named) / len(named))

    @property
    def intended_int8(self) -> tuple[NodeRow, ...]:
        """The nodes that the model wants in INT8."""
        return tuple(row for row in self.rows if row.intended == "int8")

    @property
    def int8_share(self) -> float | None:
        """Share of the layers' time, 0 to 1, that layers computing in INT8 take; None where they were not timed."""
        return self._share([layer for layer in self.layers if layer.precision == "int8" and not layer.is_reformat])

    @property
    def unknown_share(self) -> float | None:
        """Share of the layers' time in regions whose kernels TensorRT does not tell; None where it was not taken."""
        return self._share([layer for layer in self.layers if layer.region])

    @property
    def summary(self) -> str:
        """One line: "18 of 20 intended layers run INT8; 2 reformat layers". Without a model: the number of layers."""
        intended = self.intended_int8
        words = ["the model asks for INT8 nowhere"]
        if intended:
            words = [f"{sum(row.as_intended for row in intended)} of {len(intended)} intended layers run INT8"]
        unknown = sum(row.in_region and row.precision is None for row in intended)
        if unknown:
            words.append(f"{unknown} in regions whose kernels TensorRT does not tell")
        count = len(self.reformats)
        if not self.rows:
            words = [f"{len(self.layers)} layers"]
        return "; ".join([*words, f"{count} reformat layer{'' if count == 1 else 's'}"])

    def _share(self, layers: Sequence[EngineLayer]) -> float | None:
        total = sum(layer.time_ms or 0.0 for layer in self.layers)
        return sum(layer.time_ms or 0.0 for layer in layers) / total if total else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "engine": self.engine,
            "summary": self.summary,
            "int8_share": self.int8_share,
            "unknown_share": self.unknown_share,
            "rows": [asdict(row) | {"as_intended": row.as_intended, "wider": row.wider} for row in self.rows],
            "layers": [asdict(layer) | {"reformat": layer.is_reformat} for layer in self.layers],
        }


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """Some nodes in two engines: as few as have layers of their own in both, for engines fuse differently.

    Attributes:
        nodes: their names.
        first_layers: the layers that they are in, in the first engine; none where TensorRT removed them.
        second_layers: the same in the second.
        first_precisions: what those layers compute in, each once; None for what TensorRT does not tell.
        second_precisions: the same in the second.
        first_ms: time of the layers in the first engine; None where they were not timed.
        second_ms: the same in the second.
    """

    nodes: tuple[str, ...]
    first_layers: tuple[str, ...]
    second_layers: tuple[str, ...]
    first_precisions: tuple[str | None, ...]
    second_precisions: tuple[str | None, ...]
    first_ms: float | None
    second_ms: float | None

    @property
    def difference_ms(self) -> float | None:
        """Time in the second engine, less that in the first; None where either is not known."""
        if self.first_ms is None or self.second_ms is None:
            return None
        return self.second_ms - self.first_ms

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self) | {"difference_ms": self.difference_ms}


def intended_precisions(model: onnx.ModelProto, *, implicit: bool = False) -> dict[str, tuple[str, str | None]]:
    """Tell for each node of a model the precision that it asks for.

    A convolution or matrix product whose data and weights both come out of DequantizeLinear is meant to run in INT8.
    Every other node is meant to run in the type of its first float output, but for conversions.

    Args:
        model: the model that the engine was built from, with or without its weights.
        implicit: whether a calibrator brought INT8 into an FP32 model: then every convolution and matrix product is
            meant to run in it.

    Returns:
        Node name to operator and precision, in the order of the nodes; without Q/DQ nodes and constants. The precision
        is None where the types are not known. A node without a name has the one that TensorRT's parser gives it.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    found: dict[str, tuple[str, str | None]] = {}
    for node in graph.node:
        precision: str | None = None
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Constant"):
            continue
        if node.op_type in WEIGHTED and (implicit or all(name in dequantized for name in node.input[:2])):
            precision = "int8"
        elif node.op_type != "Cast":
            precisions = (_ONNX_PRECISIONS.get(types.get(name, 0)) for name in node.output)
            precision = next((name for name in precisions if name), None)
        found[_parser_name(node)] = node.op_type, precision
    return found


def layer_table(
    engine: str, model: onnx.ModelProto, layers: Sequence[EngineLayer], *, implicit: bool = False
) -> LayerTable:
    """Put an engine's layers beside the nodes of the model that it was built from.

    Args:
        engine: its name.
        model: see `intended_precisions`.
        layers: the engine's layers.
        implicit: see `intended_precisions`.
    """
    # A node may also be in a copy of its input, and in several kernels; the one that multiplies is the one to show.
    by_node: dict[str, EngineLayer] = {}
    for layer in sorted(layers, key=lambda layer: (not _only_moves(layer), layer.is_product)):
        if layer.region is None:
            by_node.update(dict.fromkeys(layer.nodes, layer))
    # Compilers behind TensorRT's parser write names in their own letters.
    by_letters = {_letters(name): layer for name, layer in by_node.items()}
    regions = _regions(model, layers)
    rows = []
    for node, (op_type, intended) in intended_precisions(model, implicit=implicit).items():
        found = by_node.get(node) or by_letters.get(_letters(node)) or regions.get(node)
        if found is None:
            rows.append(NodeRow(node, op_type, intended, None, None, None))
        else:
            inside = found.region is not None
            rows.append(NodeRow(node, op_type, intended, found.name, found.precision, found.time_ms, inside))
    return LayerTable(engine, tuple(rows), tuple(layers))


def compare_tables(first: LayerTable, second: LayerTable) -> tuple[LayerDifference, ...]:
    """Put two engines of one network side by side: their nodes are joined by name.

    Returns:
        The largest difference in time first, what was not timed last. Copies into another layout or type belong to no
        node and are not in it, and neither are nodes that both engines are without.
    """
    sides = [{row.node: row for row in table.rows if row.layer is not None} for table in (first, second)]
    nodes = list(dict.fromkeys(row.node for table in (first, second) for row in table.rows))
    members: dict[str, list[str]] = {}
    group_of: dict[tuple[int, str | None], str] = {}
    for node in nodes:
        layers = [(side, rows[node].layer) for side, rows in enumerate(sides) if node in rows]
        if not layers:
            continue
        # Layers that share a node are one group; the groups that this node joins become that of the first of them.
        joined = list(dict.fromkeys(group_of[layer] for layer in layers if layer in group_of)) or [node]
        target = members.setdefault(joined[0], [])
        for other in joined[1:]:
            target += members.pop(other)
            group_of.update({layer: joined[0] for layer, group in group_of.items() if group == other})
        target.append(node)
        group_of.update(dict.fromkeys(layers, joined[0]))
    found = [_difference(sorted(group, key=nodes.index), sides, (first, second)) for group in members.values()]
    return tuple(sorted(found, key=lambda item: -abs(item.difference_ms or 0.0)))


def _difference(
    nodes: Sequence[str], sides: Sequence[Mapping[str, NodeRow]], tables: Sequence[LayerTable]
) -> LayerDifference:
    names: list[tuple[str, ...]] = []
    precisions: list[tuple[str | None, ...]] = []
    times: list[float | None] = []
    for rows, table in zip(sides, tables, strict=True):
        layers = {row.layer: row for row in map(rows.get, nodes) if row is not None}
        names.append(tuple(name for name in layers if name is not None))
        precisions.append(tuple(dict.fromkeys(row.precision for row in layers.values())))
        timed = any(layer.time_ms is not None for layer in table.layers)
        times.append(sum(row.layer_ms or 0.0 for row in layers.values()) if timed else None)
    return LayerDifference(
        nodes=tuple(nodes),
        first_layers=names[0],
        second_layers=names[1],
        first_precisions=precisions[0],
        second_precisions=precisions[1],
        first_ms=times[0],
        second_ms=times[1],
    )


def _parser_name(node: onnx.NodeProto) -> str:
    """Return a node's name as TensorRT's ONNX parser has it."""
    return node.name or f"node_of_{node.output[0]}"


def _letters(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _only_moves(layer: EngineLayer) -> bool:
    return layer.is_reformat or layer.kind.lower() == "noop"


def _regions(model: onnx.ModelProto, layers: Sequence[EngineLayer]) -> dict[str, EngineLayer]:
    """Return the nodes in regions: those that TensorRT names, and all from the first to the last in the model's order.

    Where the model does not have one of the two ends, nothing between them is claimed.
    """
    order = [_parser_name(node) for node in model.graph.node]
    place = {name: index for index, name in enumerate(order)}
    found: dict[str, EngineLayer] = {}
    for layer in layers:
        if layer.region is None:
            continue
        ends = [[place[name] for name in nodes_in_name(end) if name in place] for end in layer.region]
        between = order[min(ends[0]) : max(ends[1]) + 1] if all(ends) else []
        found.update(dict.fromkeys((*between, *layer.nodes), layer))
    return found
