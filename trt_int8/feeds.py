"""One batch of the user's arrays made into what a model takes, or refused with both sides named.

Only conversions that people rely on, and that lose nothing a model would notice, happen by themselves: byte order,
int32 to int64 and back where the values fit, float16 and float64 to float32. Whole numbers for a float input are
refused: raw pixels fed without their preprocessing are the most frequent silent mistake of calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrators.protocols import Array
from engines.onnxrt import shape_fits
from engines.runner import TensorSpec
from trt_int8.errors import DataError

_SAFE_CASTS = {("float16", "float32"), ("float64", "float32"), ("int32", "int64"), ("int64", "int32")}
"""(dtype of the data, dtype of the input); narrowing integers only where every value fits."""


@dataclass(frozen=True, slots=True)
class Feeds:
    """A batch that fits the model.

    Attributes:
        inputs: one array per model input, in the model's order; a short batch is not padded.
        extras: the other arrays that have one row per sample: labels.
        left_out: names of arrays that are neither.
        samples: number of samples.
    """

    inputs: dict[str, Array]
    extras: dict[str, Array]
    left_out: tuple[str, ...]
    samples: int


def batch_input(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    """Return the input whose first axis counts the samples: the first that is not a scalar; None where all are."""
    return next((spec for spec in inputs if spec.shape != ()), None)


def fixed_batch(inputs: Sequence[TensorSpec]) -> int | None:
    """Return the batch size that the model fixes, or None where it is free."""
    spec = batch_input(inputs)
    return None if spec is None else spec.fixed_batch


def describe(inputs: Sequence[TensorSpec]) -> str:
    """List the inputs of a model for a message."""
    return "; ".join(str(spec) for spec in inputs)


def check_names(found: Mapping[str, Any], inputs: Sequence[TensorSpec], where: str) -> None:
    """Check that every input of the model is there.

    Raises:
        DataError: one is missing; the text names what the model takes and what was found.
    """
    for spec in inputs:
        if spec.name not in found:
            raise DataError(
                f"Cannot use {where}: no array {spec.name!r}; found {', '.join(map(str, found)) or 'no arrays'}. "
                f"The model takes {describe(inputs)}. Name the arrays after the inputs."
            )


def conform(arrays: Mapping[str, Any], inputs: Sequence[TensorSpec], *, where: str, first_sample: int) -> Feeds:
    """Check one batch against the model's inputs and convert what may be converted.

    Args:
        arrays: name to numpy array, torch tensor or nested list.
        inputs: the model's inputs.
        where: the batch, for messages: "batch 3 of 'calibration.npz'".
        first_sample: index of the batch's first sample in the whole stream, for messages.

    Raises:
        DataError: an input is missing, of another rank, shape or dtype, or holds NaN or infinity.
    """
    check_names(arrays, inputs, where)
    values = {spec.name: _to_numpy(arrays[spec.name], f"input {spec.name!r}", where) for spec in inputs}
    samples = _count_samples(values, inputs, where)
    fed = {}
    for spec in inputs:
        _check_shape(values[spec.name], spec, inputs, samples, where)
        value = _cast(values[spec.name], spec, where)
        _check_finite(value, spec, samples, where, first_sample)
        fed[spec.name] = value

    extras, left_out = {}, []
    for name, value in arrays.items():
        if name in fed:
            continue
        array = _to_numpy(value, f"array {name!r}", where)
        if array.ndim and len(array) == samples:
            extras[name] = array
        else:
            left_out.append(name)
    return Feeds(fed, extras, tuple(left_out), samples)


def _to_numpy(value: Any, what: str, where: str) -> Array:
    """Copy `value` into a C-ordered array of native byte order; a torch tensor may need a gradient or be on a device.

    Always a copy: many generators fill the same buffer again for their next batch.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu().numpy()
        array = np.array(value, order="C")
    except (TypeError, ValueError) as error:
        raise DataError(f"Cannot use {where}: {what} is not an array of one shape and dtype: {error}.") from error
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _count_samples(values: Mapping[str, Array], inputs: Sequence[TensorSpec], where: str) -> int:
    spec = batch_input(inputs)
    if spec is None:
        return 1
    value = values[spec.name]
    if value.ndim == 0:
        raise DataError(f"Cannot use {where}: input {spec.name!r} is a single number; the model expects {spec}.")
    if len(value) == 0:
        raise DataError(f"Cannot use {where}: input {spec.name!r} has shape {value.shape}, which holds no sample.")
    return len(value)


def _check_shape(value: Array, spec: TensorSpec, inputs: Sequence[TensorSpec], samples: int, where: str) -> None:
    shape = value.shape
    fixed = fixed_batch(inputs)
    if fixed is not None and shape[:1] == (samples,) and samples < fixed and spec.fixed_batch == fixed:
        shape = (fixed, *shape[1:])  # a short batch: whether it may be short is for the stream to say
    if not shape_fits(shape, spec.shape):
        raise DataError(
            f"Cannot use {where}: input {spec.name!r} has shape {value.shape}; the model expects {spec}."
            + shape_hint(value.shape, spec)
        )
    leader = batch_input(inputs)
    if leader is not None and _same_batch_axis(spec, leader) and len(value) != samples:
        raise DataError(
            f"Cannot use {where}: input {spec.name!r} has {len(value)} samples and input {leader.name!r} has "
            f"{samples}; the model takes as many of each."
        )


def _same_batch_axis(spec: TensorSpec, leader: TensorSpec) -> bool:
    """Tell whether the graph gives the first axes of two inputs the same symbol; unnamed axes say nothing."""
    if not spec.shape or not leader.shape:
        return False
    return isinstance(spec.shape[0], str) and spec.shape[0] == leader.shape[0]


def shape_hint(shape: tuple[int, ...], spec: TensorSpec) -> str:
    """Say what to do about a shape that `spec` does not allow, where it is one of the usual slips; else nothing."""
    if shape_fits((1, *shape), spec.shape):
        return " Add the batch axis: array[None]."
    if len(shape) == 4 and shape_fits((shape[0], shape[3], shape[1], shape[2]), spec.shape):
        return " Move the channels to the front: array.transpose(0, 3, 1, 2)."
    if len(shape) == 4 and shape_fits((shape[0], shape[2], shape[3], shape[1]), spec.shape):
        return " Move the channels to the back: array.transpose(0, 2, 3, 1)."
    return ""


def _cast(value: Array, spec: TensorSpec, where: str) -> Array:
    if value.dtype == spec.dtype:
        return value
    found = f"Cannot use {where}: input {spec.name!r} has dtype {value.dtype.name}; the model expects {spec}."
    if (value.dtype.name, spec.dtype.name) not in _SAFE_CASTS:
        hint = f" Convert it with .astype({spec.dtype.name!r})."
        if value.dtype.kind in "iu" and spec.dtype.kind == "f":
            hint = (
                " Preprocess and convert it as in training; for raw pixels often ((x / 255 - mean) / std) as float32."
            )
        raise DataError(found + hint)
    if spec.dtype.kind == "i":
        limits = np.iinfo(spec.dtype.name)
        if value.size and (value.min() < limits.min or value.max() > limits.max):
            raise DataError(f"{found} Its values, {value.min()} to {value.max()}, do not fit.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which is reported with its sample
        return value.astype(spec.dtype)


def _check_finite(value: Array, spec: TensorSpec, samples: int, where: str, first_sample: int) -> None:
    if spec.dtype.kind != "f":
        return
    finite = np.isfinite(value)
    if finite.all():
        return
    position = tuple(int(axis) for axis in np.argwhere(~finite)[0])
    what = "NaN" if np.isnan(value[position]) else "infinity"
    sample = f" in sample {first_sample + position[0]}" if position and len(value) == samples else ""
    raise DataError(
        f"Cannot use {where}: input {spec.name!r} holds {what}{sample} (at {list(position)} in the batch, counted from "
        "0); expected finite numbers. Mend that sample or leave it out."
    )
