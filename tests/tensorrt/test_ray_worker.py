"""The worker of a Ray cluster that has a GPU, over the SIMULATED TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibrators.errors import CalibrationError, NonFiniteActivationError
from engines.calibrated_tensors import tensors_to_calibrate
from engines.graph import prepare
from trt_int8 import calibrate, ray_worker
from trt_int8.calibration_backend import choose_calibration_backend
from trt_int8.ray_worker import Job, Shard, ShardBatch, add_up, count_shard, pack

IMAGES = np.random.default_rng(11).normal(size=(12, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def job(tiny_model: Path) -> Iterator[Job]:
    """A pass by TensorRT; the worker gives its GPU back in the end."""
    prepared = prepare(tiny_model)
    yield pack(prepared, tensors_to_calibrate(prepared), backend=choose_calibration_backend("tensorrt"))
    for model in ray_worker._models.values():
        model.close()
    ray_worker._models.clear()


def shard(first: int, last: int) -> Shard:
    """Some of the batches of two samples, read-only as Ray hands them out."""
    batches = [ShardBatch({"input": IMAGES[2 * index : 2 * index + 2].copy()}, 2) for index in range(first, last)]
    for batch in batches:
        batch.feeds["input"].flags.writeable = False
    return Shard(first, tuple(batches))


def test_shards_are_counted_on_the_gpu(job: Job, tiny_model: Path) -> None:
    """One engine serves them all, and they add up to what one process counts on its GPU; again after an error."""
    whole = calibrate(tiny_model, {"input": IMAGES}, batch_size=2, backend="tensorrt")
    wrong = shard(2, 4)
    wrong.batches[1].feeds["input"] = np.full_like(IMAGES[:2], np.inf)  # type: ignore[index]

    parts = [count_shard(job, shard(2, 4))]
    with pytest.raises(NonFiniteActivationError, match="in batch 3;"):
        count_shard(job, wrong)
    parts += [count_shard(job, shard(0, 2)), count_shard(job, shard(4, 6))]

    found = add_up(*parts)
    assert len(ray_worker._models) == 1
    assert found.batches == 6
    for name, histogram in found.histograms.items():
        np.testing.assert_array_equal(histogram.bins, whole.histogram(name).bins)
        np.testing.assert_array_equal(histogram.counts, whole.histogram(name).counts)


def test_gpus_of_another_kind_are_refused(job: Job) -> None:
    """Their activations differ in the last bits."""
    other = replace(job, backend=replace(job.backend, settings={**job.backend.settings, "gpu": "NVIDIA H100"}))

    with pytest.raises(CalibrationError, match=r"gpu SIMULATED.*; expected .*gpu NVIDIA H100, as the first worker has"):
        count_shard(other, shard(0, 1))
