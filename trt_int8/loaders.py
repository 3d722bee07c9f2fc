"""Data that come in ready batches: folders with a file per batch, Polygraphy's inputs, and code of the user's own.

Nothing is split or joined here, and no more than one batch is held at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engines.runner import TensorSpec
from trt_int8.entry_points import import_entry_point, import_file
from trt_int8.errors import ConfigError, DataError, FileAccessError
from trt_int8.feeds import describe
from trt_int8.streams import BatchStream, DataOptions, RawBatch, hash_files, unreadable

Arrays = Mapping[str, Any]
Inputs = Sequence[TensorSpec]


# --- files -----------------------------------------------------------------------------------------------------------


def batch_folder(folder: Path, files: Sequence[Path], options: DataOptions) -> BatchStream:
    """Stream `files` of a folder, one batch each: `.npz`, `.npy` (models of one input) or Polygraphy's `.json`."""
    chosen = files[: options.max_batches]

    def read() -> Iterator[RawBatch]:
        for file in chosen:
            yield RawBatch(repr(str(file)), _READERS[file.suffix.lower()](file, options.inputs))

    return BatchStream(
        description=f"{folder} ({len(chosen)} batch files)",
        read=read,
        batches=len(chosen),
        hash_files=lambda: hash_files(chosen),
        threadable=True,
    )


def polygraphy_json(file: Path, options: DataOptions) -> BatchStream:
    """Stream the inputs that Polygraphy saved with `--save-inputs` into one file: a list with a dict per batch.

    Such a file can only be decoded as a whole. A folder with a file per batch is streamed.
    """
    batches = _load_polygraphy(file)[: options.max_batches]

    def read() -> Iterator[RawBatch]:
        for index, arrays in enumerate(batches):
            yield RawBatch(f"batch {index} of {str(file)!r}", arrays)

    return BatchStream(description=str(file), read=read, batches=len(batches), hash_files=lambda: hash_files([file]))


def _read_npz(file: Path, inputs: Inputs) -> Arrays:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise unreadable(file, "an .npz file of plain arrays", error) from error


def _read_npy(file: Path, inputs: Inputs) -> Arrays:
    if len(inputs) != 1:
        raise DataError(
            f"Cannot use {str(file)!r}: an .npy file holds one array, and the model takes {describe(inputs)}. "
            "Save each batch as .npz, one array per input."
        )
    try:
        return {inputs[0].name: np.load(file, allow_pickle=False)}
    except Exception as error:  # numpy raises ValueError, EOFError or OSError, depending on where the file ends
        raise unreadable(file, "an .npy file of a plain array", error) from error


def _read_json(file: Path, inputs: Inputs) -> Arrays:
    batches = _load_polygraphy(file)
    if len(batches) != 1:
        raise DataError(
            f"Cannot use {str(file)!r}: it holds {len(batches)} batches, and each file of a folder is one batch. "
            "Name that file itself as the data."
        )
    return batches[0]


_READERS: dict[str, Callable[[Path, Inputs], Arrays]] = {".npz": _read_npz, ".npy": _read_npy, ".json": _read_json}

BATCH_SUFFIXES = frozenset(_READERS)
"""Suffixes of files that hold one batch each when they lie in a folder."""


def _load_polygraphy(file: Path) -> list[Arrays]:
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json

    expected = "a file of inputs that Polygraphy saved with --save-inputs"
    try:
        content = load_json(str(file))
    except OSError as error:
        raise FileAccessError(f"Cannot read the data {str(file)!r}: {error.strerror or error}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, PolygraphyException) as error:
        raise unreadable(file, expected, error) from error
    batches = content if isinstance(content, list) else [content]
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise unreadable(file, expected, TypeError(f"it holds a {type(batch).__name__}"))
    return batches


# --- code of the user's own ------------------------------------------------------------------------------------------


def entry_point(spec: str, options: DataOptions) -> BatchStream:
    """Stream what `package.module:callable` or `file.py:callable` returns; it is called anew for every pass."""
    return _called(import_entry_point(spec, "the data"), spec, options)


def loader_script(file: Path, options: DataOptions) -> BatchStream:
    """Stream what `load_data()` of Polygraphy's data-loader script yields."""
    module = import_file(file, "the data")
    if not hasattr(module, "load_data"):
        raise ConfigError(
            f"Cannot use {str(file)!r} as data: it has no function load_data(). "
            f"Define it, or name another one: {file}:FUNCTION."
        )
    return _called(module.load_data, f"{file}:load_data", options)


def iterable(batches: Iterable[Any], options: DataOptions) -> BatchStream:
    """Stream a list, a DataLoader, a generator or any other iterable of batches; a generator only once."""
    name = f"a {type(batches).__name__}"
    count = None
    if isinstance(batches, Sized):
        with suppress(TypeError):  # a DataLoader over an IterableDataset has no length, and says so only when asked
            count = min(len(batches), options.max_batches or len(batches))
    return BatchStream(
        description=name,
        read=lambda: _named(batches, name, options),
        batches=count,
        rewindable=not isinstance(batches, Iterator),
    )


def _called(function: Any, name: str, options: DataOptions) -> BatchStream:
    if not callable(function):
        raise ConfigError(
            f"Cannot use {name} as data: it is a {type(function).__name__}; "
            "expected a function without arguments that returns the batches."
        )

    given: list[Iterator[Any]] = []

    def read() -> Iterator[RawBatch]:
        batches = function()
        if any(batches is earlier for earlier in given):
            raise DataError(
                f"Cannot use {name} for more than one pass: it returned the iterator that it had returned before, "
                "which is used up. Let it make a new one at each call, or return a list."
            )
        if isinstance(batches, Iterator):
            given[:] = [batches]
        if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
            raise DataError(
                f"Cannot use {name}: it returned a {type(batches).__name__}; "
                "expected one batch after the other: yield them, or return a list or a DataLoader."
            )
        return _named(batches, name, options)

    return BatchStream(description=name, read=read)


def _named(batches: Iterable[Any], name: str, options: DataOptions) -> Iterator[RawBatch]:
    for index, batch in enumerate(islice(batches, options.max_batches)):
        where = f"batch {index} of {name}"
        yield RawBatch(where, _by_name(batch, where, options))


def _by_name(batch: Any, where: str, options: DataOptions) -> Arrays:
    """Give the elements of a batch their names: dicts have them, tuples follow the model's inputs, labels last."""
    if isinstance(batch, Mapping):
        return batch
    elements = list(batch) if isinstance(batch, tuple | list) else [batch]
    names = [spec.name for spec in options.inputs]
    if len(elements) == len(names) + 1:
        names.append(options.label)
    if len(elements) != len(names):
        raise DataError(
            f"Cannot use {where}: it has {len(elements)} elements; the model takes {len(options.inputs)} "
            f"({describe(options.inputs)}), and labels may follow them. Yield dicts of arrays to say which is which."
        )
    return dict(zip(names, elements, strict=True))
