"""Calibrating on the GPU, over the SIMULATED TensorRT and a double of ONNX Runtime's CUDA provider."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cuda.bindings import driver as cuda

from calibrators.calibration import Calibration
from calibrators.counter import histogram_of
from calibrators.errors import CalibrationError, NonFiniteActivationError
from engines.errors import DeviceError, EngineBuildError, InferenceError, MissingDependencyError
from engines.graph import prepare
from trt_int8 import calibrate
from trt_int8.calibrate_stage import calibrate_into
from trt_int8.calibration_backend import CalibrationBackendChoice, choose_calibration_backend
from trt_int8.calibration_job import CalibrationJob
from trt_int8.cli import main
from trt_int8.errors import ConfigError, DataError
from trt_int8.machine import read_cuda_driver

IMAGES = np.random.default_rng(11).normal(size=(22, 3, 8, 8)).astype(np.float32)


SESSION = onnxruntime.InferenceSession


class CudaSession:
    """An ONNX Runtime session whose CUDA provider is a double: it computes on the processor, on device memory."""

    streams: list[str] = []  # noqa: RUF012

    def __init__(self, source: Any, options: Any, providers: Sequence[Any]) -> None:
        options.intra_op_num_threads = 1
        self._providers = providers
        self._session = SESSION(source, options, providers=["CPUExecutionProvider"])
        self.streams += [options["user_compute_stream"] for name, options in providers[:-1] if options["use_tf32"] == 0]

    def get_providers(self) -> list[str]:
        return [provider if isinstance(provider, str) else provider[0] for provider in self._providers]

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding) -> None:
        binding.outputs = [Output(value) for value in self._session.run(binding.names, binding.feeds)]


class Binding:
    """A double of `onnxruntime.IOBinding`."""

    def __init__(self) -> None:
        self.feeds: dict[str, np.ndarray] = {}
        self.names: list[str] = []
        self.outputs: list[Output] = []

    def bind_input(self, name: str, kind: str, device: int, dtype: Any, shape: Sequence[int], address: int) -> None:
        assert (kind, device) == ("cuda", 0)
        self.feeds[name] = np.empty(shape, dtype)
        checked(cuda.cuMemcpyDtoH(self.feeds[name].ctypes.data, address, self.feeds[name].nbytes))

    def bind_output(self, name: str, kind: str, device: int) -> None:
        assert (kind, device) == ("cuda", 0)
        self.names.append(name)

    def get_outputs(self) -> list[Output]:
        return self.outputs


class Output:
    """A double of `onnxruntime.OrtValue` in device memory."""

    def __init__(self, value: np.ndarray) -> None:
        self._value = np.ascontiguousarray(value)
        self._address = int(checked(cuda.cuMemAlloc(max(value.nbytes, 1))))
        checked(cuda.cuMemcpyHtoD(self._address, self._value.ctypes.data, value.nbytes))

    def __del__(self) -> None:
        cuda.cuMemFree(self._address)

    def data_ptr(self) -> int:
        return self._address

    def shape(self) -> list[int]:
        return list(self._value.shape)

    def element_type(self) -> int:
        return onnx.helper.np_dtype_to_tensor_dtype(self._value.dtype)


def checked(result: tuple[Any, ...]) -> Any:
    assert result[0] == cuda.CUresult.CUDA_SUCCESS
    return result[1] if len(result) > 1 else None


@pytest.fixture
def cuda_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime with a CUDA provider."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)

    def session(source: Any, options: Any, providers: Sequence[Any]) -> Any:
        return (SESSION if providers == ["CPUExecutionProvider"] else CudaSession)(source, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)


def computed(model: Path, feeds: Sequence[Mapping[str, np.ndarray]], tensors: Sequence[str]) -> list[dict[str, Any]]:
    """What the simulated TensorRT computes: each node as it is written."""
    proto = onnx.ModelProto()
    proto.CopyFrom(prepare(model).proto)
    present = {value.name for value in [*proto.graph.output, *proto.graph.input]}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in present)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = SESSION(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [name for name in tensors if name not in feeds[0]]
    return [dict(zip(names, session.run(names, dict(fed)), strict=True)) | dict(fed) for fed in feeds]


def assert_counts(calibration: Calibration, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
    """The calibration holds the exact counts of these activations."""
    for name in calibration.tensors:
        found, expected = calibration.histogram(name), histogram_of(*(batch[name] for batch in batches))
        np.testing.assert_array_equal(found.bins, expected.bins)
        np.testing.assert_array_equal(found.counts, expected.counts)
        assert (found.minimum, found.maximum, found.zeros) == (expected.minimum, expected.maximum, expected.zeros)


def batches_of(images: np.ndarray, size: int) -> list[dict[str, np.ndarray]]:
    return [{"input": images[start : start + size]} for start in range(0, len(images), size)]


def test_counts_are_those_of_what_tensorrt_computed(tiny_model: Path) -> None:
    """All tensors, the input among them, over full batches and a shorter one; nothing is lost on the way."""
    calibration = calibrate(tiny_model, {"input": IMAGES}, batch_size=8, tensors="all", backend="tensorrt")

    assert calibration.tensors == ("input", "conv", "relu", "flat", "logits")
    assert (calibration.fingerprint.batches, calibration.fingerprint.samples) == (3, 22)
    assert calibration.input_shapes["input"] == {(6, 3, 8, 8): 1, (8, 3, 8, 8): 2}
    assert_counts(calibration, computed(tiny_model, batches_of(IMAGES, 8), calibration.tensors))


@pytest.mark.tensorrt(11)
def test_scales_are_those_of_the_processor_but_for_rounding(tiny_model: Path) -> None:
    """Fusions and orders of sums differ, so the last bits do."""
    on_gpu, on_processor = (
        calibrate(tiny_model, {"input": IMAGES}, batch_size=8, backend=backend)
        for backend in ("tensorrt", "onnxruntime")
    )
    for method in ("minmax", "entropy", "percentile", "mse"):
        expected = on_processor.scales(method)
        for name, scale in on_gpu.scales(method).items():
            assert scale == pytest.approx(expected[name], rel=2e-3)
    assert list(on_gpu.convergence) == list(on_processor.convergence)


def test_padding_is_not_counted(graph_builder: Any, tmp_path: Path) -> None:
    """The rows that fill up the last batch of a model with a fixed batch are run, and left out."""
    graph = graph_builder()
    x = graph.input("input", (4, 3, 8, 8))
    pooled = graph.node("Flatten", [graph.node("GlobalAveragePool", [graph.node("Relu", [graph.conv(x, (3, 5))])])])
    model = graph.save(tmp_path / "fixed.onnx", [graph.gemm(pooled, (5, 2), "logits")])
    calibration = calibrate(model, {"input": IMAGES[:6]}, tensors="all", backend="tensorrt")

    padded = [{"input": IMAGES[:4]}, {"input": np.concatenate([IMAGES[4:6], IMAGES[4:6]])}]
    full, short = computed(model, padded, calibration.tensors)
    assert_counts(calibration, [full, {name: value[:2] for name, value in short.items()}])
    assert calibration.fingerprint.samples == 6


def test_other_shapes_have_the_engine_built_anew(
    graph_builder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each shape beyond those before; what was counted stays."""
    graph = graph_builder()
    x = graph.input("input", ("N", 3, "H", "W"))
    model = graph.save(tmp_path / "wide.onnx", [graph.node("Relu", [graph.conv(x, (3, 4))], "out")])
    rng = np.random.default_rng(5)
    shapes = [(2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 6, 12), (2, 3, 7, 9), (3, 3, 8, 8)]
    batches = [{"input": rng.normal(size=shape).astype(np.float32)} for shape in shapes]
    with caplog.at_level(logging.INFO, "engines.gpu_tensorrt"):
        calibration = calibrate(model, batches, tensors="all", backend="tensorrt")

    assert_counts(calibration, computed(model, batches, calibration.tensors))
    built = [line for line in caplog.messages if "building" in line]
    assert len(built) == 3
    assert "min (1, 3, 6, 8)" in built[1]
    assert "max (3, 3, 8, 12)" in built[2]


def test_fp16_models_are_counted_in_fp32_bins(graph_builder: Any, tmp_path: Path) -> None:
    """Their activations are widened, as on the processor."""
    graph = graph_builder()
    x = graph.input("input", ("N", 4), onnx.TensorProto.FLOAT16)
    weights = graph.constant(graph.rng.normal(size=(4, 3)).astype(np.float16))
    graph.node("MatMul", [x, weights], "out")
    output = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT16, ["N", 3])
    model = graph.save(tmp_path / "half.onnx", [output])
    batches = [{"input": IMAGES.reshape(-1, 4)[:64].astype(np.float16)}]
    calibration = calibrate(model, batches, tensors="all", backend="tensorrt")

    assert_counts(calibration, computed(model, batches, calibration.tensors))


@pytest.mark.tensorrt(11)
def test_the_cuda_provider_counts_the_same(tiny_model: Path, cuda_provider: None) -> None:
    """Its outputs are counted where they are, and its double computes what the processor computes: equal to the bit."""
    options = {"batch_size": 8, "tensors": "all"}
    expected = calibrate(tiny_model, {"input": IMAGES}, **options)
    found = calibrate(tiny_model, {"input": IMAGES}, **options, backend="cuda")

    assert found.sha256 == expected.sha256
    assert found.convergence == expected.convergence
    assert found.settings["backend"] == "cuda"
    assert all(int(stream) > 2 for stream in CudaSession.streams)


@pytest.mark.tensorrt(11)
@pytest.mark.parametrize("backend", ["tensorrt", "cuda"])
def test_several_passes_count_the_same(tiny_model: Path, cuda_provider: None, backend: Any) -> None:
    """Each has its own tensors on the GPU."""
    options = {"batch_size": 8, "tensors": "all", "backend": backend}
    whole = calibrate(tiny_model, {"input": IMAGES}, **options)
    parts = calibrate(tiny_model, {"input": IMAGES}, **options, max_memory_bytes=20_000)

    assert parts.sha256 == whole.sha256


@pytest.mark.parametrize("backend", ["tensorrt", "cuda"])
def test_an_activation_that_is_not_finite_is_named(tiny_model: Path, cuda_provider: None, backend: Any) -> None:
    """The tensor, the node and the batch, in the words of the processor's counter."""
    images = IMAGES.copy()
    images[13] = 3e38
    batches = [{"input": images[:8]}, {"input": images[8:16]}, {"input": images[16:]}]
    with pytest.raises(NonFiniteActivationError) as on_processor:
        calibrate(tiny_model, batches)
    with pytest.raises(NonFiniteActivationError, match="in batch 1; expected finite activations") as caught:
        calibrate(tiny_model, batches, backend=backend)

    assert (caught.value.tensor, caught.value.node, caught.value.batch) == ("relu", "node 'relu'", 1)
    # How many values become infinite may differ: sums that overflow depend on the order of their terms.
    texts = [re.sub(r": \d+ of its", ": N of its", str(error.value)) for error in (caught, on_processor)]
    assert texts[0] == texts[1]


@pytest.mark.tensorrt(11)
class TestStages:
    """What every calibration can do, it can do on the GPU."""

    @staticmethod
    def job(model: Path, data: Any, backend: CalibrationBackendChoice = "tensorrt", **options: Any) -> CalibrationJob:
        return CalibrationJob(model, data, batch_size=1, backend=backend, **options)

    def test_an_interrupted_pass_goes_on(self, tiny_model: Path, tmp_path: Path) -> None:
        """To the same counts; nothing that was counted is counted again."""
        part = tmp_path / "c.part.npz"
        expected = calibrate(tiny_model, {"input": IMAGES}, backend="tensorrt")

        def interrupted() -> Iterator[dict[str, np.ndarray]]:
            yield from batches_of(IMAGES, 1)[:13]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_model, interrupted(), backend="tensorrt", checkpoint=part, checkpoint_every=5)
        assert Calibration.load(part).fingerprint.batches == 10
        found = calibrate(tiny_model, batches_of(IMAGES, 1), backend="tensorrt", checkpoint=part, resume=True)

        assert found.sha256 == expected.sha256
        assert found.convergence == expected.convergence

    def test_a_pass_on_the_processor_is_not_gone_on_with(self, tiny_model: Path, tmp_path: Path) -> None:
        """The two would not agree in the last bits."""
        part = tmp_path / "c.part.npz"
        calibrate(tiny_model, {"input": IMAGES}).save(part)
        with pytest.raises(
            CalibrationError, match=r"Cannot resume from .*: the backend was onnxruntime and is tensorrt\. "
        ):
            calibrate(tiny_model, {"input": IMAGES}, backend="tensorrt", checkpoint=part, resume=True)

    def test_a_file_is_kept_where_the_backend_is_the_same(self, tiny_model: Path, tmp_path: Path) -> None:
        """Another one gives another calibration."""
        output, data = tmp_path / "c.npz", {"input": IMAGES}
        assert not calibrate_into(output, self.job(tiny_model, data)).kept
        assert calibrate_into(output, self.job(tiny_model, data)).kept
        with pytest.raises(CalibrationError, match=r": the backend was tensorrt and is onnxruntime\. "):
            calibrate_into(output, self.job(tiny_model, data, "onnxruntime"))

    def test_it_stops_when_scales_are_stable(self, tiny_model: Path) -> None:
        """The scales are looked at on the way; no batch behind the last one is counted."""
        batches = [{"input": IMAGES[:2]}] * 100
        calibration = calibrate(tiny_model, batches, backend="tensorrt", stop_when_stable="minmax")

        assert calibration.fingerprint.batches == 32
        assert calibration.histogram("input").count == 32 * IMAGES[:2].size

    def test_what_is_wrong_first_is_reported_first(self, tiny_model: Path) -> None:
        """A batch that cannot be read comes behind the one that overflows."""

        def stream(value: float) -> Iterator[dict[str, np.ndarray]]:
            yield {"input": IMAGES[:1]}
            yield {"input": np.full((1, 3, 8, 8), value, np.float32)}
            raise DataError("the disk is gone")

        with pytest.raises(NonFiniteActivationError, match="batch 1"):
            calibrate(tiny_model, stream(3e38), backend="tensorrt")
        with pytest.raises(DataError, match="the disk is gone"):
            calibrate(tiny_model, stream(0.5), backend="tensorrt")


@pytest.mark.tensorrt(11)
def test_the_command_says_what_it_takes(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """--backend auto finds the simulated GPU; what it needs of its memory is said before."""
    data = tmp_path / "images.npz"
    np.savez(data, input=IMAGES)
    command = ["calibrate", tiny_model, "--data", data, "--output", tmp_path / "c.npz", "--backend", "auto"]

    assert main([*map(str, command)]) == 0
    assert "calibrating by tensorrt: found SIMULATED" in caplog.text
    assert "MiB of activations" in caplog.text
    assert Calibration.load(tmp_path / "c.npz").settings["backend"] == "tensorrt"


@pytest.mark.tensorrt(11)
class TestErrors:
    """What is missing is said in one line, with what to do."""

    def test_no_room_for_activations(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Histograms fit, activations do not: several passes do."""
        monkeypatch.setenv("TRTSIM_DEVICE_MEMORY_MB", "12")
        images = np.zeros((3000, 3, 8, 8), np.float32)
        with pytest.raises(DeviceError, match=r"Cannot calibrate 5 tensors of tiny.onnx at a time .*--max-memory"):
            calibrate(tiny_model, {"input": images}, batch_size=3000, tensors="all", backend="tensorrt")

    def test_tensorrt_refuses_the_model(self, graph_builder: Any, tmp_path: Path) -> None:
        """The file and the operator are named, not the temporary copy."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input("input"), (3, 4))])
        model = graph.save(tmp_path / "odd.onnx", [graph.node("Det", [x], "out")])
        with pytest.raises(EngineBuildError, match=r"odd\.onnx.*Det"):
            calibrate(model, {"input": IMAGES}, backend="tensorrt")

    def test_the_gpu_fails(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The batch is named."""
        monkeypatch.setenv("TRTSIM_FAIL", "enqueue")
        with pytest.raises(InferenceError, match=r"Calibration of tiny.onnx failed in batch 0"):
            calibrate(tiny_model, {"input": IMAGES}, backend="tensorrt")

    def test_a_kernel_that_fails_leaves_the_batch_named(self, tiny_model: Path) -> None:
        """Nothing can be given back then; what is said is the first error all the same."""
        code = (
            "import sys; import numpy as np; from trt_int8 import calibrate\n"
            "calibrate(sys.argv[1], {'input': np.ones((2, 3, 8, 8), np.float32)}, backend='tensorrt')"
        )
        command = [sys.executable, "-c", code, str(tiny_model)]
        result = subprocess.run(
            command, env=os.environ | {"TRTSIM_FAIL": "device"}, capture_output=True, text=True, check=False
        )

        error = result.stderr.splitlines()[-1]
        assert "InferenceError: Calibration of tiny.onnx failed on the GPU in batch 0: CUDA failed" in error
        assert "illegal memory access" in error

    def test_no_compiler(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before anything is built; "auto" takes the processor and says why."""
        monkeypatch.setattr("trt_int8.calibration_backend.compiler_problem", lambda: "cuda-python finds no NVRTC")
        problem = "cuda-python finds no NVRTC"
        with pytest.raises(MissingDependencyError, match=r"nothing compiles the kernel: cuda-python finds no NVRTC\. "):
            choose_calibration_backend("tensorrt", compiler=lambda: problem)
        found = choose_calibration_backend("auto", compiler=lambda: problem)
        assert found.name == "onnxruntime"
        assert problem in found.reason

    def test_no_cuda_provider(self, tiny_model: Path) -> None:
        """The installed providers are listed."""
        with pytest.raises(MissingDependencyError, match=r"has no CUDAExecutionProvider, only .*onnxruntime-gpu"):
            calibrate(tiny_model, {"input": IMAGES}, backend="cuda")

    def test_a_provider_that_does_not_start(
        self, tiny_model: Path, cuda_provider: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """ONNX Runtime goes on without it; that would be calibrated on the processor unnoticed."""
        monkeypatch.setattr(CudaSession, "get_providers", lambda self: ["CPUExecutionProvider"])
        with pytest.raises(DeviceError, match=r"CUDAExecutionProvider is installed and does not start"):
            calibrate(tiny_model, {"input": IMAGES}, backend="cuda")

    def test_a_dtype_that_is_not_counted(self, graph_builder: Any, tmp_path: Path, cuda_provider: None) -> None:
        """FP64 is counted on the processor alone."""
        graph = graph_builder()
        x = graph.input("input", ("N", 4), onnx.TensorProto.DOUBLE)
        model = graph.save(tmp_path / "double.onnx", [graph.node("Sqrt", [x], "out")])
        with pytest.raises(CalibrationError, match=r"'input' of model input on the GPU: its dtype is float64"):
            calibrate(model, {"input": np.ones((2, 4))}, tensors="all", backend="cuda")

    def test_no_such_backend(self, tiny_model: Path) -> None:
        """The words are listed."""
        backend: Any = "gpu"
        with pytest.raises(ConfigError, match=r"backend is 'gpu'; expected 'auto' or 'onnxruntime' or 'cuda' or"):
            calibrate(tiny_model, {"input": IMAGES}, backend=backend)


def test_auto_takes_the_provider_before_tensorrt() -> None:
    """It needs no engine; without it TensorRT is taken; without a GPU the processor, and the driver says why."""
    driver = read_cuda_driver()
    assert choose_calibration_backend("auto", provider=lambda: None).name == "cuda"
    assert choose_calibration_backend("auto").name == "tensorrt"
    none = choose_calibration_backend("auto", cuda=replace(driver, error="no CUDA-capable device is detected"))
    assert (none.name, none.reason) == ("onnxruntime", "no CUDA-capable device is detected")
    assert choose_calibration_backend().name == "onnxruntime"
