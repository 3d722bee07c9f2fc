"""How named arrays reach a PyTorch model: by name where they are named as its parameters, else by position."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from calibrators.protocols import Array
from engines.runner import TensorSpec
from trt_int8.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class InputBinding:
    """The way from named inputs to the arguments of a call.

    Attributes:
        names: the inputs in the order in which the exported graph takes them.
        arguments: turns one value for each name, in that order, into positional and keyword arguments.
        by_parameter: turns one value for each name into a dict by parameter, as `torch.export` wants shapes.
    """

    names: tuple[str, ...]
    arguments: Callable[[Mapping[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
    by_parameter: Callable[[Mapping[str, Any]], dict[str, Any]]


def bind_to_module(model: torch.nn.Module, names: Sequence[str]) -> InputBinding:
    """Bind inputs to the parameters of a module's `forward`.

    Raises:
        ExportError: there are too few or too many of them, or a parameter's name stands at another one's place.
    """
    signature = inspect.signature(model.forward)
    parameters = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    by_name = set(names) <= set(parameters)
    ordered = tuple(name for name in parameters if name in names) if by_name else tuple(names)

    def bound(values: Mapping[str, Any]) -> inspect.BoundArguments:
        return signature.bind(**values) if by_name else signature.bind(*values.values())

    if not by_name:
        for name, parameter in zip(ordered, parameters, strict=False):
            if name in parameters and name != parameter:
                raise ExportError(
                    f"Cannot bind the inputs {', '.join(names)}: {name!r} would be passed as {parameter!r}. "
                    f"Name all of them as forward{signature} does, or give them in its order."
                )
    try:
        bound(dict.fromkeys(ordered))
    except TypeError as error:
        raise ExportError(
            f"Cannot bind the inputs {', '.join(names)} to the model's forward{signature}: {error}. "
            "Name the inputs after its parameters."
        ) from error

    def arguments(values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = bound(values)
        return call.args, call.kwargs

    return InputBinding(ordered, arguments, lambda values: dict(bound(values).arguments))


def bind_to_program(program: ExportedProgram, names: Sequence[str]) -> InputBinding:
    """Bind inputs to those of a program of `torch.export`.

    Raises:
        ExportError: the program takes other inputs, or constants beside them.
    """
    from torch.utils import _pytree

    wanted = tuple(spec.name for spec in program_inputs(program))
    structure = program.call_spec.in_spec
    if structure is None or structure.num_leaves != len(wanted):
        raise ExportError(
            f"Cannot feed the program: it takes constants beside its tensors {', '.join(wanted)}. "
            "Export it again with tensors alone."
        )
    by_name = set(names) == set(wanted)
    if not by_name and (len(names) != len(wanted) or set(names) & set(wanted)):
        raise ExportError(
            f"Cannot bind the inputs {', '.join(names)} to the program, which takes {', '.join(wanted)}. "
            "Name the inputs as it does, or give as many in its order."
        )

    def arguments(values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = _pytree.tree_unflatten(list(values.values()), structure)
        return tuple(args), dict(kwargs)

    return InputBinding(wanted if by_name else tuple(names), arguments, dict)


def program_samples(program: ExportedProgram) -> dict[str, Array]:
    """Return the inputs that a program was made with, by name; empty where it does not keep them."""
    from torch.utils import _pytree

    leaves = _pytree.tree_leaves(program.example_inputs)
    names = [spec.name for spec in program_inputs(program)]
    if len(leaves) != len(names):
        return {}
    return {name: leaf.detach().numpy() for name, leaf in zip(names, leaves, strict=True)}


def program_inputs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """Return what a program of `torch.export` takes, so that data can be opened for it; free axes are None."""
    import torch

    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for name in program.graph_signature.user_inputs:
        value = values.get(str(name))
        if isinstance(value, torch.Tensor):
            axes: Sequence[object] = value.shape  # a free axis has a symbol for its length
            shape = tuple(axis if isinstance(axis, int) else None for axis in axes)
            specs.append(TensorSpec(str(name), torch.empty(0, dtype=value.dtype).numpy().dtype, shape))
    return tuple(specs)
