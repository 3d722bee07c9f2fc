"""The `auto` method: the scales that do least harm to the model's outputs, measured on held-back data.

First every method is tried for the whole model. Then, tensor by tensor in graph order, every other method's scale is
tried for that tensor alone, or for those that share one scale, and taken where it gains more than noise. Harm is the
squared error of the float outputs against FP32, relative to the outputs' energy, per sample; a gain counts where its
mean over the samples exceeds two standard errors and one per cent of the harm.

The trials share one session: the scales of the Q/DQ nodes are inputs of the graph, so that a trial costs inference
only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibrators.calibration import SEARCHES, Calibration
from calibrators.protocols import Array, Track, untracked
from engines.graph import PreparedModel, name_of, open_session
from engines.onnxrt import tensor_specs
from engines.placement import Placement
from engines.qdq import insert_qdq
from engines.scale_groups import chosen_together, shared_scales, without_silent
from trt_int8.data import DataBatch
from trt_int8.errors import DataError
from trt_int8.joining import joined

STANDARD_ERRORS = 2.0
LEAST_GAIN = 0.01
LEAST_DIFFERENCE = 0.02
"""Scales closer together than this are not tried against each other: the difference is below INT8's own step."""

MAX_SAMPLES = 128
JOINED_SAMPLES = 32
"""Held-back samples that are run at once where the model's batch is free; each set of scales runs them all."""


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """What `auto` took, and why.

    Attributes:
        scales: scale by tensor.
        methods: method by tensor.
        whole_model: harm of each method when used for the whole model: relative squared error, the lower the better.
        harm: harm of the final choice.
        samples: number of held-back samples that it was measured on.
        reasons: one line for the whole-model choice and one for every tensor that departs from it.
    """

    scales: dict[str, float]
    methods: dict[str, str]
    whole_model: dict[str, float]
    harm: float
    samples: int
    reasons: tuple[str, ...]


def choose_scales(
    prepared: PreparedModel,
    placement: Placement,
    calibration: Calibration,
    batches: Iterable[DataBatch],
    *,
    percentile: float,
    track: Track = untracked,
) -> AutoChoice:
    """Choose a method for the whole model and then for each tensor.

    Args:
        prepared: the FP32 model.
        placement: a placement for TensorRT; harm is judged with its Q/DQ run as exact fake quantization.
        calibration: gives every method's scales.
        batches: held-back data, not the calibration's; the first `MAX_SAMPLES` samples are used.
        percentile: of the percentile method.
        track: shows progress.

    Raises:
        DataError: there is no sample, or the model has no float output to judge by.
    """
    silent = calibration.always_zero
    scales = {
        method: without_silent(placement, calibration.scales(method, percentile=percentile), silent)
        for method in SEARCHES
    }
    trial = _Trial(prepared, placement, scales["minmax"], batches)
    harms = {method: trial.harm(scales[method]) for method in track(SEARCHES, "auto: whole model", len(SEARCHES))}
    whole = min(SEARCHES, key=lambda method: float(harms[method].mean()))
    ranking = ", ".join(f"{method} {harms[method].mean():.3g}" for method in SEARCHES)
    reasons = [f"whole model: {whole} does least harm to the outputs on {trial.samples} samples ({ranking})"]
    chosen = {tensor: scales[whole][tensor] for tensor in placement.tensors}
    methods = dict.fromkeys(placement.tensors, whole)
    best = harms[whole]
    together = chosen_together(placement)
    for tensors in track(together, "auto: tensors", len(together)):
        others = [method for method in SEARCHES if method != whole]
        largest = {method: max(scales[method][tensor] for tensor in tensors) for method in others}
        for method in _distinct(max(chosen[tensor] for tensor in tensors), largest):
            harm = trial.harm({**chosen, **{tensor: scales[method][tensor] for tensor in tensors}})
            if gains(best, harm):
                reasons.append(
                    f"{', '.join(tensors)}: {method} instead of {methods[tensors[0]]}: "
                    f"harm {best.mean():.3g} -> {harm.mean():.3g}"
                )
                best = harm
                for tensor in tensors:
                    chosen[tensor], methods[tensor] = scales[method][tensor], method
    return AutoChoice(
        scales=chosen,
        methods=methods,
        whole_model={method: float(harm.mean()) for method, harm in harms.items()},
        harm=float(best.mean()),
        samples=trial.samples,
        reasons=tuple(reasons),
    )


def gains(before: NDArray[np.float64], after: NDArray[np.float64]) -> bool:
    """Tell whether per-sample harms `after` are lower than `before` by more than noise (a paired comparison)."""
    difference = before - after
    mean = float(difference.mean())
    if mean <= LEAST_GAIN * float(before.mean()):
        return False
    if difference.size < 2:
        return True
    return mean > STANDARD_ERRORS * float(difference.std(ddof=1)) / math.sqrt(difference.size)


def _distinct(current: float, others: Mapping[str, float]) -> list[str]:
    """Return the methods whose scale differs noticeably from the current one and from one another."""
    kept: list[str] = []
    seen = [current]
    for method, scale in others.items():
        if all(abs(scale / other - 1) > LEAST_DIFFERENCE for other in seen):
            kept.append(method)
            seen.append(scale)
    return kept


class _Trial:
    """Measures the harm of any set of scales, with one session."""

    def __init__(
        self,
        prepared: PreparedModel,
        placement: Placement,
        scales: Mapping[str, float],
        batches: Iterable[DataBatch],
    ) -> None:
        self._placement = placement
        reference = open_session(prepared.proto, execution="native")
        self._outputs = [output.name for output in reference.get_outputs() if "float" in output.type]
        if not self._outputs:
            raise DataError(f"Cannot choose scales: {prepared.path.name!r} has no float output to judge them by.")
        self._batches: list[tuple[dict[str, Array], int]] = []
        self._reference: list[list[Array]] = []
        self.samples = 0
        inputs, _ = tensor_specs(prepared.proto)
        for batch in joined(batches, inputs, JOINED_SAMPLES):
            self._batches.append((dict(batch.feeds), batch.samples))
            self._reference.append(reference.run(self._outputs, dict(batch.feeds)))
            self.samples += batch.samples
            if self.samples >= MAX_SAMPLES:
                break
        if not self.samples:
            raise DataError("Cannot choose scales: the held-back data holds no sample. Give other data with --data.")
        model = insert_qdq(prepared, placement, scales).model
        self._scale_inputs = _expose_scales(model, placement)
        self._session = open_session(ir.to_proto(model), execution="exact")

    def harm(self, scales: Mapping[str, float]) -> NDArray[np.float64]:
        """Return the relative squared error of the outputs, one value per sample."""
        scales = shared_scales(self._placement, scales)
        feeds = {name: np.asarray(scales[tensor], np.float32) for name, tensor in self._scale_inputs}
        harms = [
            _relative_error(expected, self._session.run(self._outputs, inputs | feeds), samples)
            for (inputs, samples), expected in zip(self._batches, self._reference, strict=True)
        ]
        return np.concatenate(harms)


def _expose_scales(model: ir.Model, placement: Placement) -> list[tuple[str, str]]:
    """Turn the scales of the activations into graph inputs; return (input name, tensor whose scale it takes)."""
    graph = model.graph
    scales = {node.inputs[0]: node.inputs[1] for node in graph if node.op_type == "QuantizeLinear"}
    by_tensor = {value.name: scale for value, scale in scales.items() if value is not None and scale is not None}
    exposed: list[tuple[str, str]] = []
    for point in placement.activations:
        if point.amax is not None:
            continue  # nothing to choose: the graph fixes this scale
        scale = by_tensor[point.tensor]
        graph.initializers.pop(name_of(scale))
        scale.const_value = None
        scale.shape, scale.dtype = ir.Shape(()), ir.DataType.FLOAT
        graph.inputs.append(scale)
        exposed.append((name_of(scale), point.scale_of))
    return exposed


def _relative_error(expected: Sequence[Array], found: Sequence[Array], samples: int) -> NDArray[np.float64]:
    """Sum over the outputs of ||expected - found||^2 / mean ||expected||^2, per sample."""
    total = np.zeros(samples)
    for reference, candidate in zip(expected, found, strict=True):
        rows = reference.shape[0] if reference.ndim else 1
        if rows < samples:
            raise DataError(
                f"Cannot judge scales by an output of shape {reference.shape}: its first axis does not hold the "
                f"{samples} samples of the batch. Use --batch-size 1."
            )
        per_row = reference.reshape(rows, -1)[:samples].astype(np.float64)
        error = ((per_row - candidate.reshape(rows, -1)[:samples]) ** 2).sum(axis=1)
        energy = (per_row**2).sum(axis=1).mean()
        total += error / max(float(energy), np.finfo(np.float32).tiny)
    return total
