"""Which kernels an engine runs, in which precision, and what became of each node of its model.

TensorRT fuses, removes and inserts layers, and takes INT8 where the model asks for it and a kernel exists. Its engine
inspector tells what came out, as JSON, which TensorRT 10 and 11 write differently; both are read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx
import onnx.shape_inference

from engines.errors import EngineError
from engines.placement import WEIGHTED

_DATA_TYPES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "tf32": "fp32", "fp16": "fp16", "float16": "fp16",
    "half": "fp16", "bf16": "bf16", "bfloat16": "bf16", "fp8": "fp8", "fp4": "fp4", "int8": "int8", "uint8": "uint8",
    "int4": "int4", "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip
_DATA_TYPE = re.compile(rf"\bk?({'|'.join(sorted(_DATA_TYPES, key=len, reverse=True))})\b", re.IGNORECASE)
_NODE_PREFIX = "[ONNX Layer: "
_NODE_SEPARATOR = "\x1e"

_ONNX_PRECISIONS = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp32",  # TensorRT has no double
}


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of an engine, which is one kernel or a few.

    Attributes:
        name: TensorRT's name: often the nodes in it, joined by " + ".
        kind: such as "CaskConvolution", "PointWiseV2", "Reformat".
        precision: data type that it computes in: that of its first input; None where TensorRT does not tell.
        nodes: the ONNX nodes in it, Q/DQ nodes included.
        inputs: data format of each input, as TensorRT words it.
        outputs: the same of each output.
        tactic: name of the kernel, where TensorRT tells it.
        time_ms: mean time of a run; None where it was not profiled.
    """

    name: str
    kind: str
    precision: str | None
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str
    time_ms: float | None = None

    @property
    def is_reformat(self) -> bool:
        """Whether it only copies data into another layout or type."""
        return self.kind.lower() == "reformat" or self.name.startswith("Reformatting CopyNode")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """What became of one node of the model.

    Attributes:
        node: its name.
        op_type: its operator.
        intended: precision that the model asks for.
        layer: the engine's layer that it is in; None where TensorRT removed it.
        precision: of that layer.
        layer_ms: mean time of that layer, which all nodes in it share.
    """

    node: str
    op_type: str
    intended: str | None
    layer: str | None
    precision: str | None
    layer_ms: float | None

    @property
    def as_intended(self) -> bool:
        """Whether the layer computes in the intended precision."""
        return self.precision is not None and self.precision == self.intended


@dataclass(frozen=True, slots=True)
class LayerTable:
    """An engine beside its model.

    Attributes:
        engine: name of the engine.
        rows: one for each node of the model but Q/DQ and constants, in the model's order.
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
    def intended_int8(self) -> tuple[NodeRow, ...]:
        """The nodes that the model wants in INT8."""
        return tuple(row for row in self.rows if row.intended == "int8")

    @property
    def summary(self) -> str:
        """One line: "18 of 20 intended layers run INT8; 2 reformat layers"."""
        running = sum(row.as_intended for row in self.intended_int8)
        count = len(self.reformats)
        return (
            f"{running} of {len(self.intended_int8)} intended layers run INT8; "
            f"{count} reformat layer{'' if count == 1 else 's'}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "engine": self.engine,
            "summary": self.summary,
            "rows": [asdict(row) for row in self.rows],
            "layers": [asdict(layer) | {"reformat": layer.is_reformat} for layer in self.layers],
        }


@dataclass(frozen=True, slots=True)
class NodeDifference:
    """One node in two engines.

    Attributes:
        node: its name.
        first: what became of it in the first engine; None where its model does not have it.
        second: the same in the second.
    """

    node: str
    first: NodeRow | None
    second: NodeRow | None

    @property
    def difference_ms(self) -> float | None:
        """Time of its layer in the second engine, less that in the first; None where either is not known."""
        if self.first is None or self.second is None:
            return None
        if self.first.layer_ms is None or self.second.layer_ms is None:
            return None
        return self.second.layer_ms - self.first.layer_ms


def parse_layers(text: str, times: Mapping[str, float] | None = None) -> tuple[EngineLayer, ...]:
    """Read the engine inspector's JSON, of TensorRT 10 or 11.

    Args:
        text: what `get_engine_information` gave.
        times: mean milliseconds by layer name.

    Raises:
        EngineError: it is not such JSON, or the engine was built with the names of its layers alone.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"Cannot read what TensorRT's inspector says of the engine ({type(error).__name__}: {error}); expected "
            'JSON with a list "Layers".'
        ) from error
    if any(isinstance(layer, str) for layer in layers):
        raise EngineError(
            "TensorRT's inspector tells only the names of this engine's layers: it was not built with detailed "
            "profiling verbosity. Build it with `trt-int8 build`."
        )
    return tuple(_layer(layer, times or {}) for layer in layers)


def intended_precisions(model: onnx.ModelProto) -> dict[str, tuple[str, str | None]]:
    """Tell for each node of a model the precision that it asks for.

    A convolution or matrix product whose data and weights both come out of DequantizeLinear is meant to run in INT8.
    Every other node is meant to run in the type of its first float output.

    Args:
        model: the model that the engine was built from, with or without its weights.

    Returns:
        Node name to operator and precision, in the order of the nodes; without Q/DQ nodes and constants. The precision
        is None where the types are not known.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    found: dict[str, tuple[str, str | None]] = {}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Constant"):
            continue
        if node.op_type in WEIGHTED and all(name in dequantized for name in node.input[:2]):
            found[node.name] = node.op_type, "int8"
        else:
            precisions = (_ONNX_PRECISIONS.get(types.get(name, 0)) for name in node.output)
            found[node.name] = node.op_type, next((name for name in precisions if name), None)
    return found


def layer_table(engine: str, model: onnx.ModelProto, layers: Sequence[EngineLayer]) -> LayerTable:
    """Put an engine's layers beside the nodes of the model that it was built from."""
    # A node may be in a reformat of its input too; the layer that computes it is the one to show.
    by_node: dict[str, EngineLayer] = {}
    for layer in sorted(layers, key=lambda layer: not layer.is_reformat):
        by_node.update(dict.fromkeys(layer.nodes, layer))
    rows = []
    for node, (op_type, intended) in intended_precisions(model).items():
        found = by_node.get(node)
        if found is None:
            rows.append(NodeRow(node, op_type, intended, None, None, None))
        else:
            rows.append(NodeRow(node, op_type, intended, found.name, found.precision, found.time_ms))
    return LayerTable(engine, tuple(rows), tuple(layers))


def compare_tables(first: LayerTable, second: LayerTable) -> tuple[NodeDifference, ...]:
    """Put two engines' nodes side by side, the largest difference in time first; nodes without times come last."""
    left = {row.node: row for row in first.rows}
    right = {row.node: row for row in second.rows}
    names = list(dict.fromkeys((*left, *right)))
    differences = [NodeDifference(name, left.get(name), right.get(name)) for name in names]
    return tuple(sorted(differences, key=lambda item: -abs(item.difference_ms or 0.0)))


def data_type(text: str) -> str | None:
    """Find a data type in TensorRT's words: "Thirty-two wide channel vectorized row major Int8 format" is "int8"."""
    match = _DATA_TYPE.search(text)
    return _DATA_TYPES[match[1].lower()] if match else None


def _layer(data: Mapping[str, Any], times: Mapping[str, float]) -> EngineLayer:
    name = str(data.get("Name", ""))
    inputs = tuple(map(_format, data.get("Inputs", ())))
    outputs = tuple(map(_format, data.get("Outputs", ())))
    stated = data_type(str(data.get("Precision", "")))
    return EngineLayer(
        name=name,
        kind=str(data.get("LayerType", "")),
        precision=stated or next((found for found in map(data_type, (*inputs[:1], *outputs[:1])) if found), None),
        nodes=_nodes(name, str(data.get("Metadata", ""))),
        inputs=inputs,
        outputs=outputs,
        tactic=str(data.get("TacticName", "")),
        time_ms=times.get(name),
    )


def _format(tensor: Mapping[str, Any]) -> str:
    """Return a tensor's layout and type in one text: TensorRT 10 writes them as one, TensorRT 11 apart."""
    joined = tensor.get("Format/Datatype")
    if joined is not None:
        return str(joined)
    parts = (tensor.get(key) for key in ("Format", "DataType", "Datatype"))
    return " ".join(str(part) for part in parts if part)


def _nodes(name: str, metadata: str) -> tuple[str, ...]:
    """Return the ONNX nodes in a layer: from its metadata, else from its name."""
    parts = [part.strip() for part in metadata.split(_NODE_SEPARATOR)]
    nodes = [part[len(_NODE_PREFIX) : -1] for part in parts if part.startswith(_NODE_PREFIX) and part.endswith("]")]
    return tuple(dict.fromkeys(nodes)) or tuple(part.strip() for part in name.split(" + ") if part.strip())
