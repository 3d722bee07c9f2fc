"""Symmetric INT8: scales, rounding and clamping, as TensorRT and ONNX define them.

    quantized = clamp(round_half_even(real / scale), low, 127)        real ~ quantized * scale        scale = amax / 127

The zero point is 0 everywhere. Activations use all 256 codes (low = -128), which is how QuantizeLinear clamps; weights leave
-128 out (low = -127), so that a weight and its negative always have opposite codes and integer kernels that negate or pair
products cannot overflow. Arithmetic is float32 throughout, because that is what the engines compute with: the same division and
the same rounding give the same codes.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.errors import CalibrationError

LEVELS = 127
"""Number of positive codes; the code of amax."""

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Smallest normal float32. A subnormal scale loses bits, and engines that flush subnormals would divide by zero."""

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@overload
def scale_from_amax(amax: float) -> float: ...
@overload
def scale_from_amax(amax: NDArray[Any]) -> NDArray[np.float32]: ...


def scale_from_amax(amax: float | NDArray[Any]) -> float | NDArray[np.float32]:
    """Turn the largest magnitude that must be representable into a scale: amax / 127, rounded to float32.

    Args:
        amax: a number, or an array of any shape with one value per channel; finite, >= 0, in the tensor's own unit.

    Returns:
        For a number a float that float32 represents exactly (it ends up as float32 in ONNX files and calibration caches);
        for an array a float32 array of the same shape. Always > 0: an amax of 0 gives 1.0, since a tensor that is always
        zero is exact under any scale, and a scale below the smallest normal float32 is raised to it.

    Raises:
        CalibrationError: an amax is negative, NaN or infinite.
    """
    values = np.asarray(amax, dtype=np.float64)
    if not np.all((values >= 0) & (values <= LARGEST_FLOAT32)):
        bad = values[~((values >= 0) & (values <= LARGEST_FLOAT32))].flat[0]
        raise CalibrationError(f"Cannot make a scale of amax {bad}: expected a finite float32 value, 0 or larger.")
    scales = np.where(values > 0, np.maximum(values / LEVELS, SMALLEST_SCALE), 1.0).astype(np.float32)
    return scales if isinstance(amax, np.ndarray) else float(scales)


def quantize(values: ArrayLike, scale: ArrayLike) -> NDArray[np.int8]:
    """Quantize activations as QuantizeLinear does: clamp(round_half_even(values / scale), -128, 127).

    Args:
        values: any shape, without NaN; computed in float32. Infinities saturate.
        scale: a number, or an array that broadcasts against `values`; > 0.

    Returns:
        int8, shape of `values`.

    Raises:
        CalibrationError: `values` holds NaN, which no integer stands for.
    """
    return _codes(np.asarray(values, dtype=np.float32), np.asarray(scale, dtype=np.float32), lowest=-128)


def dequantize(codes: NDArray[np.int8], scale: ArrayLike) -> NDArray[np.float32]:
    """Return codes * scale in float32, as DequantizeLinear does; `scale` broadcasts against `codes`."""
    return codes.astype(np.float32) * np.asarray(scale, dtype=np.float32)


def quantize_weights(
    weights: ArrayLike,
    axis: int | None,
    *,
    limit: int = LEVELS,
    minimum_scale: ArrayLike | None = None,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize weights with one scale per slice along `axis`, or one for the whole tensor.

    quantized = clamp(round_half_even(weights / scale), -limit, limit), scale = max|weights| / limit.

    Args:
        weights: any shape and floating dtype, finite; computed in float32.
        axis: the axis of the output channels, may be negative; None for one scale.
        limit: largest code; 127, or 63 where pairs of unsigned x signed products are added in 16 bits.
        minimum_scale: smallest scale allowed, shape (channels,); its largest counts where `axis` is None. Callers that
            quantize a bias with the product of two scales bound it by what the bias's integer type can hold.

    Returns:
        The codes, int8 in the shape of `weights`; the scales, float32 of shape (channels,), or of shape () for axis None.
        An all-zero channel gets scale 1.0; every scale is a normal float32 > 0.

    Raises:
        CalibrationError: a weight is NaN or infinite in float32, or `weights` has no such axis.
    """
    array = np.asarray(weights, dtype=np.float32)
    if axis is not None and not -array.ndim <= axis < array.ndim:
        raise CalibrationError(
            f"Cannot quantize weights of shape {array.shape} along axis {axis}: there is no such axis."
        )
    others = None if axis is None else tuple(i for i in range(array.ndim) if i != axis % array.ndim)
    amax = np.asarray(np.max(np.abs(array), axis=others, keepdims=True, initial=0.0))
    if not np.all(np.isfinite(amax)):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise CalibrationError(
            f"Cannot quantize weights of shape {array.shape}: {bad} of them are NaN or infinite in float32; "
            "expected finite weights. Check the checkpoint they come from."
        )
    scales = scale_from_amax(amax * (LEVELS / limit))
    if minimum_scale is not None:
        smallest = np.asarray(minimum_scale, dtype=np.float32)
        scales = np.maximum(scales, smallest.max() if axis is None else smallest.reshape(scales.shape))
    return _codes(array, scales, lowest=-limit, highest=limit), scales.reshape(() if axis is None else -1)


def _codes(
    values: NDArray[np.float32], scale: NDArray[np.float32], lowest: int, highest: int = LEVELS
) -> NDArray[np.int8]:
    with np.errstate(over="ignore"):  # a quotient beyond float32 is infinite, and saturates as it should
        quotient = values / scale
    if np.isnan(quotient).any():
        raise CalibrationError("Cannot quantize values that hold NaN: no INT8 code stands for it.")
    codes: NDArray[np.int8] = np.clip(np.rint(quotient), lowest, highest).astype(np.int8)
    return codes
