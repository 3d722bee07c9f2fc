"""engines.cuda_graph: the order of calls, over a driver that records them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engines.cuda_graph import capture_graph
from engines.errors import DeviceError


class Driver:
    """Records the calls of a capture; `failing` names the one that fails."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"))
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread local")

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> tuple[object, ...]:
            self.calls.append(name)
            if name == self.failing:
                return SimpleNamespace(name="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"), None
            value = {"cuStreamEndCapture": "graph", "cuGraphInstantiate": "executable"}.get(name)
            return (self.CUresult.CUDA_SUCCESS, value) if value else (self.CUresult.CUDA_SUCCESS,)

        return call


def test_captures_once_and_launches_as_often_as_asked() -> None:
    """The work is queued within the capture; the graph is given back once its executable exists."""
    driver = Driver()
    graph = capture_graph(driver, "stream", lambda: driver.calls.append("work"))
    graph()
    graph()
    graph.release()
    graph.release()

    assert driver.calls == [
        "cuStreamBeginCapture", "work", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy",
        "cuGraphLaunch", "cuGraphLaunch", "cuGraphExecDestroy",
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_failure_names_the_step(call: str) -> None:
    """The driver's status is in the message, and no graph is left behind."""
    driver = Driver(call)
    with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        capture_graph(driver, "stream", lambda: None)

    assert ("cuGraphDestroy" in driver.calls) == ("cuGraphInstantiate" in driver.calls)


def test_a_failure_within_the_capture_ends_it() -> None:
    """The stream is left usable, and the reason is raised."""
    driver = Driver()

    def fail() -> None:
        raise ValueError("cannot be captured")

    with pytest.raises(ValueError, match="cannot be captured"):
        capture_graph(driver, "stream", fail)
    assert driver.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"]


def test_a_refused_launch_is_an_error() -> None:
    """Launching checks its status too."""
    driver = Driver("cuGraphLaunch")
    graph = capture_graph(driver, "stream", lambda: None)

    with pytest.raises(DeviceError, match="launch a CUDA graph"):
        graph()
