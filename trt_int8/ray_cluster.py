"""Calibration on a Ray cluster: the batches are dealt out in shards, counted by workers, and the counts added up.

What comes back is bit for bit what one process counts. The driver alone reads the data, in order, so that batches,
hashes and errors of the data are those of one process, and no worker needs the data or the user's code. Counts are
integers in bins that do not depend on the data, so their sum does not depend on who counted what. Activations are the
same where ONNX Runtime computes the same: every run takes one thread, there as in one process, over the same batches,
with the same versions (which is checked) on processors of the same family (which is not). Where GPUs run the model,
each task has one of its own, and all must be of one kind (which is checked).

A shard is a task without side effects, so Ray runs it again elsewhere when its worker is lost. Batches lie in the
driver's object store until the counts that were made from them have reached the driver, a bounded number at a time.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from calibrators.collector import ActivationStatistics, Due, Review
from calibrators.errors import CalibrationError, EmptyCalibrationSetError, TrtInt8Error
from calibrators.protocols import CalibrationBatch, Track, untracked
from engines.graph import PreparedModel
from engines.optional import require
from engines.padding import PaddedTensors
from trt_int8 import __version__
from trt_int8.calibration_backend import (
    CalibrationBackend,
    CalibrationBackendChoice,
    choose_calibration_backend,
)
from trt_int8.ray_worker import Shard, ShardBatch, add_up, count_shard, pack

SHARD_BATCHES = 16
"""Batches of a shard at most. Its counts, some 10 MB for a large model, are as much as a few batches of images."""

SHARD_BYTES = 64 * 2**20
"""A shard is closed when its inputs have come to this size."""

SHARDS_PER_WORKER = 2
"""One that is being counted, and one that is ready when it is done."""

ARITY = 8
"""How many shards' counts are added up on the cluster before they travel to the driver."""

LOST_LIMIT = 3
"""How many times a shard is run again after its worker was lost."""

_CONNECT_S = 5.0


class RayCluster:
    """A Ray cluster to calibrate on; connected to inside of `with`.

    A connection that the calling program has made itself is used, and left as it is.

    Args:
        address: "auto" for the cluster that this machine is part of, "host:port", "ray://host:port" for Ray's client,
            or "local" for a cluster of this machine alone that lives as long as the connection.

    Raises:
        MissingDependencyError: Ray is not installed.
        CalibrationError: the address has none of these forms, or nothing listens there. On entering: there is no
            cluster, or it runs other versions of Ray or Python.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._ray = require("ray", "calibrate on a Ray cluster")
        self._connected = False
        host = _host_and_port(address)
        if not self._ray.is_initialized():
            if address == "auto":
                host = _announced()
            if host is not None:
                self._knock(*host)

    def __enter__(self) -> Self:
        """Connect."""
        if self._ray.is_initialized():
            return self
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a fresh cluster reports to Ray's makers
            options |= {"include_dashboard": False, "num_cpus": len(os.sched_getaffinity(0))}
        if self._address.startswith("ray://"):
            options = {}  # they are for clusters that one is part of
        try:
            self._ray.init(address=self._address, **options)
        except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and gRPC's own
            raise CalibrationError(
                f"Cannot reach the Ray cluster at {self._address!r}: {_line(error)}. "
                "Start one with `ray start --head`, or give --ray local for the cores of this machine."
            ) from error
        self._connected = True
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Disconnect; a local cluster ends."""
        if self._connected:
            self._connected = False
            self._ray.shutdown()

    def choose_backend(self, requested: CalibrationBackendChoice) -> CalibrationBackend:
        """Choose what runs the model on the workers, as one of them sees it; this machine needs no GPU.

        Args:
            requested: see `trt_int8.calibration_backend.choose_calibration_backend`; "auto" takes the GPUs, where the
                cluster offers some.

        Raises:
            CalibrationError: the cluster cannot be reached, or GPUs are asked for and it offers none.
            DeviceError, MissingDependencyError: a worker that has a GPU cannot use it; says why.
        """
        if requested == "onnxruntime":
            return choose_calibration_backend(requested)
        with self:
            if requested == "auto" and not sum(self._offered("GPU")):
                return replace(choose_calibration_backend("onnxruntime"), reason="the Ray cluster offers no GPUs")
            self._workers("GPU")
            ask = self._ray.remote(num_cpus=1, num_gpus=1, max_retries=LOST_LIMIT)(choose_calibration_backend)
            try:
                found: CalibrationBackend = self._ray.get(ask.remote(requested))
            except self._ray.exceptions.RayTaskError as error:
                raise _worker_error(error) or error from None
        return found

    def collect(
        self,
        prepared: PreparedModel,
        tensors: Sequence[str],
        batches: Iterable[CalibrationBatch],
        *,
        exposed: Sequence[str] | None = None,
        backend: CalibrationBackend | None = None,
        padded: PaddedTensors | None = None,
        first: int = 0,
        track: Track = untracked,
        total: int | None = None,
        interval: int | Due | None = None,
        review: Review | None = None,
    ) -> ActivationStatistics:
        """Count the activations of a model over a stream, as `calibrators.collector.collect` does in one process.

        The tree has three levels: a task counts a shard of batches, a task adds up the counts of `ARITY` shards, and
        the driver adds up those sums. Before a review everything that was dealt out is counted, so that the stream has
        been read up to there and no further.

        Args:
            prepared: the model.
            tensors: names from `engines.calibrated_tensors.tensors_to_calibrate`.
            batches: the stream; consumed once, in the caller's thread.
            exposed: see `engines.activations.OnnxRuntimeActivations`.
            backend: what runs the model, from `choose_backend`; None for the processors. On GPUs each task has one.
            padded: where padding lies in the tensors, which is left out; None for nowhere.
            first: index of the first batch of the stream, where others were counted before it; for messages.
            track: shows the progress.
            total: number of batches, where it is known.
            interval: see `calibrators.collector.collect`.
            review: likewise.

        Raises:
            TrtInt8Error: what reading the data or counting it raises, as in one process; batches have their numbers in
                the whole stream.
            CalibrationError: workers cannot import this version of trt-int8, or a shard's worker was lost again and
                again.
        """
        # The object store hands the model to every node once.
        on_gpu = backend is not None and backend.on_gpu
        job = self._ray.put(pack(prepared, tensors, exposed, backend, padded))
        running = _Pass(self._ray, job, self._workers("GPU" if on_gpu else "CPU"), on_gpu=on_gpu)
        size = SHARD_BATCHES if total is None else max(1, min(SHARD_BATCHES, total // (4 * running.workers)))
        due = interval if callable(interval) else lambda count: interval is not None and count % interval == 0

        def counted() -> Iterator[int]:
            pending: list[ShardBatch] = []
            dealt = 0
            stream = iter(batches)
            while True:
                try:
                    batch = next(stream)
                except StopIteration:
                    break
                except Exception:
                    # What is wrong with a batch before comes first, as it would in one process.
                    if pending:
                        running.start(Shard(first + dealt - len(pending), tuple(pending)))
                    yield from running.wait(0)
                    raise
                dealt += 1
                extras = {} if padded is None else {k: v for k, v in batch.extras.items() if k == padded.padding.array}
                pending.append(ShardBatch(dict(batch.feeds), batch.samples, extras))
                reviewed = review is not None and due(dealt)
                held = sum(array.nbytes for item in pending for array in item.feeds.values())
                if reviewed or len(pending) == size or held >= SHARD_BYTES:
                    running.start(Shard(first + dealt - len(pending), tuple(pending)))
                    pending.clear()
                    yield from running.wait(SHARDS_PER_WORKER * running.workers)
                if review is not None and reviewed:
                    yield from running.wait(0)
                    if review(running.result()):
                        return
            if pending:
                running.start(Shard(first + dealt - len(pending), tuple(pending)))
            yield from running.wait(0)

        try:
            for _ in track(counted(), "calibrate", total):
                pass
        finally:
            running.cancel()
        return running.result()

    def _knock(self, host: str, port: int) -> None:
        """Check that something listens; Ray itself would try for a minute, and may end the process."""
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
        except OSError as error:
            where = f"{self._address!r}" if self._address != "auto" else f"'auto', which was {host}:{port}"
            raise CalibrationError(
                f"Cannot reach the Ray cluster at {where}: {error.strerror or error}. "
                "Start it with `ray start --head`, or give the address that it printed."
            ) from error

    def _workers(self, resource: Literal["CPU", "GPU"]) -> int:
        """Return how many tasks can run at a time: one per CPU, or per GPU, that the cluster offers.

        Raises:
            CalibrationError: it offers none.
        """
        offered = self._offered(resource)
        if not sum(offered):
            raise CalibrationError(
                f"Cannot calibrate on the Ray cluster at {self._address!r}: its {len(offered)} nodes offer no "
                f"{resource}s; expected at least one. Add nodes with `ray start --address=...`"
                f"{', or take --backend onnxruntime' if resource == 'GPU' else ''}."
            )
        return sum(offered)

    def _offered(self, resource: str) -> list[int]:
        return [int(node["Resources"].get(resource, 0)) for node in self._ray.nodes() if node["Alive"]]


@dataclass(frozen=True, slots=True)
class _Dealt:
    """Which batches went into a shard."""

    first: int
    batches: int

    def __str__(self) -> str:
        last = self.first + self.batches - 1
        return f"batch {self.first}" if self.batches == 1 else f"batches {self.first} to {last}"


class _Pass:
    """The tasks of one pass, and what has been counted so far."""

    def __init__(self, ray: Any, job: Any, workers: int, *, on_gpu: bool) -> None:
        self.workers = workers
        self._ray = ray
        self._job = job
        self._count = ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_retries=LOST_LIMIT)(count_shard)
        # Additions take no CPU from the counting: they are short, and they set the shards' batches free.
        self._add = ray.remote(num_cpus=0, max_retries=LOST_LIMIT)(add_up)
        self._shards: dict[Any, _Dealt] = {}  # being counted
        self._counted: list[tuple[Any, _Dealt]] = []  # not yet added up
        self._sums: deque[tuple[Any, list[tuple[Any, _Dealt]]]] = (
            deque()
        )  # on their way to the driver, with their parts
        self._total: ActivationStatistics | None = None

    def start(self, shard: Shard) -> None:
        """Give a shard to the cluster."""
        result = self._count.remote(self._job, self._ray.put(shard))
        self._shards[result] = _Dealt(shard.first, len(shard.batches))

    def wait(self, most: int) -> Iterator[int]:
        """Wait until no more than `most` shards are being counted; 0 also waits until all is added up.

        Yields:
            the number of each batch that is done, counted from 1 within its shard.
        """
        while len(self._shards) > most:
            ready, _ = self._ray.wait(list(self._shards), num_returns=1)
            for result in ready:
                dealt = self._shards.pop(result)
                self._counted.append((result, dealt))
                yield from range(1, dealt.batches + 1)
            if len(self._counted) >= ARITY:
                self._add_up()
            while len(self._sums) > self.workers:
                self._fetch()
        if most == 0:
            if self._counted:
                self._add_up()
            while self._sums:
                self._fetch()

    def result(self) -> ActivationStatistics:
        """Return what has been fetched so far."""
        if self._total is None:
            raise EmptyCalibrationSetError(
                "Cannot calibrate: the calibration data held no batch; expected at least one. "
                "Check the path of the data and the limit on batches."
            )
        return self._total

    def cancel(self) -> None:
        """Drop what is still under way."""
        for result in [*self._shards, *(total for total, _ in self._sums)]:
            self._ray.cancel(result)
        self._shards.clear()
        self._counted.clear()
        self._sums.clear()

    def _add_up(self) -> None:
        parts, self._counted = self._counted, []
        results = [result for result, _ in parts]
        # The parts are referred to until their sum has been fetched: so long Ray can make them anew.
        self._sums.append((results[0] if len(parts) == 1 else self._add.remote(*results), parts))

    def _fetch(self) -> None:
        total, parts = self._sums.popleft()
        try:
            found: ActivationStatistics = self._ray.get(total)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TrtInt8Error):
                raise self._first_error(error.cause, parts) from None  # as in one process: without Ray's traceback
            raise _worker_error(error) or error from None
        except self._ray.exceptions.RayError as error:
            lost = ", ".join(str(dealt) for _, dealt in parts)
            raise CalibrationError(
                f"Cannot calibrate on the Ray cluster: the workers of {lost} were lost more than {LOST_LIMIT} times: "
                f"{_line(error)}. Look at the nodes' memory (a worker holds the model, "
                "one batch's activations and a shard) and at Ray's logs."
            ) from error
        self._total = found if self._total is None else add_up(self._total, found)

    def _first_error(self, met: TrtInt8Error, parts: list[tuple[Any, _Dealt]]) -> TrtInt8Error:
        """Return the error of the earliest of the batches that are wrong."""
        known = [*parts, *self._counted, *self._shards.items(), *(part for _, others in self._sums for part in others)]
        for result, _ in sorted(known, key=lambda part: part[1].first):
            try:
                self._ray.get(result)
            except self._ray.exceptions.RayTaskError as error:
                return error.cause if isinstance(error.cause, TrtInt8Error) else met
            except self._ray.exceptions.RayError:
                return met
        return met


def _worker_error(error: Any) -> TrtInt8Error | None:
    """Return what a task's failure means for the user; None for a bug, whose traceback Ray's own error quotes."""
    if isinstance(error.cause, TrtInt8Error):
        return error.cause
    if isinstance(error.cause, ImportError) or "failed to import" in str(error.cause):
        return CalibrationError(
            f"Cannot calibrate on the Ray cluster: its workers cannot import trt_int8: {_line(error.cause)}. "
            f"Install trt-int8 {__version__} with the same dependencies on every node."
        )
    return None


def _announced() -> tuple[str, int] | None:
    """Return where "auto" will look for a cluster; None where nothing tells, which Ray says at once.

    The note that `ray start` leaves stays behind when a cluster dies, and Ray would then try for minutes.
    """
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = os.environ.get("RAY_ADDRESS") or note.read_text().strip()
        return _host_and_port(address)
    except (OSError, UnicodeDecodeError, CalibrationError):
        return None


def _host_and_port(address: str) -> tuple[str, int] | None:
    """Return the host and the port of an address, None for the words "auto" and "local".

    Raises:
        CalibrationError: it has another form.
    """
    if address in ("auto", "local"):
        return None
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 2**16):
        raise CalibrationError(
            f"Cannot reach a Ray cluster at {address!r}; expected auto, local, HOST:PORT or ray://HOST:PORT."
        )
    return host, int(port)


def _line(error: BaseException) -> str:
    """Return what an error says as one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
