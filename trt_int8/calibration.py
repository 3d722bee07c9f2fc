"""The calibration stage: one pass of the FP32 model over the data, statistics for every method."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from calibrators.calibration import Calibration
from calibrators.collector import Statistics
from calibrators.errors import CalibrationError
from calibrators.protocols import Track, untracked
from engines.graph import PreparedModel
from engines.padding import Padding
from trt_int8 import __version__
from trt_int8.calibration_backend import DEFAULT_CALIBRATION_BACKEND, CalibrationBackendChoice
from trt_int8.calibration_job import DEFAULT_MAX_BATCHES, CalibrationJob, Tensors
from trt_int8.checkpoint import Checkpoint
from trt_int8.config import Search
from trt_int8.data import DataSpec
from trt_int8.idle_options import refuse_idle

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

_log = logging.getLogger(__name__)

__all__ = ["DEFAULT_MAX_BATCHES", "Tensors", "calibrate", "check_fits", "padding_left_out", "releases"]


def calibrate(
    model: str | os.PathLike[str],
    data: DataSpec,
    *,
    tensors: Tensors = "quantized",
    batch_size: int | None = None,
    max_batches: int | None = DEFAULT_MAX_BATCHES,
    preprocessing: Preprocessing | None = None,
    threads: int | None = None,
    statistics: Statistics = "histogram",
    stop_when_stable: Search | None = None,
    max_memory_bytes: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    backend: CalibrationBackendChoice = DEFAULT_CALIBRATION_BACKEND,
    padding_mask: str | None = None,
    lengths: str | None = None,
    ray: str | None = None,
    track: Track = untracked,
) -> Calibration:
    """Stream batches through an FP32 model once and keep what every calibration method needs.

    Args:
        model: an ONNX file.
        data: any form of DATA: an iterable of {input name: array}, a PyTorch DataLoader, a path, or
            "package.module:callable".
        tensors: "quantized" collects the tensors that Q/DQ takes scales from, for either target and whatever options;
            "tensorrt" or "cpu" those of one target's default options, which costs less; "all" every FP32 activation.
        batch_size: samples a batch, where the data is cut here; 1 by default.
        max_batches: stop after so many batches; None takes all.
        preprocessing: how images become arrays, for image folders.
        threads: number of batches that are run at a time, each in one thread; None takes one per usable core, but no
            more than 8. The result does not depend on it. For the processor of this machine: a GPU, or a worker of a
            Ray cluster, runs one batch at a time.
        statistics: "histogram" keeps what every method takes its scales from; "minmax" only each tensor's range, which
            costs less, and serves the method "minmax" alone.
        stop_when_stable: end at 32, 64, 128, ... batches once no scale by this method has moved by more than 1 % over
            the last doubling; None reads all.
        max_memory_bytes: what the activations that are handed out for counting may take, those of all batches that are
            run at a time together, in each worker of a Ray cluster; where they take more, the tensors are shared out
            over several passes, with the same result. None takes one pass whatever it needs.
        checkpoint: a file that the state is written to while the pass goes on; it is deleted at the end. None keeps
            none.
        checkpoint_every: batches between two checkpoints; None writes one a minute.
        resume: go on from the checkpoint, where there is one. The stream is read again up to there and must give the
            same batches; the result is the one that an undisturbed run would have had, to the bit.
        backend: what runs the model: "onnxruntime" (the processor); "cuda" (ONNX Runtime's CUDA provider) or "tensorrt"
            (an FP32 engine, built for it), where the activations are counted on the GPU and never leave it; "auto"
            takes a GPU where there is one. The activations differ in their last bits from one to the other, so that a
            calibration is recognised by the same one alone.
        padding_mask: name of the mask that tells real positions (1 or True) from those that fill sequences up to one
            length: an input of the model, or an array that goes along with the inputs, of shape (samples, positions).
            What fills up is left out of every activation with an axis of positions; where several have one, as the
            scores of an attention have, padded queries and padded keys alike. Tensors of which the graph does not tell
            where it lies are counted whole, and named in the log.
        lengths: the same, told by the number of real positions of each sample, which come first: shape (samples,).
        ray: address of a Ray cluster whose workers count the batches, see `trt_int8.ray_cluster`; the result is the
            same to the bit. None counts them in this process.
        track: shows progress.

    Returns:
        The calibration; `save` keeps it, `scales` reads any method from it.

    Raises:
        DataError: the data is missing, empty, of another shape or dtype, or not finite; it has changed since the
            checkpoint, or between two passes; or it can be read only once where several passes are needed.
        NonFiniteActivationError: an activation overflowed; the tensor, batch and node are named.
        CalibrationError: the checkpoint is of another model, or of a run that was told something else; the Ray cluster
            cannot be reached or does not do its work.
        MissingDependencyError: Ray is asked for and not installed.
        UsageError: padding is told by two arrays, or is to be left out on a GPU; or an option would have no effect.
        TrtInt8Error: see `engines.graph.prepare` for the model's own errors.
    """
    refuse_idle(
        {
            "resume": checkpoint is None and resume,
            "checkpoint_every": checkpoint is None and checkpoint_every is not None,
        },
        "there is no checkpoint",
        "name its file with checkpoint",
    )
    job = CalibrationJob(
        model,
        data,
        tensors=tensors,
        batch_size=batch_size,
        max_batches=max_batches,
        preprocessing=preprocessing,
        threads=threads,
        statistics=statistics,
        stop_when_stable=stop_when_stable,
        max_memory_bytes=max_memory_bytes,
        backend=backend,
        padding_mask=padding_mask,
        lengths=lengths,
        ray=ray,
    )
    for note in job.notes:
        _log.warning("%s", note)
    kept = None if checkpoint is None else Checkpoint(Path(checkpoint), checkpoint_every)
    calibration = job.run(kept, resume=resume, track=track)
    if kept is not None:
        kept.remove()
    return calibration


def check_fits(calibration: Calibration, prepared: PreparedModel) -> None:
    """Refuse a calibration that was made for another model, or by another release of trt-int8.

    Raises:
        CalibrationError: the graph or the weights differ from those that were calibrated, or the release differs.
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
    if releases(fingerprint.tool) != releases(__version__):
        raise CalibrationError(
            f"The calibration of {str(prepared.path)!r} was made by trt-int8 {fingerprint.tool}, and this is "
            f"{__version__}, which may count or place otherwise. Calibrate again, or use force (--force) to take it as "
            "it is."
        )


def padding_left_out(calibration: Calibration) -> Padding | None:
    """Return what tells the padding that a calibration left out; None where it left none out.

    Raises:
        CalibrationError: it says something else.
    """
    told = calibration.settings.get("padding")
    return None if told is None else Padding.parse(str(told))


def releases(tool: str) -> set[str]:
    """Return the releases that made a calibration: what is corrected within one, as by 0.1.2, counts no other way.

    Args:
        tool: the `tool` of a fingerprint: versions, with commas between those of merged parts.
    """
    return {".".join(version.split(".")[:2]) for version in tool.split(", ")}
