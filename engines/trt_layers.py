"""The layers of an engine, read from what TensorRT's engine inspector says of it.

The inspector writes JSON, and TensorRT 8 to 11 do not write it alike: up to 10 a tensor's layout and type are one text
(`Format/Datatype`), from 11 on two; dynamic shapes have neither before they are set. A layer's nodes stand in its
metadata, one `[ONNX Layer: NAME]` for each; where there is none, its name tells them: joined by " + " or " || ",
wrapped in `PWN(...)` where they became one pointwise kernel. A `{ForeignNode[FIRST...LAST]}` is a region that another
compiler made into kernels of its own: which ones, and in which precision, is not told.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.errors import EngineError

_DATA_TYPES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "tf32": "fp32", "fp16": "fp16", "float16": "fp16",
    "half": "fp16", "bf16": "bf16", "bfloat16": "bf16", "fp8": "fp8", "fp4": "fp4", "int8": "int8", "uint8": "uint8",
    "int4": "int4", "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip
_DATA_TYPE = re.compile(rf"\bk?({'|'.join(sorted(_DATA_TYPES, key=len, reverse=True))})\b", re.IGNORECASE)
_ARITHMETIC = ("int4", "int8", "fp4", "fp8", "fp16", "bf16", "fp32")

# The names of tensor-core kernels hold the types of operands and result, then those of the products and their sums:
# sm80_xmma_fprop_implicit_gemm_i8f32_i8i32_f32_..., ..._f32f32_tf32f32_f32_...
_KERNEL_TYPES = {
    "i8": "int8", "f16": "fp16", "bf16": "bf16", "tf32": "fp32", "f32": "fp32", "e4m3": "fp8", "e5m2": "fp8",
}  # fmt: skip
_ONE_TYPE = r"(?:i8|i32|tf32|bf16|f16|f32|e4m3|e5m2)"
_KERNEL = re.compile(rf"_{_ONE_TYPE}{{2}}_({'|'.join(_KERNEL_TYPES)}){_ONE_TYPE}_{_ONE_TYPE}(?:_|$)")

_METADATA = re.compile(r"\[ONNX Layer: (.+?)\](?=\s*(?:[\x1e\x1f,;]|\[ONNX Layer: |$))")
_COPY = re.compile(r"^Reformatting CopyNode for (?:Input|Output) Tensor \d+ to ")
_REGION = re.compile(r"^\{ForeignNode\[(.+?)(?:\.\.\.(.+))?\]\}")
_COMPILER_SUFFIX = re.compile(r"_myl\d+_\d+$")


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of an engine, which is one kernel or a few.

    Attributes:
        name: TensorRT's name: often the nodes in it, joined by " + ".
        kind: such as "CaskConvolution", "PointWiseV2", "Reformat".
        precision: what it computes in: by the name of its kernel, else the data type of its first input; None where
            TensorRT does not tell.
        nodes: the ONNX nodes in it, Q/DQ nodes included.
        inputs: data format of each input, as TensorRT words it.
        outputs: the same of each output.
        tactic: name of the kernel, where TensorRT tells it.
        time_ms: mean time of a run; None where it was not profiled.
        region: first and last node of a region of which TensorRT tells no more; None for a layer proper.
    """

    name: str
    kind: str
    precision: str | None
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str
    time_ms: float | None = None
    region: tuple[str, str] | None = None

    @property
    def is_reformat(self) -> bool:
        """Whether it only copies data into another layout or type."""
        return self.kind.lower() == "reformat" or (self.kind.lower() != "noop" and _COPY.match(self.name) is not None)

    @property
    def is_product(self) -> bool:
        """Whether the name of its kernel says that it multiplies matrices."""
        return _KERNEL.search(self.tactic) is not None


def parse_layers(text: str, times: Mapping[str, float] | None = None) -> tuple[EngineLayer, ...]:
    """Read the engine inspector's JSON, of TensorRT 8 to 11.

    Args:
        text: what `get_engine_information` gave.
        times: mean milliseconds by layer name; layers that share a name share its time evenly.

    Raises:
        EngineError: it is not such JSON, or the engine was built without the details of its layers.
    """
    try:
        # Between the nodes of a layer stands a control character, which some releases write as it is.
        layers = list(json.loads(text, strict=False)["Layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"Cannot read what TensorRT's inspector says of the engine ({type(error).__name__}: {error}); expected "
            'JSON with a list "Layers".'
        ) from error
    if not layers or any(not isinstance(layer, Mapping) for layer in layers):
        found = "only the names of" if layers else "nothing about"
        raise EngineError(
            f"TensorRT's inspector tells {found} this engine's layers: it was not built with detailed "
            "profiling verbosity. Build it with `trt-int8 build`."
        )
    shared = Counter(_text(layer, "Name") for layer in layers)
    each = {name: time / shared[name] for name, time in (times or {}).items() if name in shared}
    return tuple(_layer(layer, each) for layer in layers)


def data_type(text: str) -> str | None:
    """Find a data type in TensorRT's words: "Thirty-two wide channel vectorized row major Int8 format" is "int8"."""
    match = _DATA_TYPE.search(text)
    return _DATA_TYPES[match[1].lower()] if match else None


def kernel_precision(tactic: str) -> str | None:
    """Read off the name of a matrix kernel what it multiplies: "..._i8f32_i8i32_f32_..." is "int8"."""
    match = _KERNEL.search(tactic)
    return _KERNEL_TYPES[match[1]] if match else None


def nodes_in_name(name: str) -> tuple[str, ...]:
    """Return the ONNX nodes that a layer's name tells: "PWN(PWN(/act/Sigmoid), /act/Mul)" is of two."""
    plain = _COMPILER_SUFFIX.sub("", _COPY.sub("", name))
    region = _REGION.match(plain)
    ends = [end for end in region.groups() if end] if region else [plain]
    parts = (part for end in ends for part in re.split(r" \+ | \|\| |, ", end))
    return tuple(dict.fromkeys(filter(None, map(_unwrapped, parts))))


def _layer(data: Mapping[str, Any], times: Mapping[str, float]) -> EngineLayer:
    name, tactic = _text(data, "Name"), _text(data, "TacticName")
    inputs, outputs = _tensors(data, "Inputs"), _tensors(data, "Outputs")
    region = _region(name)
    named = _METADATA.findall(_text(data, "Metadata"))
    return EngineLayer(
        name=name,
        kind=_text(data, "LayerType"),
        precision=data_type(_text(data, "Precision"))
        or (None if region else _precision(tactic, inputs, outputs, data.get("Weights"))),
        nodes=tuple(dict.fromkeys(named)) or nodes_in_name(name),
        inputs=tuple(map(_format, inputs)),
        outputs=tuple(map(_format, outputs)),
        tactic=tactic,
        time_ms=times.get(name),
        region=region,
    )


def _precision(
    tactic: str, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]], weights: Any
) -> str | None:
    """Take the best evidence: the kernel, what it reads, its weights (all there is before shapes are set), its output.

    Masks and indices are no precision as long as there is anything else.
    """
    held = data_type(_text(weights, "Type")) if isinstance(weights, Mapping) else None
    read = [kind for kind in map(_type, inputs) if kind]
    found = [kernel_precision(tactic), *read, held, *map(_type, outputs[:1])]
    return next((kind for kind in found if kind in _ARITHMETIC), next(iter(read), None))


def _tensors(data: Mapping[str, Any], side: str) -> list[Mapping[str, Any]]:
    return [tensor for tensor in data.get(side) or () if isinstance(tensor, Mapping)]


def _type(tensor: Mapping[str, Any]) -> str | None:
    texts = (_text(tensor, key) for key in ("DataType", "Datatype", "Format/Datatype", "Format"))
    return next((kind for kind in map(data_type, texts) if kind), None)


def _format(tensor: Mapping[str, Any]) -> str:
    """Return a tensor's layout and type in one text: TensorRT 10 writes them as one, TensorRT 11 apart."""
    joined = _text(tensor, "Format/Datatype")
    parts = (_text(tensor, key) for key in ("Format", "DataType", "Datatype"))
    return joined or " ".join(filter(None, parts))


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    return "" if value is None else str(value)


def _region(name: str) -> tuple[str, str] | None:
    match = _REGION.match(name)
    return (match[1], match[2] or match[1]) if match else None


def _unwrapped(part: str) -> str:
    """Take away the wrappers of fused pointwise nodes: a name may lack the brackets that its neighbours hold."""
    part = part.strip()
    while part.startswith("PWN("):
        part = part[len("PWN(") :]
    while part.endswith(")") and part.count(")") > part.count("("):
        part = part[:-1]
    return part
