"""`trt-int8 cache check`: whether new data stay within the ranges that a model was calibrated for.

Two things can be wrong with them. They drifted: other light, another sensor, and some tensors clip more than they did.
Or they are not what the model was calibrated on at all: a forgotten division by 255 makes an input 255 times as large,
which the input's own range shows at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from calibrators.calibration import DEFAULT_METHOD, DEFAULT_PERCENTILE, Calibration
from calibrators.collector import collect
from calibrators.errors import CalibrationError
from calibrators.input_statistics import Inputs, merge_inputs, statistics_of_feeds
from calibrators.protocols import Track, untracked
from engines.activations import OnnxRuntimeActivations
from engines.graph import float_activations, prepare
from engines.onnxrt import tensor_specs
from engines.sequence_axes import find_padding
from trt_int8.cache_verdict import CheckResult, compare_tensor, judge
from trt_int8.calibration import DEFAULT_MAX_BATCHES, check_fits, padding_left_out
from trt_int8.data import DataBatch, DataSpec, open_data
from trt_int8.idle_options import refuse_idle_percentile
from trt_int8.input_alarm import gross_difference, summarize_input
from trt_int8.quantization import method_name

if TYPE_CHECKING:
    import os

    from trt_int8.images import Preprocessing


def check_data(
    calibration: Calibration,
    data: DataSpec,
    model: str | os.PathLike[str],
    *,
    method: str = DEFAULT_METHOD,
    percentile: float = DEFAULT_PERCENTILE,
    batch_size: int | None = None,
    max_batches: int | None = DEFAULT_MAX_BATCHES,
    preprocessing: Preprocessing | None = None,
    threads: int | None = None,
    force: bool = False,
    track: Track = untracked,
) -> CheckResult:
    """Run new data through a model and compare its activations with a calibration.

    The padding that the calibration left out is left out of the new data too.

    Args:
        calibration: of this model.
        data: any form of DATA.
        model: the FP32 ONNX file that was calibrated.
        method: the calibration method whose thresholds are judged by.
        percentile: of the percentile method.
        batch_size: samples a batch, where the data is cut here; 1 by default.
        max_batches: stop after so many batches; None takes all.
        preprocessing: how images become arrays, for image folders.
        threads: number of batches that are run at a time, each in one thread; None takes one per core, 8 at most.
        force: use a calibration of other weights or another graph, as far as tensors have equal names.
        track: shows progress.

    Raises:
        CalibrationError: the calibration belongs to another model or holds ranges alone, or there is no such method.
        UsageError: a percentile for another method.
        DataError: the data are missing, empty, of another shape or dtype, or not finite, or lack the array that tells
            padding.
        NonFiniteActivationError: an activation overflowed.
    """
    if calibration.statistics != "histogram":
        raise CalibrationError(
            "Cannot check data against a calibration of ranges alone: how many values lie beyond the thresholds is "
            "told by histograms. Calibrate again without --statistics minmax."
        )
    refuse_idle_percentile(percentile, method)
    thresholds = calibration.amax(method, percentile=percentile)
    prepared = prepare(model)
    if not force:
        check_fits(calibration, prepared)
    present = set(float_activations(prepared.ir()))
    names = [name for name in calibration.tensors if name in present]
    if not names:
        raise CalibrationError(
            f"Cannot check {str(prepared.path)!r} against the calibration: none of its {len(calibration.tensors)} "
            "tensors is in the graph. Give the model that was calibrated."
        )
    inputs, _ = tensor_specs(prepared.proto)
    padding = padding_left_out(calibration)
    source = open_data(
        data,
        inputs,
        batch_size=batch_size,
        max_batches=max_batches,
        preprocessing=preprocessing,
        padding=padding,
    )
    padded = None if padding is None else find_padding(prepared, names, padding)
    fed_inputs = _FedInputs()
    activations = OnnxRuntimeActivations(prepared, names, fed_inputs.noted(source), threads=threads, padded=padded)
    collected = collect(activations, track=track, total=source.batches)
    fed = {spec.name for spec in inputs}
    rows = [
        compare_tensor(name, name in fed, calibration.histogram(name), collected.histograms[name], thresholds[name])
        for name in names
    ]
    notes = []
    if source.rolling_hash in calibration.fingerprint.data:
        notes.append("these are the data that were calibrated on")
    if source.preprocessing != calibration.fingerprint.preprocessing:
        notes.append(
            f"the preprocessing differs: {source.preprocessing or 'none'} here, "
            f"{calibration.fingerprint.preprocessing or 'none'} in calibration"
        )
    verdict, line = judge(rows, fed_inputs.unlike(calibration, collected.samples))
    ordered = sorted(rows, key=lambda row: (-row.clipped, -row.amax_ratio))
    return CheckResult(
        verdict,
        line,
        method_name(method, percentile),
        collected.batches,
        collected.samples,
        tuple(ordered),
        tuple(notes),
    )


class _FedInputs:
    """Mean, deviation and range of what is fed: they show what stays within the calibrated range and is yet unlike."""

    def __init__(self) -> None:
        self._seen: Inputs = {}

    def noted(self, batches: Iterable[DataBatch]) -> Iterator[DataBatch]:
        """Pass batches on, and count what they feed."""
        for batch in batches:
            self._seen = merge_inputs(self._seen, statistics_of_feeds(batch.feeds, batch.samples))
            yield batch

    def unlike(self, calibration: Calibration, samples: int) -> list[str]:
        """Say which inputs look unlike those of a calibration."""
        found = []
        for name, statistics in self._seen.items():
            if name in calibration.input_statistics:
                told = summarize_input(calibration.input_statistics[name])
                seen = summarize_input(statistics)
                hint = gross_difference(told, seen, samples)
                if hint is not None:
                    found.append(f"input {name} has {seen}, and had {told} in calibration{hint}")
        return found
