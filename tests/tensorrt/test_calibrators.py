"""TensorRT's builder drives the calibrators: the bindings are NVIDIA's, the libraries beneath are SIMULATED."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt as trt

from calibrators.errors import CacheFormatError, CalibrationError, EmptyCalibrationSetError
from calibrators.tensorrt import ImplicitCalibrator, scales_calibrator, streaming_calibrator
from calibrators.tensorrt_cache import TensorRTCache
from calibrators.tensorrt_cache_file import CacheOrigin
from engines.device import UploadBuffers, open_device

ORIGIN = CacheOrigin(model="model-1", data="data-1", preprocessing="resize", tool="0.1.0")
BATCH = 4


@dataclass(frozen=True)
class Feeds:
    feeds: Mapping[str, np.ndarray[Any, Any]]
    samples: int


def batch(samples: int = BATCH, *, value: float | None = None, **others: Any) -> Feeds:
    """Images for the input `x` of `network`, random where no value is given."""
    shape = (samples, 3, 4, 4)
    images = np.random.default_rng(samples).normal(size=shape) if value is None else np.full(shape, value)
    return Feeds({"x": images.astype(np.float32), **others}, samples)


@pytest.fixture
def buffers() -> Iterator[UploadBuffers]:
    with open_device("cuda") as device, UploadBuffers(device) as opened:
        yield opened


@pytest.fixture
def network(graph_builder: Any) -> onnx.ModelProto:
    """x -> Conv -> Relu -> y."""
    graph = graph_builder()
    x = graph.input("x", ("N", 3, 4, 4))
    model: onnx.ModelProto = graph.model([graph.node("Relu", [graph.conv(x, (3, 8), "conv")], "y")])
    return model


@pytest.fixture
def two_inputs(graph_builder: Any) -> onnx.ModelProto:
    """first, second -> Add -> sum, with an index input that picks a row."""
    graph = graph_builder()
    first, second = graph.input("first", ("N", 2)), graph.input("second", ("N", 2))
    rows = graph.input("rows", ("N",), onnx.TensorProto.INT64)
    picked = graph.node("Gather", [graph.node("Add", [first, second], "sum"), rows], "y")
    model: onnx.ModelProto = graph.model([picked])
    return model


def build(model: onnx.ModelProto, calibrator: ImplicitCalibrator, batch_size: int = BATCH) -> Any:
    """An engine with implicit INT8; None where TensorRT refuses."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString())
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.int8_calibrator = calibrator
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        shape = (batch_size, *network.get_input(index).shape[1:])
        profile.set_shape(network.get_input(index).name, shape, shape, shape)
    config.add_optimization_profile(profile)
    config.set_calibration_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else trt.Runtime(logger).deserialize_cuda_engine(plan)


def kernel_types(engine: Any) -> dict[str, str]:
    """Layer to the type of its first input."""
    inspector = engine.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
    return {layer["Name"]: layer["Inputs"][0]["Format/Datatype"].split()[-2] for layer in layers}


@pytest.fixture
def calibrate(network: onnx.ModelProto, buffers: UploadBuffers) -> Callable[..., Any]:
    """Builds the network with a streaming calibrator: calibrate(batches, kind="entropy2", **options)."""

    def run(batches: Iterable[Feeds], kind: str = "entropy2", **options: Any) -> Any:
        calibrator = streaming_calibrator(trt, kind, batches, **{"buffers": buffers, "batch_size": BATCH} | options)
        calibrator.engine = build(network, calibrator)
        return calibrator

    return run


only_10 = pytest.mark.tensorrt(10)
every_kind = pytest.mark.parametrize(
    ("kind", "algorithm"), [("entropy2", "EntropyCalibration2"), ("minmax", "MinMaxCalibration")]
)


@pytest.mark.tensorrt(11)
@pytest.mark.parametrize("kind", ["entropy2", "minmax"])
def test_tensorrt_11_has_no_streaming_calibrator_and_the_error_says_what_to_use(kind: str, buffers: Any) -> None:
    """On TensorRT 11 there is one line that names quantize."""
    with pytest.raises(CalibrationError, match=r"^TensorRT 11.* has no calibrators.* trt-int8 quantize.*$"):
        streaming_calibrator(trt, kind, [], buffers=buffers, batch_size=1)


@pytest.mark.tensorrt(11)
def test_tensorrt_11_takes_no_scales() -> None:
    """The calibrator that serves scales is refused on TensorRT 11 as well."""
    with pytest.raises(CalibrationError, match="has no calibrators"):
        scales_calibrator(trt, {"x": 0.1})


@only_10
@every_kind
def test_the_builder_pulls_every_batch_once(calibrate: Any, kind: str, algorithm: str) -> None:
    """A stream of 25 batches is delivered whole, and the engine runs the layer with weights in INT8."""
    calibrator = calibrate((batch() for _ in range(25)), kind)
    calibrator.raise_error()
    assert calibrator.batches_delivered == 25
    assert calibrator.consulted
    assert calibrator.get_batch_size() == 1
    assert calibrator.notes == []
    assert TensorRTCache.from_bytes(calibrator.cache).algorithm == algorithm
    assert kernel_types(calibrator.engine) == {"n_conv": "Int8", "n_y": "FP32"}


@only_10
def test_batches_are_opened_and_shown_only_when_tensorrt_asks(network: onnx.ModelProto, buffers: Any) -> None:
    """The progress wraps the stream; before the build nothing is read."""
    shown: list[Any] = []

    def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        shown.append((description, total))
        for item in items:
            yield item
            shown.append(item.samples)

    calibrator = streaming_calibrator(
        trt, "minmax", [batch(), batch()], buffers=buffers, batch_size=BATCH, total=2, track=track
    )
    assert shown == []
    build(network, calibrator)
    assert shown == [("calibrate", 2), BATCH, BATCH]


@only_10
def test_min_max_sees_the_bytes_that_were_uploaded(calibrate: Any) -> None:
    """The scale of the input is its largest magnitude over all batches divided by 127; float64 becomes float32."""
    values = [1.0, -254.0, 3.0]
    calibrator = calibrate(
        (Feeds({"x": batch(value=v).feeds["x"].astype(np.float64)}, BATCH) for v in values), "minmax"
    )
    assert TensorRTCache.from_bytes(calibrator.cache).scales["x"] == 2.0


@only_10
def test_inputs_reach_the_device_in_the_order_of_the_network(two_inputs: onnx.ModelProto, buffers: Any) -> None:
    """Batches whose dict has another order, other dtypes and further arrays calibrate each input by its own values."""
    rows = np.array([1, 0], np.int64)
    feeds = {"label": np.array([5, 6]), "second": np.full((2, 2), -254.0, np.float16), "rows": rows}
    feeds["first"] = np.full((2, 2), 127.0)
    calibrator = streaming_calibrator(trt, "minmax", [Feeds(feeds, 2)], buffers=buffers, batch_size=2)
    assert build(two_inputs, calibrator, 2) is not None
    calibrator.raise_error()
    scales = TensorRTCache.from_bytes(calibrator.cache or b"").scales
    assert dict(scales) == {"first": 1.0, "second": 2.0, "sum": 1.0, "y": 1.0}


@only_10
def test_device_memory_is_allocated_once_for_each_input(calibrate: Any) -> None:
    """Every batch arrives at the same address."""

    class Recorder:
        def __init__(self, inner: UploadBuffers) -> None:
            self.inner = inner
            self.addresses: set[int] = set()

        def upload(self, name: str, array: Any) -> int:
            self.addresses.add(self.inner.upload(name, array))
            return self.inner.upload(name, array)

    with open_device("cuda") as device, UploadBuffers(device) as inner:
        recorder = Recorder(inner)
        calibrate([batch(), batch(), batch()], buffers=recorder).raise_error()
    assert len(recorder.addresses) == 1


@only_10
def test_a_short_last_batch_is_dropped(calibrate: Any) -> None:
    """Its values do not reach the scales, and a note says what was left out."""
    calibrator = calibrate([batch(value=127.0), batch(3, value=1270.0)], "minmax")
    calibrator.raise_error()
    assert calibrator.batches_delivered == 1
    assert TensorRTCache.from_bytes(calibrator.cache).scales["x"] == 1.0
    assert calibrator.notes == [
        "Batches with fewer than 4 samples were dropped: 1, with 3 samples. Keep them with --short-batch pad."
    ]


@only_10
def test_a_short_last_batch_is_padded_with_its_own_samples(calibrate: Any) -> None:
    """Its real samples reach the scales; rows that already padded it do not."""
    padded = batch(value=1e6)
    padded.feeds["x"][:3] = 254.0
    calibrator = calibrate([batch(value=127.0), Feeds(padded.feeds, 3)], "minmax", short_batch="pad")
    calibrator.raise_error()
    assert calibrator.batches_delivered == 2
    assert TensorRTCache.from_bytes(calibrator.cache).scales["x"] == 2.0
    assert calibrator.notes == [
        "Batches with fewer than 4 samples were filled up by repeating their samples: 1, with 3 samples."
    ]


@only_10
@pytest.mark.parametrize("after", [0, 2])
def test_an_exception_of_the_loader_surfaces(calibrate: Any, tmp_path: Path, after: int) -> None:
    """The loader's own exception comes out, and no cache of the batches before it is left."""

    class LoaderError(Exception):
        pass

    def loader() -> Iterator[Feeds]:
        for _ in range(after):
            yield batch()
        raise LoaderError("disk on fire")

    calibrator = calibrate(loader(), cache_path=tmp_path / "calibration.cache", origin=ORIGIN)
    assert calibrator.batches_delivered == after
    with pytest.raises(LoaderError, match="disk on fire"):
        calibrator.raise_error()
    assert list(tmp_path.iterdir()) == []


@only_10
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Feeds({"z": np.zeros((4, 3, 4, 4))}, 4), "batch 1: it lacks input 'x'; expected 'x', found 'z'"),
        (batch(5), "batch 1: it holds 5 samples; expected the declared batch size of 4"),
        (batch(value=np.nan), "batch 1: input 'x' holds NaN or infinite values"),
        (Feeds({"x": np.zeros((4, 3, 8, 8))}, 4), r"batch 1: .* shape \(4, 3, 8, 8\); expected \(4, 3, 4, 4\)"),
        (Feeds({"x": np.zeros((4, 3, 4, 4), np.uint8)}, 4), "batch 1: input 'x' has dtype uint8"),
    ],
)
def test_a_batch_that_does_not_fit_stops_the_calibration(calibrate: Any, wrong: Feeds, message: str) -> None:
    """The error names the batch, what was found and what was expected."""
    calibrator = calibrate([batch(), wrong, batch()])
    assert calibrator.batches_delivered == 1
    assert calibrator.cache is None
    with pytest.raises(CalibrationError, match=message):
        calibrator.raise_error()


@only_10
@pytest.mark.parametrize("batches", [[], [batch(3)], [batch(0)]])
def test_a_stream_without_a_full_batch_is_an_error(calibrate: Any, batches: list[Feeds]) -> None:
    """TensorRT builds nothing, and the reason is ours."""
    calibrator = calibrate(batches)
    assert calibrator.engine is None
    with pytest.raises(EmptyCalibrationSetError, match=f"none of the {len(batches)} batches held 4 samples"):
        calibrator.raise_error()


@only_10
@every_kind
def test_a_cache_that_fits_is_read_back(calibrate: Any, tmp_path: Path, kind: str, algorithm: str) -> None:
    """The second build reads the cache, delivers no batch, and makes the same engine."""
    options = {"cache_path": tmp_path / "calibration.cache", "origin": ORIGIN}
    first = calibrate([batch()], kind, **options)
    second = calibrate([], kind, **options)
    second.raise_error()
    assert (first.batches_delivered, second.batches_delivered) == (1, 0)
    assert first.cache == second.cache == (tmp_path / "calibration.cache").read_bytes()
    assert second.notes == []
    assert bytes(second.engine.serialize()) == bytes(first.engine.serialize())
    fingerprint = json.loads((tmp_path / "calibration.cache.json").read_text())
    assert fingerprint["model"] == "model-1"
    assert fingerprint["calibrator"] == kind
    assert fingerprint["tensorrt"] == trt.__version__
    assert fingerprint["batches"] == 1


@only_10
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"origin": CacheOrigin("model-2", "data-1", "resize", "0.1.0")}, "model was 'model-1', is 'model-2'"),
        ({"origin": CacheOrigin("model-1", "data-2", "resize", "0.1.0")}, "data was 'data-1', is 'data-2'"),
        ({"origin": CacheOrigin("model-1", "data-1", "crop", "0.1.0")}, "preprocessing was 'resize', is 'crop'"),
        ({"origin": CacheOrigin("model-1", None, "resize", "0.1.0")}, "the calibration data have no identity"),
        ({"origin": None}, "what it was made from is not known"),
        ({"kind": "minmax"}, "calibrator was 'entropy2', is 'minmax'"),
        ({"total": 7}, "total was None, is 7"),
    ],
)
def test_a_cache_of_something_else_is_not_used_and_the_note_says_why(
    calibrate: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], reason: str
) -> None:
    """Calibration runs anew and replaces the cache."""
    options = {"cache_path": tmp_path / "calibration.cache", "origin": ORIGIN}
    calibrate([batch(value=1.0)], **options)
    with caplog.at_level(logging.WARNING, logger="calibrators.tensorrt"):
        calibrator = calibrate([batch(value=9.0)], **options | changed)
    calibrator.raise_error()
    assert calibrator.batches_delivered == 1
    assert len(calibrator.notes) == 1
    assert reason in calibrator.notes[0]
    assert calibrator.notes == caplog.messages
    assert (tmp_path / "calibration.cache").read_bytes() == calibrator.cache


@only_10
def test_another_version_of_the_tool_reads_the_cache(calibrate: Any, tmp_path: Path) -> None:
    """The tool's version is recorded for information alone."""
    calibrate([batch()], cache_path=tmp_path / "c", origin=ORIGIN)
    newer = CacheOrigin("model-1", "data-1", "resize", "0.2.0")
    calibrator = calibrate([batch()], cache_path=tmp_path / "c", origin=newer)
    assert calibrator.batches_delivered == 0
    assert calibrator.notes == []


@only_10
@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("c", b"TRT-101601-EntropyCalibration2\nx: 3f800000\n", "it was changed after it was written"),
        ("c.json", None, "its fingerprint 'c.json' is missing"),
    ],
)
def test_a_cache_that_was_tampered_with_is_not_used(
    calibrate: Any, tmp_path: Path, file: str, content: bytes | None, reason: str
) -> None:
    """A cache is believed only together with its own fingerprint."""
    calibrate([batch()], cache_path=tmp_path / "c", origin=ORIGIN)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    calibrator = calibrate([batch()], cache_path=tmp_path / "c", origin=ORIGIN)
    assert calibrator.batches_delivered == 1
    assert reason in calibrator.notes[0]


@only_10
@pytest.mark.parametrize("file", ["c", "c.json"])
def test_a_cache_replaces_no_file_of_something_else(calibrate: Any, tmp_path: Path, file: str) -> None:
    """Refused before the build, and the file stays."""
    (tmp_path / file).write_text("precious")
    with pytest.raises(CacheFormatError, match="Name another file with --cache"):
        calibrate([batch()], cache_path=tmp_path / "c", origin=ORIGIN)
    assert (tmp_path / file).read_text() == "precious"


@only_10
def test_a_cache_that_cannot_be_written_is_an_error(calibrate: Any, tmp_path: Path) -> None:
    """TensorRT ignores it; `raise_error` does not."""
    (tmp_path / "file").write_text("")
    calibrator = calibrate([batch()], cache_path=tmp_path / "file" / "calibration.cache", origin=ORIGIN)
    with pytest.raises(Exception, match="Cannot write"):
        calibrator.raise_error()


@only_10
def test_known_scales_reach_tensorrt_without_data(network: onnx.ModelProto) -> None:
    """The scales are served as a cache of this TensorRT's version, and the layer runs in INT8."""
    calibrator = scales_calibrator(trt, {"x": 0.5, "conv": 0.25, "y": 0.25, "not in the network": 1.0})
    engine = build(network, calibrator)
    calibrator.raise_error()
    assert calibrator.cache == (
        b"TRT-101601-EntropyCalibration2\nx: 3f000000\nconv: 3e800000\ny: 3e800000\nnot in the network: 3f800000\n"
    )
    assert calibrator.batches_delivered == 0
    assert kernel_types(engine) == {"n_conv": "Int8", "n_y": "FP32"}


@only_10
def test_a_tensor_without_a_scale_stays_in_floating_point(network: onnx.ModelProto) -> None:
    """TensorRT falls back for the layer that reads it."""
    engine = build(network, scales_calibrator(trt, {"y": 0.25}))
    assert kernel_types(engine) == {"n_conv": "FP32", "n_y": "FP32"}


@only_10
def test_scales_that_tensorrt_refuses_are_an_error() -> None:
    """A calibrator of scales that is asked for batches says so: it has none."""
    calibrator = scales_calibrator(trt, {"x": 0.5})
    assert calibrator.get_batch(["x"]) is None
    with pytest.raises(CalibrationError, match="TensorRT did not take the 1 scales"):
        calibrator.raise_error()


@only_10
@pytest.mark.parametrize(
    ("scales", "message"), [({}, "there are none"), ({"a": 1.0, "b": 0.0, "c": np.inf}, "2 of 3 .* 0.0 of tensor 'b'")]
)
def test_scales_that_cannot_be_used_are_refused(scales: dict[str, float], message: str) -> None:
    """Before any build, with the first tensor named."""
    with pytest.raises(CalibrationError, match=message):
        scales_calibrator(trt, scales)


@only_10
def test_a_network_with_q_dq_nodes_does_not_consult_the_calibrator(graph_builder: Any, buffers: Any) -> None:
    """TensorRT ignores a calibrator there; `consulted` tells."""
    graph = graph_builder()
    scale, zero = graph.constant(np.float32(0.1)), graph.constant(np.int8(0))
    codes = graph.node("QuantizeLinear", [graph.input("x", ("N", 3, 4, 4)), scale, zero])
    graph.conv(graph.node("DequantizeLinear", [codes, scale, zero]), (3, 8), "y")
    calibrator = streaming_calibrator(trt, "minmax", [batch()], buffers=buffers, batch_size=BATCH)
    assert build(graph.model(["y"]), calibrator) is not None
    assert not calibrator.consulted


@only_10
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("legacy", {}, "no calibrator 'legacy': expected entropy2 or minmax"),
        ("minmax", {"short_batch": "keep"}, "expected 'drop' or 'pad'"),
        ("minmax", {"batch_size": 0}, "batch size of the calibration is 0"),
    ],
)
def test_wrong_arguments_are_refused(kind: str, options: dict[str, Any], message: str, buffers: Any) -> None:
    """Before anything is read."""
    with pytest.raises(CalibrationError, match=message):
        streaming_calibrator(trt, kind, [], **{"buffers": buffers, "batch_size": 1} | options)
