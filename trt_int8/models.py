"""A PyTorch model of the user's, loaded: an entry point with its weights, or a saved program.

Only data is read from checkpoints: safetensors, or `torch.load(weights_only=True)`. A pickle that wants to import
anything else could run any code, so it is refused with the class it asked for.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrators.errors import FileAccessError
from trt_int8.entry_points import import_entry_point, split_entry_point
from trt_int8.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before the names of the module that they wrap."""

NAMES_SHOWN = 5
"""Names that a message lists before it goes on to count."""


def load_model(
    source: str,
    *,
    arguments: Mapping[str, object] | None = None,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    strip_prefix: str | None = None,
) -> torch.nn.Module | ExportedProgram:
    """Load a model that is ready for inference: on the CPU, in evaluation mode, with its weights.

    What the user's own code raises while it is imported or called passes through unchanged, with its traceback.

    Args:
        source: `package.module:factory` or `path/to/file.py:factory`, where the factory is a function or class that
            returns a `torch.nn.Module`, or is such a module itself; or a `.pt2` file written by `torch.export.save`.
            The current directory is importable.
        arguments: keyword arguments for the factory.
        checkpoint: weights for the module: a `.safetensors` file or one written by `torch.save`. None keeps the
            weights that the factory gave it.
        checkpoint_key: where the weights lie in a checkpoint that holds more than them, such as "state_dict". None
            looks for the one entry that is a dict of tensors.
        strip_prefix: take only the weights whose names start with this prefix, and drop the prefix. The prefixes of
            DataParallel (`module.`) and torch.compile (`_orig_mod.`) need not be named.

    Returns:
        The module, or the program of a `.pt2` file.

    Raises:
        ConfigError: there is no such module, or it has no such name.
        FileAccessError: a file is missing or unreadable.
        ExportError: the arguments do not fit the factory, it returned something else, or the checkpoint does not fit
            the model; the first few names are given.
    """
    if source.lower().endswith(".pt2"):
        if arguments or checkpoint or checkpoint_key or strip_prefix:
            raise ExportError(
                f"Cannot load {source!r} with arguments or a checkpoint: a .pt2 program holds its graph and "
                "its weights. Leave them out, or name the factory as package.module:factory."
            )
        return _load_program(Path(source))
    if split_entry_point(source) is None:
        raise ExportError(
            f"Cannot load the model {source!r}: it is neither package.module:factory, nor path/to/file.py:factory, "
            "nor a .pt2 file. An .onnx file needs no loading: pass it to export_onnx as it is."
        )
    if checkpoint is None and (checkpoint_key or strip_prefix):
        raise ExportError(
            f"Cannot load the model {source!r}: a key or prefix of a checkpoint is given, but no checkpoint. "
            "Name the file, or leave them out."
        )
    if checkpoint is not None and not checkpoint.is_file():
        raise FileAccessError(f"Cannot read the checkpoint: there is no file {str(checkpoint)!r}.")
    model = _made(import_entry_point(source, "the model"), source, dict(arguments or {}))
    if checkpoint is not None:
        weights = _weights_in(_read_checkpoint(checkpoint), checkpoint, checkpoint_key)
        _load_weights(model, _without_prefixes(weights, model, checkpoint, strip_prefix), checkpoint)
    return model.eval()


def _made(factory: Any, source: str, arguments: dict[str, object]) -> torch.nn.Module:
    import torch

    if isinstance(factory, torch.nn.Module):
        if arguments:
            raise ExportError(
                f"Cannot pass {_listed(arguments)} to {source!r}: it is a module already, not a factory. "
                "Leave the arguments out, or name the function or class that makes it."
            )
        return factory
    if not callable(factory):
        raise ExportError(
            f"Cannot make a model from {source!r}: it is of type {type(factory).__name__}. "
            "Name a function or class that returns a torch.nn.Module."
        )
    _check_arguments(factory, source, arguments)
    model = factory(**arguments)
    if not isinstance(model, torch.nn.Module):
        raise ExportError(
            f"Cannot use what {source!r} returned: it is of type {type(model).__name__}; expected a torch.nn.Module."
        )
    return model


def _check_arguments(factory: Callable[..., object], source: str, arguments: dict[str, object]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # factories written in C may carry no signature; the call itself will tell
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = signature.replace(return_annotation=inspect.Signature.empty)
        raise ExportError(
            f"Cannot call {source!r}: {error}. It takes {takes}; given were {_listed(arguments)}."
        ) from error


def _load_program(file: Path) -> ExportedProgram:
    if not file.is_file():
        raise FileAccessError(f"Cannot read the model: there is no file {str(file)!r}.")
    import torch

    try:
        return torch.export.load(file)
    except Exception as error:  # zip, pickle and torch's own schema each raise classes of their own
        raise ExportError(
            f"Cannot load {str(file)!r} as a PyTorch program: {_first_line(error)}. "
            "Write it with torch.export.save(torch.export.export(model, inputs), file), in this or an older PyTorch."
        ) from error


def _read_checkpoint(file: Path) -> object:
    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file, device="cpu")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, safetensors and torch each raise classes of their own
        wanted = re.search(r"(?:Unsupported|Trying to load unsupported) (?:global: )?GLOBAL (\S+)", str(error))
        if wanted is not None:
            raise ExportError(
                f"Refused to read the checkpoint {str(file)!r}: its pickle wants to import {wanted[1]}, and so could "
                "run any code. Where the file is trusted, save its weights alone, as safetensors or by "
                "torch.save(model.state_dict(), file)."
            ) from error
        raise ExportError(
            f"Cannot read the checkpoint {str(file)!r}: {_first_line(error)}. "
            "Expected a .safetensors file, or one that torch.save wrote."
        ) from error


def _weights_in(content: object, file: Path, key: str | None) -> Mapping[str, torch.Tensor]:
    """Find the dict of tensors in what a checkpoint holds."""
    if not isinstance(content, Mapping):
        raise ExportError(
            f"Cannot use the checkpoint {str(file)!r}: it holds {type(content).__name__}; expected a state_dict, "
            "that is a dict of tensors. Save it with torch.save(model.state_dict(), file)."
        )
    entries = [str(name) for name, value in content.items() if _is_state_dict(value)]
    if key:
        if key not in entries:
            held = _listed(entries) if entries else "none"
            raise ExportError(
                f"Cannot take the weights from {key!r} of {str(file)!r}: "
                f"{'that entry is no dict of tensors' if key in content else 'there is no such entry'}. "
                f"Entries that hold weights: {held}."
            )
        weights: Mapping[str, torch.Tensor] = content[key]
        return weights
    if _is_state_dict(content):
        return content
    if len(entries) != 1:
        held = f"weights under {_listed(entries)}" if entries else f"no weights, only {_listed(content) or 'nothing'}"
        raise ExportError(
            f"Cannot tell which weights of {str(file)!r} to take: it holds {held}. "
            + ("Choose with checkpoint_key." if entries else "Save it with torch.save(model.state_dict(), file).")
        )
    found: Mapping[str, torch.Tensor] = content[entries[0]]
    return found


def _is_state_dict(value: object) -> bool:
    import torch

    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, torch.Tensor) for item in value.values())


def _without_prefixes(
    weights: Mapping[str, torch.Tensor], model: torch.nn.Module, file: Path, prefix: str | None
) -> dict[str, torch.Tensor]:
    if prefix:
        dotted = prefix.removesuffix(".") + "."
        found = {name.removeprefix(dotted): value for name, value in weights.items() if name.startswith(dotted)}
        if not found:
            raise ExportError(
                f"Cannot strip {dotted!r} from the weights of {str(file)!r}: no name starts with it. "
                f"Its names are {_listed(weights)}."
            )
        return found
    names = dict(weights)
    own = model.state_dict()
    stripping = True
    while stripping:
        stripping = False
        for wrapper in WRAPPER_PREFIXES:
            # A model that calls a part of itself `module` keeps that name.
            if all(name.startswith(wrapper) for name in names) and not any(name.startswith(wrapper) for name in own):
                names = {name.removeprefix(wrapper): value for name, value in names.items()}
                stripping = True
    return names


def _load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], file: Path) -> None:
    try:
        result = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        own = model.state_dict()
        misfits = [
            f"{name} is {tuple(value.shape)} where the model has {tuple(own[name].shape)}"
            for name, value in weights.items()
            if name in own and own[name].shape != value.shape
        ]
        raise ExportError(
            f"The checkpoint {str(file)!r} does not fit the model: {_listed(misfits, '; ') or _first_line(error)}. "
            "Check the arguments of the model."
        ) from error
    faults = [
        f"it lacks {len(names)} of the model's tensors ({_listed(names)})"
        if what == "missing"
        else f"the model has no place for {len(names)} of its tensors ({_listed(names)})"
        for what, names in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys))
        if names
    ]
    if faults:
        raise ExportError(
            f"The checkpoint {str(file)!r} does not fit the model: {' and '.join(faults)}. "
            "Check the arguments of the model, checkpoint_key and strip_prefix."
        )


def _listed(names: Mapping[Any, Any] | Sequence[str], separator: str = ", ") -> str:
    texts = [str(name) for name in names]
    rest = len(texts) - NAMES_SHOWN
    shown = separator.join(texts[:NAMES_SHOWN])
    return f"{shown}{separator}and {rest} more" if rest > 0 else shown


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".")
