"""Ctrl-C while TensorRT calls back, which it would swallow, over the SIMULATED TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt as trt
from onnx import TensorProto, helper

from engines.trt_builder import build_engine
from engines.trt_log import tensorrt_log
from engines.trt_runner import TensorRTRunner
from engines.trt_session import EngineSession
from engines.trt_timing import EngineTimer

FEEDS = {"x": np.array([[0, 1, 0, 2]], np.float32)}


@pytest.fixture
def engine(tmp_path: Path, graph_builder: Any) -> Path:
    """An engine whose output is as large as its input has non-zeros: TensorRT asks for room in a callback."""
    builder = graph_builder()
    builder.input("x", (1, 4))
    builder.nodes_of("NonZero", ["x"], ["indices"])
    model = builder.save(
        tmp_path / "m.onnx", [helper.make_tensor_value_info("indices", TensorProto.INT64, [2, "found"])]
    )
    return build_engine(model, tmp_path / "m.engine").path


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class Context:
    """Asks for room as TensorRT does, and fails where there is none; the simulation would write to address 0."""

    def __init__(self, session: EngineSession) -> None:
        self._allocator = session._allocators["indices"]

    def execute_async_v3(self, stream: int) -> bool:
        return bool(self._allocator.reallocate_output("indices", 0, 1 << 20, 256))


def test_ctrl_c_while_room_is_made_for_an_output(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes out of the run as what it was, and the next run is as ever."""
    with TensorRTRunner(engine) as runner:
        runner.infer(FEEDS)
        with monkeypatch.context() as patch:
            patch.setattr(runner.session, "_context", Context(runner.session))
            patch.setattr(runner.session.device, "allocate", interrupt)
            with pytest.raises(KeyboardInterrupt):
                runner.session.execute()
        np.testing.assert_array_equal(runner.infer(FEEDS)["indices"], np.nonzero(FEEDS["x"]))


@pytest.mark.parametrize(
    "run",
    [
        lambda runner: runner.infer(FEEDS),
        lambda runner: EngineTimer(runner.session).pipelined(3),
        lambda runner: EngineTimer(runner.session).stepped(FEEDS, 3),
    ],
    ids=["infer", "pipelined", "stepped"],
)
def test_ctrl_c_while_tensorrt_logs(
    engine: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[TensorRTRunner], Any]
) -> None:
    """The logger remembers it; a run, a timed one too, raises it, once."""
    with TensorRTRunner(engine) as runner:
        runner.infer(FEEDS)
        with monkeypatch.context() as patch:
            log = tensorrt_log(trt)
            execute = EngineSession.execute

            def logging_execute(session: EngineSession) -> None:
                log.logger.log(trt.ILogger.WARNING, "said in the middle of a run")
                execute(session)

            patch.setattr(EngineSession, "execute", logging_execute)
            patch.setattr("engines.trt_log._log.log", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(runner)
        run(runner)
