"""Activations in ONNX Runtime's own layout, so that handing them out costs next to nothing.

On the CPU, ONNX Runtime keeps the tensors between convolutions in blocks of channels (NCHWc: N, C / block, H, W,
block), and every graph output is put back into the order of ONNX by a `ReorderOutput` node, which costs more than
counting the values. A histogram does not depend on their order. So the graph that ONNX Runtime has optimised is written
to a temporary folder, and each output made by such a node is replaced by what goes into the node. The result is cut
into pieces (`engines.pieces`), which are loaded with optimization off: the nodes that compute are the same, and so are
the values to the bit.

The optimised graph is made for this processor and this version of ONNX Runtime; it is made anew by each process and not
kept. Where a step fails or a form is not the known one, there is no such session, and the caller takes the plain way.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from calibrators.errors import TrtInt8Error
from calibrators.protocols import Array
from engines.graph import exceeds_one_file, for_session, save_model
from engines.onnxrt import make_session
from engines.pieces import BLOCKED_DOMAIN, Piece, open_pieces, tensor_sizes

_log = logging.getLogger(__name__)

_EXTERNAL_BYTES = 1024
"""Weights from this size on are written beside the optimised graph, so that editing it does not load them."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """An output of the session that is laid out in blocks of channels.

    Attributes:
        output: its name.
        channels: number of channels; the last block is filled up with others, which hold zeros.
    """

    output: str
    channels: int


@dataclass(frozen=True, slots=True)
class BlockedSession:
    """A model that hands activations out as ONNX Runtime holds them.

    Attributes:
        pieces: of the optimised graph, in order.
        blocked: tensor to the output that holds it in blocks; the others have outputs of their own name.
    """

    pieces: Sequence[Piece]
    blocked: Mapping[str, Blocked]


def open_blocked_session(exposed: onnx.ModelProto, tensors: Sequence[str], *, threads: int) -> BlockedSession | None:
    """Open a model, cut into pieces, that hands out `tensors`, in blocks where ONNX Runtime computes them so.

    Args:
        exposed: a model that has all of `tensors` among its outputs. How ONNX Runtime fuses its nodes, and with it the
            last bit of the values, depends on all of its outputs; those not in `tensors` are not kept in memory.
        tensors: names of the outputs that are wanted.
        threads: threads inside an operator.

    Returns:
        Its pieces; None where nothing would be gained, or something is not as expected.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="trt-int8-") as folder:
            model = _optimised(exposed, Path(folder), threads)
            blocked = _without_reordering(model, tensors)
            if any(found.channels % 16 for found in blocked.values()) and channels_per_block() is None:
                return None
            known = tensor_sizes(model.graph)
            sizes = {
                blocked[name].output if name in blocked else name: known[name] for name in tensors if name in known
            }
            pieces = open_pieces(model, Path(folder), sizes, threads=threads)
            if not blocked and len(pieces) == 1 and len(tensors) == len(exposed.graph.output):
                return None
            return BlockedSession(pieces, blocked)
    except (TrtInt8Error, OSError, ValueError) as error:
        _log.debug("activations are taken in ONNX's layout: %s", error)
        return None


def real_values(values: Array, channels: int) -> Array:
    """Leave out the channels that fill up the last block.

    Args:
        values: shape (N, C, H, W) as ONNX Runtime states it, laid out as (N, C / block, H, W, block).
        channels: of them, those that belong to the tensor.

    Returns:
        The tensor's values in some order: first axis N, the same memory where nothing is left out.
    """
    if values.shape[1] == channels:
        return values
    real = np.empty((values.shape[0], real_size(values.shape, channels)), values.dtype)
    copy_real_values(values, channels, real)
    return real


def real_size(shape: tuple[int, ...], channels: int) -> int:
    """Return the number of values of a sample that are left; arguments as of `real_values`."""
    return channels * shape[2] * shape[3]


def copy_real_values(values: Array, channels: int, real: Array) -> None:
    """Write what `real_values` returns to `real`, shape (N, real_size)."""
    block = channels_per_block()
    if block is None:
        raise AssertionError("a session with filled-up blocks was made without knowing their size")
    samples, filled, height, width = values.shape
    blocks = values.reshape(samples, filled // block, height, width, block)
    whole, rest = divmod(channels, block)
    inside = whole * block * height * width
    real[:, :inside] = blocks[:, :whole].reshape(samples, inside)
    real[:, inside:].reshape(samples, height, width, rest)[:] = blocks[:, whole, ..., :rest]


@cache
def channels_per_block() -> int | None:
    """Return how many channels ONNX Runtime puts into a block on this processor; None where it does not say.

    A tensor of 64 channels and two pixels is reordered, and read: in a block the first pixel of all its channels comes
    before the second of any.
    """
    channels = 64
    graph = helper.make_graph(
        [helper.make_node("ReorderInput", ["x"], ["y"], domain=BLOCKED_DOMAIN)],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(BLOCKED_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = np.arange(2 * channels, dtype=np.float32).reshape(1, channels, 1, 2)
    try:
        y = make_session(model.SerializeToString(), execution="exact", threads=1).run(None, {"x": x})[0]
    except Exception as error:  # ONNX Runtime raises its own classes, which share no base
        _log.debug("ONNX Runtime does not tell the size of its blocks: %s", error)
        return None
    block = int(np.flatnonzero(y.reshape(-1) == 1)[0])
    expected = x.reshape(channels // block, block, 2).transpose(0, 2, 1) if channels % block == 0 else x
    return block if np.array_equal(y.reshape(-1), expected.reshape(-1)) else None


def _optimised(exposed: onnx.ModelProto, folder: Path, threads: int) -> onnx.ModelProto:
    """Return the graph as ONNX Runtime optimises it, without its large weights, which are written to `folder`."""
    written = folder / "optimised.onnx"
    source: Path | bytes
    settings: Mapping[str, str] = {}
    if exceeds_one_file(exposed):
        source = folder / "model.onnx"
        save_model(exposed, source)
    else:
        source, settings = for_session(exposed)
    make_session(
        source,
        execution="native",
        threads=threads,
        settings={
            **settings,
            "session.optimized_model_external_initializers_file_name": "weights.bin",
            "session.optimized_model_external_initializers_min_size_in_bytes": str(_EXTERNAL_BYTES),
        },
        optimized_model=written,
    )
    return onnx.load(written, load_external_data=False)


def _without_reordering(model: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, Blocked]:
    """Make `tensors` the outputs of an optimised graph, in blocks where they are computed so."""
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    blocked: dict[str, Blocked] = {}
    for name in tensors:
        node = producers.get(name)
        if node is None:
            raise ValueError(f"{name!r} is not in the optimised graph")
        channels = _reordered_channels(node)
        if channels is not None:
            blocked[name] = Blocked(node.input[0], channels)
    # What is exposed and not wanted may have been put in order for that alone.
    unwanted = {value.name for value in graph.output} - set(tensors)
    kept = [
        node
        for node in graph.node
        if readers[node.output[0]]
        or not (node.output[0] in blocked or (node.output[0] in unwanted and _reordered_channels(node) is not None))
    ]
    del graph.node[:]
    graph.node.extend(kept)
    outputs = dict.fromkeys(blocked[name].output if name in blocked else name for name in tensors)
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return blocked


def _reordered_channels(node: onnx.NodeProto) -> int | None:
    """Return the channels of what a node puts back into ONNX's order; None for any other node."""
    if node.domain != BLOCKED_DOMAIN or node.op_type != "ReorderOutput" or len(node.input) != 1:
        return None
    attributes: dict[str, int] = {attribute.name: attribute.i for attribute in node.attribute}
    if (
        set(attributes) - {"channels", "channels_last"}
        or attributes.get("channels_last")
        or "channels" not in attributes
    ):
        return None
    return attributes["channels"]
