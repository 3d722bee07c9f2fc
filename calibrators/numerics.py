"""Symmetric INT8: scales, rounding and clamping, as TensorRT and ONNX define them.

    scale = amax / 127        quantized = clamp(round_half_even(real / scale), low, 127)        real ~ quantized * scale

The zero point is 0 everywhere. Activations use all 256 codes (low = -128), which is how QuantizeLinear clamps.
Weights leave -128 out (low = -127), so that a weight and its negative always have opposite codes. Arithmetic is
float32, because that is what the engines compute with: the same division and the same rounding give the same codes.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.errors import CalibrationError

LEVELS = 127
"""Number of positive codes; the code of amax."""

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Smallest normal float32. A subnormal scale has lost bits, and an engine that flushes subnormals would divide by 0."""

_LARGEST_SCALE = float(np.finfo(np.float32).max)

FP16_MAX = 65504.0
"""Largest finite FP16 number."""


@overload
def scale_from_amax(amax: float, levels: int = LEVELS) -> float: ...
@overload
def scale_from_amax(amax: NDArray[Any], levels: int = LEVELS) -> NDArray[np.float32]: ...


def scale_from_amax(amax: float | NDArray[Any], levels: int = LEVELS) -> float | NDArray[np.float32]:
    """Turn the largest magnitude that must be representable into a scale: amax / levels, rounded to float32.

    Args:
        amax: a number, or an array of any shape with one value per channel; finite, >= 0, in the tensor's own unit.
        levels: the code of amax.

    Returns:
        For a number a float that float32 represents exactly, since ONNX files and calibration caches keep float32;
        for an array a float32 array of its shape. Always > 0: an amax of 0 gives 1.0, as a tensor that is always zero
        is exact under any scale, and a scale below the smallest normal float32 is raised to it.

    Raises:
        CalibrationError: an amax is negative, NaN or infinite, or its scale is larger than any float32.
    """
    values = np.asarray(amax, dtype=np.float64)
    usable = (values >= 0) & (values / levels <= _LARGEST_SCALE)
    if not usable.all():
        raise CalibrationError(
            f"Cannot make a scale of amax {values[~usable].flat[0]}: expected a finite number, 0 or larger."
        )
    scales = np.where(values > 0, np.maximum(values / levels, SMALLEST_SCALE), 1.0).astype(np.float32)
    return scales if isinstance(amax, np.ndarray) else float(scales)


@overload
def fp16_scale(scale: float) -> float: ...
@overload
def fp16_scale(scale: NDArray[Any]) -> NDArray[np.float32]: ...


def fp16_scale(scale: float | NDArray[Any]) -> float | NDArray[np.float32]:
    """Round scales up to the next number that FP16 holds.

    Upwards, so that amax keeps a code; by less than one unit in FP16's last place, which is 2^-10 of the scale at most
    where FP16 is normal (from 2^-14 on). Below, its numbers are 2^-24 apart, and the smallest scale is 2^-24.

    Args:
        scale: a number or an array, > 0 and at most 65504.

    Returns:
        For a number a float, for an array a float32 array of its shape; FP16 represents every value exactly.

    Raises:
        CalibrationError: a scale is NaN, not above 0, or beyond FP16's range.
    """
    exact = np.asarray(scale, dtype=np.float64)
    usable = (exact > 0) & (exact <= FP16_MAX)
    if not usable.all():
        raise CalibrationError(
            f"Cannot hold the scale {exact[~usable].flat[0]} in FP16: expected a number above 0 and at most "
            f"{FP16_MAX:.0f}. Keep the nodes that read it in FP32."
        )
    nearest = exact.astype(np.float16)
    above = np.nextafter(nearest, np.float16(FP16_MAX))
    rounded = np.where(nearest < exact, above, nearest).astype(np.float32)
    return rounded if isinstance(scale, np.ndarray) else float(rounded)


def quantize(values: ArrayLike, scale: ArrayLike) -> NDArray[np.int8]:
    """Quantize activations as QuantizeLinear does: clamp(round_half_even(values / scale), -128, 127).

    Args:
        values: any shape; computed in float32. Infinities saturate.
        scale: a number, or an array that broadcasts against `values`; > 0.

    Returns:
        int8, shape of `values`.

    Raises:
        CalibrationError: `values` holds NaN, for which no integer stands.
    """
    return _codes(np.asarray(values, dtype=np.float32), np.asarray(scale, dtype=np.float32), -128, LEVELS)


def dequantize(codes: NDArray[np.int8], scale: ArrayLike) -> NDArray[np.float32]:
    """Return codes * scale in float32, as DequantizeLinear does; `scale` broadcasts against `codes`."""
    return codes.astype(np.float32) * np.asarray(scale, dtype=np.float32)


def quantize_weights(
    weights: ArrayLike,
    axis: int | None,
    *,
    limit: int = LEVELS,
    minimum_scale: ArrayLike | None = None,
    half: bool = False,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize weights with one scale for each slice along `axis`, or one for the whole tensor.

    scale = max(max|weights| / limit, minimum_scale), with `half` rounded up to FP16's grid
    quantized = clamp(round_half_even(weights / scale), -limit, limit)

    Args:
        weights: any shape and floating dtype, finite; computed in float32.
        axis: the axis of the output channels, may be negative; None for one scale.
        limit: the largest code: 127, or 63 for processors whose 8-bit products saturate in pairs.
        minimum_scale: lower bound, shape (channels,) or a number, >= 0; for axis None the largest one holds. It serves
            layers whose INT32 bias has the scale of their products: beside tiny weights a large bias would overflow.
        half: the scales will be stored in FP16.

    Returns:
        The codes, int8 in the shape of `weights`; the scales, float32 of shape (channels,), or () for axis None.
        The scale of an all-zero channel is 1.0 or its minimum; every scale is a normal float32 > 0.

    Raises:
        CalibrationError: a weight is NaN, or infinite in float32; `weights` has no such axis; or a scale is beyond
            FP16's range where `half` asks for it.
    """
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported as such
        array = np.asarray(weights, dtype=np.float32)
    if axis is not None and not -array.ndim <= axis < array.ndim:
        raise CalibrationError(
            f"Cannot quantize weights per channel: they have shape {array.shape}; expected an axis {axis} in it."
        )
    others = None if axis is None else tuple(k for k in range(array.ndim) if k != axis % array.ndim)
    amax = np.max(np.abs(array), axis=others, initial=0.0)
    if not np.isfinite(amax).all():
        bad = np.count_nonzero(~np.isfinite(array))
        raise CalibrationError(
            f"Cannot quantize weights of shape {array.shape}: {bad} of them are NaN or infinite in float32; expected "
            "finite weights. Check the checkpoint that they come from."
        )
    scales = scale_from_amax(np.asarray(amax), levels=limit)
    if minimum_scale is not None:
        smallest = np.asarray(minimum_scale, dtype=np.float32)
        scales = np.maximum(scales, smallest.max() if axis is None else smallest)
    if half:
        scales = fp16_scale(np.asarray(scales))
    aligned = scales if others is None else np.expand_dims(scales, others)
    return _codes(array, aligned, -limit, limit), scales


def _codes(values: NDArray[np.float32], scale: NDArray[np.float32], lowest: int, highest: int) -> NDArray[np.int8]:
    with np.errstate(over="ignore"):  # a quotient beyond float32 becomes infinite and saturates as it should
        quotients = np.rint(values / scale)
    if np.isnan(quotients).any():
        raise CalibrationError("Cannot quantize values that hold NaN: expected numbers or infinities.")
    codes: NDArray[np.int8] = np.clip(quotients, lowest, highest).astype(np.int8)
    return codes
