"""Tensors that a calibration method saturates at a price: worth a look where a model's accuracy falls.

The entropy search and the percentile do not look at the size of the errors that they cause. For most tensors that is
what makes them useful. Where the values beyond the threshold are frequent or far, though, cutting them off costs more
than a bit of INT8's resolution: four times the squared error of the full range, as each bit halves the step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibrators.calibration import Calibration
from calibrators.mse import expected_squared_errors
from engines.placement import Placement
from engines.scale_groups import shared_scales

ONE_BIT = 4.0
"""Times that the squared error grows where the step doubles."""

_LISTED = 3
"""Tensors that the note names before it only counts them."""


def costly_saturation(
    placement: Placement, thresholds: Mapping[str, float], calibration: Calibration
) -> dict[str, float]:
    """Find the tensors that lose more than a bit by their saturation.

    Args:
        placement: the tensors. Codes that reach twice the threshold (never-negative values in uint8), and affine ones,
            do not saturate there and are left out.
        thresholds: by calibrated tensor.
        calibration: knows how the values are distributed.

    Returns:
        Tensor to expected squared error relative to that of its full range, the costliest first.
    """
    shared = shared_scales(placement, thresholds)
    signed = {
        point.scale_of
        for point in placement.activations
        if point.amax is None and point.span is None and not (point.unsigned and point.nonnegative)
    }
    ratios: dict[str, float] = {}
    for name in sorted(signed):
        histogram = calibration.histogram(name)
        if 0 < shared[name] < histogram.amax:
            cut, whole = expected_squared_errors(histogram, np.array([shared[name], histogram.amax]))
            if cut > ONE_BIT * whole > 0:
                ratios[name] = float(cut / whole)
    return dict(sorted(ratios.items(), key=lambda item: -item[1]))


def saturation_note(
    placement: Placement, thresholds: Mapping[str, float], calibration: Calibration, method: str
) -> str | None:
    """Say in one line which tensors a method saturates at a price; None where there is none."""
    ratios = costly_saturation(placement, thresholds, calibration)
    if not ratios:
        return None
    shown = [f"{name} ({ratio:.0f} times)" for name, ratio in list(ratios.items())[:_LISTED]]
    more = f" and {len(ratios) - _LISTED} more" if len(ratios) > _LISTED else ""
    return (
        f"{method} saturates {len(ratios)} of {len(placement.tensors)} tensors so far that their squared error grows "
        f"more than fourfold: {', '.join(shown)}{more}. Where the model's accuracy falls, compare with mse."
    )
