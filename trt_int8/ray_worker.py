"""What the workers of a Ray cluster do for a calibration: count shards of the stream, and add the counts up.

Both functions are without side effects, so that they can be run again anywhere when a worker is lost.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime

from calibrators.collector import ActivationStatistics, collect
from calibrators.errors import CalibrationError
from calibrators.protocols import Activations, Array
from engines.activations import OnnxRuntimeActivations
from engines.gpu_activations import GpuActivations
from engines.graph import PreparedModel, save_model
from engines.padding import PaddedTensors
from trt_int8 import __version__
from trt_int8.calibration_backend import (
    CalibrationBackend,
    choose_calibration_backend,
    open_gpu_activations,
)


@dataclass(frozen=True, slots=True)
class ShardBatch:
    """A batch as a worker gets it. Implements `calibrators.protocols.CalibrationBatch`."""

    feeds: Mapping[str, Array]
    samples: int
    extras: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive batches of the stream.

    Attributes:
        first: index of the first in the stream.
        batches: the batches.
    """

    first: int
    batches: tuple[ShardBatch, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """What every task of a pass needs to know; shipped once.

    Attributes:
        key: tells passes apart on a worker that serves several.
        model: file name to content of the prepared model; contents as arrays, which workers of one node share.
        name: path of the model, for messages.
        graph_hash: see `engines.graph.PreparedModel`.
        weights_hash: likewise.
        tensors: names of the tensors to count.
        exposed: see `engines.activations.OnnxRuntimeActivations`.
        versions: of the packages that decide about the result.
        backend: what runs the model; each task has a GPU of its own where that is on one.
        padded: where padding lies in the tensors, which is left out; None for nowhere.
    """

    key: str
    model: Mapping[str, Array]
    name: Path
    graph_hash: str
    weights_hash: str
    tensors: tuple[str, ...]
    exposed: tuple[str, ...]
    versions: Mapping[str, str]
    backend: CalibrationBackend
    padded: PaddedTensors | None = None


def pack(
    prepared: PreparedModel,
    tensors: Sequence[str],
    exposed: Sequence[str] | None = None,
    backend: CalibrationBackend | None = None,
    padded: PaddedTensors | None = None,
) -> Job:
    """Describe a pass.

    The model travels as files, because a protobuf message holds no more than 2 GB.

    Args:
        prepared: the model.
        tensors: names of the tensors to count.
        exposed: see `engines.activations.OnnxRuntimeActivations`; None for `tensors` alone.
        backend: what runs the model; None for the processor.
        padded: where padding lies in the tensors; None for nowhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_model(prepared.proto, Path(folder) / "model.onnx")
        files = {file.name: np.fromfile(file, np.uint8) for file in sorted(Path(folder).iterdir())}
    return Job(
        key=os.urandom(16).hex(),
        model=files,
        name=prepared.path,
        graph_hash=prepared.graph_hash,
        weights_hash=prepared.weights_hash,
        tensors=tuple(tensors),
        exposed=tuple(tensors if exposed is None else exposed),
        versions=_versions(),
        backend=backend or choose_calibration_backend("onnxruntime"),
        padded=padded,
    )


def count_shard(job: Job, shard: Shard) -> ActivationStatistics:
    """Count the activations of one shard; a task of the cluster.

    Raises:
        CalibrationError: the worker has other versions than the driver, or another GPU than the first one; or as
            `calibrators.collector.collect` says.
        InferenceError: a batch cannot be run; it is named by its number in the whole stream.
    """
    if _versions() != job.versions:
        raise CalibrationError(
            f"Cannot calibrate on the Ray cluster: {socket.gethostname()} has {_listed(_versions())}; "
            f"expected {_listed(job.versions)}, as the driver has. Install the same on every node."
        )
    if job.key not in _models:
        for model in _models.values():
            model.close()
        _models.clear()
        _models[job.key] = _OnGpu(job) if job.backend.on_gpu else _OnProcessor(job)
    return _models[job.key].count(shard)


def add_up(*parts: ActivationStatistics) -> ActivationStatistics:
    """Add up the counts of several parts of a stream; exact, and in any order. A task of the cluster."""
    return reduce(_added, parts)


class _OpenModel(Protocol):
    """The model of a pass, ready to run."""

    def count(self, shard: Shard) -> ActivationStatistics: ...

    def close(self) -> None: ...


_models: dict[str, _OpenModel] = {}
"""The model of the latest pass that this worker process serves: one session does for all its shards."""


class _OnProcessor:
    """Runs the model in one thread."""

    def __init__(self, job: Job) -> None:
        self._model = OnnxRuntimeActivations(
            _unpacked(job), job.tensors, (), threads=1, exposed=job.exposed, padded=job.padded
        )

    def count(self, shard: Shard) -> ActivationStatistics:
        return collect(_ShardActivations(self._model, shard))

    def close(self) -> None:
        pass


class _OnGpu:
    """Runs the model on the GPU that Ray has given to this worker, and counts there."""

    def __init__(self, job: Job) -> None:
        found = choose_calibration_backend(job.backend.name)
        if found.settings != job.backend.settings:
            raise CalibrationError(
                f"Cannot calibrate on the Ray cluster: {socket.gethostname()} has {_listed(found.settings)}; expected "
                f"{_listed(job.backend.settings)}, as the first worker has. Other GPUs compute other activations in "
                "the last bits: take a cluster of one kind, or --backend onnxruntime."
            )
        self._stack = ExitStack()
        opened = open_gpu_activations(job.backend, _unpacked(job), job.tensors, (), exposed=job.exposed)
        self._model: GpuActivations = self._stack.enter_context(opened)

    def count(self, shard: Shard) -> ActivationStatistics:
        self._model.restart(shard.batches, shard.first)
        return collect(self._model)

    def close(self) -> None:
        self._stack.close()


@dataclass(frozen=True, slots=True)
class _ShardActivations:
    """The activations of one shard. Implements `calibrators.protocols.ActivationSource`."""

    model: OnnxRuntimeActivations
    shard: Shard

    @property
    def tensors(self) -> Sequence[str]:
        return self.model.tensors

    def activations(self) -> Iterator[Activations]:
        for index, batch in enumerate(self.shard.batches, start=self.shard.first):
            # Ray's arrays are read-only and lie in shared memory; a kernel would be compiled once more for them.
            own = {name: np.array(array) for name, array in batch.feeds.items()}
            yield self.model.run(index, ShardBatch(own, batch.samples, batch.extras))

    def producer(self, tensor: str) -> str:
        return self.model.producer(tensor)


def _added(one: ActivationStatistics, other: ActivationStatistics) -> ActivationStatistics:
    shapes = {name: Counter(seen) for name, seen in one.input_shapes.items()}
    for name, seen in other.input_shapes.items():
        shapes.setdefault(name, Counter()).update(seen)
    return ActivationStatistics(
        histograms={name: histogram.merge(other.histograms[name]) for name, histogram in one.histograms.items()},
        batches=one.batches + other.batches,
        samples=one.samples + other.samples,
        input_shapes=shapes,
    )


def _unpacked(job: Job) -> PreparedModel:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in job.model.items():
            content.tofile(Path(folder) / name)
        proto = onnx.load(Path(folder) / "model.onnx")
    return PreparedModel(job.name, proto, graph_hash=job.graph_hash, weights_hash=job.weights_hash)


def _versions() -> dict[str, str]:
    return {"trt-int8": __version__, "onnxruntime": str(onnxruntime.__version__)}


def _listed(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())
