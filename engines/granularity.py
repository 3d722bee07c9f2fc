"""Coarser and finer codes than the default: one weight scale for a whole tensor, and affine activations.

TensorRT takes symmetric codes alone, with one scale for an activation and one for each output channel of a weight (or
one for the whole weight); ONNX Runtime's kernels take affine activations too. Both are there to be compared with the
defaults, as the literature does (Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A
whitepaper", 2018, section 2; Wu et al., "Integer quantization for deep learning inference", 2020, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from engines.placement import ActivationPoint, Placement

Weights = Literal["per-channel", "per-tensor"]
"""How many scales a weight has: one for each output channel, or one for the whole."""

Activations = Literal["symmetric", "affine"]
"""Codes of activations: 0 in the middle (or lowest, where nothing is negative), or a zero point that fits the range."""


def with_one_weight_scale(placement: Placement) -> Placement:
    """Return the placement with one scale for each weight instead of one for each output channel."""
    return replace(placement, weights=tuple(replace(weight, axis=None) for weight in placement.weights))


def with_affine_activations(
    placement: Placement, amax: Mapping[str, float], extremes: Mapping[str, tuple[float, float]]
) -> Placement:
    """Return the placement with affine uint8 activations.

    The codes of a tensor reach from lowest = max(min, -amax) to highest = min(max, amax), with 0 among them:

        scale = (highest - lowest) / 255, zero point = round(-lowest / scale)
        q = clamp(round_half_even(x / scale) + zero point, 0, 255)

    so that the method's threshold clips each side, and no code is spent beyond the values that occurred.

    Args:
        placement: one for the CPU target, whose activations are unsigned.
        amax: threshold of the calibration method, by tensor name.
        extremes: (min, max) that calibration saw, by tensor name.
    """
    return replace(
        placement,
        activations=tuple(
            # `engines.qdq.insert_qdq` says which scales are missing.
            _affine(point, amax[point.scale_of], extremes[point.scale_of]) if point.scale_of in amax else point
            for point in placement.activations
        ),
    )


def _affine(point: ActivationPoint, amax: float, extremes: tuple[float, float]) -> ActivationPoint:
    smallest, largest = extremes
    lowest, highest = min(0.0, max(smallest, -amax)), max(0.0, min(largest, amax))
    if point.nonnegative:
        lowest = 0.0  # a Relu before the pair disappears only where its zero point is the lowest code
    if lowest == highest:
        return point  # always 0: the symmetric scale of such a tensor will do
    return replace(point, span=(lowest, highest))
