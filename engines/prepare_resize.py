"""Upsample, and Resize as it was before opset 11, on their way to a newer opset.

Both take x_original = x / scale (today's "asymmetric"), and the nearest value below it, or above it where an axis
shrinks, as ONNX Runtime computes them. onnx's version converter makes today's default of them, which shifts linear
interpolation by half a pixel, and gives their outputs names of its own. So they pass through it as operators of a
domain that it leaves alone, and become Resize here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import helper

from engines.errors import UnsupportedModelError

_DOMAIN = "trt_int8.old_resize"

FIRST_WITH_MODES = 11
"""The opset in which Resize got its coordinate_transformation_mode."""


def hide_old_resizes(model: onnx.ModelProto) -> int:
    """Put Upsample and Resize of an opset below 11 into a domain that onnx's version converter passes over.

    Args:
        model: edited in place.

    Returns:
        How many there are.
    """
    count = 0
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.op_type in ("Upsample", "Resize") and node.domain in ("", "ai.onnx"):
                node.domain = _DOMAIN
                count += 1
    if count:
        model.opset_import.add(domain=_DOMAIN, version=1)
    return count


def restore_old_resizes(model: onnx.ModelProto, file: Path) -> None:
    """Make today's Resize of what `hide_old_resizes` put away.

    Args:
        model: of opset 11 or above; edited in place.
        file: the model's file, for messages.

    Raises:
        UnsupportedModelError: nearest-neighbour resizing that enlarges one axis and shrinks another, which today's
            operator does not express.
    """
    constants = _constants(model)
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.domain != _DOMAIN:
                continue
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            mode = attributes.get("mode", b"nearest").decode()
            mode = "linear" if mode == "bilinear" else mode
            if "height_scale" in attributes:  # up to opset 6, images alone
                attributes["scales"] = [1, 1, attributes["height_scale"], attributes["width_scale"]]
            if "scales" in attributes:  # up to opset 8
                name = f"{node.output[0]}_scales"
                scales = np.asarray(attributes["scales"], np.float32)
                graph.initializer.append(onnx.numpy_helper.from_array(scales, name))
                constants[name] = scales
            else:
                name = node.input[1]
            modes = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
            if mode == "nearest":
                modes["nearest_mode"] = _nearest_mode(node, constants.get(name), file)
            source = node.input[0]
            del node.input[:], node.attribute[:]
            node.op_type, node.domain = "Resize", ""
            node.input.extend([source, "", name])
            node.attribute.extend(helper.make_attribute(key, value) for key, value in modes.items())
    kept = [entry for entry in model.opset_import if entry.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _nearest_mode(node: onnx.NodeProto, scales: np.ndarray | None, file: Path) -> str:
    """Scales that are computed at run time are taken to enlarge, which Upsample always does."""
    shrinks = scales is not None and bool((scales < 1).any())
    if shrinks and scales is not None and bool((scales > 1).any()):
        raise UnsupportedModelError(
            f"{str(file)!r} holds the operator {node.op_type} ({node.name or node.output[0]}) of an opset below "
            f"{FIRST_WITH_MODES}, which enlarges one axis and shrinks another by nearest neighbours (scales "
            f"{scales.tolist()}); newer opsets round all axes alike. Export it again with opset 20."
        )
    return "ceil" if shrinks else "floor"


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the float constants that could be scales, by name."""
    found: dict[str, np.ndarray] = {}
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 1 and tensor.dims[0] <= 8:
                found[tensor.name] = onnx.numpy_helper.to_array(tensor)
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return found


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
