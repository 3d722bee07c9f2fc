"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper

from engines.onnxrt import check_feeds
from engines.runner import TensorSpec

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A seeded classifier of 7 classes on (batch, 3, 8, 8) images: Conv, Relu, Flatten, Gemm; dynamic batch."""
    rng = np.random.default_rng(7)
    weights = {
        "conv.weight": rng.normal(0, 0.3, (4, 3, 3, 3)),
        "conv.bias": rng.normal(0, 0.1, 4),
        "fc.weight": rng.normal(0, 0.1, (7, 256)),
        "fc.bias": rng.normal(0, 0.1, 7),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight", "conv.bias"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
        helper.make_node("Flatten", ["relu"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 7])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "tiny.onnx"
    onnx.save(model, path)
    return path


class FakeRunner:
    """An `engines.runner.Runner` over a Python function from `x`, (batch, 2) floats, to `y`, the same."""

    inputs = (TensorSpec("x", np.dtype(np.float32), ("batch", 2)),)
    outputs = (TensorSpec("y", np.dtype(np.float32), ("batch", 2)),)

    def __init__(
        self,
        name: str = "fake",
        function: Callable[[Any], Any] = np.negative,
        *,
        execution: str = "native",
        simulated: bool = False,
    ) -> None:
        self.name = name
        self.execution = execution
        self.simulated = simulated
        self._function = function
        self._entered = False

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered = False

    def infer(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if not self._entered:
            raise RuntimeError("infer() outside of `with runner:`")
        check_feeds(self.name, self.inputs, feeds)
        return {"y": self._function(feeds["x"])}


@pytest.fixture
def fake_runner() -> type[FakeRunner]:
    """The class of a runner that needs no model file."""
    return FakeRunner
