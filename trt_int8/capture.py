"""A PyTorch model as an ONNX graph: PyTorch's exporter, with readable names, errors of one line, and no chatter."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from calibrators.protocols import Array
from engines.graph import quiet
from trt_int8.errors import ExportError
from trt_int8.input_binding import bind_to_module, bind_to_program
from trt_int8.module_names import name_after_modules

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

DynamicAxes = Mapping[str, Mapping[int, str]]
"""Input name to axis to the axis's symbol: `{"image": {0: "batch"}}`."""


@dataclass(frozen=True, slots=True)
class Captured:
    """An exported graph and the model that it has to reproduce.

    Attributes:
        proto: the graph, as PyTorch's exporter left it, but for names and metadata.
        reference: runs the PyTorch model: input name to array in, output name to array out.
    """

    proto: onnx.ModelProto
    reference: Callable[[Mapping[str, Array]], dict[str, Array]]


def capture(
    model: torch.nn.Module | ExportedProgram,
    samples: Mapping[str, Array],
    *,
    opset: int,
    dynamic: DynamicAxes,
    output_names: Sequence[str] | None = None,
) -> Captured:
    """Export a PyTorch model with sample inputs.

    The samples are bound to the parameters of `forward` by name where every name is one of them, else by position.
    Outputs take the keys of a dict; a single tensor is called "output", members of a tuple "output_0", "output_1".
    A module in training mode is exported in evaluation mode and put back.

    Args:
        model: an FP32 module on the CPU, or a program, which keeps its own dynamic axes.
        samples: input name to array.
        opset: ONNX opset.
        dynamic: axes that stay free; must be empty for a program.
        output_names: names for the outputs, in the order in which `forward` returns them.

    Raises:
        ExportError: the model does not run on the samples, or cannot be exported.
    """
    import torch

    _check_weights(model)
    run: torch.nn.Module
    if isinstance(model, torch.export.ExportedProgram):
        run, binding = model.module(), bind_to_program(model, list(samples))
    else:
        run, binding = model, bind_to_module(model, list(samples))
    parts = [] if isinstance(model, torch.export.ExportedProgram) else list(model.modules())
    inputs = list(binding.names)

    def reference(feeds: Mapping[str, Array]) -> dict[str, Array]:
        args, kwargs = binding.arguments(_tensors(feeds, inputs))
        shapes = ", ".join(f"{name} {feeds[name].dtype.name} {feeds[name].shape}" for name in inputs)
        try:
            with _evaluation(parts), torch.no_grad():
                returned = run(*args, **kwargs)
        except Exception as error:  # whatever the user's forward, or torch on its behalf, raises
            raise ExportError(
                f"The PyTorch model does not run on the sample inputs ({shapes}): {type(error).__name__}: "
                f"{_headline(error)}. Check the names, order, shapes and dtypes of the inputs."
            ) from error
        outputs = _named_outputs(returned, inputs)
        if output_names is not None and len(output_names) != len(outputs):
            raise ExportError(
                f"Cannot name the outputs {', '.join(output_names)}: the model has {len(outputs)} "
                f"({', '.join(outputs)}). Give one name each."
            )
        return dict(zip(output_names or outputs, outputs.values(), strict=True))

    names = list(reference(samples))
    args, kwargs = binding.arguments(_tensors(samples, inputs))
    axes = {name: dict(dynamic.get(name, {})) or None for name in inputs}
    try:
        with _evaluation(parts), quiet(), _muted("torch", "onnxscript"):
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=binding.by_parameter(axes) if any(axes.values()) else None,
                input_names=inputs,
                output_names=names,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps most failures in its own class, but not all
        raise ExportError(f"PyTorch cannot export the model: {_export_failure(error)}") from error
    if program is None:
        raise AssertionError("torch.onnx.export returns a program where it is given no file")
    name_after_modules(program.model)
    proto = program.model_proto
    _check_interface(proto, opset, inputs, names)
    if isinstance(model, torch.export.ExportedProgram):
        _name_batch_axis(proto)
    return Captured(proto, reference)


def _tensors(feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, torch.Tensor]:
    import torch

    # A copy: torch warns of arrays that it must not write to.
    return {name: torch.from_numpy(np.array(feeds[name])) for name in names}


def _check_weights(model: torch.nn.Module | ExportedProgram) -> None:
    """Refuse what the comparison could not feed or judge: weights that are not FP32, or not on the CPU."""
    for name, value in model.named_parameters():
        if value.device.type != "cpu":
            raise ExportError(f"Cannot export a model that lies on {value.device} ({name}). Move it with model.cpu().")
        if value.is_floating_point() and str(value.dtype) != "torch.float32":
            raise ExportError(
                f"Cannot export {name!r} of {value.dtype}: calibration starts from FP32. Convert it with model.float()."
            )


@contextmanager
def _evaluation(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put modules in evaluation mode, and each back into the mode that it was in; a program's has no modes."""
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _muted(*names: str) -> Iterator[None]:
    """Silence loggers whose handlers write to the terminal; what they would report reaches the user as an error."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def _named_outputs(outputs: object, inputs: Sequence[str]) -> dict[str, Array]:
    """Flatten what `forward` returned and name each tensor after its place in it."""
    import torch
    from torch.utils import _pytree

    named: dict[str, Array] = {}
    for path, leaf in _pytree.tree_flatten_with_path(outputs)[0]:
        if leaf is None:
            continue
        steps = re.findall(r"\w+", _pytree.keystr(path))
        name = "_".join(steps) if steps and not steps[0].isdigit() else "_".join(["output", *steps])
        if not isinstance(leaf, torch.Tensor):
            raise ExportError(
                f"Cannot export a model that returns {type(leaf).__name__} ({name}); expected tensors, or tuples, "
                "lists or dicts of them. Wrap it in a module that returns its tensors alone."
            )
        while name in named or name in inputs:
            name = f"{name}_output" if name in inputs else f"{name}_"
        try:
            named[name] = leaf.detach().numpy()
        except TypeError as error:
            raise ExportError(
                f"Cannot export a model that returns {leaf.dtype} ({name}), which has no counterpart in numpy. "
                "Return it as float32."
            ) from error
    if not named:
        raise ExportError("Cannot export a model that returns no tensor. Return its result from forward.")
    return named


def _check_interface(proto: onnx.ModelProto, opset: int, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    # The exporter only logs that it could not convert to the opset that was asked for.
    written = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise ExportError(f"PyTorch cannot write opset {opset}: it wrote {written}. Ask for opset 18 to 25.")
    for what, wanted, values in (("inputs", inputs, proto.graph.input), ("outputs", outputs, proto.graph.output)):
        found = [value.name for value in values]
        if found != list(wanted):
            raise ExportError(
                f"PyTorch exported the {what} {', '.join(found)}; expected {', '.join(wanted)}. "
                "Wrap the model in a module whose forward takes and returns these tensors alone."
            )


def _name_batch_axis(proto: onnx.ModelProto) -> None:
    """Call a program's free batch axis "batch": PyTorch keeps no name of the user's for it, it numbers it (`s77`)."""
    graph = proto.graph
    symbols = {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input if _rank(value)} - {""}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            for symbol in symbols:
                if dim.HasField("dim_param"):
                    dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _export_failure(error: Exception) -> str:
    """Say in one line why the exporter failed, and what to do."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = str(root)
    fixed = re.search(r"static shape of (\d+) for dimension inputs\['?([^'\]]+)'?\].*?\.shape\[(\d+)\]", text)
    if fixed:
        return (
            f"it fixes axis {fixed[3]} of input {fixed[2]!r} at {fixed[1]}, which was to stay free. Look for that "
            "number in forward (reshape(2, -1) instead of reshape(x.shape[0], -1), say), or export with dynamic={}."
        )
    place = re.search(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)', text)
    where = f" at {Path(place[1]).name}:{place[2]}: `{place[3].strip()}`" if place else ""
    if "data-dependent" in text:
        return (
            f"its flow depends on values that are known only at run time{where}. "
            "Write the choice with torch.where or torch.cond."
        )
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if missing:
        return f"ONNX has no counterpart of the operator {missing[1]}. Write it with other operators."
    return f"{_headline(root)}{where}. Try torch.export.export on the model alone to see the whole of it."


def _headline(error: BaseException) -> str:
    """Return the first line of an error that says something."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".")
