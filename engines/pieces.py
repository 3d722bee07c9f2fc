"""A model cut into pieces, run one after the other: what a piece hands out is counted while it is in the cache.

Run as a whole, a model hands out tens of megabytes, which have left the cache when they are counted; and the weights of
a large model have left it, too, when the next batch is run. A piece hands out a few megabytes, and is run on several
batches in turn, so that its weights and the counters of its tensors stay. The nodes and their order are those of the
whole, and so are the values to the bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, helper

from engines.memory import tensor_bytes
from engines.onnxrt import make_session

if TYPE_CHECKING:
    import onnxruntime

_log = logging.getLogger(__name__)

BLOCKED_DOMAIN = "com.microsoft.nchwc"
"""Of the operators of ONNX Runtime that compute in blocks of channels."""

PIECE_BYTES = 2 * 2**20
"""What a piece hands out and its weights, about: they stay in a core's share of the caches."""

_UNKNOWN_BYTES = PIECE_BYTES // 8
"""What a tensor counts for whose shape the graph does not tell."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a model, ready to run.

    Attributes:
        session: runs it.
        inputs: what it reads of the model's inputs and of the pieces before.
        outputs: what it hands out: tensors that are wanted, and those that later pieces read.
        later: of everything so far, what later pieces read.
    """

    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    later: frozenset[str]


def whole(session: onnxruntime.InferenceSession, outputs: Sequence[str]) -> Piece:
    """Return a model as its only piece."""
    return Piece(session, tuple(value.name for value in session.get_inputs()), tuple(outputs), frozenset())


def open_pieces(model: onnx.ModelProto, folder: Path, sizes: Mapping[str, int], *, threads: int) -> list[Piece]:
    """Cut an optimised model, and make a session for each piece.

    Args:
        model: its nodes in the order in which they are run. Its outputs are the tensors that are wanted.
        folder: holds the weights that the model refers to.
        sizes: bytes of tensors, where they are known.
        threads: threads inside an operator.

    Returns:
        The pieces, in order; a single one where the model cannot be cut.

    Raises:
        ModelError: ONNX Runtime refuses a piece.
    """
    graph = model.graph
    handed_out = {value.name for value in graph.output}
    types = _types(graph)
    parts = _cut(graph, handed_out, sizes, types)
    constants = {weight.name: weight for weight in graph.initializer}
    read_in = [{name for node in nodes for name in node.input if name} for nodes in parts]
    last_read = {name: number for number, names in enumerate(read_in) for name in names}
    pieces = []
    carried: set[str] = set()
    for number, nodes in enumerate(parts):
        made = [name for node in nodes for name in node.output if name]
        read = read_in[number]
        # A part that was not cut reads what nested graphs read, too.
        inputs = [value.name for value in graph.input if value.name not in constants] if len(parts) == 1 else []
        inputs += sorted(read - set(made) - constants.keys() - set(inputs))
        outputs = [name for name in made if last_read.get(name, -1) > number or name in handed_out]
        own = constants.values() if len(parts) == 1 else [constants[name] for name in sorted(read & constants.keys())]
        part = helper.make_graph(
            nodes,
            f"piece_{number}",
            [helper.make_tensor_value_info(name, types[name], None) for name in inputs],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            list(own),
        )
        proto = helper.make_model(
            part, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
        )
        file = folder / f"piece_{number}.onnx"
        file.write_bytes(proto.SerializeToString())
        carried = {name for name in (*carried, *outputs) if last_read.get(name, -1) > number}
        session = make_session(file, execution="exact", threads=threads, settings=_shared_arena())
        pieces.append(Piece(session, tuple(inputs), tuple(outputs), frozenset(carried)))
    return pieces


@cache
def _shared_arena() -> Mapping[str, str]:
    """Return what makes a session take its memory from one arena of the process.

    An arena of its own would keep, for each piece, what the piece needed at most, for each thread that ran it at the
    same time as others; one arena for all is as large as what is in use at a time.
    """
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # Grown by what is asked for, not by doubling.
    arena = onnxruntime.OrtArenaCfg(
        {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": 2**20, "max_dead_bytes_per_chunk": -1}
    )
    try:
        onnxruntime.create_and_register_allocator(memory, arena)
    except Exception as error:  # ONNX Runtime raises its own classes, which share no base
        _log.debug("the process has an arena of its own already, or can have none: %s", error)
    return {"session.use_env_allocators": "1"}


def tensor_sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the bytes of the float tensors whose shape a graph states, for batches of one: open lengths count as 1."""
    sizes = {}
    for value in [*graph.value_info, *graph.output]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            sizes[value.name] = 4 * math.prod(axis.dim_value or 1 for axis in tensor.shape.dim)
    return sizes


def _cut(
    graph: onnx.GraphProto, wanted: set[str], sizes: Mapping[str, int], types: Mapping[str, int]
) -> list[list[onnx.NodeProto]]:
    """Share the nodes out, in order.

    A part takes from half of what a piece should to four times that, and ends where least is carried on.
    """
    nodes = list(graph.node)
    if any(attribute.HasField("g") or attribute.graphs for node in nodes for attribute in node.attribute):
        return [nodes]  # what nested graphs read is not among the inputs of their node
    live = _live_bytes(nodes, sizes)
    handed_out = [sum(sizes.get(name, _UNKNOWN_BYTES) for name in node.output if name in wanted) for node in nodes]
    loaded = _loaded_bytes(graph)
    last = max((k for k, size in enumerate(handed_out) if size), default=0)
    parts: list[list[onnx.NodeProto]] = []
    start = 0
    while start < len(nodes):
        end, size, best = start, 0, len(nodes)
        while end < last and size < 4 * PIECE_BYTES:
            size += handed_out[end] + loaded[end]
            end += 1
            if size >= PIECE_BYTES // 2 and (best == len(nodes) or live[end] < live[best]):
                best = end
        parts.append(nodes[start:best])
        start = best
    made_in = {name: k for k, part in enumerate(parts) for node in part for name in node.output if name}
    crossing = {
        name for k, part in enumerate(parts) for node in part for name in node.input if made_in.get(name, k) != k
    }
    return parts if crossing <= types.keys() else [nodes]


def _loaded_bytes(graph: onnx.GraphProto) -> list[int]:
    """Return for each node the bytes of the weights that no node before it reads."""
    left = {weight.name: tensor_bytes(weight.data_type, weight.dims) or 0 for weight in graph.initializer}
    return [sum(left.pop(name, 0) for name in node.input) for node in graph.node]


def _live_bytes(nodes: Sequence[onnx.NodeProto], sizes: Mapping[str, int]) -> list[int]:
    """Return for each number of nodes what later nodes read of what these have made, in bytes."""
    made_at = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    read_last: dict[str, int] = {}
    for k, node in enumerate(nodes):
        read_last |= {name: k for name in node.input if name in made_at}
    changes = [0] * (len(nodes) + 2)
    for name, k in read_last.items():
        size = sizes.get(name, _UNKNOWN_BYTES)
        changes[made_at[name] + 1] += size
        changes[k + 1] -= size
    return list(accumulate(changes))


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the element type of every value where it is known.

    ONNX Runtime states none for the tensors that it keeps in blocks; they are float, as are those computed from them.
    """
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in [*graph.input, *graph.value_info, *graph.output]
        if value.type.tensor_type.elem_type
    }
    in_blocks: set[str] = set()
    for node in graph.node:
        if node.domain == BLOCKED_DOMAIN or in_blocks & set(node.input):
            in_blocks |= set(node.output) - types.keys()
    return types | dict.fromkeys(in_blocks, int(TensorProto.FLOAT))
