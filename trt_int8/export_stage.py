"""The export stage of a configuration: load the model, take real inputs from its data, export and check."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from calibrators.protocols import Array, Track, untracked
from engines.runner import TensorSpec
from trt_int8.config import ModelConfig
from trt_int8.data import BatchSource, open_data
from trt_int8.export import ExportResult, export_onnx
from trt_int8.images import Preprocessing
from trt_int8.joining import joined
from trt_int8.models import load_model
from trt_int8.random_data import random_feeds

SAMPLES = 2
"""Samples of the batch that is exported and checked; the exporter would take a batch of 1 for a constant."""


def export_configured(
    config: ModelConfig,
    output: Path,
    *,
    data: str | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int | None = None,
    track: Track = untracked,
) -> ExportResult:
    """Export the model that a configuration names.

    Args:
        config: the model.
        output: the ONNX file to write.
        data: real inputs for the check against PyTorch; random ones where None.
        preprocessing: of `data`, for image folders.
        batch_size: of `data`, as in the calibration.
        track: shows progress.

    Raises:
        ExportError: the model cannot be loaded or exported, or its ONNX form does not reproduce it.
        DataError: the data do not fit the inputs that the configuration states.
    """
    if config.kind == "onnx":
        return export_onnx(config.source, {}, output, track=track)
    model = load_model(
        config.source,
        arguments=config.arguments,
        checkpoint=config.checkpoint,
        checkpoint_key=config.checkpoint_key,
        strip_prefix=config.strip_prefix or None,
    )
    if config.kind == "pt2":
        return export_onnx(model, {}, output, opset=config.opset, track=track)
    specs = [item.spec() for item in config.inputs]
    if data is None:
        inputs: Mapping[str, Array] = random_feeds(
            specs, SAMPLES, built_for={item.name: item.shape for item in config.inputs}
        )
    else:
        source = open_data(data, specs, batch_size=batch_size, preprocessing=preprocessing)
        inputs = _first_samples(source, specs)
    dynamic = {item.name: dict(item.free_axes) for item in config.inputs}
    return export_onnx(model, inputs, output, opset=config.opset, dynamic=dynamic, track=track)


def _first_samples(source: BatchSource, specs: list[TensorSpec]) -> Mapping[str, Array]:
    """Return the first samples of the data as one batch of at least `SAMPLES`, where the batch is free."""
    return next(iter(joined(islice(source, SAMPLES), specs, SAMPLES))).feeds
