"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper

from engines.device import SIMULATED
from engines.onnxrt import check_feeds
from engines.runner import TensorSpec
from trt_int8.backends import choose_backend, loading_problem
from trt_int8.machine import read_cuda_driver

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a test that needs a GPU fails where there is none")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, with the reason; with --require-gpu, fail."""
    if item.get_closest_marker("gpu") is None:
        return
    reason = no_gpu()
    if reason is None and item.get_closest_marker("pycuda") is not None:
        problem = loading_problem("pycuda.driver")
        reason = problem and f"pycuda {problem}"
    required = item.config.getoption("--require-gpu")
    if reason is None and required and read_cuda_driver().gpus[0].name == SIMULATED:
        reason = "the GPU is simulated"
    if reason is not None:
        (pytest.fail if required else pytest.skip)(reason)


@cache
def no_gpu() -> str | None:
    """Why engines cannot be run here, None where they can; a simulated GPU will do."""
    backend = choose_backend("auto")
    return None if backend.name == "tensorrt" else backend.reason


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A seeded classifier of 16 classes on (batch, 3, 8, 8) images: Conv, Relu, Flatten, Gemm; dynamic batch.

    Its 8 channels and 16 classes are the fewest that TensorRT's INT8 kernels take.
    """
    return save_tiny_model(tmp_path / "tiny.onnx")


@pytest.fixture(scope="module")
def module_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `tiny_model`, for the fixtures of a whole module."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


def save_tiny_model(path: Path) -> Path:
    rng = np.random.default_rng(7)
    weights = {
        "conv.weight": rng.normal(0, 0.3, (8, 3, 3, 3)),
        "conv.bias": rng.normal(0, 0.1, 8),
        "fc.weight": rng.normal(0, 0.1, (16, 512)),
        "fc.bias": rng.normal(0, 0.1, 16),
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
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
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


class GraphBuilder:
    """Draws an ONNX graph node by node, with seeded weights.

    The methods that add something return the name of the tensor that it makes. A node is named `n_` + its first output.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def input(
        self, name: str = "x", shape: Sequence[int | str] | None = ("N", 3, 8, 8), dtype: int = TensorProto.FLOAT
    ) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, values: Any, name: str | None = None) -> str:
        name = name or f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def normal(self, shape: Sequence[int], scale: float = 1.0, name: str | None = None) -> str:
        """A constant of normally distributed float32."""
        return self.constant(self.rng.normal(0, scale, tuple(shape)).astype(np.float32), name)

    def node(self, op_type: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        return self.nodes_of(op_type, inputs, [output or f"{op_type.lower()}_{len(self.nodes)}"], **attributes)[0]

    def nodes_of(self, op_type: str, inputs: Sequence[str], outputs: list[str], **attributes: Any) -> list[str]:
        """A node with several outputs."""
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=f"n_{outputs[0]}", **attributes))
        return outputs

    def conv(
        self, x: str, channels: tuple[int, int], output: str | None = None, *, kernel: int = 3, bias: bool = True,
        group: int = 1, pads: Sequence[int] | None = None, **attributes: Any,
    ) -> str:  # fmt: skip
        """A 2-D convolution from channels[0] to channels[1] that keeps the size where `pads` is not given."""
        shape = (channels[1], channels[0] // group, kernel, kernel)
        inputs = [x, self.normal(shape, np.prod(shape[1:]) ** -0.5)]
        if bias:
            inputs.append(self.normal(channels[1:], 0.1))
        pads = [kernel // 2] * 4 if pads is None else pads
        return self.node("Conv", inputs, output, pads=pads, group=group, **attributes)

    def gemm(self, x: str, features: tuple[int, int], output: str | None = None, *, bias: bool = True) -> str:
        inputs = [x, self.normal(features[::-1], features[0] ** -0.5)]
        if bias:
            inputs.append(self.normal(features[1:], 0.1))
        return self.node("Gemm", inputs, output, transB=1)

    def clip(self, x: str, low: float, high: float) -> str:
        return self.node("Clip", [x, self.constant(np.float32(low)), self.constant(np.float32(high))])

    def model(
        self, outputs: Iterable[str | onnx.ValueInfoProto], *, opset: int = 20, ir_version: int = 10
    ) -> onnx.ModelProto:
        values = [
            helper.make_tensor_value_info(value, TensorProto.FLOAT, None) if isinstance(value, str) else value
            for value in outputs
        ]
        graph = helper.make_graph(self.nodes, "drawn", self.inputs, values, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)

    def save(self, path: Path, outputs: Iterable[str | onnx.ValueInfoProto], **versions: int) -> Path:
        path.write_bytes(self.model(outputs, **versions).SerializeToString())
        return path


@pytest.fixture(scope="session")
def graph_builder() -> type[GraphBuilder]:
    """The class that draws ONNX graphs."""
    return GraphBuilder


def run_onnx(
    model: Path | onnx.ModelProto | ir.Model,
    feeds: Mapping[str, Any],
    *,
    optimized: bool = False,
    fetch: Sequence[str] | None = None,
    optimized_model: Path | None = None,
) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized_model is not None:
        options.optimized_model_filepath = str(optimized_model)
    source: Any = model
    if isinstance(model, Path):
        source = onnx.load(model)
    elif isinstance(model, ir.Model):
        source = ir.to_proto(model)
    if fetch is not None:
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        present = {value.name for value in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in fetch if name not in present)
        source = proto
    session = onnxruntime.InferenceSession(source.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = list(fetch) if fetch is not None else [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.fixture(scope="session")
def run_model() -> Callable[..., dict[str, Any]]:
    """Runs a model in ONNX Runtime, as written unless `optimized`: run_model(model, feeds, fetch=[tensor, ...])."""
    return run_onnx


@dataclass(frozen=True)
class SimulatedTensorRT:
    """Runs Python where `import tensorrt` finds NVIDIA's bindings over simulated libraries; see tests/trtsim.

    `without_pycuda` is the reason why pycuda is not among the packages, None where it is.
    """

    version: int
    environment: Mapping[str, str]
    without_pycuda: str | None

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS`; `variables` are further environment variables, such as TRTSIM_FAIL."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=os.environ | self.environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session", params=[10, 11], ids=["tensorrt10", "tensorrt11"])
def tensorrt_sim(request: pytest.FixtureRequest) -> SimulatedTensorRT:
    """The simulated TensorRT, 10 and 11 in turn."""
    provision = runpy.run_path(str(Path(__file__).parent / "trtsim" / "provision.py"))
    folder = Path(sys.prefix) / "trtsim"
    reason = provision["unavailable"](folder)
    if reason is not None:
        pytest.skip(reason)
    return SimulatedTensorRT(
        request.param, provision["environment"](folder, request.param), provision["pycuda_unavailable"](folder)
    )
