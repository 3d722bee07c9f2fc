"""Which node of a graph is which layer of a TensorRT network, from the kinds and the order of the layers alone.

A network that was built without ONNX's names (through TensorRT's own API, by torch2trt or an old parser) calls its
tensors `(Unnamed Layer* N) [Kind]_output`, N being the number of the layer. Layers are added after those that they
read, so the network is one topological order of the graph, and the sequence of kinds says which. Often it is the only
one that fits; then every layer is known, and nothing was guessed. Where several orders fit, as with two convolutions
side by side, only the layers that are the same in all of them are.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from engines.graph import is_activation, name_of

MAX_STATES = 4096
"""Sets of finished nodes that are followed at a time; networks are narrow, and one that is not is given up."""

_KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "Conv": (("convolution",),),
    "ConvTranspose": (("deconvolution",),),
    "Gemm": (("fullyconnected",), ("matrixmultiply", "elementwise")),
    "MatMul": (("matrixmultiply",), ("fullyconnected",)),
    "GlobalAveragePool": (("pooling",), ("reduce",)),
    "GlobalMaxPool": (("pooling",), ("reduce",)),
    "BatchNormalization": (("scale",),),
    "LRN": (("lrn",),),
    "PRelu": (("parametricrelu",),),
    "Concat": (("concatenation",),),
    "Resize": (("resize",),),
    "Upsample": (("resize",),),
    **dict.fromkeys(("MaxPool", "AveragePool"), (("pooling",),)),
    **dict.fromkeys(("Softmax",), (("softmax",),)),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"), (("elementwise",),)),
    **dict.fromkeys(
        (
            "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "Elu", "Selu", "Softplus", "Softsign", "HardSigmoid",
            "ThresholdedRelu",
        ),
        (("activation",),),
    ),
    **dict.fromkeys(
        ("Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Sin", "Cos", "Erf", "Floor", "Ceil"), (("unary",),)
    ),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"), (("reduce",),)),
}  # fmt: skip
"""The layers that an operator becomes; several forms where builders differ. Operators that are missing move data."""

_MOVING = frozenset({"constant", "shuffle", "identity", "cast", "shape", "slice", "padding", "gather", "split"})
"""Kinds of layer that builders add and leave out as they like; they are passed over."""

_COUNTED = frozenset(kind for forms in _KINDS.values() for form in forms for kind in form)


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """One tensor of a calibration cache, in the order of the network.

    Attributes:
        name: in the cache.
        scale: its scale; layers that have equal ones need not be told apart.
        kind: of the layer as its name tells, such as "Fully Connected"; None where the tensor has a name of its own.
        tensor: the graph's tensor of that name; None where the graph has none.
    """

    name: str
    scale: float
    kind: str | None = None
    tensor: str | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    kind: str
    output: str
    after: int


def match_layers(model: ir.Model, cached: Sequence[CachedLayer]) -> tuple[dict[str, str], str]:
    """Find the tensors of a graph that unnamed layers of a cache compute.

    Args:
        model: the graph, with types.
        cached: the tensors of the cache, inputs of the network left out.

    Returns:
        Tensor of the graph to name in the cache, for those that are certain; and why there are no more, or an empty
        text.
    """
    unknown = sorted({item.kind for item in cached if item.kind and not _is_known(item.kind)})
    if unknown:
        return {}, f"it holds layers of kind {', '.join(unknown)}, which stand for no operator of ONNX"
    items = [item for item in cached if item.kind is None or _plain(item.kind) not in _MOVING]
    if not any(item.kind for item in items):
        return {}, ""
    reason = ""
    found: list[dict[str, str]] = []
    kinds = {_plain(item.kind) for item in items if item.kind}
    for layers in _forms(model, kinds):
        matched, why = _match(layers, items)
        if matched is not None:
            found.append(matched)
        reason = reason or why
    if not found:
        return {}, reason
    agreed = {tensor: name for tensor, name in found[0].items() if all(way.get(tensor) == name for way in found)}
    known = agreed.keys() | {item.tensor for item in items}
    unsure = {layer.output for layers in _forms(model, kinds) for layer in layers} - known
    return agreed, "several orders of the graph's nodes fit it" if unsure else ""


def _plain(kind: str) -> str:
    return kind.replace(" ", "").lower()


def _is_known(kind: str) -> bool:
    return _plain(kind) in _COUNTED | _MOVING


def _forms(model: ir.Model, kinds: set[str]) -> Iterator[list[_Layer]]:
    """Yield the graph as layers, once for each way in which a builder may have written its operators."""
    operators = {node.op_type for node in model.graph if node.domain == "" and node.op_type in _KINDS}
    choices = {}
    for operator in sorted(operators):
        forms = _KINDS[operator]
        choices[operator] = [form for form in forms if kinds.intersection(form)] or list(forms)
    for forms_taken in itertools.product(*choices.values()):
        yield _layers(model, dict(zip(choices, forms_taken, strict=True)))


def _layers(model: ir.Model, forms: Mapping[str, tuple[str, ...]]) -> list[_Layer]:
    layers: list[_Layer] = []
    behind: dict[str, int] = {}
    for node in model.graph:
        after = 0
        for value in node.inputs:
            after |= behind.get(value.name or "", 0) if value is not None else 0
        form = forms.get(node.op_type, ()) if node.domain == "" and is_activation(node.outputs[0]) else ()
        if form[1:] and (len(node.inputs) < 3 or node.inputs[2] is None):
            form = form[:1]  # without a bias there is nothing to add
        for kind in form:
            layers.append(_Layer(kind, name_of(node.outputs[0]), after))
            after = 1 << (len(layers) - 1)
        for output in node.outputs:
            behind[output.name or ""] = after
    return layers


def _match(layers: Sequence[_Layer], items: Sequence[CachedLayer]) -> tuple[dict[str, str] | None, str]:
    """Follow all orders of the layers that fit the items; None where there is none, with the reason."""
    counted = Counter(_plain(item.kind) for item in items if item.kind)
    present = Counter(layer.kind for layer in layers)
    named = sum(item.kind is None for item in items)
    short = [kind for kind, count in counted.items() if count > present[kind]]
    if short or len(layers) > sum(counted.values()) + named:
        kinds = short or [kind for kind in present if present[kind] > counted[kind]]
        counts = ", ".join(f"{counted[kind]} of kind {kind} where the graph has {present[kind]}" for kind in kinds)
        return None, f"the numbers of layers differ: {counts}"
    last = {layer.output: index for index, layer in enumerate(layers)}
    steps: list[dict[int, list[tuple[int | None, int]]]] = []
    states = {0}
    for item in items:
        transitions = {state: list(_moves(layers, last, item, state)) for state in states}
        steps.append(transitions)
        states = {after for moves in transitions.values() for _, after in moves}
        if len(states) > MAX_STATES:
            return None, "too many orders of the graph's nodes fit it"
    complete = (1 << len(layers)) - 1
    if complete not in states:
        return None, "no order of the graph's nodes has its layers in their order"
    return _certain(layers, last, items, steps, complete), ""


def _moves(
    layers: Sequence[_Layer], last: Mapping[str, int], item: CachedLayer, state: int
) -> Iterator[tuple[int | None, int]]:
    """Yield what an item can be after the layers of `state`: (layer, new state); None for one that only moves data."""
    kind = None if item.kind is None else _plain(item.kind)
    own = last.get(item.tensor) if item.tensor is not None else None
    if item.tensor is not None and own is None:
        yield None, state  # a tensor of the graph that no counted layer computes
        return
    if kind is None and own is None:
        yield None, state
    for index, layer in enumerate(layers):
        if state >> index & 1 or layer.after & ~state:
            continue
        if own == index if own is not None else kind in (None, layer.kind):
            yield index, state | 1 << index


def _certain(
    layers: Sequence[_Layer],
    last: Mapping[str, int],
    items: Sequence[CachedLayer],
    steps: Sequence[Mapping[int, Sequence[tuple[int | None, int]]]],
    complete: int,
) -> dict[str, str]:
    """Return the outputs whose scale is the same in every order that ends with all layers."""
    names: dict[int, dict[float, str]] = defaultdict(dict)
    unsure: set[int] = set()
    alive = {complete}
    for item, transitions in zip(reversed(items), reversed(steps), strict=True):
        before = set()
        for state, moves in transitions.items():
            for index, after in moves:
                if after not in alive:
                    continue
                before.add(state)
                if index is not None and item.kind is not None:
                    names[index].setdefault(item.scale, item.name)
                elif index is not None and item.tensor is None:
                    unsure.add(index)
        alive = before
    return {
        layer.output: next(iter(names[index].values()))
        for index, layer in enumerate(layers)
        if last[layer.output] == index and len(names[index]) == 1 and index not in unsure
    }
