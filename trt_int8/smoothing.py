"""The smoothing stage: two passes over some data make a model, and its calibration, easier to quantize."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from calibrators.calibration import Calibration
from calibrators.collector import collect
from calibrators.protocols import Array, Track, untracked
from engines.activations import OnnxRuntimeActivations
from engines.graph import PreparedModel
from engines.onnxrt import tensor_specs
from engines.padding import PaddedTensors, Padding
from engines.sequence_axes import find_padding
from engines.smoothing import SmoothingSite, smooth, smoothing_sites
from trt_int8.calibration import padding_left_out
from trt_int8.data import BatchSource, DataSpec, open_data
from trt_int8.errors import ConfigError, DataError, ModelError, UsageError
from trt_int8.images import Preprocessing


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A smoothed model with the calibration that fits it.

    Attributes:
        prepared: the model, whose answers are those of the original up to float rounding.
        calibration: the original's, with the statistics of the smoothed tensors counted anew.
        tensors: the tensors of the original that were smoothed.
        factors: what each tensor's channels were divided by, by the name of what holds the quotients.
        notes: what was smoothed, and which of it by products of its own.
    """

    prepared: PreparedModel
    calibration: Calibration
    tensors: tuple[str, ...]
    factors: Mapping[str, Array]
    notes: tuple[str, ...]


def check_smoothing(calibration: Calibration, data: DataSpec | None, alpha: float) -> DataSpec:
    """Check what can be told without the model: before it is prepared, and the data are opened.

    Args:
        calibration: the model's.
        data: what it would be smoothed by.
        alpha: how much of the difficulty goes into the weights.

    Returns:
        The data.

    Raises:
        CalibrationError: the calibration holds ranges alone, or does not tell what padding it left out.
        ConfigError: `alpha` is not in [0, 1].
        UsageError: there is no data.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"smooth is {alpha:g}; expected a number from 0 to 1: 0.5 shares the difficulty evenly.")
    if data is None:
        raise UsageError(
            "Cannot smooth without data: the largest magnitude of every channel is needed, which a calibration does "
            "not hold. Name the calibration data (--data)."
        )
    padding_left_out(calibration)
    for name in calibration.tensors[:1]:
        calibration.histogram(name)  # the tensors that are not smoothed keep theirs
    return data


def check_smoothable(prepared: PreparedModel) -> None:
    """Check that a model has something to smooth.

    Raises:
        ModelError: it has not.
    """
    _sites(prepared)


def smooth_model(
    prepared: PreparedModel,
    calibration: Calibration,
    data: DataSpec | None,
    alpha: float,
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    track: Track = untracked,
) -> Smoothed:
    """Move the difficulty of normalized activations into the weights that read them; see `engines.smoothing`.

    The first pass finds the largest magnitude of every channel of the tensors to smooth, the second one counts the
    smoothed tensors; all other tensors keep their statistics, since their values do not change. Both leave out the
    padding that the calibration left out.

    Args:
        prepared: the model that was calibrated.
        calibration: its calibration.
        data: what it was calibrated on, or a part of it; read twice, up to its number of samples.
        alpha: in [0, 1]: how much of the difficulty goes into the weights.
        preprocessing: of `data`, for image folders.
        batch_size: samples per batch, see `trt_int8.data.open_data`; None takes the calibration's.
        threads: number of batches that are run at a time; None takes one per core.
        track: shows the progress.

    Raises:
        CalibrationError: the calibration holds ranges alone, or does not tell what padding it left out.
        ConfigError: `alpha` is not in [0, 1].
        UsageError: there is no data.
        ModelError: nothing in the model can be smoothed.
        DataError: the data hold no sample, can be read only once, or lack the array that tells padding.
    """
    data = check_smoothing(calibration, data, alpha)
    sites = _sites(prepared)
    kept = {name: calibration.histogram(name) for name in calibration.tensors}
    padding = padding_left_out(calibration)
    source = _open(prepared, calibration, data, preprocessing, batch_size, padding)
    source.require_rewindable("to smooth")
    amax = _channel_amax(prepared, sites, source, padding, threads, track)
    model = prepared.ir()
    factors = smooth(model, amax, alpha)
    smoothed = prepared.replaced(model)
    padded = None if padding is None else find_padding(smoothed, list(factors), padding)
    activations = OnnxRuntimeActivations(smoothed, list(factors), source, threads=threads, padded=padded)
    counted = collect(activations, track, source.batches)
    renewed = Calibration(
        kept | dict(counted.histograms),
        calibration.fingerprint,
        calibration.input_shapes,
        input_statistics=calibration.input_statistics,
        settings={**calibration.settings, "smooth": f"{alpha:g}"},
    )
    tensors = [site.tensor for site in sites]
    note = f"smoothed {len(sites)} normalized tensors with alpha {alpha:g}: {_some(tensors)}"
    shared = [site.tensor for site in sites if site.shared]
    if shared:
        note += f"; {len(shared)} of them, which other nodes read too, by a Mul of its own: {_some(shared)}"
    return Smoothed(smoothed, renewed, tuple(tensors), factors, (note,))


def _with_channels_last(padded: PaddedTensors) -> PaddedTensors:
    """Keep the tensors whose last axis, that of the channels, is still the last one without the padding."""
    return replace(padded, roles={name: roles for name, roles in padded.roles.items() if roles[-1] == "other"})


def _open(
    prepared: PreparedModel,
    calibration: Calibration,
    data: DataSpec,
    preprocessing: Preprocessing | None,
    batch_size: int | None,
    padding: Padding | None,
) -> BatchSource:
    """Open as much of the data as was calibrated."""
    fingerprint = calibration.fingerprint
    opened = partial(open_data, data, tensor_specs(prepared.proto)[0], preprocessing=preprocessing, padding=padding)
    source = opened(batch_size=batch_size, max_batches=fingerprint.batches)
    if source.batch_size is None or source.batch_size * fingerprint.batches >= fingerprint.samples:
        return source
    # In smaller batches than the calibration's, as many of them would end before its samples do.
    size = batch_size or math.ceil(fingerprint.samples / fingerprint.batches)
    return opened(batch_size=size, max_batches=math.ceil(fingerprint.samples / size))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _sites(prepared: PreparedModel) -> tuple[SmoothingSite, ...]:
    """Return what can be smoothed.

    Raises:
        ModelError: nothing can.
    """
    sites = smoothing_sites(prepared.ir())
    if not sites:
        raise ModelError(
            f"Cannot smooth {str(prepared.path)!r}: no normalization (LayerNormalization, RMSNormalization) has an "
            "output that matrix products with constant weights read. Leave smoothing out."
        )
    return sites


def _channel_amax(
    prepared: PreparedModel,
    sites: Sequence[SmoothingSite],
    source: BatchSource,
    padding: Padding | None,
    threads: int | None,
    track: Track,
) -> dict[str, Array]:
    """Return the largest magnitude of every channel of the tensors to smooth, over all batches."""
    largest = {site.tensor: np.zeros(site.channels, np.float32) for site in sites}
    padded = None if padding is None else _with_channels_last(find_padding(prepared, list(largest), padding))
    activations = OnnxRuntimeActivations(prepared, list(largest), source, threads=threads, blocked=False, padded=padded)
    samples = 0
    for batch in track(activations.activations(), "smooth: channels", source.batches):
        samples += batch.samples
        for name, values in batch.values.items():
            seen = np.abs(values.reshape(-1, largest[name].size)).max(axis=0, initial=0)
            np.maximum(largest[name], seen, out=largest[name])
    if not samples:
        raise DataError(f"Cannot smooth: {source.description} held no sample.")
    return largest
