"""Carries a model of the zoo, or any other one, through both targets, and measures what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zoo.inputs import Feeds

from calibrators.calibration import Calibration
from engines.lint import lint
from engines.onnxrt import OnnxRuntimeRunner
from engines.placement import Target
from engines.placement_options import Residual
from trt_int8.calibration import calibrate
from trt_int8.config import Method
from trt_int8.quantization import quantize
from trt_int8.quantize_result import Int8Precision, QuantizeResult

METHOD: Method = "mse"
"""The method that harms outputs least where weights are random: what is left to see is the placement."""

Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized model, and what it answered.

    Attributes:
        result: of `trt_int8.quantization.quantize`.
        outputs: the float outputs, or those of whole numbers where there is no other; all batches joined and flattened.
        sqnr_db: of each float output, against the FP32 model's.
    """

    result: QuantizeResult
    outputs: Outputs
    sqnr_db: Mapping[str, float]

    @property
    def worst_db(self) -> float:
        """The least SQNR of an output."""
        return min(self.sqnr_db.values())

    @property
    def quantized(self) -> int:
        """Number of weighted nodes that compute on INT8."""
        return sum(decision.quantized for decision in self.result.placement.decisions)

    @property
    def findings(self) -> list[str]:
        """What the linter holds against the model; notes left out."""
        found = lint(self.result.path).findings
        return [f"{entry.rule} at {entry.node}: {entry.what}" for entry in found if entry.severity != "note"]

    @property
    def floating(self) -> list[str]:
        """The weighted nodes that stay float, and by which rule."""
        return [f"{held.node} ({held.rule}: {held.reason})" for held in self.result.held_back]

    @property
    def pairs(self) -> int:
        """Number of Q/DQ pairs on activations."""
        return len(self.result.placement.activations)


class Subject:
    """A model with the data that it is calibrated and judged on; every figure is computed when it is first asked for.

    Args:
        model: an ONNX file.
        calibration_batches: what it is calibrated on.
        held_back: what it is judged on.
        folder: where the quantized models go.
    """

    def __init__(
        self, model: Path, calibration_batches: Sequence[Feeds], held_back: Sequence[Feeds], folder: Path
    ) -> None:
        self.model = model
        self._batches = calibration_batches
        self._held_back = held_back
        self._folder = folder
        self._calibration: Calibration | None = None
        self._reference: Outputs | None = None
        self._made: dict[tuple[Target, Int8Precision, Residual], Quantized] = {}

    @property
    def calibration(self) -> Calibration:
        """The calibration of the FP32 model."""
        if self._calibration is None:
            self._calibration = calibrate(self.model, self._batches)
        return self._calibration

    @property
    def reference(self) -> Outputs:
        """What the FP32 model answers."""
        if self._reference is None:
            self._reference = self._run(self.model)
        return self._reference

    def quantized(self, target: Target, *, precision: Int8Precision = "int8", residual: Residual = "int8") -> Quantized:
        """Quantize the model, and run it as its target's models are run."""
        key = (target, precision, residual)
        if key not in self._made:
            path = self._folder / f"{self.model.stem}.{target}.{precision}.{residual}.onnx"
            result = quantize(
                self.model, self.calibration, output=path, method=METHOD, target=target, precision=precision,
                residual=residual,
            )  # fmt: skip
            outputs = self._run(path)
            figures = {name: sqnr_db(self.reference[name], outputs[name]) for name in outputs}
            self._made[key] = Quantized(result, outputs, figures)
        return self._made[key]

    def _run(self, model: Path) -> Outputs:
        with OnnxRuntimeRunner(model, threads=1) as runner:
            answers = [runner.infer(feeds) for feeds in self._held_back]
        floats = [name for name, value in answers[0].items() if value.dtype.kind == "f"] or list(answers[0])
        return {name: np.concatenate([answer[name].ravel() for answer in answers]) for name in floats}


def sqnr_db(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Return 10 log10(sum r^2 / sum (r - c)^2) in dB: infinity where nothing differs, NaN for values that are none."""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    noise = float(np.sum((r - c) ** 2))
    if math.isnan(noise):
        return math.nan
    return math.inf if noise == 0.0 else 10.0 * math.log10(float(np.sum(r * r)) / noise)


def disagreement(reference: Outputs, one: Outputs, other: Outputs) -> dict[str, float]:
    """Return for each output by how much two models differ, as a multiple of what is allowed.

    Allowed is 1.5 times the larger one's own error against the reference, and 0.5 % of the reference: two independent
    errors of the same size lie 1.4 times that size apart.
    """
    found = {}
    for name, values in reference.items():
        own = max(_rms(one[name] - values), _rms(other[name] - values))
        found[name] = _rms(one[name] - other[name]) / (1.5 * own + 0.005 * _rms(values))
    return found


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
