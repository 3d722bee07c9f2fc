"""One pass over the data for some tensors: what is counted, where it is reviewed, where it can be taken up again."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from calibrators.calibration import Calibration, Fingerprint, Settings
from calibrators.collector import ActivationStatistics, Statistics, collect
from calibrators.convergence import LEAST_BATCHES, History, extended, is_point, judge, last_point, trimmed
from calibrators.idle import IdleMeter
from calibrators.input_statistics import Inputs, merge_inputs, statistics_of_feeds
from calibrators.protocols import Track
from engines.activations import OnnxRuntimeActivations, worker_count
from engines.graph import PreparedModel
from engines.padding import PaddedTensors
from trt_int8 import __version__
from trt_int8.calibration_backend import CalibrationBackend, open_gpu_activations
from trt_int8.checkpoint import Checkpoint
from trt_int8.data import DataBatch
from trt_int8.errors import DataError
from trt_int8.progress import time_data
from trt_int8.ray_cluster import RayCluster

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Position:
    """A place in the stream: what was read up to there.

    Attributes:
        batches: number of batches.
        rolling_hash: of all of them.
        inputs: statistics of what they fed.
        keep: whether a checkpoint is due there.
    """

    batches: int
    rolling_hash: str
    inputs: Inputs
    keep: bool


@dataclass(slots=True)
class CalibrationPass:
    """A pass over the data, from its start or from a checkpoint.

    Batches may be read ahead of those that have been counted; so what belongs to a place in the stream is noted when
    it is read there, and looked up when the statistics have come as far.

    Attributes:
        prepared: the model.
        tensors: those that this pass counts.
        exposed: those that all passes over these data count; see `engines.activations.OnnxRuntimeActivations`.
        preprocessing: of the data, for the fingerprint.
        settings: what the pass was told.
        threads: number of batches that are run at a time; None takes one per core.
        stop_when_stable: the method whose scales end the pass when they have settled; None for none.
        count_inputs: whether mean, deviation and range of the inputs are kept.
        checkpoint: where the state is kept; None for nowhere.
        earlier: the state that the pass goes on from; None for the start.
        cluster: where the batches are counted; None for this process.
        statistics: what is kept of each tensor.
        backend: what runs the model in this process; None for the processor.
        padded: where padding lies in the tensors, which is left out of their statistics, not of the inputs' (what
            measures a model later does not know of it); None for nowhere.
    """

    prepared: PreparedModel
    tensors: list[str]
    exposed: list[str]
    preprocessing: str
    settings: Settings
    threads: int | None
    stop_when_stable: str | None = None
    count_inputs: bool = True
    checkpoint: Checkpoint | None = None
    earlier: Calibration | None = None
    cluster: RayCluster | None = None
    statistics: Statistics = "histogram"
    backend: CalibrationBackend | None = None
    padded: PaddedTensors | None = None
    _total: int | None = field(default=None, init=False)
    _waited_s: float = field(default=0.0, init=False)
    _inputs: Inputs = field(default_factory=dict, init=False)
    _history: History = field(default_factory=dict, init=False)
    _reviews: dict[int, _Position] = field(default_factory=dict, init=False)
    _last: _Position | None = field(default=None, init=False)
    _stopped: _Position | None = field(default=None, init=False)

    def run(self, batches: Iterator[DataBatch], total: int | None, track: Track) -> Calibration:
        """Calibrate.

        Args:
            batches: the whole stream; what the earlier state has counted is read again, and checked.
            total: number of batches, where it is known.
            track: shows the progress.

        Raises:
            DataError: the stream is not the one of the earlier state.
            NonFiniteActivationError: an activation overflowed; the tensor, batch and node are named.
        """
        self._total = None if self.stop_when_stable is not None else total  # it may end anywhere
        if self.earlier is None:
            return self._count(batches, total, track)
        self._inputs, self._history = self.earlier.input_statistics, self.earlier.convergence
        check_skipped(batches, self.earlier, track)
        first = next(batches, None)
        if first is None:
            return self._finished(self.earlier)
        return self._count(chain([first], batches), None if total is None else total - self._skipped(), track)

    def _count(self, batches: Iterable[DataBatch], total: int | None, track: Track) -> Calibration:
        meter = IdleMeter(worker_count(self.threads))
        # Elsewhere nothing tells how busy the workers are: they count as idle as long as data are waited for.
        local = self.cluster is None and (self.backend is None or not self.backend.on_gpu)
        noted = self._noted(_timed(batches, self._add_wait, meter.idle_s if local else time.perf_counter))
        track = time_data(track, lambda: self._waited_s)
        if self.cluster is None and self.backend is not None and self.backend.on_gpu:
            with open_gpu_activations(
                self.backend, self.prepared, self.tensors, noted, exposed=self.exposed, first=self._skipped()
            ) as source:
                statistics = collect(
                    source,
                    track=track,
                    total=total,
                    interval=self._due,
                    review=self._review,
                    statistics=self.statistics,
                )
        elif self.cluster is None:
            activations = OnnxRuntimeActivations(
                self.prepared,
                self.tensors,
                noted,
                threads=self.threads,
                exposed=self.exposed,
                padded=self.padded,
                first=self._skipped(),
            )
            statistics = collect(
                activations,
                track=track,
                total=total,
                interval=self._due,
                review=self._review,
                statistics=self.statistics,
                meter=meter,
            )
        else:
            statistics = self.cluster.collect(
                self.prepared,
                self.tensors,
                noted,
                exposed=self.exposed,
                backend=self.backend,
                padded=self.padded,
                first=self._skipped(),
                track=track,
                total=total,
                interval=self._due,
                review=self._review,
            )
        end = self._stopped or self._last
        if end is None:
            raise AssertionError("batches were counted that were never read")
        return self._finished(self._state(statistics, end))

    def _add_wait(self, seconds: float) -> None:
        self._waited_s += seconds

    def _noted(self, batches: Iterable[DataBatch]) -> Iterator[DataBatch]:
        """Pass batches on, and note where the statistics will have to be looked at."""
        for batch in batches:
            count = batch.index + 1
            if self.count_inputs:
                self._inputs = merge_inputs(self._inputs, statistics_of_feeds(batch.feeds, batch.samples))
            keep = self.checkpoint is not None and self.checkpoint.due(count)
            self._last = _Position(count, batch.rolling_hash, self._inputs, keep)
            if keep or is_point(count, self._total):
                self._reviews[count] = self._last
            yield batch

    def _skipped(self) -> int:
        return 0 if self.earlier is None else self.earlier.fingerprint.batches

    def _due(self, counted: int) -> bool:
        return self._skipped() + counted in self._reviews

    def _review(self, statistics: ActivationStatistics) -> bool:
        position = self._reviews.pop(self._skipped() + statistics.batches)
        state = self._state(statistics, position)
        if is_point(position.batches, self._total):
            self._history = extended(self._history, position.batches, state.all_scales())
            if self._settled(position.batches):
                self._stopped = position
                return True
        if position.keep and self.checkpoint is not None:
            self.checkpoint.save(state.annotated(convergence=self._history))
        return False

    def _settled(self, batches: int) -> bool:
        if self.stop_when_stable is None or batches < LEAST_BATCHES:
            return False
        verdict = judge(self._history, self.stop_when_stable)
        return verdict is not None and verdict.stable

    def _state(self, statistics: ActivationStatistics, position: _Position) -> Calibration:
        """Return what was counted up to a position, the earlier state included."""
        if self.statistics == "minmax":
            statistics = statistics.reduced()
        histograms, ranges = dict(statistics.histograms), dict(statistics.ranges)
        shapes = {name: Counter(seen) for name, seen in statistics.input_shapes.items()}
        samples = statistics.samples
        if self.earlier is not None:
            histograms = {name: self.earlier.histogram(name).merge(found) for name, found in histograms.items()}
            ranges = {name: self.earlier.magnitude_range(name).merge(found) for name, found in ranges.items()}
            for name, seen in self.earlier.input_shapes.items():
                shapes.setdefault(name, Counter()).update(seen)
            samples += self.earlier.fingerprint.samples
        fingerprint = Fingerprint(
            graph=self.prepared.graph_hash,
            weights=self.prepared.weights_hash,
            data=(position.rolling_hash,),
            preprocessing=self.preprocessing,
            tool=__version__,
            batches=position.batches,
            samples=samples,
        )
        return Calibration(
            ranges or histograms,
            fingerprint,
            shapes,
            input_statistics=position.inputs,
            convergence=self._history,
            settings=self.settings,
        )

    def _finished(self, state: Calibration) -> Calibration:
        """Return the state with the last point of its history."""
        batches = state.fingerprint.batches
        if last_point(self._history) != batches:
            self._history = extended(self._history, batches, state.all_scales())
        return state.annotated(convergence=trimmed(self._history))


def _timed(
    batches: Iterable[DataBatch], add: Callable[[float], None], idle_s: Callable[[], float]
) -> Iterator[DataBatch]:
    """Pass batches on, and add up for how long workers were idle while one was read."""
    stream = iter(batches)
    while True:
        before = idle_s()
        batch = next(stream, None)
        add(idle_s() - before)
        if batch is None:
            return
        yield batch


def check_skipped(batches: Iterator[DataBatch], earlier: Calibration, track: Track) -> None:
    """Read as many batches as a calibration has counted, and check that they are the same.

    Raises:
        DataError: they are not, or there are fewer.
    """
    wanted = earlier.fingerprint.batches
    last: DataBatch | None = None
    for _ in track(range(wanted), "resume", wanted):
        last = next(batches, None)
        if last is None:
            break
    if last is None:
        raise DataError(
            f"Cannot go on from batch {wanted}: the data end before it; they are not the ones that were calibrated, or "
            "the limit on batches is lower now. Leave --resume out to start anew."
        )
    if (last.rolling_hash,) != earlier.fingerprint.data:
        raise DataError(
            f"Cannot go on from batch {wanted}: the first {wanted} batches are not the ones that were calibrated (hash "
            f"{last.rolling_hash[:16]}, expected {earlier.fingerprint.data[0][:16]}). The data have changed; leave "
            "--resume out to start anew."
        )
