"""The proof that an ONNX file computes what its model computes: both are run on the same samples.

Where the batch is free, two batch sizes are run: a graph that holds a fixed batch somewhere inside fails at the second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibrators.protocols import Array
from engines.errors import InferenceError
from engines.onnxrt import OnnxRuntimeRunner
from engines.runner import TensorSpec
from trt_int8.errors import ExportError

Reference = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Runs the model that is to be reproduced: input name to array in, output name to array out."""

DEFAULT_TOLERANCE = 1e-3
"""Largest difference that is let pass, relative to the largest magnitude of the output.

Rounding in another order gives 1e-7 to 1e-5 in FP32 nets; a wrong padding, axis or batch gives 1e-2 and more.
"""

SMALLEST_MAGNITUDE = 1e-3
"""Outputs below this are judged as if they reached it: relative to (almost) nothing, every rounding is large."""


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far an output of the file is from the reference's, at one batch size.

    Attributes:
        output: name of the output.
        batch: length of the batch axis; None where the inputs have none that is free.
        max_abs: largest |file - reference|.
        max_rel: max_abs / max(largest |reference|, 1e-3).
    """

    output: str
    batch: int | None
    max_abs: float
    max_rel: float


def check_reproduction(
    model: str | os.PathLike[str],
    reference: Reference,
    samples: Mapping[str, Array],
    *,
    tolerance: float = DEFAULT_TOLERANCE,
) -> list[OutputDifference]:
    """Compare an ONNX file with its reference, on the samples and on another batch of them where the batch is free.

    The file runs on ONNX Runtime with its default optimizations, as it will be used.

    Args:
        model: the file.
        reference: the model that it has to reproduce.
        samples: input name to array, the batch axis first; the file may lack inputs that it has no use for.
        tolerance: largest `OutputDifference.max_rel` that is let pass.

    Returns:
        The difference of each output at each batch size.

    Raises:
        ExportError: the file does not run, or an output has another shape or differs by more than the tolerance.
    """
    differences: list[OutputDifference] = []
    with OnnxRuntimeRunner(model, name="the exported model") as runner:
        inputs = [spec.name for spec in runner.inputs]
        for batch, feeds in _batches(samples, runner.inputs):
            at = "" if batch is None else f" at batch {batch}"
            expected = reference(feeds)
            try:
                found = runner.infer({name: value for name, value in feeds.items() if name in inputs})
            except InferenceError as error:
                raise ExportError(
                    f"The exported model does not run{at}: {error} "
                    "Where forward holds a number for the batch, let it take x.shape[0]."
                ) from error
            for name, value in expected.items():
                if found[name].shape != value.shape:
                    raise ExportError(
                        f"The exported model does not reproduce its source{at}: output {name!r} has shape "
                        f"{found[name].shape}; expected {value.shape}. "
                        "Look in forward for squeeze() without an axis, or for a number for the batch."
                    )
                difference = measure_difference(name, batch, found[name], value)
                if not difference.max_rel <= tolerance:
                    raise ExportError(
                        f"The exported model does not reproduce its source{at}: output {name!r} differs by "
                        f"{difference.max_abs:.3g}, which is {difference.max_rel:.3g} of its largest magnitude; "
                        f"expected at most {tolerance:g}. Try another opset or simplify=False, and raise the tolerance "
                        "only if the difference does no harm."
                    )
                differences.append(difference)
    return differences


def measure_difference(output: str, batch: int | None, found: Array, expected: Array) -> OutputDifference:
    """Return the largest difference of two arrays of one shape, absolute and relative to the largest magnitude.

    Elements that are the same infinity, or NaN on both sides, do not differ; one that is finite on one side only, or
    infinite with another sign, differs by infinity.
    """
    got, want = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    finite = np.isfinite(got) & np.isfinite(want)
    alike = (got == want) | (np.isnan(got) & np.isnan(want))
    apart = np.where(alike, 0.0, np.inf)
    apart[finite] = np.abs(got[finite] - want[finite])
    max_abs = float(np.max(apart, initial=0.0))
    magnitude = float(np.max(np.abs(want[np.isfinite(want)]), initial=0.0))
    return OutputDifference(output, batch, max_abs, max_abs / max(magnitude, SMALLEST_MAGNITUDE))


def batch_of(samples: Mapping[str, Array], free: Mapping[str, Mapping[int, str]]) -> int | None:
    """Return the length of the batch axis, that is of the first axis 0 that is free; None where there is none.

    Args:
        samples: input name to array.
        free: input name to free axis to its symbol.
    """
    lengths = (samples[name].shape[0] for name, axes in free.items() if 0 in axes and samples[name].ndim)
    return next(lengths, None)


def with_batch(samples: Mapping[str, Array], free: Mapping[str, Mapping[int, str]], batch: int) -> dict[str, Array]:
    """Cut or repeat samples to another batch, along every axis that bears the symbol of an axis 0.

    Args:
        samples: input name to array.
        free: input name to free axis to its symbol.
        batch: the new length.
    """
    symbols = {axes[0] for axes in free.values() if 0 in axes}
    result = dict(samples)
    for name, axes in free.items():
        for axis, symbol in axes.items():
            if symbol in symbols:
                length = result[name].shape[axis]
                result[name] = np.take(result[name], np.arange(batch) % length, axis=axis)
    return result


def _batches(
    samples: Mapping[str, Array], specs: Sequence[TensorSpec]
) -> Iterator[tuple[int | None, Mapping[str, Array]]]:
    """Yield the samples as they are, then again with another batch where the model's is free."""
    free = {
        spec.name: {
            axis: symbol or "batch"
            for axis, symbol in enumerate(spec.shape or ())
            if isinstance(symbol, str) or (symbol is None and axis == 0)
        }
        for spec in specs
        if spec.name in samples
    }
    batch = batch_of(samples, free)
    yield batch, samples
    if batch is not None:
        # A single sample is what most models are used with, and what trips code that squeezes axes.
        other = 2 if batch == 1 else 1
        yield other, with_batch(samples, free, other)
