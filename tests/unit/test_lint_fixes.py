"""Every fix is proved by ONNX Runtime: the same numbers before and after, or as close as the fix promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.errors import ModelError
from engines.lint import RULES, lint
from engines.lint_fixes import MendResult, mend
from trt_int8.errors import FileAccessError

SCALE, ZERO = np.float32(0.05), np.int8(0)

HALF = TensorProto.FLOAT16


def pair(graph: Any, x: str, name: str, scale: Any = SCALE, zero: Any = ZERO, **attributes: Any) -> str:
    """Q and DQ named n_NAME_q and n_NAME; `zero` None leaves the zero point out."""
    zeros = [] if zero is None else [graph.constant(zero)]
    read = graph.constant(scale)
    code = graph.node("QuantizeLinear", [x, read, *zeros], f"{name}_q", **attributes)
    return str(graph.node("DequantizeLinear", [code, read, *zeros], name, **attributes))


def weight(graph: Any, name: str, dtype: Any = np.int8, zero: int = 0, low: int = -127, high: int = 128) -> str:
    """A 1x1 convolution's weight: an initializer of codes and a DQ with scales along axis 0."""
    codes = graph.constant(graph.rng.integers(low, high, (4, 4, 1, 1), dtype))
    scale = graph.constant(np.float32([0.01, 0.02, 0.03, 0.04]))
    return str(graph.node("DequantizeLinear", [codes, scale, graph.constant(np.full(4, zero, dtype))], name, axis=0))


def conv(graph: Any, x: str, name: str) -> str:
    return str(graph.node("Conv", [x, weight(graph, f"{name}_w")], name))


def image(graph: Any, name: str = "x", dtype: int = TensorProto.FLOAT) -> str:
    return str(graph.input(name, (1, 4, 8, 8), dtype))


FEEDS = {"x": np.random.default_rng(1).normal(0, 2, (1, 4, 8, 8)).astype(np.float32)}


@pytest.fixture
def mended(tmp_path: Path) -> Any:
    """Save a drawn graph, mend it: the result, the model before, the model after."""

    def carry_out(graph: Any, *outputs: Any, **versions: Any) -> tuple[MendResult, Path, Path]:
        before = graph.save(tmp_path / "before.onnx", outputs or ["y"], **versions)
        result = mend(before, tmp_path / "after.onnx")
        onnx.checker.check_model(onnx.load(result.path), full_check=True)
        return result, before, result.path

    return carry_out


def done(result: MendResult) -> list[tuple[str, str]]:
    return [(outcome.rule, outcome.node) for outcome in result.mended]


def rules(result: MendResult) -> set[str]:
    """What is still found in the mended file, notes left out."""
    return {finding.rule for finding in result.after.findings if finding.severity != "note"}


def difference(run_model: Any, before: Path, after: Path, feeds: Any = None) -> float:
    """Largest difference between the outputs of two models, run as they are written."""
    first, second = (run_model(model, FEEDS if feeds is None else feeds) for model in (before, after))
    assert list(first) == list(second)
    return max(float(np.abs(first[name].astype(float) - second[name]).max()) for name in first)


def test_uint8_around_128(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """UINT8 codes with zero point 128 are INT8 codes shifted: the same numbers, saturated ones too."""
    graph = graph_builder()
    conv(graph, pair(graph, image(graph), "a", zero=np.uint8(128)), "y")
    result, before, after = mended(graph)

    assert done(result) == [("uint8-codes", "n_a_q")]
    assert rules(result) == set()
    assert difference(run_model, before, after, {"x": 5 * FEEDS["x"]}) == 0


@pytest.mark.parametrize(
    ("dtype", "zero", "low", "high"),
    [(np.uint8, 128, 0, 256), (np.uint8, 100, 0, 200), (np.uint8, 0, 0, 128), (np.int8, 5, -120, 128)],
)
def test_codes_of_weights(
    dtype: Any, zero: int, low: int, high: int, graph_builder: Any, mended: Any, run_model: Any
) -> None:
    """Stored codes are shifted to zero point 0 wherever all of them still fit INT8."""
    graph = graph_builder()
    w = weight(graph, "w", dtype, zero, low, high)
    graph.node("Conv", [pair(graph, image(graph), "a"), w], "y")
    result, before, after = mended(graph)

    assert done(result) == [("uint8-codes" if dtype == np.uint8 else "zero-point", "n_w")]
    assert rules(result) == set()
    assert difference(run_model, before, after) == 0


@pytest.mark.parametrize("zero", [np.uint8(0), np.uint8(100), np.int8(5)])
def test_activations_without_an_int8_twin_are_left(zero: Any, graph_builder: Any, mended: Any, run_model: Any) -> None:
    """Codes of other zero points have values that INT8 has not: left alone, with the reason."""
    graph = graph_builder()
    conv(graph, pair(graph, image(graph), "a", zero=zero), "y")
    result, before, after = mended(graph)

    assert result.mended == ()
    assert [outcome.node for outcome in result.left] == ["n_a_q"]
    assert "only UINT8 with zero point 128" in result.left[0].what
    assert difference(run_model, before, after) == 0


def test_codes_of_weights_that_do_not_fit(graph_builder: Any, mended: Any) -> None:
    """All of 0 to 255 less 0 is more than INT8 holds; the span is named."""
    graph = graph_builder()
    codes = graph.constant(np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4, 1, 1))
    w = graph.node("DequantizeLinear", [codes, graph.constant(SCALE), graph.constant(np.uint8(0))], "w")
    graph.node("Conv", [pair(graph, image(graph), "a"), w], "y")
    result, _, _ = mended(graph)

    assert [outcome.what for outcome in result.left] == [
        "its codes less their zero point are 0 to 255, more than INT8 holds"
    ]


def test_missing_zero_point(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """The Q becomes INT8, as TensorRT takes it: equal where UINT8 and INT8 both have a code, 0 to 127 scales."""
    graph = graph_builder()
    conv(graph, pair(graph, image(graph), "a", zero=None), "y")
    result, before, after = mended(graph)
    inside = {"x": np.clip(np.abs(FEEDS["x"]), 0, 127 * SCALE)}

    assert done(result) == [("missing-zero-point", "n_a_q")]
    assert rules(result) == set()
    assert difference(run_model, before, after, inside) == 0
    explicit = graph_builder()
    conv(explicit, pair(explicit, image(explicit), "a"), "y")
    assert difference(run_model, explicit.save(before, ["y"]), after) == 0


def test_missing_zero_point_of_int8_codes(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """A DQ of INT8 gets its zero point spelt out."""
    graph = graph_builder()
    codes = graph.constant(np.arange(-8, 8, dtype=np.int8).reshape(4, 4, 1, 1))
    w = graph.node("DequantizeLinear", [codes, graph.constant(SCALE)], "w")
    graph.node("Conv", [pair(graph, image(graph), "a"), w], "y")
    result, before, after = mended(graph)

    assert done(result) == [("missing-zero-point", "n_w")]
    assert not [finding for finding in result.after.findings if finding.rule == "missing-zero-point"]
    assert difference(run_model, before, after) == 0


def test_missing_axis(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """ONNX means axis 1, and the file then says so."""
    graph = graph_builder()
    codes = graph.constant(graph.rng.integers(-127, 128, (4, 5), np.int8))
    inputs = [codes, graph.constant(np.float32([0.1, 0.2, 0.3, 0.4, 0.5])), graph.constant(np.zeros(5, np.int8))]
    w = graph.node("DequantizeLinear", inputs, "w")
    graph.node("MatMul", [pair(graph, graph.input("x", (2, 4)), "a"), w], "y")
    result, before, after = mended(graph)

    assert done(result) == [("missing-axis", "n_w")]
    assert result.mended[0].what == "axis 1 is written"
    assert rules(result) == set()
    assert difference(run_model, before, after, {"x": FEEDS["x"][0, :2, 0, :4]}) == 0


@pytest.mark.parametrize("size", [4, 1])
def test_zero_points_as_many_as_scales(size: int, graph_builder: Any, tmp_path: Path, run_model: Any) -> None:
    """Zero points of 0 are widened; before, ONNX Runtime refuses the model, so the sound twin is compared."""
    files = []
    for zeros in (1, 4):
        graph = graph_builder()
        codes = graph.constant(graph.rng.integers(-127, 128, (4, 4, 1, 1), np.int8))
        inputs = [codes, graph.constant(np.full(4, 0.1, np.float32)), graph.constant(np.zeros(zeros, np.int8))]
        w = graph.node("DequantizeLinear", inputs, "w", axis=0)
        graph.node(
            "Conv",
            [pair(graph, image(graph), "a", np.full(size, SCALE)[:1].reshape(()) if size > 1 else SCALE), w],
            "y",
        )
        files.append(graph.save(tmp_path / f"{zeros}.onnx", ["y"]))
    result = mend(files[0], tmp_path / "after.onnx")

    assert done(result) == [("zero-point-size", "n_w")]
    assert difference(run_model, files[1], result.path) == 0


@pytest.mark.parametrize("per_channel", [True, False])
def test_int32_bias(per_channel: bool, graph_builder: Any, mended: Any, run_model: Any) -> None:
    """An INT32 bias becomes code * scale, to the last bit; its initializers go."""
    graph = graph_builder()
    scale = np.float32([1e-3, 2e-3, 3e-3, 4e-3]) if per_channel else np.float32(1e-3)
    inputs = [graph.constant(np.int32([-900, 70001, 3, 4])), graph.constant(scale)]
    bias = graph.node("DequantizeLinear", inputs, "bias", **({"axis": 0} if per_channel else {}))
    graph.node("Conv", [pair(graph, image(graph), "a"), weight(graph, "w"), bias], "y")
    result, before, after = mended(graph)

    assert done(result) == [("int32-dq", "n_bias")]
    assert rules(result) == set()
    assert not [tensor for tensor in onnx.load(after).graph.initializer if tensor.data_type == TensorProto.INT32]
    assert difference(run_model, before, after) == 0


@pytest.mark.parametrize("stored", [True, False])
def test_quantized_bias(stored: bool, graph_builder: Any, mended: Any, run_model: Any) -> None:
    """Stored in INT8: the same floats. Behind Q and DQ: the float itself, at most half a scale away."""
    graph = graph_builder()
    if stored:
        inputs = [graph.constant(np.int8([1, -2, 3, 4])), graph.constant(SCALE), graph.constant(ZERO)]
        bias = graph.node("DequantizeLinear", inputs, "bias")
    else:
        bias = pair(graph, graph.constant(np.float32([0.51, -0.22, 0.33, 0.44])), "bias")
    graph.node("Conv", [pair(graph, image(graph), "a"), weight(graph, "w"), bias], "y")
    result, before, after = mended(graph)

    assert done(result) == [("quantized-bias", "n_bias")]
    assert rules(result) == set()
    assert difference(run_model, before, after) <= (0 if stored else SCALE / 2 + 1e-5)


def test_scale_behind_nodes(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """A scale that is computed of constants, largest magnitude / 127, becomes an initializer."""
    graph = graph_builder()
    largest = graph.node("ReduceMax", [graph.node("Abs", [graph.normal((3, 4))])], keepdims=0)
    scale = graph.node("Identity", [graph.node("Div", [largest, graph.constant(np.float32(127))])])
    zero = graph.constant(ZERO)
    code = graph.node("QuantizeLinear", [image(graph), scale, zero], "a_q")
    conv(graph, graph.node("DequantizeLinear", [code, scale, zero], "a"), "y")
    result, before, after = mended(graph)

    assert done(result) == [("scale-behind-nodes", "n_a_q"), ("scale-behind-nodes", "n_a")]
    assert "Div" not in [node.op_type for node in onnx.load(after).graph.node]
    assert rules(result) == set()
    assert difference(run_model, before, after) == 0


def test_scales_of_a_half_graph(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """Casts around FP32 scales go, and scales are rounded up to FP16: a code may move by one, weights by 2^-10."""
    graph = graph_builder()
    x = graph.node("Relu", [image(graph, dtype=HALF)], "r")
    x = pair(graph, graph.node("Cast", [x], "wide", to=TensorProto.FLOAT), "a")
    w = graph.node("Cast", [weight(graph, "w")], "w_half", to=HALF)
    graph.node("Conv", [graph.node("Cast", [x], "half", to=HALF), w], "y")
    result, before, after = mended(graph, helper.make_tensor_value_info("y", HALF, (1, 4, 8, 8)))
    weights = 4 * 127 * 0.04  # four products for each output

    assert {node for _, node in done(result)} == {"n_a_q", "n_w"}
    assert rules(result) == set()
    assert "Cast" not in [node.op_type for node in onnx.load(after).graph.node]
    peak = float(np.abs(FEEDS["x"]).max())
    assert difference(run_model, before, after, {"x": FEEDS["x"].astype(np.float16)}) <= weights * (
        SCALE + peak * 2**-9
    )


def test_half_scales_need_opset_19(graph_builder: Any, mended: Any) -> None:
    """Below, the scales are left in FP32, and it is said why."""
    graph = graph_builder()
    x = graph.node("Cast", [graph.node("Relu", [image(graph, dtype=HALF)])], to=TensorProto.FLOAT)
    x = graph.node("Cast", [pair(graph, x, "a")], to=HALF)
    graph.node("Conv", [x, graph.constant(np.ones((4, 4, 1, 1), np.float16))], "y")
    result, _, _ = mended(graph, helper.make_tensor_value_info("y", HALF, None), opset=18)

    assert [outcome.rule for outcome in result.left] == ["fp32-scales"]
    assert "opset 18" in result.left[0].what


@pytest.mark.parametrize("read", [TensorProto.FLOAT16, TensorProto.FLOAT])
def test_scale_in_the_type_that_is_read(read: int, graph_builder: Any, tmp_path: Path) -> None:
    """The scale of a Q takes the type of its data, in FP16 rounded up to its grid."""
    graph = graph_builder()
    other = np.float32(0.0501) if read == HALF else np.float16(0.0501)
    zero = graph.constant(ZERO)
    code = graph.node("QuantizeLinear", [image(graph, dtype=read), graph.constant(other), zero], "a_q")
    own = np.float16(0.0501) if read == HALF else np.float32(0.0501)
    graph.node("Softmax", [graph.node("DequantizeLinear", [code, graph.constant(own), zero], "a")], "y")
    file = graph.save(tmp_path / "m.onnx", [helper.make_tensor_value_info("y", read, None)], opset=23)
    result = mend(file, tmp_path / "after.onnx")

    assert ("scale-type", "n_a_q") in done(result)
    assert rules(result) == set()


def test_lonely_pairs(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """A pair before Softmax and one on the output are taken away: at most half a scale apart, names kept."""
    graph = graph_builder()
    x = graph.node("Tanh", [image(graph)])
    graph.node("Tanh", [pair(graph, x, "a")], "t")
    pair(graph, "t", "y")
    result, before, after = mended(graph)

    assert set(done(result)) == {("lonely-pair", "n_a_q"), ("lonely-pair", "n_y_q")}
    assert [node.op_type for node in onnx.load(after).graph.node] == ["Tanh", "Tanh"]
    assert difference(run_model, before, after) <= SCALE / 2 + SCALE / 2 + 1e-6


def test_lonely_pair_between_input_and_output(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """Where only the pair stands between them, input and output keep their names."""
    graph = graph_builder()
    pair(graph, image(graph), "y")
    result, before, after = mended(graph)

    assert done(result) == [("lonely-pair", "n_y_q")]
    assert [node.op_type for node in onnx.load(after).graph.node] == ["Identity"]
    inside = {"x": np.clip(FEEDS["x"], -127 * SCALE, 127 * SCALE)}
    assert difference(run_model, before, after, inside) <= SCALE / 2 + 1e-6


def test_split_activation(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """The pair between Conv and Relu goes, the one behind the Relu stays."""
    graph = graph_builder()
    x = pair(graph, conv(graph, pair(graph, image(graph), "a"), "c"), "b", np.float32(0.1))
    conv(graph, pair(graph, graph.node("Relu", [x], "r"), "d", np.float32(0.1)), "y")
    result, before, after = mended(graph)
    bound = 0.1 * 4 * 127 * 0.04  # a code of the pair that stays may move by one, in four products

    assert ("split-activation", "n_b_q") in done(result)
    assert rules(result) == set()
    assert difference(run_model, before, after, {"x": 0.1 * FEEDS["x"]}) <= bound


def test_residual_branch(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """The Add reads the convolution itself; a second reader of the branch's pair keeps it."""
    graph = graph_builder()
    real = pair(graph, image(graph), "a")
    branch = pair(graph, conv(graph, real, "c"), "b", np.float32(0.2))
    graph.node("Add", [branch, real], "y")
    result, before, after = mended(graph)

    assert done(result) == [("residual-branch", "n_y")]
    assert rules(result) == set()
    assert difference(run_model, before, after, {"x": 0.1 * FEEDS["x"]}) <= 0.1 + 1e-5


@pytest.mark.parametrize("scale", [SCALE, np.float32(0.08)])
def test_quantized_twice(scale: Any, graph_builder: Any, mended: Any, run_model: Any) -> None:
    """Of two pairs the second stays: exact for one scale, else at most a code of the second apart."""
    graph = graph_builder()
    conv(graph, pair(graph, pair(graph, image(graph), "a"), "b", scale), "y")
    result, before, after = mended(graph)
    exact = scale == SCALE

    assert [rule for rule, _ in done(result)] == ["requantized"]
    assert rules(result) == set()
    assert difference(run_model, before, after, {"x": 0.5 * FEEDS["x"]}) <= (0 if exact else scale * 4 * 127 * 0.04)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_pair_before_the_pad(mode: str, graph_builder: Any, mended: Any, run_model: Any) -> None:
    """The pair moves before the Pad; the graph stays in order, and the numbers are the same."""
    graph = graph_builder()
    pads = graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))
    x = graph.node("Pad", [graph.node("Tanh", [image(graph)]), pads], "padded", mode=mode)
    conv(graph, pair(graph, x, "a"), "y")
    result, before, after = mended(graph)

    assert done(result) == [("split-pad", "n_a_q")]
    assert rules(result) == set()
    order = [node.op_type for node in onnx.load(after).graph.node]
    assert order.index("QuantizeLinear") < order.index("Pad") < order.index("Conv")
    assert difference(run_model, before, after) == 0


def test_concat_scales(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """Two Concats that share a pair take the largest scale of all; values move by at most half of it on each side."""
    graph = graph_builder()
    x, z = image(graph), image(graph, "z")
    a, b, c = (
        pair(graph, value, name, np.float32(scale)) for value, name, scale in
        ((x, "a", 0.05), (z, "b", 0.08), (graph.node("Tanh", [x]), "c", 0.01))
    )  # fmt: skip
    cut = [graph.constant(np.int64([value])) for value in (0, 4, 1)]
    first = graph.node("Concat", [a, b], "cat_1", axis=1)
    second = graph.node("Concat", [b, c], "cat_2", axis=1)
    pool = graph.node("AveragePool", [graph.node("Add", [first, second])], kernel_shape=[1, 1])
    conv(graph, graph.node("Slice", [pair(graph, pool, "d", np.float32(1)), *cut]), "y")
    result, before, after = mended(graph, "cat_1", "cat_2", "y")
    scales = {
        tuple(np.unique(onnx.numpy_helper.to_array(tensor)).tolist())
        for tensor in onnx.load(after).graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name.endswith("mended")
    }

    assert [outcome for outcome in done(result) if outcome[0] == "concat-scales"] == [
        ("concat-scales", "n_cat_1"), ("concat-scales", "n_cat_2")
    ]  # fmt: skip
    assert scales == {(float(np.float32(0.08)),)}
    feeds = {"x": FEEDS["x"], "z": FEEDS["x"][..., ::-1].copy()}
    assert difference(run_model, before, after, {name: 0.05 * value for name, value in feeds.items()}) <= 0.08


def test_concat_scales_beside_a_pool(graph_builder: Any, mended: Any, run_model: Any) -> None:
    """A pair behind a MaxPool has the scale of the one before it, and keeps step with it.

    Each of a convolution's 4 inputs moves by at most half of the scale before and half of the one after.
    """
    graph = graph_builder()
    a = pair(graph, image(graph), "a", np.float32(0.05))
    pool = graph.node("MaxPool", [a], kernel_shape=[2, 2], strides=[2, 2])
    conv(graph, pair(graph, pool, "b", np.float32(0.05)), "z")
    c = pair(graph, graph.node("Tanh", ["x"]), "c", np.float32(0.01))
    cut = [graph.constant(np.int64([value])) for value in (2, 6, 1)]
    joined = pair(graph, graph.node("Concat", [a, c], "cat", axis=1), "d", np.float32(0.1))
    conv(graph, graph.node("Slice", [joined, *cut]), "y")
    result, before, after = mended(graph, "y", "z")

    assert done(result) == [("concat-scales", "n_cat")]
    assert rules(result) == set()
    assert difference(run_model, before, after) <= 4 * (127 * 0.04) * (0.05 + 0.1) / 2


def test_what_every_mendable_rule_is_mended_by(graph_builder: Any, mended: Any) -> None:
    """A rule that promises a fix has one: its name stands among the outcomes of these tests' fixes."""
    import inspect

    from engines import lint_fixes_placement, lint_fixes_values

    source = inspect.getsource(lint_fixes_values) + inspect.getsource(lint_fixes_placement)

    assert [rule.name for rule in RULES if rule.mendable and f'"{rule.name}"' not in source] == []


class TestFiles:
    """What mend writes, and where."""

    @pytest.fixture
    def faulty(self, graph_builder: Any, tmp_path: Path) -> Path:
        """A model with UINT8 codes around 128."""
        graph = graph_builder()
        conv(graph, pair(graph, image(graph), "a", zero=np.uint8(128)), "y")
        return Path(graph.save(tmp_path / "faulty.onnx", ["y"]))

    def test_the_model_itself_is_left_alone(self, faulty: Path) -> None:
        """Its own file is refused as the output."""
        content = faulty.read_bytes()

        with pytest.raises(FileAccessError, match=r"part of the model that is read\. Name another file"):
            mend(faulty, faulty)
        assert faulty.read_bytes() == content

    def test_external_data(self, faulty: Path, tmp_path: Path, run_model: Any) -> None:
        """Weights outside of the file are read where a fix needs them, and written beside the new file."""
        whole = onnx.load(faulty)
        big = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
        whole.graph.initializer.append(onnx.numpy_helper.from_array(big, "big"))
        whole.graph.node.append(helper.make_node("MatMul", ["z", "big"], ["u"], "n_u"))
        whole.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 64]))
        whole.graph.output.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, [2, 64]))
        before = tmp_path / "in" / "m.onnx"
        before.parent.mkdir()
        onnx.save(whole, before, save_as_external_data=True, location="m.weights", size_threshold=0)
        result = mend(before, tmp_path / "out" / "m.onnx")

        assert done(result) == [("uint8-codes", "n_a_q")]
        assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["m.onnx", "m.onnx.data"]
        feeds = {**FEEDS, "z": np.ones((2, 64), np.float32)}
        assert difference(run_model, before, result.path, feeds) == 0
        with pytest.raises(FileAccessError, match="is part of the model"):
            mend(result.path, tmp_path / "out" / "m.onnx.data")

    def test_a_model_for_the_cpu_is_refused(self, faulty: Path, tmp_path: Path) -> None:
        """The fixes are TensorRT's; unsigned codes are right for the CPU."""
        model = onnx.load(faulty)
        helper.set_model_props(model, {"trt_int8.target": "cpu"})
        onnx.save(model, faulty)

        with pytest.raises(ModelError, match="for the target cpu: the fixes are TensorRT's"):
            mend(faulty, tmp_path / "after.onnx")
        assert not (tmp_path / "after.onnx").exists()

    def test_nothing_else_is_touched(self, faulty: Path, tmp_path: Path) -> None:
        """Names, order, metadata, dead nodes and stated types stay as they are."""
        model = onnx.load(faulty)
        helper.set_model_props(model, {"author": "someone"})
        model.graph.node.append(helper.make_node("Relu", ["y"], ["dead"], "n_dead"))
        model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 4, 8, 8]))
        onnx.save(model, faulty)
        after = onnx.load(mend(faulty, tmp_path / "after.onnx").path)

        assert [node.name for node in after.graph.node] == [node.name for node in model.graph.node]
        assert {entry.key: entry.value for entry in after.metadata_props} == {"author": "someone"}
        stored = {tensor.name for tensor in after.graph.initializer}
        assert [value.name for value in after.graph.value_info if value.name not in stored] == ["a"]
        assert lint(after).count("error") == 0
