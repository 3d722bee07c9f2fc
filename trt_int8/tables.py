"""Arrays with one row per sample, cut into batches: an `.npz` file, or arrays in memory.

Of a file only the rows of the current batch are read, also where it is compressed, so that its size does not matter.
"""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import numpy as np

from calibrators.protocols import Array
from engines.onnxrt import shape_fits
from engines.runner import TensorSpec
from trt_int8.errors import DataError
from trt_int8.feeds import batch_input, check_names, shape_hint
from trt_int8.streams import BatchStream, DataOptions, RawBatch, hash_files, unreadable

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Column:
    """A named array that can be read block by block.

    Attributes:
        shape: shape of the whole.
        blocks: gives consecutive blocks of so many rows; the last may be short.
        load: gives the whole array.
    """

    shape: tuple[int, ...]
    blocks: Callable[[int], Iterator[Array]]
    load: Callable[[], Array]


def npz_table(file: Path, options: DataOptions) -> BatchStream:
    """Cut the arrays of an `.npz` file into batches."""
    stream = _table(_npz_columns(file), repr(str(file)), options)
    return replace(stream, hash_files=lambda: hash_files([file]), threadable=True)


def array_table(arrays: Mapping[str, Any], options: DataOptions) -> BatchStream:
    """Cut arrays in memory into batches."""
    return _table({name: _array_column(value) for name, value in arrays.items()}, "the arrays", options)


def _table(columns: Mapping[str, Column], name: str, options: DataOptions) -> BatchStream:
    check_names(columns, options.inputs, name)
    samples = _count_samples(columns, options.inputs, name)
    batches = math.ceil(samples / options.cut)
    if options.max_batches is not None:
        batches = min(batches, options.max_batches)
    specs = {spec.name: spec for spec in options.inputs}
    cuts = {key: _cut(key, column, specs.get(key), samples, options.cut, name) for key, column in columns.items()}

    def read() -> Iterator[RawBatch]:
        running = {key: start() for key, start in cuts.items() if start is not None}
        for index in range(batches):
            yield RawBatch(f"batch {index} of {name}", {key: next(parts) for key, parts in running.items()})

    left_out = [key for key, start in cuts.items() if start is None]
    if left_out:
        _log.info("%s: left out, neither an input of the model nor a row per sample: %s", name, ", ".join(left_out))
    return BatchStream(description=f"{name} ({samples} samples)", read=read, batches=batches, batch_size=options.cut)


def _count_samples(columns: Mapping[str, Column], inputs: Sequence[TensorSpec], where: str) -> int:
    """Return the rows of the input that counts samples; a model of scalars takes one sample per number."""
    leader = batch_input(inputs)
    shapes = [columns[leader.name].shape] if leader else [columns[spec.name].shape for spec in inputs]
    lengths = [shape[0] for shape in shapes if shape]
    if leader is not None and not lengths:
        raise DataError(f"Cannot use {where}: input {leader.name!r} is a single number; the model expects {leader}.")
    samples = max(lengths, default=1)
    if samples == 0:
        raise DataError(f"Cannot use {where}: it holds no samples (input shape {shapes[0]}).")
    return samples


def _cut(
    name: str, column: Column, spec: TensorSpec | None, samples: int, size: int, where: str
) -> Callable[[], Iterator[Array]] | None:
    """Choose how a column is shared out among the batches: in rows, whole to each of them, or one element each.

    Returns:
        Starts one pass over the column's parts; None for a column that is no input and has not a row per sample.
    """
    shape = column.shape
    row_per_sample = shape[:1] == (samples,)
    if spec is None:
        return (lambda: column.blocks(size)) if row_per_sample else None
    same_rank = spec.shape is None or len(shape) == len(spec.shape)
    if row_per_sample and same_rank and spec.fixed_batch in (None, size):
        return lambda: column.blocks(size)
    # An input that is a scalar, or whose first axis has another fixed length (a recurrent state), has no sample axis.
    if spec.shape == () or spec.fixed_batch is not None:
        if shape_fits(shape, spec.shape):
            return lambda: repeat(column.load())
        if row_per_sample and size == 1 and shape_fits(shape[1:], spec.shape):
            return lambda: (block[0] for block in column.blocks(1))
    raise DataError(
        f"Cannot use {where}: input {name!r} has shape {shape}; the model expects {spec}, "
        f"and there are {samples} samples in batches of {size}.{shape_hint(shape, spec)}"
    )


def _array_column(value: Any) -> Column:
    array = value if hasattr(value, "detach") else np.asarray(value)
    return Column(tuple(array.shape), lambda size: _slices(array, size), lambda: array)


def _slices(array: Any, size: int) -> Iterator[Any]:
    return (array[start : start + size] for start in range(0, len(array), size))


def _npz_columns(file: Path) -> dict[str, Column]:
    """Read the header of every array in an `.npz` file, and no array."""
    with _reading(file), zipfile.ZipFile(file) as archive:
        members = [member for member in archive.namelist() if member.endswith(".npy")]
        return {member.removesuffix(".npy"): _npz_column(file, archive, member) for member in members}


def _npz_column(file: Path, archive: zipfile.ZipFile, member: str) -> Column:
    with archive.open(member) as stream:
        shape, fortran_order, dtype = _read_header(stream)
    if dtype.hasobject:
        raise ValueError(f"array {member.removesuffix('.npy')!r} holds Python objects")

    def load() -> Array:
        with _reading(file), np.load(file, allow_pickle=False) as arrays:
            whole: Array = arrays[member.removesuffix(".npy")]
            return whole

    def blocks(size: int) -> Iterator[Array]:
        # In Fortran order the samples do not lie one after the other: there is no reading such an array in pieces.
        return _slices(load(), size) if fortran_order else _stream_rows(file, member, shape, dtype, size)

    return Column(shape, blocks, load)


def _stream_rows(file: Path, member: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> Iterator[Array]:
    with _reading(file):
        archive = zipfile.ZipFile(file)
    with archive, archive.open(member) as stream:
        _read_header(stream)
        for start in range(0, shape[0], size):
            rows = (min(size, shape[0] - start), *shape[1:])
            with _reading(file):
                block: Array = np.ndarray(rows, dtype, stream.read(math.prod(rows) * dtype.itemsize))
            yield block


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an `.npy` stream: shape, whether in Fortran order, dtype; the data follow."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile, zlib and numpy each raise their own for a damaged file
        raise unreadable(file, "a whole .npz file of plain arrays", error) from error
