"""Rules about operators and opsets that TensorRT's parser does not take."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from engines.lint_graph import LintGraph
from engines.lint_rules import SYMMETRIC, Hit, Rule
from engines.opset import STANDARD_DOMAINS

FIRST_OPSET = 9
LAST_OPSET = {10: 24, 11: 25}
"""Newest opset that each release's documentation names."""

_PARSER = "onnx-tensorrt, operators.md of release 10.15"

_INTEGER = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"})

_INTEGER_CONTRIB = re.compile(
    r"QLinear\w+|QGemm|QMoE|QAttention|QOrdered\w+|\w*MatMulInteger\w*|DynamicQuantize\w+|QEmbed\w+|"
    r"MatMul(NBits|BnB4|FpQ4)|(Quantize|Dequantize)(Linear|BFP)|(Quantize|Dequantize)WithOrder|GatherBlockQuantized"
)

_FAKE_QUANT = re.compile(
    r"fake_?quant\w*|fixed_?per_?(tensor|channel)_?affine|learnable_?per_?(tensor|channel)_?affine|bipolarquant|"
    r"(int|float)?quant(izer)?|trunc",
    re.IGNORECASE,
)
"""FakeQuantize (OpenVINO), FakeQuantWithMinMaxVars (TensorFlow), fake_quantize_* (PyTorch's ATen), Quant, IntQuant,
BipolarQuant and Trunc (QONNX), FixedPerTensorAffine and LearnablePerTensorAffine (training frameworks)."""

_UNKNOWN_TO_PARSER = frozenset((
    "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "DFT", "Det", "ImageDecoder", "MaxRoiPool",
    "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional",
    "OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "SequenceAt", "SequenceConstruct",
    "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
    "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit",
    "TfIdfVectorizer", "Unique",
))  # fmt: skip


def integer_operators(graph: LintGraph) -> Iterator[Hit]:
    """Find operators that compute on integers themselves."""
    for node in graph.nodes:
        if node.domain in STANDARD_DOMAINS:
            if node.op_type in _INTEGER:
                yield Hit(node, node.op_type)
        elif node.domain.startswith("com.microsoft") and _INTEGER_CONTRIB.fullmatch(node.op_type):
            yield Hit(node, f"{node.op_type} of {node.domain}")


def fake_quantization(graph: LintGraph) -> Iterator[Hit]:
    """Find other frameworks' fake quantization, as an operator of its own or taken apart."""
    for node in graph.nodes:
        if node.domain not in STANDARD_DOMAINS:
            if _FAKE_QUANT.fullmatch(node.op_type):
                yield Hit(node, f"{node.op_type} of {node.domain}")
        elif _FAKE_QUANT.fullmatch(node.op_type):
            yield Hit(node, node.op_type)
        elif node.op_type == "Round" and _clamps_codes(graph, node):
            yield Hit(node, "quantization taken apart: Round, Clip and Mul", "warning")


def other_domains(graph: LintGraph) -> Iterator[Hit]:
    """Find operators of other domains that need a plugin."""
    for node in graph.nodes:
        if node.domain in STANDARD_DOMAINS or _FAKE_QUANT.fullmatch(node.op_type):
            continue
        if not (node.domain.startswith("com.microsoft") and _INTEGER_CONTRIB.fullmatch(node.op_type)):
            yield Hit(node, f"{node.op_type} of {node.domain}")


def unknown_operators(graph: LintGraph) -> Iterator[Hit]:
    """Find standard operators that the parser does not take."""
    for node in graph.nodes:
        if node.domain in STANDARD_DOMAINS and node.op_type in _UNKNOWN_TO_PARSER:
            yield Hit(node, node.op_type)


def old_opset(graph: LintGraph) -> Iterator[Hit]:
    """Find an opset older than the parser's first."""
    if graph.opset < FIRST_OPSET:
        yield Hit(None, f"opset {graph.opset}; TensorRT's parser documents {FIRST_OPSET} and above")


def new_opset(graph: LintGraph) -> Iterator[Hit]:
    """Find an opset newer than the parser's last."""
    if graph.opset > LAST_OPSET[11]:
        yield Hit(None, f"opset {graph.opset}; TensorRT 11 documents opsets up to {LAST_OPSET[11]}")
    elif graph.opset > LAST_OPSET[10]:
        what = f"opset {graph.opset}; TensorRT 10 documents opsets up to {LAST_OPSET[10]}"
        yield Hit(None, what, releases=(10,))


def nothing_quantized(graph: LintGraph) -> Iterator[Hit]:
    """Find models without any Q or DQ."""
    found = any(True for _ in integer_operators(graph)) or any(True for _ in fake_quantization(graph))
    if not graph.quantizers and not found:
        yield Hit(None, "no QuantizeLinear and no DequantizeLinear")


def _clamps_codes(graph: LintGraph, node: ir.Node) -> bool:
    """Tell whether a Round leads to a Clip at the ends of 8 bits and a Mul, with casts and zero points between."""
    return any(
        _is_clip_to_codes(graph, clip) and any(last.op_type == "Mul" for last in _behind(clip))
        for clip in _behind(node)
    )


def _behind(node: ir.Node) -> list[ir.Node]:
    """Return the nodes that read a node, directly or across at most two of Cast, Add and Sub."""
    found: list[ir.Node] = []
    current = [node]
    for _ in range(3):
        readers = [use.node for before in current for value in before.outputs for use in value.uses()]
        found.extend(reader for reader in readers if reader.op_type in ("Clip", "Min", "Max", "Mul"))
        current = [reader for reader in readers if reader.op_type in ("Cast", "Add", "Sub")]
    return found


def _is_clip_to_codes(graph: LintGraph, node: ir.Node) -> bool:
    if node.op_type not in ("Clip", "Min", "Max"):
        return False
    bounds = [graph.array(value) for value in node.inputs if value in graph.constants]
    stated = [node.attributes[name].as_float() for name in ("min", "max") if name in node.attributes]
    found = {float(bound.reshape(-1)[0]) for bound in bounds if bound is not None and bound.size == 1}
    return bool({*found, *stated} & {127.0, 255.0, -128.0, -127.0})


OPERATOR_RULES = (
    Rule(
        "integer-operator",
        "error",
        "TensorRT's parser takes quantization as Q/DQ around float operators, and refuses operators on integers.",
        "quantize the float model again in Q/DQ form (`trt-int8 quantize`; ONNX Runtime: quant_format=QDQ).",
        _PARSER,
        integer_operators,
    ),
    Rule(
        "fake-quant-operator",
        "error",
        "TensorRT does not know it: the build fails, or the layers run in float.",
        f"export as QuantizeLinear and DequantizeLinear, or {SYMMETRIC} from the float model.",
        _PARSER,
        fake_quantization,
    ),
    Rule(
        "foreign-operator",
        "warning",
        "an operator outside of ONNX needs a TensorRT plugin of that name, or the build fails.",
        "export with standard ONNX operators, or load the plugin.",
        _PARSER,
        other_domains,
    ),
    Rule(
        "unsupported-operator",
        "error",
        "TensorRT's parser does not take this operator; the list is that of release 10.15.",
        "replace it before the export, or cut the graph there.",
        _PARSER,
        unknown_operators,
    ),
    Rule(
        "old-opset",
        "warning",
        "operators of so old an opset may be refused or read otherwise.",
        "export again with opset 20.",
        _PARSER,
        old_opset,
    ),
    Rule(
        "new-opset",
        "note",
        "the parser may refuse operators of an opset that it does not know.",
        "export again with opset 20, if the build refuses it.",
        f"{_PARSER}; NVIDIA's guide to ONNX opsets for 11",
        new_opset,
        verified=False,
    ),
    Rule(
        "not-quantized",
        "note",
        "it runs in the types of the file: nothing is computed in INT8.",
        "`trt-int8 calibrate` and `trt-int8 quantize` make an INT8 model of it.",
        "strong typing",
        nothing_quantized,
        targets=("tensorrt", "cpu"),
    ),
)
