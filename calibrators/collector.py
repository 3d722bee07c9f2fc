"""One pass over the calibration data, in which every activation of every batch is counted once and none is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.counter import MagnitudeCounter
from calibrators.errors import CalibrationError, EmptyCalibrationSetError, NonFiniteActivationError
from calibrators.histogram import MagnitudeHistogram
from calibrators.protocols import ActivationSource, Track, untracked


@dataclass(frozen=True, slots=True, eq=False)
class ActivationStatistics:
    """What one pass over the calibration data found.

    Attributes:
        histograms: tensor name to histogram, in the order of the source.
        batches: number of batches.
        samples: number of samples in them.
        input_shapes: model input to the shapes that were fed, each with its number of batches.
    """

    histograms: Mapping[str, MagnitudeHistogram]
    batches: int
    samples: int
    input_shapes: Mapping[str, Mapping[tuple[int, ...], int]]


def collect(source: ActivationSource, track: Track = untracked, total: int | None = None) -> ActivationStatistics:
    """Run `source` once and count the magnitudes of all its tensors.

    Memory does not grow with the number of batches. Counting releases the GIL, so several sources can be collected in
    threads of their own; their histograms merge exactly.

    Args:
        source: runs the model over the data.
        track: shows the progress.
        total: number of batches, where it is known.

    Raises:
        EmptyCalibrationSetError: the source held no sample.
        NonFiniteActivationError: an activation is NaN or infinite; names the tensor, the batch and the node.
        CalibrationError: a tensor is not of a floating dtype.
    """
    counters = {tensor: MagnitudeCounter() for tensor in source.tensors}
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    batches = 0
    samples = 0
    for activations in track(source.activations(), "calibrate", total):
        for tensor, counter in counters.items():
            values = activations.values[tensor]
            if not np.issubdtype(values.dtype, np.floating):
                raise CalibrationError(
                    f"Cannot calibrate tensor {tensor!r} of {source.producer(tensor)}: its dtype is {values.dtype}; "
                    "expected a floating dtype. Leave it out of the tensors to calibrate."
                )
            counter.update(values)
            if counter.nonfinite:
                raise _nonfinite(tensor, activations.batch, source.producer(tensor), values)
        for name, shape in activations.input_shapes.items():
            shapes.setdefault(name, Counter())[shape] += 1
        batches += 1
        samples += activations.samples
    if samples == 0:
        raise EmptyCalibrationSetError(
            f"Cannot calibrate: the calibration data held no sample in {batches} batches; expected at least one. "
            "Check the path of the data and the limit on batches."
        )
    histograms = {tensor: counter.histogram() for tensor, counter in counters.items()}
    return ActivationStatistics(histograms=histograms, batches=batches, samples=samples, input_shapes=shapes)


def _nonfinite(tensor: str, batch: int, node: str, values: NDArray[Any]) -> NonFiniteActivationError:
    with np.errstate(over="ignore"):
        bad = np.count_nonzero(~np.isfinite(values.astype(np.float32)))
    return NonFiniteActivationError(
        f"Cannot calibrate tensor {tensor!r} of {node}: {bad} of its {values.size} values are NaN "
        f"or infinite in batch {batch}; expected finite activations. Check the samples of that batch, then the model.",
        tensor=tensor,
        batch=batch,
        node=node,
    )
