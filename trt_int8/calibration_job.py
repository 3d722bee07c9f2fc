"""A calibration that is ready to run: what it is made from, whether an earlier one is the same, and how it is run.

Where the activations of all tensors do not fit the memory, the tensors are shared out over several passes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Literal

from calibrators.calibration import Calibration
from calibrators.collector import Statistics
from calibrators.errors import CalibrationError
from calibrators.protocols import Track, untracked
from engines.activations import worker_count
from engines.calibrated_tensors import tensors_to_calibrate
from engines.graph import prepare
from engines.onnxrt import tensor_specs
from engines.sequence_axes import find_padding
from trt_int8 import __version__
from trt_int8.calibration_backend import (
    DEFAULT_CALIBRATION_BACKEND,
    CalibrationBackendChoice,
    choose_calibration_backend,
)
from trt_int8.calibration_memory import plan_memory
from trt_int8.calibration_pass import CalibrationPass
from trt_int8.checkpoint import FINISHED, Checkpoint
from trt_int8.choices import check_choice
from trt_int8.config import Search
from trt_int8.data import DataSpec, open_data, padding_from
from trt_int8.errors import DataError, UsageError
from trt_int8.float_models import check_float
from trt_int8.idle_options import refuse_idle
from trt_int8.ray_cluster import RayCluster

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

_log = logging.getLogger(__name__)

Tensors = Literal["quantized", "tensorrt", "cpu", "all"]

DEFAULT_MAX_BATCHES = 1000

_SETTINGS = {"stop_when_stable": "--stop-when-stable", "backend": "the backend"}
"""Settings by the words that a message has for them."""

_NAMED = 8
"""Tensors that a note lists."""


class CalibrationJob:
    """A calibration that is ready to run: the model is prepared, the data are open, the tensors chosen.

    The arguments are those of `trt_int8.calibration.calibrate`.
    """

    def __init__(
        self,
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
        backend: CalibrationBackendChoice = DEFAULT_CALIBRATION_BACKEND,
        padding_mask: str | None = None,
        lengths: str | None = None,
        ray: str | None = None,
    ) -> None:
        padding = padding_from(padding_mask, lengths)
        self._cluster = None if ray is None else RayCluster(ray)
        check_choice("tensors", tensors, Tensors)
        if stop_when_stable is not None:
            check_choice("stop_when_stable", stop_when_stable, Search)
        check_choice("statistics", statistics, Statistics)
        if statistics == "minmax" and stop_when_stable not in (None, "minmax"):
            raise UsageError(
                f"Cannot stop when the scales of {stop_when_stable!r} are stable: --statistics minmax keeps ranges "
                "alone, which give the scales of 'minmax'. Stop by that, or keep histograms."
            )
        choose = choose_calibration_backend if self._cluster is None else self._cluster.choose_backend
        self._backend = choose("onnxruntime" if padding is not None and backend == "auto" else backend)
        if padding is not None and self._backend.on_gpu:
            raise UsageError(
                f"Cannot leave padding out by the {padding} where activations are counted on a GPU (--backend "
                f"{backend}): they are counted whole there. Take --backend onnxruntime."
            )
        refuse_idle(
            {"--threads": threads is not None and self._cluster is not None},
            "each worker of a Ray cluster runs one batch at a time",
            "calibrate without --ray",
        )
        refuse_idle(
            {"--threads": threads is not None and backend != "auto" and self._backend.on_gpu},
            "a GPU runs one batch at a time",
            "take --backend onnxruntime",
        )
        check_float(model, "calibrate")
        self._prepared = prepare(model)
        inputs, _ = tensor_specs(self._prepared.proto)
        self._tensors = tensors_to_calibrate(self._prepared, tensors)
        self._source = open_data(
            data,
            inputs,
            batch_size=batch_size,
            max_batches=max_batches,
            preprocessing=preprocessing,
            padding=padding,
        )
        self._padded = None if padding is None else find_padding(self._prepared, self._tensors, padding)
        self._threads = threads
        self._statistics = statistics
        self._stop_when_stable = stop_when_stable
        self._max_memory_bytes = max_memory_bytes
        self._settings = {
            "stop_when_stable": stop_when_stable,
            **({"statistics": statistics} if statistics != "histogram" else {}),
            "padding": None if padding is None else str(padding),
            **self._backend.settings,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it is done, a line each."""
        whole = () if self._padded is None else self._padded.unknown
        if not whole:
            return ()
        more = f" and {len(whole) - _NAMED} more" if len(whole) > _NAMED else ""
        return (
            f"counted with their padding, as the graph does not tell where it lies: {', '.join(whole[:_NAMED])}{more}",
        )

    def run(
        self, checkpoint: Checkpoint | None = None, *, resume: bool = False, track: Track = untracked
    ) -> Calibration:
        """Calibrate; see `trt_int8.calibration.calibrate`. The checkpoint is left for the caller to remove.

        Args:
            checkpoint: where the state is kept; None for nowhere.
            resume: go on from the checkpoint, where there is one.
            track: shows progress.
        """
        stream = iter(self._source)
        first = next(stream)
        passes = self._passes({name: value.shape for name, value in first.feeds.items()})
        parts: list[Calibration] = []
        with nullcontext() if self._cluster is None else self._cluster:
            for index, names in enumerate(passes):
                batches = chain([first], stream) if index == 0 else iter(self._source)
                part = self._part(names, index, len(passes), checkpoint, resume=resume)
                # Of several passes that are done, the first is read again and checked, and the others agree with it.
                found = part.earlier if index > 0 and _is_finished(part.earlier) else None
                if found is None:
                    found = part.run(batches, self._source.batches, track)
                    if part.checkpoint is not None and len(passes) > 1:
                        part.checkpoint.save(found.annotated(settings={**found.settings, FINISHED: True}))
                parts.append(found)
        return self._joined(parts)

    def what_changed(self, calibration: Calibration, track: Track = untracked) -> str | None:
        """Say why a calibration is not the one that this job would make; None where it is.

        Where model and settings agree, the data are read, which takes no inference.

        Args:
            calibration: made earlier, perhaps.
            track: shows the progress of reading.
        """
        wanted = calibration.fingerprint
        if len(wanted.data) != 1:
            return f"it was merged of {len(wanted.data)} parts"
        changes = self._changes(calibration, self._tensors)
        if changes:
            return "; ".join(changes)
        if not self._source.rewindable:
            return f"{self._source.description} can be read only once, so nothing tells whether it is the same data"
        read, found = 0, ""
        for batch in track(self._source, "check the data", self._source.batches):
            read, found = read + 1, batch.rolling_hash
            if self._stop_when_stable is not None and read == wanted.batches:
                break
        if read != wanted.batches:
            return f"the data give {read} batches now, and gave {wanted.batches}"
        if found != wanted.data[0]:
            return f"the data have changed: their hash is {found[:16]} now, and was {wanted.data[0][:16]}"
        return None

    def _passes(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], ...]:
        """Share the tensors out over passes, and say how much memory they take."""
        on_gpu = self._backend.on_gpu
        # A GPU, and each worker of a cluster in its own process, runs one batch at a time.
        workers = 1 if on_gpu or self._cluster is not None else worker_count(self._threads)
        plan = plan_memory(self._prepared, self._tensors, shapes, workers=workers, limit=self._max_memory_bytes)
        if len(plan.passes) > 1:
            self._source.require_rewindable(f"to calibrate in {len(plan.passes)} passes")
            if self._stop_when_stable is not None:
                raise UsageError(
                    f"Cannot stop when scales are stable in a calibration of {len(plan.passes)} passes: none of them "
                    "sees all tensors. Leave --stop-when-stable out, or allow more with --max-memory."
                )
        _log.info("calibrating by %s: %s", self._backend.name, self._backend.reason)
        if on_gpu:
            _log.info("memory of the GPU: %s", plan.on_gpu())
        else:
            where = "" if self._cluster is None else " of each worker"
            _log.info("memory%s: %s", where, plan.on_processor(histograms=self._statistics == "histogram"))
        return plan.passes

    def _part(
        self, names: Sequence[str], index: int, count: int, checkpoint: Checkpoint | None, *, resume: bool
    ) -> CalibrationPass:
        kept = None if checkpoint is None else checkpoint.of_pass(index, count)
        return CalibrationPass(
            prepared=self._prepared,
            tensors=list(names),
            exposed=self._tensors,
            preprocessing=self._source.preprocessing,
            settings=self._settings,
            threads=self._threads,
            stop_when_stable=self._stop_when_stable,
            count_inputs=index == 0,
            checkpoint=kept,
            earlier=None if kept is None else self._earlier(kept, names, resume=resume),
            cluster=self._cluster,
            statistics=self._statistics,
            backend=self._backend,
            padded=self._padded,
        )

    def _earlier(self, checkpoint: Checkpoint, names: Sequence[str], *, resume: bool) -> Calibration | None:
        """Read the state to go on from.

        Raises:
            CalibrationError: it is of another model, or of a run that was told something else.
        """
        if not resume:
            if checkpoint.path.exists():
                _log.info("%s is not used: --resume would go on from it", checkpoint.path)
            return None
        earlier = checkpoint.load()
        if earlier is None:
            _log.info("there is no checkpoint %s: starting from the beginning", checkpoint.path)
            return None
        changes = self._changes(earlier, names)
        if changes:
            raise CalibrationError(
                f"Cannot resume from {str(checkpoint.path)!r}: {'; '.join(changes)}. Calibrate as before, or leave "
                "--resume out to start anew."
            )
        _log.info("going on from batch %s, as kept in %s", earlier.fingerprint.batches, checkpoint.path)
        return earlier

    def _changes(self, calibration: Calibration, names: Sequence[str]) -> list[str]:
        """Name what a calibration was made from, and how, that is different now; the data are not looked at."""
        fingerprint = calibration.fingerprint
        changes = [
            f"the {what} has changed since" if what == "graph" else f"the {what} have changed since"
            for what, before, now in (
                ("graph", fingerprint.graph, self._prepared.graph_hash),
                ("weights", fingerprint.weights, self._prepared.weights_hash),
            )
            if before != now
        ]
        if calibration.statistics != self._statistics:
            changes.append(f"it was made with --statistics {calibration.statistics}, and is now {self._statistics}")
        if not changes and list(calibration.tensors) != list(names):
            lacking = len(set(names) - set(calibration.tensors))
            changes.append(
                f"it holds {len(calibration.tensors)} tensors, and {len(names)} are asked for"
                + (f", {lacking} of which it lacks" if lacking else "")
            )
        earlier = calibration.settings
        other_backend = earlier.get("backend", self._backend.name) != self._backend.name
        told = {
            "the preprocessing": (fingerprint.preprocessing, self._source.preprocessing),
            "trt-int8": (fingerprint.tool, __version__),
            **{
                _SETTINGS.get(name, name): (earlier.get(name, "not known"), now)
                for name, now in self._settings.items()
                # Statistics are told above, and another backend has other versions.
                if name != "statistics" and (name in earlier or not other_backend)
            },
        }
        changes += [
            f"{name} was {_told(before)} and is {_told(now)}" for name, (before, now) in told.items() if before != now
        ]
        return changes

    def _joined(self, parts: Sequence[Calibration]) -> Calibration:
        """Return passes over the same data as one calibration.

        Raises:
            DataError: the data were not the same.
        """
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        for number, part in enumerate(parts[1:], 2):
            if part.fingerprint != first.fingerprint:
                raise DataError(
                    f"The data changed between the passes: {_read(part)} in pass {number}, and {_read(first)} in pass "
                    "1. Give data that are the same each time, or allow one pass with --max-memory."
                )
        holder = {name: part for part in parts for name in part.tensors}
        return Calibration(
            {name: holder[name].magnitude_range(name) for name in self._tensors}
            if self._statistics == "minmax"
            else {name: holder[name].histogram(name) for name in self._tensors},
            first.fingerprint,
            first.input_shapes,
            input_statistics=first.input_statistics,
            convergence={
                method: {name: holder[name].convergence[method][name] for name in self._tensors}
                for method in first.convergence
            },
            settings=self._settings,
        )


def _told(setting: object) -> str:
    """Return a setting as a message gives it: text without quotes, and none where it was left out."""
    return str(setting) if setting not in (None, "") else "none"


def _is_finished(earlier: Calibration | None) -> bool:
    return earlier is not None and bool(earlier.settings.get(FINISHED))


def _read(part: Calibration) -> str:
    fingerprint = part.fingerprint
    return f"{fingerprint.batches} batches, {fingerprint.samples} samples (hash {fingerprint.data[0][:16]})"
