"""Calibration batches in the form that TensorRT's calibrators hand to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from calibrators.errors import CalibrationError, EmptyCalibrationSetError
from calibrators.protocols import Array, CalibrationBatch

ShortBatch = Literal["drop", "pad"]

_INDEX_DTYPES = (np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.bool_))


def device_batches(
    batches: Iterable[CalibrationBatch],
    names: Sequence[str],
    *,
    batch_size: int,
    short_batch: ShortBatch,
    report: Callable[[str], None],
) -> Iterator[dict[str, Array]]:
    """Yield the batches as TensorRT wants them: every input, the declared batch size, one shape throughout.

    Args:
        batches: the stream; further arrays in it are ignored.
        names: the network's inputs.
        batch_size: samples in each batch that is yielded.
        short_batch: a batch with fewer samples is left out ("drop"), or filled up by repeating its samples ("pad").
        report: told at the end how many batches were short.

    Yields:
        Input name to array, in the order of `names`, C-contiguous: float32 for any floating dtype, as TensorRT
        calibrates a float32 build of the network; int32, int64 and bool are kept.

    Raises:
        CalibrationError: a batch lacks an input, holds more samples than declared, NaN or infinity, or has another
            dtype or shape; names the batch.
        EmptyCalibrationSetError: there was no batch to yield.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    short = samples = 0
    index = -1
    for index, batch in enumerate(batches):
        feeds = _device_arrays(index, batch.feeds, names)
        rows = next((array.shape[0] for array in feeds.values() if array.ndim), batch_size)
        if rows > batch_size:
            raise CalibrationError(
                f"Cannot calibrate on batch {index}: it holds {rows} samples; expected the declared batch size of "
                f"{batch_size}. Declare the batch size that the data come in."
            )
        real = min(batch.samples, rows)
        if real < batch_size:
            short += 1
            samples += real
            if real == 0 or short_batch == "drop":
                continue
            feeds = {name: _padded(array, rows, real, batch_size) for name, array in feeds.items()}
        for name, array in feeds.items():
            if array.shape != shapes.setdefault(name, array.shape):
                raise CalibrationError(
                    f"Cannot calibrate on batch {index}: input {name!r} has shape {array.shape}; expected "
                    f"{shapes[name]} as in the batches before, since TensorRT calibrates at one shape."
                )
        yield feeds
    if not shapes:
        raise EmptyCalibrationSetError(
            f"Cannot calibrate: none of the {index + 1} batches held {batch_size} samples; expected at least "
            "one full batch. Choose a smaller batch size, or have short batches padded (--short-batch pad)."
        )
    if short:
        if short_batch == "drop":
            what, advice = "dropped", " Keep them with --short-batch pad."
        else:
            what, advice = "filled up by repeating their samples", ""
        report(f"Batches with fewer than {batch_size} samples were {what}: {short}, with {samples} samples.{advice}")


def _padded(array: Array, rows: int, real: int, batch_size: int) -> Array:
    """Fill a batch up by repeating its real samples; an input without a batch axis stays as it is."""
    if array.shape[:1] != (rows,):
        return array
    return np.resize(array[:real], (batch_size, *array.shape[1:]))


def _device_arrays(index: int, feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    missing = [name for name in names if name not in feeds]
    if missing:
        raise CalibrationError(
            f"Cannot calibrate on batch {index}: it lacks input {missing[0]!r}; expected "
            f"{', '.join(map(repr, names))}, found {', '.join(map(repr, feeds)) or 'nothing'}."
        )
    return {name: _device_array(index, name, np.asarray(feeds[name])) for name in names}


def _device_array(index: int, name: str, array: Array) -> Array:
    if array.dtype in _INDEX_DTYPES:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise CalibrationError(
            f"Cannot calibrate on batch {index}: input {name!r} has dtype {array.dtype}; expected a floating dtype, "
            "or int32, int64 or bool for an index input."
        )
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise CalibrationError(
            f"Cannot calibrate on batch {index}: input {name!r} holds NaN or infinite values; expected finite float32."
        )
    return array
