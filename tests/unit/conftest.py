"""A GPU made of arithmetic, for those who time engines: its clock moves by work alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.runner import TensorSpec
from engines.trt_runner import TensorRTRunner


@dataclass
class Mark:
    """An event: when the stream passed it."""

    number: int
    at: int = 0


class FakeGpu:
    """The host's clock, one stream, and a log of what was asked of them. Times are whole nanoseconds.

    The host goes on while the stream works; `wait` lets it catch up.
    """

    name = "NVIDIA Fake"
    pci_bus_id = "0000:51:00.0"

    def __init__(self) -> None:
        self.now = 0
        self.free_at = 0
        self.marks = 0
        self.log: list[str] = []

    def clock(self) -> int:
        return self.now

    def work(self, nanoseconds: int) -> None:
        self.free_at = max(self.free_at, self.now) + nanoseconds

    def record(self, event: Mark | None = None) -> Mark:
        if event is None:
            event = Mark(self.marks)
            self.marks += 1
        event.at = max(self.free_at, self.now)
        self.log.append(f"record {event.number}")
        return event

    def wait(self, event: Mark) -> None:
        self.now = max(self.now, event.at)
        self.log.append(f"wait {event.number}")

    def elapsed_ms(self, start: Mark, end: Mark) -> float:
        return (end.at - start.at) / 1e6

    def engine(self, name: str = "fake.engine", **how: Any) -> FakeEngine:
        return FakeEngine(self, name, **how)


class FakeSession:
    """An `engines.trt_session.EngineSession` whose steps take the times of its engine, in milliseconds."""

    device_memory_bytes = 4096

    def __init__(self, engine: FakeEngine) -> None:
        self.device = engine.gpu
        self.name = engine.name
        self.captured = engine.graph_fallback is None
        self._engine = engine
        self._runs = 0

    def stage(self, feeds: Mapping[str, Any]) -> None:
        self.device.log.append("stage")

    def upload(self) -> None:
        self.device.log.append("upload")
        self.device.work(int(self._engine.h2d_ms * 1e6))

    def execute(self) -> None:
        engine = self._engine
        self.device.log.append(f"execute {engine.name}")
        self.device.now += int(engine.enqueue_ms * 1e6)
        compute = engine.compute_ms(self._runs) if callable(engine.compute_ms) else engine.compute_ms
        self.device.work(int(compute * 1e6))
        self._runs += 1

    def copy_out(self) -> None:
        self.device.log.append("copy_out")
        self.device.work(int(self._engine.d2h_ms * 1e6))


class FakeEngine(TensorRTRunner):
    """A runner of an engine that is not there; `infer` adds `host_ms` on the host to its steps."""

    inputs = (TensorSpec("x", np.dtype(np.float32), ("batch", 2)),)
    outputs = (TensorSpec("y", np.dtype(np.float32), ("batch", 2)),)

    def __init__(
        self,
        gpu: FakeGpu,
        name: str,
        *,
        compute_ms: float | Callable[[int], float] = 1.0,
        h2d_ms: float = 0.2,
        d2h_ms: float = 0.1,
        enqueue_ms: float = 0.0,
        host_ms: float = 0.5,
        simulated: bool = False,
        precision: str | None = None,
        profiles: Any = (),
        graph_fallback: str | None = None,
    ) -> None:
        self.gpu, self.name, self.path = gpu, name, Path(__file__)
        self.compute_ms, self.h2d_ms, self.d2h_ms = compute_ms, h2d_ms, d2h_ms
        self.enqueue_ms, self.host_ms = enqueue_ms, host_ms
        self.simulated, self.profiles, self.graph_fallback = simulated, profiles, graph_fallback
        self.sidecar: Any = SimpleNamespace(precision=precision)
        self.fed: list[Any] = []

    def __enter__(self) -> FakeEngine:
        self._session: Any = FakeSession(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None

    def infer(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.fed.append(feeds)
        self.gpu.now += int(self.host_ms * 1e6)
        self.session.upload()
        self.session.execute()
        self.session.copy_out()
        self.gpu.now = max(self.gpu.now, self.gpu.free_at)
        return {"y": feeds["x"]}


@pytest.fixture
def fake_gpu() -> FakeGpu:
    """A GPU without a GPU: `fake_gpu.engine(name, compute_ms=2)` makes runners for it."""
    return FakeGpu()


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch, fake_gpu: FakeGpu) -> Any:
    """nvidia-ml-py over the fake GPU, which takes 100 W; its energy counter steps every 50 ms.

    A function in `missing` is one that the GPU does not support.
    """
    nvml: Any = ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU = 1, 2, 0
    nvml.missing, nvml.opened, nvml.sm_clocks = set(), 0, [1500]

    def answer(name: str, value: Callable[..., int]) -> None:
        def call(*arguments: Any) -> int:
            if name in nvml.missing:
                raise nvml.NVMLError("Not Supported")
            return value(*arguments)

        setattr(nvml, name, call)

    def opened(by: int) -> int:
        nvml.opened += by
        return 0

    def clock(gpu: str, which: int) -> int:
        if which == nvml.NVML_CLOCK_MEM:
            return 2600
        return int(nvml.sm_clocks.pop(0) if len(nvml.sm_clocks) > 1 else nvml.sm_clocks[0])

    def handle(bus_id: str) -> Any:
        if bus_id != FakeGpu.pci_bus_id:
            raise nvml.NVMLError("Not Found")
        return bus_id

    answer("nvmlInit", lambda: opened(1))
    answer("nvmlShutdown", lambda: opened(-1))
    answer("nvmlDeviceGetHandleByPciBusId", handle)
    answer("nvmlDeviceGetClockInfo", clock)
    answer("nvmlDeviceGetTemperature", lambda gpu, sensor: 40 + fake_gpu.now // 10**9)
    answer("nvmlDeviceGetPowerUsage", lambda gpu: 100_000)
    answer("nvmlDeviceGetTotalEnergyConsumption", lambda gpu: fake_gpu.now // 50_000_000 * 5_000)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml
