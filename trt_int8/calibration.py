"""The calibration stage: one pass of the FP32 model over the data, statistics for every method."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from calibrators.calibration import Calibration, Fingerprint
from calibrators.collector import collect
from calibrators.errors import CalibrationError
from calibrators.protocols import Track, untracked
from engines.activations import OnnxRuntimeActivations, tensors_to_calibrate
from engines.graph import PreparedModel, prepare
from engines.onnxrt import tensor_specs
from trt_int8 import __version__
from trt_int8.choices import check_choice
from trt_int8.data import DataSpec, open_data

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

Tensors = Literal["quantized", "all"]

DEFAULT_MAX_BATCHES = 1000


def calibrate(
    model: str | os.PathLike[str],
    data: DataSpec,
    *,
    tensors: Tensors = "quantized",
    batch_size: int | None = None,
    max_batches: int | None = DEFAULT_MAX_BATCHES,
    preprocessing: Preprocessing | None = None,
    data_id: str | None = None,
    threads: int | None = None,
    track: Track = untracked,
) -> Calibration:
    """Stream batches through an FP32 model once and keep what every calibration method needs.

    Args:
        model: an ONNX file.
        data: any form of DATA: an iterable of {input name: array}, a PyTorch DataLoader, a path, or
            "package.module:callable".
        tensors: "quantized" collects the tensors that Q/DQ takes scales from; "all" every FP32 activation.
        batch_size: samples a batch, where the data is cut here; 1 by default.
        max_batches: stop after so many batches; None takes all.
        preprocessing: how images become arrays, for image folders.
        data_id: a name for data that comes from a callable, so that its calibration can be recognised later.
        threads: ONNX Runtime's threads inside an operator; None takes its default.
        track: shows progress.

    Returns:
        The calibration; `save` keeps it, `scales` reads any method from it.

    Raises:
        DataError: the data is missing, empty, of another shape or dtype, or not finite.
        NonFiniteActivationError: an activation overflowed; the tensor, batch and node are named.
        TrtInt8Error: see `engines.graph.prepare` for the model's own errors.
    """
    check_choice("tensors", tensors, Tensors)
    prepared = prepare(model)
    inputs, _ = tensor_specs(prepared.proto)
    names = tensors_to_calibrate(prepared, tensors)
    source = open_data(
        data,
        inputs,
        batch_size=batch_size,
        max_batches=max_batches,
        preprocessing=preprocessing,
        data_id=data_id,
    )
    activations = OnnxRuntimeActivations(prepared, names, source, threads=threads)
    collected = collect(activations, track=track, total=source.batches)
    fingerprint = Fingerprint(
        graph=prepared.graph_hash,
        weights=prepared.weights_hash,
        data=(source.rolling_hash or "",),
        preprocessing=source.preprocessing,
        tool=__version__,
        batches=collected.batches,
        samples=collected.samples,
    )
    return Calibration(collected.histograms, fingerprint, collected.input_shapes)


def check_fits(calibration: Calibration, prepared: PreparedModel) -> None:
    """Refuse a calibration that was made for another model.

    Raises:
        CalibrationError: the graph or the weights differ from those that were calibrated.
    """
    fingerprint = calibration.fingerprint
    changed = [
        what
        for what, calibrated, found in (
            ("graph", fingerprint.graph, prepared.graph_hash),
            ("weights", fingerprint.weights, prepared.weights_hash),
        )
        if calibrated != found
    ]
    if changed:
        raise CalibrationError(
            f"The calibration does not belong to {str(prepared.path)!r}: its {' and '.join(changed)} differ from what "
            "was calibrated. Calibrate this model, or use force (--force) to take scales by the tensors' names."
        )
