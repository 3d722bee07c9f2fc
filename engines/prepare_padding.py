"""`auto_pad` written out: what SAME_UPPER, SAME_LOWER and VALID mean in numbers."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

OPERATORS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")


def write_pads_out(model: ir.Model) -> int:
    """Replace `auto_pad` by explicit `pads` where these do not depend on the input.

    VALID: no padding. SAME: o = ceil(i / s) outputs per axis, so p = max((o - 1) s + (k - 1) d + 1 - i, 0) zeros, the
    odd one at the end (SAME_UPPER) or at the beginning (SAME_LOWER). With a stride of 1 that is (k - 1) d for any size
    i. A ConvTranspose has o = i s, so (k - 1) d + 1 + output_padding - s are cut away, for any i. Where the size is
    known at run time only, and the stride is not 1, `auto_pad` stays; TensorRT and ONNX Runtime take it.

    Args:
        model: with shapes; edited in place, in the main graph.

    Returns:
        The number of nodes that were changed.
    """
    changed = 0
    for node in model.graph:
        if node.op_type not in OPERATORS or node.domain != "":
            continue
        mode = _text(node, "auto_pad")
        if mode not in ("VALID", "SAME_UPPER", "SAME_LOWER"):
            continue
        pads = _pads(node, mode)
        if pads is None:
            continue
        del node.attributes["auto_pad"]
        node.attributes["pads"] = ir.AttrInt64s("pads", pads)
        if mode != "VALID":
            node.attributes.pop("ceil_mode", None)  # it has no say in the number of outputs there
        changed += 1
    return changed


def _pads(node: ir.Node, mode: str) -> list[int] | None:
    kernel = _kernel(node)
    if kernel is None:
        return None
    axes = len(kernel)
    if mode == "VALID":
        return [0] * (2 * axes)
    strides, dilations = (_numbers(node, name) or [1] * axes for name in ("strides", "dilations"))
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    totals: list[int] = []
    if node.op_type == "ConvTranspose":
        if "output_shape" in node.attributes:
            return None
        extra = _numbers(node, "output_padding") or [0] * axes
        totals = [r + more - stride for r, more, stride in zip(reach, extra, strides, strict=True)]
        if min(totals) < 0:
            return None
    else:
        for size, r, stride in zip(_sizes(node, axes), reach, strides, strict=True):
            if stride == 1:
                totals.append(r - 1)
            elif size is None:
                return None
            else:
                totals.append(max((-(-size // stride) - 1) * stride + r - size, 0))
    low = [total // 2 if mode == "SAME_UPPER" else total - total // 2 for total in totals]
    return [*low, *(total - begin for total, begin in zip(totals, low, strict=True))]


def _kernel(node: ir.Node) -> Sequence[int] | None:
    given = _numbers(node, "kernel_shape")
    if given is not None:
        return given
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    shape = weight.shape if weight is not None else None
    sizes = [] if shape is None else [size for size in shape[2:] if isinstance(size, int)]
    return sizes if shape is not None and len(sizes) == len(shape) - 2 else None


def _sizes(node: ir.Node, axes: int) -> list[int | None]:
    value = node.inputs[0]
    shape = value.shape if value is not None else None
    if shape is None:
        return [None] * axes
    return [size if isinstance(size, int) else None for size in shape[2:]]


def _numbers(node: ir.Node, name: str) -> Sequence[int] | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else attribute.as_ints()


def _text(node: ir.Node, name: str) -> str | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else attribute.as_string()
