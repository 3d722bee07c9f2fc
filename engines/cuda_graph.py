"""CUDA graphs: work of a stream recorded once and launched as a whole, which saves the host's part of each kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engines.errors import DeviceError


class GraphLaunch:
    """A captured graph; calling it launches the graph in its stream.

    Args:
        driver: the module `cuda.bindings.driver`.
        executable: a CUgraphExec.
        stream: a CUstream.
    """

    def __init__(self, driver: Any, executable: Any, stream: Any) -> None:
        self._driver = driver
        self._executable = executable
        self._stream = stream

    def __call__(self) -> None:
        """Launch the graph.

        Raises:
            DeviceError: the driver refused.
        """
        _check(self._driver, "launch a CUDA graph", self._driver.cuGraphLaunch(self._executable, self._stream))

    def release(self) -> None:
        """Give the graph back; a second call does nothing."""
        if self._executable is not None:
            self._driver.cuGraphExecDestroy(self._executable)
            self._executable = None


def capture_graph(driver: Any, stream: Any, enqueue: Callable[[], None]) -> GraphLaunch:
    """Record what `enqueue` puts into a stream.

    Args:
        driver: the module `cuda.bindings.driver`; also where the stream was made by pycuda, which has no graphs itself.
        stream: a CUstream.
        enqueue: queues the work and waits for none of it. It must have run once before: TensorRT does work on its first
            run that cannot be captured.

    Raises:
        DeviceError: the driver has no graphs, or something in `enqueue` cannot be captured.
    """
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    _check(driver, "begin to capture a CUDA graph", driver.cuStreamBeginCapture(stream, mode))
    try:
        enqueue()
    except BaseException:
        # The capture ends whatever happened, or the stream could never be used again; a graph of half the work is
        # thrown away.
        status, graph = driver.cuStreamEndCapture(stream)
        if status == driver.CUresult.CUDA_SUCCESS:
            driver.cuGraphDestroy(graph)
        raise
    graph = _check(driver, "capture a CUDA graph", driver.cuStreamEndCapture(stream))
    try:
        executable = _check(driver, "instantiate a CUDA graph", driver.cuGraphInstantiate(graph, 0))
    finally:
        driver.cuGraphDestroy(graph)
    return GraphLaunch(driver, executable, stream)


def _check(driver: Any, what: str, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"CUDA cannot {what}: {status.name}")
    return values[0] if values else None
