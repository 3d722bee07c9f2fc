"""`trt-int8 cache import`: a calibration cache of TensorRT 10 and older becomes a Q/DQ model.

TensorRT 11 builds Q/DQ models, and reads no calibration cache. The scales in a cache are as good as ever, though: a
Q/DQ model says with them what the implicit path did, and says it in the file. Nothing is guessed on the way: a tensor
whose scale is not in the cache for certain is named, and the import is refused, or the nodes that need it stay float.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import onnx.shape_inference
import onnx_ir as ir

from calibrators.errors import CalibrationError
from calibrators.numerics import LEVELS
from calibrators.tensorrt_cache import TensorRTCache, release_of, why_unusable
from engines.graph import PreparedModel, prepare, quiet
from engines.onnxrt import load_header
from engines.placement import Placement
from engines.placement_options import Attention, PlacementOptions, Residual
from engines.placement_tensorrt import place_for_tensorrt
from engines.tensorrt_names import FoundTensor, MissingTensor, contradictions, find_tensors, is_tensorrts_own
from trt_int8.cache_import_result import ImportResult
from trt_int8.choices import check_choice
from trt_int8.errors import ConfigError, UsageError
from trt_int8.float_models import check_float
from trt_int8.idle_options import idle_wishes
from trt_int8.outputs import check_output
from trt_int8.placement_options import placement_entry, placement_options
from trt_int8.quantization import write_quantized
from trt_int8.quantize_result import CALIBRATION_KEY, METHOD_KEY, Int8Precision

_LISTED = 10
"""Names that a one-line message holds."""


def import_cache(
    cache: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    residual: Residual = "int8",
    attention: Attention = "float",
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    precision: Int8Precision = "int8",
    allow_missing: bool = False,
    renamed: Mapping[str, str] | None = None,
) -> ImportResult:
    """Write a Q/DQ model with the scales of a TensorRT calibration cache.

    Args:
        cache: the cache, of any TensorRT that writes one (7 to 10).
        model: the FP32 ONNX file; the one that the cache was made from, or another export of the same model.
        output: the file to write.
        residual: whether the skip input of residual Adds is quantized.
        attention: whether the operands of attention products are quantized, where the rules allow it.
        exclude: regular expressions; weighted nodes whose whole name matches stay float.
        include: the same for nodes to quantize against a rule about speed or accuracy; see `engines.node_rules`.
        precision: "int8" leaves the other layers in FP32, "int8+fp16" in FP16.
        allow_missing: leave the nodes float whose scales the cache lacks, instead of refusing.
        renamed: name in the cache to name in the graph, where no rule of `engines.tensorrt_names` finds a tensor.

    Raises:
        CacheFormatError: `cache` is no TensorRT calibration cache, but a file of the kind named.
        CalibrationError: it lacks scales, holds unusable ones, or is of another model.
        ConfigError: `renamed` names what is not there; `output` is read as well.
        ModelError: the model is quantized already, or an expression of `exclude` or `include` matches nothing.
    """
    options = placement_options(residual, attention, exclude, include)
    check_choice("precision", precision, Int8Precision)
    check_output(output, cache, model)
    check_float(model, "quantize")
    content = TensorRTCache.load(cache)
    prepared = prepare(model)
    lookup = _Lookup(content, prepared.ir(), _original(prepared), dict(renamed or {}))
    lookup.check_renamed()
    graph = prepared.ir()
    placement = place_for_tensorrt(graph, options)
    idle = idle_wishes(options, placement, partial(place_for_tensorrt, graph))
    wanted = placement.tensors
    found, missing = lookup.find(wanted)
    _check(f"Cannot import {os.fspath(cache)!r} for {os.fspath(model)!r}", lookup, found, missing, allow_missing)
    if missing:
        placement, found = _without(prepared, lookup, found, options)
    if not placement.weights:
        raise CalibrationError(
            f"Cannot import {os.fspath(cache)!r} for {os.fspath(model)!r}: no node would be left to quantize. Check "
            "that the cache belongs to the model, or calibrate it with `trt-int8 calibrate`."
        )
    scales = {item.tensor: content.scales[item.cached] for item in found}
    quantized, held = write_quantized(
        prepared,
        placement,
        scales,
        _thresholds(content, scales),
        output,
        precision=precision,
        reduce_range=False,
        metadata={
            METHOD_KEY: f"{content.algorithm} of TensorRT {release_of(content.version)}",
            CALIBRATION_KEY: hashlib.sha256(content.to_bytes()).hexdigest(),
            **placement_entry(options),
        },
    )
    used = {item.cached for item in found}
    return ImportResult(
        path=Path(output),
        precision=precision,
        release=release_of(content.version),
        algorithm=content.algorithm,
        placement=placement,
        scales=quantized.scales,
        wanted=len(wanted),
        found=tuple(item for item in found if item.tensor in wanted),
        missing=tuple(missing),
        absent=lookup.absent(found),
        own=sum(is_tensorrts_own(name) and name not in used for name in content.scales),
        held=held,
        notes=(*_notes(lookup, precision), *idle),
    )


def parse_renamed(words: Sequence[str]) -> dict[str, str]:
    """Read `--rename CACHE=GRAPH`, split at the last "="; names of tensors in a cache may hold one.

    Raises:
        UsageError: there is no "=", or nothing on one side of it.
    """
    renamed: dict[str, str] = {}
    for word in words:
        name, _, tensor = word.rpartition("=")
        if not name or not tensor:
            raise UsageError(f"--rename is {word!r}; expected CACHE=GRAPH: the name in the cache, and in the graph.")
        renamed[name] = tensor
    return renamed


def _original(prepared: PreparedModel) -> ir.Model:
    """Return the file as it is, with types; its weights may be missing."""
    header = load_header(prepared.path)
    with quiet():
        try:
            header = onnx.shape_inference.infer_shapes(header)
        except Exception:  # of a file that the preparation has taken; without types it tells less, and nothing wrong
            return prepared.ir()
    return ir.from_proto(header)


@dataclass(frozen=True, slots=True)
class _Lookup:
    """A cache, and the graph whose tensors are looked up in it.

    Attributes:
        cache: the cache.
        graph: the prepared graph.
        original: the file before its preparation.
        renamed: name in the cache to name in the graph.
    """

    cache: TensorRTCache
    graph: ir.Model
    original: ir.Model
    renamed: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        """All tensors that the file names, those included that its preparation removes."""
        return _names(self.graph) | _names(self.original)

    def find(self, tensors: Sequence[str]) -> tuple[list[FoundTensor], list[MissingTensor]]:
        """Find tensors; one whose scale cannot be used is missing."""
        found, missing = find_tensors(tensors, self.cache.scales, self.graph, self.original, self.renamed)
        reasons = {item: why_unusable(self.cache.scales[item.cached]) for item in found}
        missing += [
            MissingTensor(item.tensor, f"its scale in the cache, of {item.cached!r}, is {reason}")
            for item, reason in reasons.items()
            if reason
        ]
        return [item for item in found if not reasons[item]], missing

    def absent(self, found: Sequence[FoundTensor]) -> tuple[str, ...]:
        """Return the names in the cache that stand for no tensor of the graph, and that TensorRT did not make up."""
        known = self.names | {item.cached for item in found} | self.renamed.keys()
        return tuple(name for name in self.cache.scales if name not in known and not is_tensorrts_own(name))

    def check_renamed(self) -> None:
        """Check that what the user renames is there, on both sides."""
        tensors = _names(self.graph)
        for name, tensor in self.renamed.items():
            if name not in self.cache.scales:
                raise ConfigError(
                    f"Cannot rename {name!r}: the cache holds {len(self.cache.scales)} other names "
                    f"({_listed(list(self.cache.scales))}). `trt-int8 cache show` lists them."
                )
            if tensor not in tensors:
                raise ConfigError(
                    f"Cannot rename {name!r} to {tensor!r}: the prepared graph has no such tensor. Name the output of "
                    "a node or an input."
                )


def _names(model: ir.Model) -> set[str]:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {value.name for value in values if value.name}


def _check(
    what: str, lookup: _Lookup, found: Sequence[FoundTensor], missing: Sequence[MissingTensor], allow_missing: bool
) -> None:
    """Refuse a cache of another model; without `allow_missing` also one that lacks scales or holds unusable ones."""
    cache, wanted = lookup.cache, len(found) + len(missing)
    unusable = [name for name in cache.unusable if name in lookup.names | lookup.renamed.keys()]
    if missing and not found and not unusable:
        names = _listed([item.tensor for item in missing], limit=3)
        raise CalibrationError(
            f"{what}: none of the {wanted} tensors that Q/DQ needs ({names}) is among its {len(cache.scales)} "
            f"({_listed(list(cache.scales), limit=3)}); expected a cache of this model. Give the ONNX file that it was "
            "made from, or name the tensors with --rename."
        )
    if allow_missing:
        return
    if unusable:
        shown = [f"{name} is {why_unusable(cache.scales[name])}" for name in unusable]
        raise CalibrationError(
            f"{what}: {len(unusable)} of its scales cannot be used: {_listed(shown, quote=False)}; expected finite "
            "numbers above zero. Calibrate again with `trt-int8 calibrate`, or leave what needs them float with "
            "--allow-missing."
        )
    if missing:
        absent = lookup.absent(found)
        lacks = f" It holds {len(absent)} names that the graph lacks: {_listed(absent)}." if absent else ""
        shown = [f"{item.tensor!r} ({item.reason})" for item in missing]
        raise CalibrationError(
            f"{what}: it lacks the scales of {len(missing)} of the {wanted} tensors that Q/DQ needs: "
            f"{_listed(shown, quote=False)}.{lacks} Name them with --rename CACHE=GRAPH, leave the nodes that read "
            "them float with --allow-missing, which lists all names, or calibrate the model."
        )


def _without(
    prepared: PreparedModel, lookup: _Lookup, found: Sequence[FoundTensor], options: PlacementOptions
) -> tuple[Placement, list[FoundTensor]]:
    """Plan again without the nodes whose data input has no scale.

    Leaving a node float may change what its neighbours need, so it is repeated until nothing more is missing. A skip
    input without a scale is left alone.

    Returns:
        The plan, and the tensors that it takes scales from.
    """
    graph = prepared.ir()
    known = {item.tensor: item for item in found}
    lacking: dict[str, str] = {}
    while True:
        excluded = [*options.exclude, *map(re.escape, lacking)]
        placement = place_for_tensorrt(graph, dataclasses.replace(options, exclude=excluded))
        more, _ = lookup.find([tensor for tensor in placement.tensors if tensor not in known])
        known |= {item.tensor: item for item in more}
        new = {weight.node: weight.data_scale_of for weight in placement.weights if weight.data_scale_of not in known}
        products = {decision.node for decision in placement.decisions if decision.rule == "attention"}
        for point in placement.activations:
            if point.amax is None and point.scale_of not in known:
                new |= {node: point.scale_of for node, _ in point.uses or () if node in products}
        if not new:
            break
        lacking |= new
    decisions = tuple(
        dataclasses.replace(
            decision, rule="no-scale", reason=f"the cache has no scale for its input {lacking[decision.node]!r}"
        )
        if decision.node in lacking
        else decision
        for decision in placement.decisions
    )
    points = tuple(point for point in placement.activations if point.amax is not None or point.scale_of in known)
    return dataclasses.replace(placement, activations=points, decisions=decisions), list(known.values())


def _thresholds(cache: TensorRTCache, scales: Mapping[str, float]) -> dict[str, float]:
    usable = {name: scale for name, scale in cache.scales.items() if not why_unusable(scale)}
    return {name: scale * LEVELS for name, scale in {**usable, **scales}.items()}


def _notes(lookup: _Lookup, precision: Int8Precision) -> tuple[str, ...]:
    notes: list[str] = []
    against = contradictions(lookup.cache.scales, lookup.original)
    if against:
        notes.append(
            f"warning: {len(against)} tensors do not fit the graph, such as {against[0]!r}: they come before what they "
            "are computed from, or differ from what they repeat. Perhaps the cache is of another export, whose "
            "numbered names mean other tensors; compare the model's accuracy before it is used."
        )
    idle = [name for name in lookup.cache.unusable if name not in lookup.names]
    if idle:
        notes.append(f"{len(idle)} scales are zero or not finite, of tensors that the graph has not: {_listed(idle)}")
    if precision == "int8+fp16":
        notes.append(
            "FP16's range was judged by the cache's thresholds; values beyond them, which the calibrator clipped, are "
            "not in it. A calibration (`trt-int8 calibrate`) knows them."
        )
    return tuple(notes)


def _listed(names: Sequence[str], *, quote: bool = True, limit: int = _LISTED) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) if quote else name for name in names[:limit]) + more
