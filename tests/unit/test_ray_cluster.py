"""Calibration on a Ray cluster: equal to one process to the bit, also when a worker or a whole node is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trt_int8
from calibrators.collector import ActivationStatistics, collect
from calibrators.errors import (
    CalibrationError,
    EmptyCalibrationSetError,
    NonFiniteActivationError,
    TrtInt8Error,
)
from engines.activations import OnnxRuntimeActivations
from engines.calibrated_tensors import tensors_to_calibrate
from engines.errors import DeviceError, InferenceError
from engines.graph import PreparedModel, prepare
from trt_int8 import ray_cluster, ray_worker
from trt_int8.calibration import calibrate
from trt_int8.calibration_backend import CalibrationBackend, choose_calibration_backend
from trt_int8.ray_cluster import ARITY, RayCluster
from trt_int8.ray_worker import Shard, ShardBatch, add_up, count_shard, pack

ROOT = Path(trt_int8.__file__).parents[1]


def batches(count: int, samples: int = 2) -> list[ShardBatch]:
    rng = np.random.default_rng(5)
    return [
        ShardBatch({"input": rng.normal(0, 1 + index % 3, (samples, 3, 8, 8)).astype(np.float32)}, samples)
        for index in range(count)
    ]


def in_one_process(model: PreparedModel, data: list[ShardBatch]) -> ActivationStatistics:
    return collect(OnnxRuntimeActivations(model, tensors_to_calibrate(model), data, threads=1))


def assert_equal(one: ActivationStatistics, other: ActivationStatistics) -> None:
    assert (one.batches, one.samples, one.input_shapes) == (other.batches, other.samples, other.input_shapes)
    assert list(one.histograms) == list(other.histograms)
    for name, histogram in one.histograms.items():
        for field in dataclasses.fields(histogram):
            np.testing.assert_array_equal(
                getattr(histogram, field.name), getattr(other.histograms[name], field.name), strict=True
            )


@pytest.fixture
def model(tiny_model: Path) -> PreparedModel:
    return prepare(tiny_model)


# --- a real cluster of two worker processes, and for a while of a second node -----------------------------------------

SCRIPT = """
import contextlib, json, os, pickle, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, psutil
from engines.calibrated_tensors import tensors_to_calibrate
from engines.graph import prepare
from trt_int8 import calibrate, ray_cluster
from trt_int8.errors import TrtInt8Error

folder = Path(sys.argv[1])
said = {}
os.sched_getaffinity = lambda _: {0, 1}  # two workers, whatever the machine has

LONG = 33  # a batch of that index and 20000 times the samples keeps a worker busy for a while

class Stream:
    # Batches as the test's own process has them, but something happens before one of them is given.
    def __init__(self, at=None, do=None, long=False):
        self.at, self.do, self.long = at, do, long
    def __len__(self):
        return 48
    def __iter__(self):
        for index, batch in enumerate(np.load(folder / "data.npy")):
            if index == self.at:
                batch = self.do(batch)
            yield {"input": np.repeat(batch, 20000, axis=0) if self.long and index == LONG else batch}

class Grows:
    # An array that gets 2000 times the samples where it arrives.
    nbytes = 0
    def __init__(self, values):
        self.values = values
    def __reduce__(self):
        return np.repeat, (self.values, 2000, 0)

def growing():
    for index, batch in enumerate(np.load(folder / "data.npy")):
        if index == 44:
            kill_node()
        feeds = {"input": Grows(batch) if index >= 32 else batch}
        yield ray_cluster.ShardBatch(feeds, 4000 if index >= 32 else 2)

def workers(below=None):
    # Process ids and titles of Ray's processes; a worker's title names the function that it runs.
    titles = {}
    for process in psutil.Process(below).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles[process.pid] = " ".join(process.cmdline())[:80]
    return titles

def kill(batch):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid, title in workers().items():
            if title.startswith("ray::count_shard"):
                os.kill(pid, signal.SIGKILL)
                said["killed"] = [title.strip(), pid]
                return batch
    raise TimeoutError(f"no worker was counting: {workers()}")

def kill_node():
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        processes = workers(node.pid)
        if any(title.startswith("ray::count_shard") for title in processes.values()):
            node.kill()
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            said["killed_node"] = len(ray.nodes())
            return
    raise TimeoutError(f"the second node was not counting: {workers()}")

def user_error(batch):
    raise ZeroDivisionError("the user's own")

def endless(batch):
    return batch * np.float32(1e38)

class Exits:
    nbytes = 0
    def __reduce__(self):
        return os._exit, (1,)

def run(name, **how):
    try:
        found = calibrate(folder / "model.onnx", ray="local", **how)
        found.save(folder / f"{name}.npz")
        said[name] = f"{found.fingerprint.batches} batches"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"

import ray
with ray_cluster.RayCluster("local") as cluster:
    said["cpus"] = ray.cluster_resources()["CPU"]
    join = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    address = ray.get_runtime_context().gcs_address
    log = open(folder / "node.log", "w")
    node = subprocess.Popen([*join, f"--address={address}"], stdout=log, stderr=log)
    run("killed_worker", data=Stream(40, kill, long=True))
    run("user_error", data=Stream(30, user_error))
    run("overflow", data=Stream(30, endless))
    while len(ray.nodes()) < 2 and node.poll() is None:
        time.sleep(0.05)
    prepared = prepare(folder / "model.onnx")
    found = cluster.collect(prepared, tensors_to_calibrate(prepared), growing(), total=48)
    (folder / "lost_node.pickle").write_bytes(pickle.dumps(found))
    run("stable", data=[{"input": np.load(folder / "data.npy")[0]}] * 48, stop_when_stable="entropy")
    ray_cluster.LOST_LIMIT = 1
    lost = [ray_cluster.ShardBatch({"input": Exits()}, 1)]
    try:
        cluster.collect(prepared, ["input"], lost)
    except TrtInt8Error as error:
        said["lost"] = f"{type(error).__name__}: {error}"
    said["still connected"] = ray.is_initialized()
said["disconnected"] = not ray.is_initialized()
said["left over"] = [title for title in workers().values() if "ray::" in title]
(folder / "said.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def cluster_run(module_tiny_model: Path) -> tuple[Path, dict[str, Any]]:
    """What a process saw that calibrated on a local cluster of two workers; Ray stays out of this process."""
    folder = module_tiny_model.parent
    np.save(folder / "data.npy", np.random.default_rng(1).normal(size=(48, 2, 3, 8, 8)).astype(np.float32))
    (folder / "model.onnx").write_bytes(module_tiny_model.read_bytes())
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    # A node that does not answer is given up after a second, not after fifteen.
    variables |= {"RAY_health_check_period_ms": "300", "RAY_health_check_failure_threshold": "3"}
    variables |= {"RAY_health_check_initial_delay_ms": "0"}
    done = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder)],
        env=variables, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        # A machine where Ray itself cannot start a cluster (no shared memory, no sockets) says nothing of this program.
        start = "import ray; ray.init(num_cpus=1, include_dashboard=False); ray.shutdown()"
        alone = subprocess.run(
            [sys.executable, "-c", start], env=variables, capture_output=True, text=True, check=False
        )
        if alone.returncode != 0:
            pytest.skip(f"Ray cannot start a cluster here: {alone.stderr.strip().splitlines()[-1]}")
        pytest.fail(done.stderr)
    return folder, json.loads((folder / "said.json").read_text())


def test_a_killed_worker_changes_no_bit(cluster_run: tuple[Path, dict[str, Any]]) -> None:
    """One of two workers gets SIGKILL while it counts; the file has the bytes of one process that met no mishap."""
    folder, said = cluster_run

    data = [{"input": batch} for batch in np.load(folder / "data.npy")]
    data[33] = {"input": np.repeat(data[33]["input"], 20000, axis=0)}
    calibrate(folder / "model.onnx", data, threads=1).save(folder / "one.npz")

    assert said["cpus"] == 2
    assert said["killed"][0] == "ray::count_shard"
    assert said["killed_worker"] == "48 batches"
    assert (folder / "killed_worker.npz").read_bytes() == (folder / "one.npz").read_bytes()


def test_a_lost_node_changes_no_bit(cluster_run: tuple[Path, dict[str, Any]]) -> None:
    """All processes of a node are killed while it counts: what it had counted is counted again elsewhere."""
    folder, said = cluster_run

    data = np.load(folder / "data.npy")
    arrays = [np.repeat(batch, 2000 if index >= 32 else 1, axis=0) for index, batch in enumerate(data)]
    counted = [ShardBatch({"input": array}, len(array)) for array in arrays]

    assert said["killed_node"] == 2
    found = pickle.loads((folder / "lost_node.pickle").read_bytes())
    assert_equal(found, in_one_process(prepare(folder / "model.onnx"), counted))


def test_errors_are_those_of_one_process(cluster_run: tuple[Path, dict[str, Any]]) -> None:
    """The user's own exception, and an overflow with the number of its batch in the whole stream."""
    _, said = cluster_run

    assert said["user_error"] == "ZeroDivisionError: the user's own"
    assert said["overflow"].startswith("NonFiniteActivationError: Cannot calibrate tensor ")
    assert " values are NaN or infinite in batch 30; " in said["overflow"]


def test_the_pass_ends_where_one_process_ends_it(cluster_run: tuple[Path, dict[str, Any]]) -> None:
    """Scales that have settled end it after the same batch, with the same file."""
    folder, said = cluster_run

    same = [{"input": np.load(folder / "data.npy")[0]}] * 48
    calibrate(folder / "model.onnx", same, threads=1, stop_when_stable="entropy").save(folder / "one_stable.npz")

    assert said["stable"] == "32 batches"
    assert (folder / "stable.npz").read_bytes() == (folder / "one_stable.npz").read_bytes()


def test_a_shard_that_kills_its_workers_is_given_up(cluster_run: tuple[Path, dict[str, Any]]) -> None:
    """One line names the batches and where to look, and the cluster is left in order."""
    _, said = cluster_run

    assert said["lost"].startswith(
        "CalibrationError: Cannot calibrate on the Ray cluster: the workers of batch 0 were lost more than 1 times: "
    )
    assert "\n" not in said["lost"]
    assert said["still connected"] is True
    assert said["disconnected"] is True
    assert said["left over"] == []


# --- the work of one worker -------------------------------------------------------------------------------------------


def test_shards_add_up_to_the_whole(model: PreparedModel) -> None:
    """Whatever the cut and the order, and with the arrays read-only, as Ray hands them out."""
    data = batches(7)
    job = pack(model, tensors_to_calibrate(model))
    for batch in data:
        batch.feeds["input"].flags.writeable = False

    parts = [count_shard(job, Shard(first, tuple(data[first:last]))) for first, last in ((4, 7), (0, 1), (1, 4))]

    assert_equal(add_up(*parts), in_one_process(model, data))


def test_a_worker_serves_one_pass_after_the_other(model: PreparedModel) -> None:
    """The session of another pass is not used: it may be of another model."""
    data = batches(2)
    every, only = pack(model, tensors_to_calibrate(model)), pack(model, ["input"])

    for job, tensors in ((every, tensors_to_calibrate(model)), (only, ["input"]), (every, tensors_to_calibrate(model))):
        assert list(count_shard(job, Shard(0, tuple(data))).histograms) == tensors


def test_batches_have_their_numbers_in_the_stream(model: PreparedModel) -> None:
    """The third batch of a shard that begins with batch 5 is batch 7."""
    data = batches(3)
    data[2].feeds["input"][0, 0, 0, 0] = np.inf
    job = pack(model, tensors_to_calibrate(model))

    with pytest.raises(NonFiniteActivationError, match="in batch 7;") as caught:
        count_shard(job, Shard(5, tuple(data)))
    assert caught.value.batch == 7


def test_a_failed_inference_names_the_batch(model: PreparedModel) -> None:
    """By its number in the stream."""
    wrong = ShardBatch({"input": np.zeros((1, 3, 9, 9), np.float32)}, 1)

    with pytest.raises(InferenceError, match=r"^batch 9: input 'input' has shape"):
        count_shard(pack(model, ["conv"]), Shard(8, (*batches(1), wrong)))


@pytest.mark.parametrize("package", ["trt-int8", "onnxruntime"])
def test_other_versions_on_a_worker_are_refused(model: PreparedModel, package: str) -> None:
    """Both sides are named, with the node."""
    job = pack(model, ["conv"])
    other = dataclasses.replace(job, versions={**job.versions, package: "0.0.7"})

    with pytest.raises(CalibrationError, match=f"expected .*{package} 0.0.7.*, as the driver has"):
        count_shard(other, Shard(0, tuple(batches(1))))


def test_the_overflow_error_travels_between_processes() -> None:
    """With its text and attributes."""
    error = NonFiniteActivationError("it overflowed", tensor="t", batch=3, node="n")

    found = pickle.loads(pickle.dumps(error))

    assert (str(found), found.tensor, found.batch, found.node) == ("it overflowed", "t", 3, "n")


# --- the driver, with a Ray that runs tasks when they are asked for ---------------------------------------------------


class FakeRay:
    """Runs a task when its result is waited for; keeps the largest number of shards that were under way."""

    class exceptions:  # noqa: N801, the name of Ray's module
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause: Exception) -> None:
                super().__init__(str(cause))
                self.cause = cause

    def __init__(self, cpus: tuple[int, ...] = (2, 4)) -> None:
        self.cpus = cpus
        self.gpus = 0
        self.options: list[dict[str, Any]] = []
        self.open: set[str] = set()
        self.most = 0
        self.cancelled = 0
        self.results: dict[str, Callable[[], Any]] = {}

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        nodes = [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(self.gpus)}} for cpus in self.cpus]
        return [*nodes, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        self.options.append(options)
        ray = self

        class Task:
            def __init__(self, function: Callable[..., Any]) -> None:
                self.function = function

            def remote(self, *arguments: Any) -> str:
                name = f"{self.function.__name__} {len(ray.results)}"
                ray.results[name] = lambda: self.function(
                    *(ray.get(argument) if argument in ray.results else argument for argument in arguments)
                    if self.function is add_up
                    else arguments
                )
                if self.function is not add_up:
                    ray.open.add(name)
                    ray.most = max(ray.most, len(ray.open))
                return name

        return Task

    def wait(self, names: list[str], num_returns: int) -> tuple[list[str], list[str]]:
        self.open.discard(names[-1])  # the latest first: what comes back in another order must not matter
        return names[-1:], names[:-1]

    def get(self, name: str) -> Any:
        try:
            return self.results[name]()
        except (TrtInt8Error, ImportError) as error:
            raise self.exceptions.RayTaskError(error) from error

    def cancel(self, name: str) -> None:
        self.cancelled += 1


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setattr(ray_cluster, "require", lambda module, purpose: ray)
    return ray


def test_shards_are_dealt_a_bounded_number_at_a_time(fake_ray: FakeRay, model: PreparedModel) -> None:
    """Six CPUs: twelve shards are under way, and the thirteenth is read when one of them is done."""
    data = batches(400, samples=1)
    read: list[int] = []

    def stream() -> Iterator[ShardBatch]:
        for index, batch in enumerate(data):
            read.append(index)
            yield batch

    with RayCluster("auto") as cluster:
        found = cluster.collect(model, tensors_to_calibrate(model), stream(), total=400)

    assert fake_ray.options[0]["num_cpus"] == 1
    assert fake_ray.most == 2 * 6 + 1
    assert len(read) == 400
    assert_equal(found, collect(OnnxRuntimeActivations(model, tensors_to_calibrate(model), data, threads=2)))


def test_reviews_see_exactly_the_batches_before_them(fake_ray: FakeRay, model: PreparedModel) -> None:
    """Nothing beyond has been read, and True ends the pass."""
    read: list[int] = []
    seen: list[tuple[int, int]] = []

    def stream() -> Iterator[ShardBatch]:
        for index, batch in enumerate(batches(100)):
            read.append(index)
            yield batch

    def review(statistics: ActivationStatistics) -> bool:
        seen.append((statistics.batches, len(read)))
        return statistics.batches == 60

    found = RayCluster("auto").collect(model, ["conv", "relu"], stream(), interval=20, review=review)

    assert seen == [(20, 20), (40, 40), (60, 60)]
    assert_equal(found, collect(OnnxRuntimeActivations(model, ["conv", "relu"], batches(100)[:60], threads=1)))


def test_large_batches_make_small_shards(
    fake_ray: FakeRay, model: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is closed when it has grown to the limit in bytes."""
    monkeypatch.setattr(ray_cluster, "SHARD_BYTES", 3 * 2 * 3 * 8 * 8 * 4)

    RayCluster("auto").collect(model, ["conv"], batches(9))

    assert sum(name.startswith("count_shard") for name in fake_ray.results) == 3


def test_sums_are_made_on_the_cluster(fake_ray: FakeRay, model: PreparedModel) -> None:
    """Every eight shards travel to the driver as one."""
    RayCluster("auto").collect(model, ["conv"], batches(2 * ARITY * 16))

    assert sum(name.startswith("count_shard") for name in fake_ray.results) == 2 * ARITY
    assert sum(name.startswith("add_up") for name in fake_ray.results) >= 2


def test_an_error_ends_the_pass_and_drops_the_rest(fake_ray: FakeRay, model: PreparedModel) -> None:
    """What is still under way is cancelled, and the error is the worker's own."""
    data = batches(400)
    data[100].feeds["input"][0] = np.nan

    with pytest.raises(NonFiniteActivationError, match="in batch 100;"):
        RayCluster("auto").collect(model, ["conv"], data)
    assert fake_ray.cancelled > 0


def test_of_several_wrong_batches_the_first_is_reported(fake_ray: FakeRay, model: PreparedModel) -> None:
    """Whatever shard is done first; and before an exception of the data that come behind them."""
    data = batches(60)
    for index in (50, 41, 20):
        data[index].feeds["input"][0] = np.nan

    def stream() -> Iterator[ShardBatch]:
        yield from data
        raise ZeroDivisionError("the user's own")

    with pytest.raises(NonFiniteActivationError, match="in batch 20;"):
        RayCluster("auto").collect(model, ["conv"], stream())
    with pytest.raises(NonFiniteActivationError, match="in batch 20;"):
        RayCluster("auto").collect(model, ["conv"], data)


def test_workers_without_the_package_are_named(
    fake_ray: FakeRay, model: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step is to install it there."""

    def count_nothing(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'trt_int8'")

    monkeypatch.setattr(ray_cluster, "count_shard", count_nothing)

    with pytest.raises(CalibrationError, match=r"cannot import trt_int8: No module .*\. Install trt-int8"):
        RayCluster("auto").collect(model, ["conv"], batches(1))


def test_a_bug_on_a_worker_keeps_its_traceback(
    fake_ray: FakeRay, model: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own error, which quotes it, passes through."""

    def broken(*arguments: object) -> None:
        raise fake_ray.exceptions.RayTaskError(KeyError("a bug"))

    monkeypatch.setattr(ray_cluster, "count_shard", broken)

    with pytest.raises(fake_ray.exceptions.RayTaskError, match="a bug"):
        RayCluster("auto").collect(model, ["conv"], batches(1))


def test_no_batches(fake_ray: FakeRay, model: PreparedModel) -> None:
    """As in one process."""
    with pytest.raises(EmptyCalibrationSetError, match="held no batch"):
        RayCluster("auto").collect(model, ["conv"], [])


def test_a_cluster_without_processors(fake_ray: FakeRay, model: PreparedModel) -> None:
    """Tasks would wait for ever."""
    fake_ray.cpus = (0,)

    with pytest.raises(CalibrationError, match="its 1 nodes offer no CPUs"):
        RayCluster("auto").collect(model, ["conv"], batches(1))


# --- GPUs -----------------------------------------------------------------------------------------------------------


def test_every_task_has_a_gpu_of_its_own(
    fake_ray: FakeRay, model: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model runs on GPUs: as many tasks at a time as there are, and each is told what to run it on."""
    fake_ray.gpus = 1
    backend = CalibrationBackend("cuda", "found it", {"backend": "cuda", "gpu": "NVIDIA H100"})
    told: list[CalibrationBackend] = []

    def count_shard(job: Any, shard: Shard) -> ActivationStatistics:
        told.append(job.backend)
        return ray_worker.count_shard(dataclasses.replace(job, backend=choose_calibration_backend()), shard)

    monkeypatch.setattr(ray_cluster, "count_shard", count_shard)
    data = batches(400, samples=1)
    found = RayCluster("auto").collect(model, ["conv"], data, backend=backend, total=400)

    assert fake_ray.options[0] == {"num_cpus": 1, "num_gpus": 1, "max_retries": 3}
    assert fake_ray.options[1] == {"num_cpus": 0, "max_retries": 3}
    assert fake_ray.most == 2 * 2 + 1
    assert set(map(id, told)) == {id(backend)}
    assert_equal(found, collect(OnnxRuntimeActivations(model, ["conv"], data, threads=1)))


def test_a_worker_with_a_gpu_says_what_it_has(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver needs none; "auto" asks where there is one, and what is in the way is the worker's own word."""
    fake_ray.gpus = 1
    seen = CalibrationBackend("tensorrt", "found it", {"gpu": "NVIDIA H100"})
    monkeypatch.setattr(ray_cluster, "choose_calibration_backend", lambda requested: seen)
    assert RayCluster("auto").choose_backend("auto") is seen
    assert fake_ray.options == [{"num_cpus": 1, "num_gpus": 1, "max_retries": 3}]

    def refuse(requested: str) -> CalibrationBackend:
        raise DeviceError("the driver is too old")

    monkeypatch.setattr(ray_cluster, "choose_calibration_backend", refuse)
    with pytest.raises(DeviceError, match="the driver is too old"):
        RayCluster("auto").choose_backend("tensorrt")


def test_a_cluster_without_gpus(fake_ray: FakeRay) -> None:
    """ "auto" takes the processors; a GPU that is asked for is an error."""
    found = RayCluster("auto").choose_backend("auto")

    assert (found.name, found.reason) == ("onnxruntime", "the Ray cluster offers no GPUs")
    assert RayCluster("auto").choose_backend("onnxruntime").name == "onnxruntime"
    assert fake_ray.options == []
    with pytest.raises(CalibrationError, match=r"its 2 nodes offer no GPUs; .* or take --backend onnxruntime"):
        RayCluster("auto").choose_backend("cuda")


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["", "nonsense", "ray://x", "host:", ":6379", "host:0", "host:70000", "host:6x"])
def test_addresses_of_another_form_are_refused(fake_ray: FakeRay, address: str) -> None:
    """The forms are named before anything is tried."""
    with pytest.raises(CalibrationError, match="expected auto, local, HOST:PORT or ray://HOST:PORT"):
        RayCluster(address)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nothing_listens(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """One line, at once."""
    monkeypatch.setattr(fake_ray, "is_initialized", lambda: False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = form.format(closed.getsockname()[1])

        with pytest.raises(CalibrationError, match=f"Cannot reach the Ray cluster at '{address}': Connection refused"):
            RayCluster(address)


@pytest.mark.parametrize("form", ["note", "variable"])
def test_a_cluster_that_is_gone(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str) -> None:
    """ "auto" goes where an earlier cluster said it was; nothing listens there any more, which is said at once."""
    monkeypatch.setattr(fake_ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        if form == "note":
            (tmp_path / "ray").mkdir()
            (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        else:
            monkeypatch.setenv("RAY_ADDRESS", address)

        with pytest.raises(CalibrationError, match=f"at 'auto', which was {address}: Connection refused"):
            RayCluster("auto")


def test_what_ray_says_is_cut_to_a_line(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster here, or one of another version of Python."""

    def init(**options: object) -> None:
        raise RuntimeError("\nVersion mismatch: The cluster was started with:\n    Ray: 2.0\n")

    monkeypatch.setattr(fake_ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(fake_ray, "init", init, raising=False)

    with pytest.raises(CalibrationError, match=r"at 'auto': Version mismatch: .* Ray: 2\.0.*Start one with"):
        RayCluster("auto").__enter__()


def test_the_command_says_it_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """Exit status 1, before the data are looked at."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "trt_int8", "calibrate", tiny_model, "--data", "missing.npz", "--ray", address,
             "--output", tmp_path / "calibration.npz"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"Cannot reach the Ray cluster at '{address}': Connection refused." in line
