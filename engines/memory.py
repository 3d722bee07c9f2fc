"""How much memory the activations of a calibration pass take, from the shapes that the graph states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.helper
import onnx.shape_inference

from engines.errors import ModelError
from engines.graph import PreparedModel

_SMALL_CONSTANT = 1024
"""Elements; smaller constants stay in the graph, since shapes are computed from them (Reshape, Slice, Expand)."""


def weight_bytes(prepared: PreparedModel) -> int:
    """Return the size of the weights in memory."""
    return sum(tensor_bytes(weight.data_type, weight.dims) or 0 for weight in prepared.proto.graph.initializer)


def tensor_bytes(elem_type: int, shape: Sequence[int]) -> int | None:
    """Return the size of a tensor in memory; None for strings.

    Args:
        elem_type: ONNX's number of its dtype.
        shape: its lengths.
    """
    if elem_type == onnx.TensorProto.STRING:
        return None
    width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)).itemsize
    return width * math.prod(shape)


def activation_bytes(
    prepared: PreparedModel, tensors: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int | None]:
    """Return the size of each tensor for one batch.

    Args:
        prepared: the model.
        tensors: names of activations.
        shapes: model input to the shape that is fed.

    Returns:
        Tensor to bytes; None where the graph does not tell, as for shapes that depend on values.
    """
    found = _shapes(prepared, shapes)
    return {name: tensor_bytes(*found[name]) if name in found else None for name in tensors}


def inferred_shapes(prepared: PreparedModel, fed: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all values whose shape the graph tells.

    Args:
        prepared: the model.
        fed: model input to the shape that is fed.
    """
    return {name: tuple(shape) for name, (_, shape) in _shapes(prepared, fed).items()}


def split_tensors(sizes: Mapping[str, int | None], limit: int) -> list[list[str]]:
    """Share tensors out over the fewest passes that a simple rule finds, so that those of one pass fit a limit.

    The largest first, each into the first pass that has room for it.

    Args:
        sizes: tensor to bytes; a size that is not known counts as nothing.
        limit: bytes that the tensors of a pass may take together.

    Returns:
        The tensors of each pass, in the order of `sizes`.

    Raises:
        ModelError: one tensor alone exceeds the limit.
    """
    name, largest = max(((name, size or 0) for name, size in sizes.items()), key=lambda item: item[1])
    if largest > limit:
        raise ModelError(
            f"Cannot calibrate within {limit / 2**20:.2f} MiB of activations for a batch: {name!r} alone takes "
            f"{largest / 2**20:.2f} MiB. Allow more with --max-memory, or take a smaller batch or fewer --threads."
        )
    room: list[int] = []
    place: dict[str, int] = {}
    for name in sorted(sizes, key=lambda item: -(sizes[item] or 0)):
        size = sizes[name] or 0
        index = next((index for index, left in enumerate(room) if size <= left), len(room))
        if index == len(room):
            room.append(limit)
        room[index] -= size
        place[name] = index
    return [[name for name in sizes if place[name] == index] for index in range(len(room))]


def _shapes(prepared: PreparedModel, fed: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, list[int]]]:
    """Return type and shape of every value whose shape is known when inputs of these shapes are fed."""
    source = prepared.proto.graph
    weights = [weight for weight in source.initializer if math.prod(weight.dims) > _SMALL_CONSTANT]
    heavy = {weight.name for weight in weights}
    skeleton = onnx.helper.make_graph(
        source.node,
        "shapes",
        [_fixed(value, fed) for value in source.input]
        # Weights as inputs: inference looks at their shapes alone, and need not copy them.
        + [onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims) for weight in weights],
        source.output,
        [weight for weight in source.initializer if weight.name not in heavy],
    )
    model = onnx.helper.make_model(
        skeleton, opset_imports=prepared.proto.opset_import, ir_version=prepared.proto.ir_version
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    stated = [*source.value_info, *inferred.value_info, *inferred.output, *inferred.input]
    return {value.name: known for value in stated if (known := _known(value)) is not None}


def _fixed(value: onnx.ValueInfoProto, fed: Mapping[str, tuple[int, ...]]) -> onnx.ValueInfoProto:
    if value.name not in fed:
        return value
    return onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, fed[value.name])


def _known(value: onnx.ValueInfoProto) -> tuple[int, list[int]] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(axis.HasField("dim_value") for axis in tensor.shape.dim):
        return None
    return tensor.elem_type, [axis.dim_value for axis in tensor.shape.dim]
