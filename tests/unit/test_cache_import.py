"""`trt-int8 cache import`: a TensorRT calibration cache becomes a Q/DQ model."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators.calibration import Calibration
from calibrators.tensorrt_cache import TensorRTCache
from engines.errors import ModelError
from engines.graph import float_activations, prepare
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import insert_qdq
from trt_int8.cache_import import import_cache, parse_renamed
from trt_int8.caches import export_cache
from trt_int8.calibration import calibrate
from trt_int8.errors import CacheFormatError, CalibrationError, ConfigError, UsageError
from trt_int8.quantization import quantize


def write_cache(path: Path, scales: Mapping[str, float], version: int = 8601) -> Path:
    """Write a cache of TensorRT 8.6.1's entropy calibrator."""
    TensorRTCache(version, "EntropyCalibration2", scales).save(path)
    return path


def residual_net(builder: Any, path: Path) -> Path:
    """Draw conv, BatchNorm, relu, then a residual block with a projection, a pool and a classifier."""

    def normalized(x: str, channels: tuple[int, int], name: str, kernel: int = 3) -> str:
        conv = builder.conv(x, channels, f"{name}.conv", kernel=kernel, bias=False)
        parameters = [builder.normal((channels[1],)) for _ in range(3)]
        variance = builder.constant(abs(builder.rng.normal(size=channels[1])).astype(np.float32) + 0.5)
        return str(builder.node("BatchNormalization", [conv, *parameters, variance], f"{name}.bn"))

    stem = builder.node("Relu", [normalized(builder.input(), (3, 16), "stem")], "stem.relu")
    first = builder.node("Relu", [normalized(stem, (16, 32), "first")], "first.relu")
    branch = normalized(first, (32, 32), "second")
    skip = normalized(stem, (16, 32), "skip", kernel=1)
    added = builder.node("Relu", [builder.node("Add", [branch, skip], "add")], "add.relu")
    pool = builder.node("MaxPool", [added], "pool", kernel_shape=[2, 2], strides=[2, 2])
    builder.gemm(builder.node("Flatten", [pool], "flat"), (512, 16), "logits")
    return Path(builder.save(path, ["logits"]))


@pytest.fixture
def net(graph_builder: Any, tmp_path: Path) -> Path:
    """The residual net, its BatchNorms standing."""
    return residual_net(graph_builder(), tmp_path / "net.onnx")


WANTED = {"x": 0.02, "stem.relu": 0.03, "first.relu": 0.04, "skip.bn": 0.05, "add.relu": 0.06}
"""What Q/DQ needs of the net; the input of the classifier takes its scale from before the pool."""


def content(model: Path) -> onnx.ModelProto:
    """Return a model without its metadata."""
    proto = onnx.load(model)
    del proto.metadata_props[:]
    return proto


def test_scales_come_from_the_cache(net: Path, tmp_path: Path):
    """Every pair has the cache's scale; names that the graph lacks and TensorRT's own are told apart."""
    scales = {**WANTED, "other": 0.5, "(Unnamed Layer* 9) [Constant]_output": 0.0, "add": 0.7}
    cache = write_cache(tmp_path / "k.cache", scales)
    result = import_cache(cache, net, output=tmp_path / "q.onnx")

    assert dict(result.scales) == {
        name: float(np.float32(scale))
        for name, scale in {**{k: v for k, v in WANTED.items() if k != "add.relu"}, "flat": 0.06}.items()
    }
    assert (result.wanted, len(result.found), result.missing) == (5, 5, ())
    assert (result.absent, result.own) == (("other",), 1)
    assert "5 of 5 tensors that Q/DQ needs found in the cache: 5 by name" in result.lines()
    assert "not in the graph: other" in result.lines()
    written = onnx.load(tmp_path / "q.onnx")
    assert {item.key: item.value for item in written.metadata_props}["trt_int8.target"] == "tensorrt"
    json.dumps(result.to_json(), allow_nan=False)


def test_model_runs(net: Path, tmp_path: Path, run_model: Callable[..., Mapping[str, Any]]):
    """With the ranges of the data as scales, the answers are close to those of the FP32 model."""
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    names = float_activations(prepare(net).ir())
    values = run_model(prepare(net).proto, {"x": x}, fetch=[name for name in names if name != "x"]) | {"x": x}
    cache = write_cache(tmp_path / "k.cache", {name: float(np.abs(values[name]).max()) / 127 for name in names})
    import_cache(cache, net, output=tmp_path / "q.onnx")
    answer = run_model(tmp_path / "q.onnx", {"x": x})["logits"]

    error = np.linalg.norm(answer - values["logits"]) / np.linalg.norm(values["logits"])
    assert 0 < error < 0.05


def test_cache_of_the_folded_file(net: Path, tmp_path: Path):
    """From a cache whose file had its BatchNorms folded, a skip input is found under its convolution's name."""
    scales = {("skip.conv" if name == "skip.bn" else name): scale for name, scale in WANTED.items()}
    result = import_cache(write_cache(tmp_path / "k.cache", scales), net, output=tmp_path / "q.onnx")

    assert result.scales["skip.bn"] == np.float32(0.05)
    assert any("'skip.conv' (by the convolution that a BatchNorm was folded into)" in line for line in result.lines())


def test_scale_behind_the_pool(net: Path, tmp_path: Path):
    """A tensor before a MaxPool is found as the one behind it, which TensorRT gives the same scale."""
    scales = {("pool" if name == "add.relu" else name): scale for name, scale in WANTED.items()}
    result = import_cache(write_cache(tmp_path / "k.cache", scales), net, output=tmp_path / "q.onnx")

    assert result.scales["flat"] == np.float32(0.06)


LAYERS = [
    "Convolution", "Scale", "Activation", "Convolution", "Scale", "Activation", "Convolution", "Scale", "Convolution",
    "Scale", "ElementWise", "Activation", "Pooling", "Shuffle", "Fully Connected",
]  # fmt: skip
"""The layers of the net, as a builder that calls the network's API adds them."""


@pytest.mark.parametrize("residual", ["int8", "float"])
def test_network_without_names(residual: Any, net: Path, tmp_path: Path):
    """Of a network without names what one order alone explains is found; the two convolutions side by side are not."""
    scales = {"data": 0.02}
    for index, kind in enumerate(LAYERS):
        scales[f"(Unnamed Layer* {index}) [{kind}]_output"] = 0.1 + index / 100
    cache = write_cache(tmp_path / "k.cache", scales)
    output = tmp_path / "q.onnx"
    if residual == "int8":
        with pytest.raises(CalibrationError, match=r"lacks the scales of 1 of the 5 .*'skip.bn' \(.*several orders"):
            import_cache(cache, net, output=output, residual=residual)
        assert not output.exists()
        return
    result = import_cache(cache, net, output=output, residual=residual)

    assert {name: round(scale, 6) for name, scale in result.scales.items()} == {
        "x": 0.02, "stem.relu": 0.12, "first.relu": 0.15, "flat": 0.21,
    }  # fmt: skip
    assert {item.rule for item in result.found} == {"layer order"}


def test_missing_scales_are_refused(net: Path, tmp_path: Path):
    """A scale that is not there refuses the import, with the tensor's name and what to do; nothing is written."""
    scales = {name: scale for name, scale in WANTED.items() if name != "first.relu"} | {"spare": 0.1}
    cache = write_cache(tmp_path / "k.cache", scales)
    with pytest.raises(CalibrationError) as caught:
        import_cache(cache, net, output=tmp_path / "q.onnx")

    text = str(caught.value)
    assert "lacks the scales of 1 of the 5 tensors that Q/DQ needs: 'first.relu'" in text
    assert "1 names that the graph lacks: 'spare'" in text
    assert "--allow-missing" in text
    assert not (tmp_path / "q.onnx").exists()


def test_missing_scales_leave_nodes_float(net: Path, tmp_path: Path):
    """With allow_missing the node that reads the tensor stays float, and the others are quantized as they were."""
    scales = {name: scale for name, scale in WANTED.items() if name != "first.relu"}
    cache = write_cache(tmp_path / "k.cache", scales)
    result = import_cache(cache, net, output=tmp_path / "q.onnx", allow_missing=True)

    held = [decision for decision in result.placement.decisions if not decision.quantized]
    assert [(item.node, item.rule) for item in held] == [("second.conv", "no-scale")]
    assert "the cache has no scale for its input 'first.relu'" in held[0].reason
    assert "missing: first.relu: " in " ".join(result.lines())
    assert (result.wanted, len(result.found), len(result.missing)) == (5, 4, 1)
    written = onnx.load(tmp_path / "q.onnx")
    assert "first.relu" in {name for node in written.graph.node if node.op_type == "Conv" for name in node.input}


def test_missing_skip_alone_is_left_out(net: Path, tmp_path: Path):
    """A skip input without a scale costs no node its INT8."""
    scales = {name: scale for name, scale in WANTED.items() if name != "skip.bn"}
    cache = write_cache(tmp_path / "k.cache", scales)
    result = import_cache(cache, net, output=tmp_path / "q.onnx", allow_missing=True)

    assert all(decision.quantized for decision in result.placement.decisions)
    assert "skip.bn" not in result.scales


@pytest.mark.parametrize(
    ("scale", "what"), [(0.0, "zero"), (-0.5, "negative"), (math.inf, "not finite"), (math.nan, "not finite")]
)
def test_unusable_scales(scale: float, what: str, net: Path, tmp_path: Path):
    """Zero, negative and non-finite scales of the graph's tensors are refused by name, needed or not."""
    for name in ("first.relu", "add"):
        cache = write_cache(tmp_path / "k.cache", {**WANTED, "add": 0.7, name: scale})
        with pytest.raises(CalibrationError, match=rf"1 of its scales cannot be used: {name} is {what}"):
            import_cache(cache, net, output=tmp_path / "q.onnx")
        result = import_cache(cache, net, output=tmp_path / "q.onnx", allow_missing=True)
        assert [item.tensor for item in result.missing] == ([name] if name in WANTED else [])


def test_unusable_scales_of_others_do_not_matter(net: Path, tmp_path: Path):
    """A zero of a tensor that the graph has not, such as a constant of TensorRT's own, is only noted."""
    cache = write_cache(tmp_path / "k.cache", {**WANTED, "(Unnamed Layer* 64) [Shuffle]_output": 0.0})
    result = import_cache(cache, net, output=tmp_path / "q.onnx")

    assert any("1 scales are zero or not finite" in note for note in result.notes)


def test_another_models_cache(net: Path, tmp_path: Path):
    """A cache of which no name fits is of another model."""
    cache = write_cache(tmp_path / "k.cache", {"a": 0.1, "b": 0.2})
    with pytest.raises(CalibrationError, match="none of the 5 tensors that Q/DQ needs"):
        import_cache(cache, net, output=tmp_path / "q.onnx", allow_missing=True)


def test_rename(net: Path, tmp_path: Path):
    """What the user names is taken; what is not there is said."""
    scales = {("data" if name == "x" else name): scale for name, scale in WANTED.items()}
    cache = write_cache(tmp_path / "k.cache", scales)
    result = import_cache(cache, net, output=tmp_path / "q.onnx", renamed={"data": "x"})

    assert result.scales["x"] == np.float32(0.02)
    assert result.absent == ()
    with pytest.raises(ConfigError, match="the cache holds 5 other names"):
        import_cache(cache, net, output=tmp_path / "q.onnx", renamed={"no": "x"})
    with pytest.raises(ConfigError, match="the prepared graph has no such tensor"):
        import_cache(cache, net, output=tmp_path / "q.onnx", renamed={"data": "no"})


@pytest.mark.parametrize("word", ["data", "=x", "data="])
def test_words_that_rename_nothing(word: str):
    """--rename without both names is a usage error."""
    with pytest.raises(UsageError, match="expected CACHE=GRAPH"):
        parse_renamed([word])


def test_words_that_rename():
    """A name in a cache may hold "=" and colons."""
    assert parse_renamed(["a=b:0=x", "c=d"]) == {"a=b:0": "x", "c": "d"}


def test_exclude_and_residual(net: Path, tmp_path: Path):
    """What is excluded needs no scale, nor does a skip input that stays float."""
    cache = write_cache(tmp_path / "k.cache", {name: WANTED[name] for name in ("x", "stem.relu", "add.relu")})
    result = import_cache(
        cache, net, output=tmp_path / "q.onnx", residual="float", exclude=["second.conv"], precision="int8+fp16"
    )

    assert result.wanted == 3
    assert any(item.data_type == onnx.TensorProto.FLOAT16 for item in onnx.load(tmp_path / "q.onnx").graph.initializer)
    assert any("FP16's range was judged by the cache's thresholds" in note for note in result.notes)
    with pytest.raises(ModelError, match="matches the whole name of none"):
        import_cache(cache, net, output=tmp_path / "q.onnx", exclude=["no"])


def test_numbered_names_of_another_export(net: Path, tmp_path: Path):
    """A cache that contradicts the graph's order is taken with a warning."""
    cache = write_cache(tmp_path / "k.cache", dict(reversed(WANTED.items())) | {"add": 0.3, "stem.bn": 0.2})
    result = import_cache(cache, net, output=tmp_path / "q.onnx")

    assert any(note.startswith("warning: ") for note in result.notes)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"data 2.64\nrelu 1.5\n", "ONNX Runtime's calibration table"),
        (b'{"data": [-2.1, 2.6]}', "ONNX Runtime's calibration.json"),
        (b"\x0c\x00\x00\x00", "a binary file"),
        (b"", "an empty file"),
    ],
)
def test_tables_of_other_tools(text: bytes, kind: str, net: Path, tmp_path: Path):
    """Another tool's table is refused, its kind named."""
    (tmp_path / "table").write_bytes(text)
    with pytest.raises(CacheFormatError, match=kind):
        import_cache(tmp_path / "table", net, output=tmp_path / "q.onnx")


def test_output_over_an_input(net: Path, tmp_path: Path):
    """The cache is not overwritten."""
    cache = write_cache(tmp_path / "k.cache", WANTED)
    with pytest.raises(ConfigError, match="it is read as well"):
        import_cache(cache, net, output=cache)


@pytest.mark.parametrize(
    ("method", "release"),
    [("minmax", "7.2.3"), ("entropy", "8.6.1"), ("percentile", "9.3.0"), ("mse", "10.16.1")],
)
@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
def test_export_and_import_are_quantize(method: Any, precision: Any, release: str, net: Path, tmp_path: Path):
    """The way through a cache of any version gives the model that `quantize` gives with the same scales."""
    x = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)
    calibration = calibrate(net, {"x": x}, tensors="all")
    calibration.save(tmp_path / "c.npz")
    export_cache(tmp_path / "c.npz", tmp_path / "k.cache", method=method, tensorrt_version=release)
    import_cache(tmp_path / "k.cache", net, output=tmp_path / "imported.onnx", precision=precision)
    quantize(net, calibration, output=tmp_path / "quantized.onnx", method=method, precision=precision)

    assert content(tmp_path / "imported.onnx") == content(tmp_path / "quantized.onnx")


@pytest.fixture(scope="module")
def module_net(graph_builder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The net, for a whole module."""
    return residual_net(graph_builder(), tmp_path_factory.mktemp("net") / "net.onnx")


@settings(max_examples=15)
@given(
    scales=st.lists(st.floats(2**-20, 2**20, width=32), min_size=5, max_size=5), version=st.sampled_from([7203, 101601])
)
def test_scales_pass_through_unchanged(
    scales: list[float], version: int, module_net: Path, tmp_path_factory: pytest.TempPathFactory
):
    """Whatever the scales, the imported model is the one that they give directly."""
    folder = tmp_path_factory.mktemp("property")
    values = dict(zip(WANTED, scales, strict=True))
    import_cache(write_cache(folder / "k.cache", values, version), module_net, output=folder / "q.onnx")
    prepared = prepare(module_net)
    direct = insert_qdq(prepared, place_for_tensorrt(prepared.ir()), values)
    found = content(folder / "q.onnx")

    expected = {name: np.float32(scale) for name, scale in direct.scales.items()}
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in found.graph.initializer}
    pairs = {node.input[0]: constants[node.input[1]] for node in found.graph.node if node.op_type == "QuantizeLinear"}
    assert pairs == expected


def test_calibration_is_no_cache(tiny_model: Path, tmp_path: Path):
    """A calibration of ours is named as such."""
    calibrate(tiny_model, {"input": np.ones((2, 3, 8, 8), np.float32)}).save(tmp_path / "c.npz")
    with pytest.raises(CacheFormatError, match="perhaps trt-int8's own calibration"):
        import_cache(tmp_path / "c.npz", tiny_model, output=tmp_path / "q.onnx")
    assert Calibration.load(tmp_path / "c.npz").tensors


def test_what_a_float_node_makes_necessary_is_found(graph_builder: Any, tmp_path: Path):
    """With a node left float its output may become the skip input, whose scale is in the cache and is taken."""
    builder = graph_builder()
    x = builder.input(shape=("N", 16, 8, 8))
    a = builder.node("Relu", [builder.conv(x, (16, 16), "a")], "a.relu")
    b = builder.node("Relu", [builder.conv(x, (16, 16), "b")], "b.relu")
    left, right = builder.conv(a, (16, 16), "left"), builder.conv(b, (16, 16), "right")
    model = builder.save(tmp_path / "m.onnx", [builder.node("Add", [left, right], "sum")])
    skip = next(
        point.tensor for point in place_for_tensorrt(prepare(model).ir()).activations if point.rule == "residual-skip"
    )
    branch, lacking = ("left", "a.relu") if skip == "right" else ("right", "b.relu")
    scales = {"x": 0.1, "a.relu": 0.2, "b.relu": 0.3, "left": 0.4, "right": 0.5}
    del scales[lacking]
    cache = write_cache(tmp_path / "k.cache", scales)
    result = import_cache(cache, model, output=tmp_path / "q.onnx", allow_missing=True)

    assert [item.tensor for item in result.missing] == [lacking]
    assert set(result.scales) == {"x", branch, "a.relu", "b.relu"} - {lacking}
    assert result.scales[branch] == np.float32(scales[branch])
