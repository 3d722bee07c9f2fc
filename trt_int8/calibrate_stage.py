"""Calibrating into a file: kept where it fits already, taken up again where it was interrupted, else made anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibrators.calibration import DEFAULT_METHOD, Calibration
from calibrators.convergence import judge
from calibrators.errors import CacheFormatError, CalibrationError
from calibrators.files import remove_leftovers
from calibrators.protocols import Track, untracked
from trt_int8.calibration_job import CalibrationJob
from trt_int8.checkpoint import Checkpoint, checkpoint_beside


@dataclass(frozen=True, slots=True)
class CalibrateResult:
    """A calibration in its file.

    Attributes:
        path: the file.
        calibration: what it holds.
        kept: whether it was there already, and fitted.
        notes: what a user should know, one line each.
    """

    path: Path
    calibration: Calibration
    kept: bool
    notes: tuple[str, ...]


def calibrate_into(
    output: Path,
    job: CalibrationJob,
    *,
    method: str = DEFAULT_METHOD,
    checkpoint_every: int | None = None,
    resume: bool = False,
    force: bool = False,
    track: Track = untracked,
) -> CalibrateResult:
    """Calibrate and write the file.

    A file that is there already is kept if it is exactly what would be made: the same model, settings and data, which
    are read for it; where it is not, it stays as it is, and what changed is the error. While the pass goes on, its
    state lies beside the output (`trt_int8.checkpoint`); it is deleted when the output is written.

    Args:
        output: the file.
        job: what to calibrate.
        method: whose convergence is reported.
        checkpoint_every: batches between two checkpoints; None writes one a minute.
        resume: go on from the state of an interrupted run, where there is one.
        force: calibrate anew whatever the file holds, and replace it.
        track: shows progress.

    Raises:
        CalibrationError: the file holds something else.
        TrtInt8Error: see `trt_int8.calibration.calibrate`.
        FileAccessError: the file cannot be written; the last checkpoint stays.
    """
    checkpoint = Checkpoint(checkpoint_beside(output), checkpoint_every)
    calibration = None if force else _kept(output, job, track)
    kept = calibration is not None
    if calibration is None:
        calibration = job.run(checkpoint, resume=resume, track=track)
        calibration.save(output)
    remove_leftovers(output)
    checkpoint.remove()
    return CalibrateResult(output, calibration, kept, (*_notes(calibration, method), *job.notes))


def _kept(output: Path, job: CalibrationJob, track: Track) -> Calibration | None:
    """Return the calibration that lies there if it is the one that would be made; None where nothing lies there.

    Raises:
        CalibrationError: something else does.
    """
    if not output.exists():
        return None
    try:
        calibration = Calibration.load(output)
    except CacheFormatError as error:
        raise CalibrationError(
            f"Cannot calibrate into {str(output)!r}: it is there already and holds no calibration that can be read. "
            "Name another --output, or replace it with --force."
        ) from error
    change = job.what_changed(calibration, track)
    if change is not None:
        raise CalibrationError(
            f"Cannot reuse the calibration in {str(output)!r}: {change}. Name another --output, or calibrate anew in "
            "its place with --force."
        )
    return calibration


def _notes(calibration: Calibration, method: str) -> tuple[str, ...]:
    verdict = judge(calibration.convergence, method)
    settled = () if verdict is None else (str(verdict),)
    return (*settled, *(f"{name} was always 0: its scale is 1" for name in calibration.always_zero))
