"""What a plan file holds, layer by layer, and how long each layer takes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from calibrators.protocols import Array
from engines.errors import DeviceError, InferenceError
from engines.onnxrt import check_feeds
from engines.optional import require
from engines.trt_layers import EngineLayer, parse_layers
from engines.trt_runner import TensorRTRunner
from engines.trt_session import EngineSession


def inspect_engine(
    plan: str | os.PathLike[str],
    feeds: Mapping[str, Array] | None = None,
    *,
    runs: int = 20,
    trust: bool = False,
) -> tuple[EngineLayer, ...]:
    """List the layers of a plan file; with feeds, time each of them.

    Timing layer by layer takes waiting between them, so the times say how a run divides up, and their sum is no run
    time: `bench` measures that, on engines that nobody profiles.

    Args:
        plan: the file.
        feeds: one batch; it also settles the shapes that the layers are shown with.
        runs: number of timed runs; one more goes before them. None is made where it is 0.
        trust: see `engines.trt_runner.TensorRTRunner`.

    Raises:
        EngineLoadError: the plan cannot be loaded here.
        EngineError: it tells only the names of its layers.
        InferenceError: the feeds do not fit, or a run failed.
    """
    trt = require("tensorrt", "inspect an engine")
    with TensorRTRunner(plan, trust=trust) as runner:
        session = runner.session
        times: dict[str, float] = {}
        if feeds is not None:
            check_feeds(runner.name, runner.inputs, feeds)
            try:
                session.bind({name: value.shape for name, value in feeds.items()})
                times = _layer_times(trt, session, feeds, runs) if runs else {}
            except DeviceError as error:  # a kernel's error comes up in whatever call is next
                raise InferenceError(f"{runner.name} failed on the GPU: {error}") from error
        inspector = session.context.engine.create_engine_inspector()
        if feeds is not None:
            inspector.execution_context = session.context  # or dynamic shapes are shown as -1
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        del inspector
    return parse_layers(text, times)


def _layer_times(trt: Any, session: EngineSession, feeds: Mapping[str, Array], runs: int) -> dict[str, float]:
    """Return the mean milliseconds of each layer, by its name."""
    profiler = _profiler(trt)
    session.copy_in(feeds)
    session.execute()
    session.synchronize()
    session.context.profiler = profiler
    for _ in range(runs):
        session.execute()
        session.synchronize()
        if profiler.interrupted:
            raise KeyboardInterrupt
    return {name: total / runs for name, total in profiler.totals.items()}


def _profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]  # TensorRT ships no types
        """Adds up the time of each layer, in milliseconds."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.totals: defaultdict[str, float] = defaultdict(float)
            self.interrupted = False

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            try:
                self.totals[layer_name] += ms
            except KeyboardInterrupt:  # which TensorRT would swallow
                self.interrupted = True

    return Profiler()
