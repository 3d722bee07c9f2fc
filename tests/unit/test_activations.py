"""Facts about `engines.activations`: what the calibration is handed is what the FP32 model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from calibrators.collector import collect
from calibrators.errors import CalibrationError
from engines import blocked
from engines.activations import OnnxRuntimeActivations
from engines.calibrated_tensors import tensors_to_calibrate
from engines.errors import InferenceError, ModelError
from engines.graph import PreparedModel, prepare
from engines.placement_cpu import place_for_cpu
from engines.placement_options import PlacementOptions
from engines.placement_tensorrt import place_for_tensorrt

RNG = np.random.default_rng(9)
IMAGES = RNG.normal(size=(4, 3, 8, 8)).astype(np.float32)


@dataclass
class Batch:
    feeds: Mapping[str, Any]
    samples: int


def delivered(
    prepared: PreparedModel, tensors: list[str], *batches: Batch, blocked: bool = False
) -> list[dict[str, Any]]:
    source = OnnxRuntimeActivations(prepared, tensors, batches, blocked=blocked)
    assert source.tensors == tensors
    return [dict(batch.values) for batch in source.activations()]


@pytest.fixture
def residual(graph_builder: Any, tmp_path: Path) -> PreparedModel:
    """A residual net with pooling, a Gemm and two outputs; dynamic batch."""
    graph = graph_builder()
    trunk = graph.node("Relu", [graph.conv(graph.input(), (3, 4), "stem")], "trunk")
    branch = graph.conv(graph.node("Relu", [graph.conv(trunk, (4, 4), "b1")], "hidden"), (4, 4), "b2")
    total = graph.node("Relu", [graph.node("Add", [branch, trunk], "sum")], "total")
    graph.node("Sigmoid", [total], "mask")
    graph.gemm(graph.node("Flatten", [graph.node("GlobalAveragePool", [total], "pooled")], "flat"), (4, 5), "logits")
    return prepare(graph.save(tmp_path / "residual.onnx", ["mask", "logits"]))


class TestChoice:
    """Which tensors are counted."""

    def test_quantized_covers_both_targets_and_the_borders(self, residual: PreparedModel) -> None:
        """Every scale that either placement asks for, the float inputs and the outputs, in graph order."""
        names = tensors_to_calibrate(residual)
        order = ["x", *(output for node in residual.proto.graph.node for output in node.output)]

        model = residual.ir()
        assert {*place_for_tensorrt(model).tensors, *place_for_cpu(model).tensors} < set(names)
        assert {"x", "mask", "logits"} <= set(names)
        assert names == sorted(names, key=order.index)
        assert {"stem", "b1"} & set(names) == set()  # their Relu's output is what anyone quantizes

    def test_one_target_takes_fewer(self, graph_builder: Any, tmp_path: Path) -> None:
        """What its default placement asks for, and the borders; only the CPU has both inputs of an Add in INT8."""
        graph = graph_builder()
        trunk = graph.node("Relu", [graph.conv(graph.input("x", ("N", 32, 8, 8)), (32, 32), "stem")], "trunk")
        total = graph.node("Relu", [graph.node("Add", [graph.conv(trunk, (32, 32), "branch"), trunk], "sum")], "total")
        graph.conv(total, (32, 32), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))

        assert tensors_to_calibrate(prepared) == ["x", "trunk", "branch", "total", "y"]
        assert tensors_to_calibrate(prepared, "cpu") == ["x", "trunk", "branch", "total", "y"]
        assert tensors_to_calibrate(prepared, "tensorrt") == ["x", "trunk", "total", "y"]

    def test_excluding_nodes_never_needs_a_tensor_that_was_not_calibrated(self, residual: PreparedModel) -> None:
        """Without one convolution another Add input becomes the skip; its scale is there."""
        names = set(tensors_to_calibrate(residual))
        for excluded in ("n_stem", "n_b1", "n_b2", "n_logits"):
            for place in (place_for_tensorrt, place_for_cpu):
                assert set(place(residual.ir(), PlacementOptions(exclude=[excluded])).tensors) <= names

    def test_including_nodes_never_needs_a_tensor_that_was_not_calibrated(self, residual: PreparedModel) -> None:
        """What a rule keeps in float may be asked for later: these convolutions have too few channels for TensorRT."""
        names = set(tensors_to_calibrate(residual))
        included = place_for_tensorrt(residual.ir(), PlacementOptions(include=[".*"]))

        assert len(included.weights) > len(place_for_tensorrt(residual.ir()).weights)
        assert set(included.tensors) <= names

    def test_attention_may_be_asked_for_later(self, graph_builder: Any, tmp_path: Path) -> None:
        """Queries, keys and values are counted; probabilities, which lie between 0 and 1 and are many, are not."""
        graph = graph_builder()
        x = graph.input("x", ("N", 32, 16))
        query, key, value = (graph.node("MatMul", [x, graph.normal((16, 16))], name) for name in "qkv")
        scores = graph.node("MatMul", [query, graph.node("Transpose", [key], perm=[0, 2, 1])], "scores")
        graph.node("MatMul", [graph.node("Softmax", [scores], "p"), value], "y")

        assert tensors_to_calibrate(prepare(graph.save(tmp_path / "m.onnx", ["y"]))) == ["x", "q", "k", "v", "y"]

    def test_attention_may_be_asked_for_against_a_rule(self, graph_builder: Any, tmp_path: Path) -> None:
        """Only once its products may be INT8 at all does a rule find them too small, and only then is it overruled."""
        graph = graph_builder()
        x = graph.input("x", (1, 4, 64))
        query, key, value = (graph.node("MatMul", [x, graph.normal((64, 64))], name) for name in "qkv")
        scores = graph.node("MatMul", [query, graph.node("Transpose", [key], perm=[0, 2, 1])], "scores")
        graph.node("MatMul", [graph.node("Softmax", [scores], "p"), value], "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        names = set(tensors_to_calibrate(prepared))

        asked, included = (
            place_for_tensorrt(prepared.ir(), PlacementOptions(attention="int8", include=include))
            for include in ([], [".*"])
        )
        assert {"q", "k", "v"} & set(asked.tensors) == set()
        assert {"q", "k", "v"} <= set(included.tensors) <= names

    def test_all_names_every_float_activation(self, residual: PreparedModel) -> None:
        """TensorRT's implicit path falls back to float wherever a scale is missing."""
        assert tensors_to_calibrate(residual, "all") == [
            "x", *(output for node in residual.proto.graph.node for output in node.output)
        ]  # fmt: skip

    def test_a_graph_with_nothing_to_quantize(self, graph_builder: Any, tmp_path: Path) -> None:
        """It is an error that names the way out, and that way works."""
        graph = graph_builder()
        graph.node("Relu", [graph.input()], "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))

        with pytest.raises(CalibrationError, match=r"nothing to quantize.*--tensors all"):
            tensors_to_calibrate(prepared)
        assert tensors_to_calibrate(prepared, "all") == ["x", "y"]


class TestValues:
    """Against a run of the same graph without optimization."""

    def test_delivered_values_are_those_of_an_unoptimized_run(
        self, residual: PreparedModel, run_model: Callable[..., Any]
    ) -> None:
        """ONNX Runtime's fusions change nothing beyond float rounding, for every tensor of the graph."""
        names = tensors_to_calibrate(residual, "all")
        (found,) = delivered(residual, names, Batch({"x": IMAGES}, 4))
        expected = run_model(residual.proto, {"x": IMAGES}, fetch=[name for name in names if name != "x"])

        np.testing.assert_array_equal(found["x"], IMAGES)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)

    def test_batches_come_one_by_one_with_their_index(self, residual: PreparedModel) -> None:
        """The stream is read lazily: the second batch is made after the first was used; batch sizes may differ."""
        made: list[int] = []

        def stream() -> Any:
            for size in (3, 1):
                made.append(size)
                yield Batch({"x": IMAGES[:size]}, size)

        source = OnnxRuntimeActivations(residual, ["trunk"], stream(), blocked=False)
        running = source.activations()
        assert made == []
        first = next(running)
        assert (made, first.batch, first.samples, first.values["trunk"].shape) == ([3], 0, 3, (3, 4, 8, 8))
        assert first.input_shapes == {"x": (3, 3, 8, 8)}
        second = next(running)
        assert (made, second.batch, second.samples, second.values["trunk"].shape) == ([3, 1], 1, 1, (1, 4, 8, 8))
        assert list(running) == []

    def test_inputs_alone_need_no_run(self, residual: PreparedModel) -> None:
        """A graph input is its own activation."""
        assert [list(values) for values in delivered(residual, ["x"], Batch({"x": IMAGES}, 4))] == [["x"]]

    def test_integer_scalar_and_second_inputs(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """Token ids and a scalar are fed as they are; the float inputs are counted, the integers not."""
        graph = graph_builder()
        rows = graph.node("Gather", [graph.normal((9, 4)), graph.input("ids", ("N", 3), TensorProto.INT64)], "rows")
        scaled = graph.node("Mul", [rows, graph.input("temperature", ())], "scaled")
        both = graph.node("Add", [scaled, graph.input("bias", ("N", 3, 4))], "both")
        graph.node("MatMul", [both, graph.normal((4, 2))], "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        feeds = {
            "ids": np.int64([[0, 8, 3]]),
            "temperature": np.array(2.5, np.float32),
            "bias": RNG.normal(size=(1, 3, 4)).astype(np.float32),
        }
        names = tensors_to_calibrate(prepared)
        (found,) = delivered(prepared, names, Batch(feeds, 1))

        assert names == ["temperature", "bias", "both", "y"]
        assert found["temperature"] == np.float32(2.5)
        for name, value in run_model(prepared.proto, feeds, fetch=["both", "y"]).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)

    def test_producers_are_named_for_messages(self, residual: PreparedModel) -> None:
        """A tensor with NaN is traced to its node."""
        source = OnnxRuntimeActivations(residual, ["x", "trunk"], [])

        assert source.producer("x") == "model input"
        assert source.producer("trunk") == "node 'n_trunk'"


class TestBlocks:
    """Tensors in ONNX Runtime's own layout hold the same values, in another order."""

    @pytest.fixture
    def mixed(self, graph_builder: Any, tmp_path: Path) -> PreparedModel:
        """Convolutions with channels that fill blocks of 8 and 16, and that do not; sigmoids are always positive."""
        graph = graph_builder()
        x = graph.conv(graph.input("x", (2, 3, 9, 7)), (3, 16), "even")
        for name, channels in [("eight", (16, 24)), ("twelve", (24, 12)), ("odd", (12, 37)), ("five", (37, 5))]:
            x = graph.node("Sigmoid", [graph.conv(x, channels, name)], f"{name}_positive")
        graph.gemm(graph.node("Flatten", [x]), (5 * 63, 3), "y")
        return prepare(graph.save(tmp_path / "m.onnx", ["y"]))

    def batches(self, samples: int = 2) -> list[Batch]:
        return [Batch({"x": RNG.normal(size=(2, 3, 9, 7)).astype(np.float32)}, samples) for _ in range(3)]

    @pytest.mark.parametrize("samples", [2, 1])
    def test_the_layout_changes_no_value(self, samples: int, mixed: PreparedModel) -> None:
        """Bit for bit, batch by batch; what fills up blocks and batches is left out, with and without blocks."""
        names, batches = tensors_to_calibrate(mixed, "all"), self.batches(samples)
        source = OnnxRuntimeActivations(mixed, names, batches)
        plain = delivered(mixed, names, *batches)

        assert {name for name in names if name in source._blocked} >= {"even", "eight", "twelve", "odd"}
        for found, expected in zip(source.activations(), plain, strict=True):
            for name in names:
                np.testing.assert_array_equal(
                    np.sort(found.values[name], axis=None), np.sort(expected[name], axis=None), err_msg=name
                )

    def test_what_fills_up_a_block_is_no_zero_of_the_tensor(self, mixed: PreparedModel) -> None:
        """A sigmoid is never 0: neither its smallest value nor its zeros come from the padding."""
        names = [name for name in tensors_to_calibrate(mixed, "all") if name.endswith("positive")]
        histograms = collect(OnnxRuntimeActivations(mixed, names, self.batches())).histograms

        assert {histogram.zeros for histogram in histograms.values()} == {0}
        assert min(histogram.minimum for histogram in histograms.values()) > 0

    @pytest.mark.parametrize("block", [4, 8, 16])
    @pytest.mark.parametrize("channels", [1, 8, 12, 16, 37])
    def test_blocks_of_every_size(self, block: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Processors differ in the size; the layout is built here by hand, with a padding that would be noticed."""
        monkeypatch.setattr(blocked, "channels_per_block", lambda: block)
        values = RNG.normal(size=(2, channels, 3, 5)).astype(np.float32)
        filled = -(-channels // block) * block
        padded = np.full((2, filled, 3, 5), 7e7, np.float32)
        padded[:, :channels] = values
        laid_out = padded.reshape(2, filled // block, block, 3, 5).transpose(0, 1, 3, 4, 2).reshape(2, filled, 3, 5)

        real = blocked.real_values(np.ascontiguousarray(laid_out), channels)

        assert len(real) == 2
        for sample in range(2):
            np.testing.assert_array_equal(np.sort(real[sample], axis=None), np.sort(values[sample], axis=None))

    def test_nothing_is_filled_up_where_nothing_is_missing(self) -> None:
        """The memory is that of ONNX Runtime; no copy is made."""
        values = np.ones((1, 8, 2, 2), np.float32)

        assert blocked.real_values(values, 8) is values

    def test_this_runtime_tells_its_block(self) -> None:
        """4 on Arm, 8 or 16 on x86."""
        assert blocked.channels_per_block() in (4, 8, 16)

    @pytest.mark.parametrize("trouble", ["optimised graph", "size of a block", "disk"])
    def test_any_doubt_leads_to_the_plain_way(
        self, trouble: str, mixed: PreparedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Values come in ONNX's layout then."""

        def fails(*arguments: Any, **options: Any) -> Any:
            raise {"optimised graph": ModelError("no"), "disk": OSError("full")}[trouble]

        if trouble == "size of a block":
            monkeypatch.setattr(blocked, "channels_per_block", lambda: None)
        else:
            monkeypatch.setattr(blocked, "_optimised", fails)
        source = OnnxRuntimeActivations(mixed, ["odd"], self.batches())

        assert next(source.activations()).values["odd"].shape == (2, 37, 9, 7)

    def test_a_reordering_of_another_form_is_left_alone(self) -> None:
        """Attributes that are not known might mean another order."""
        known = onnx.helper.make_node("ReorderOutput", ["a"], ["b"], domain="com.microsoft.nchwc", channels=24)
        last = onnx.helper.make_node(
            "ReorderOutput", ["a"], ["b"], domain="com.microsoft.nchwc", channels=24, channels_last=1
        )
        newer = onnx.helper.make_node("ReorderOutput", ["a"], ["b"], domain="com.microsoft.nchwc", channels=24, group=2)
        other = onnx.helper.make_node("ReorderOutput", ["a"], ["b"], channels=24)

        assert [blocked._reordered_channels(node) for node in (known, last, newer, other)] == [24, None, None, None]

    def test_a_part_of_the_exposed_tensors_has_the_bits_of_all(self, residual: PreparedModel) -> None:
        """Passes over some tensors each give what one pass over all of them gives: nothing else is fused."""
        names, batch = tensors_to_calibrate(residual, "all"), Batch({"x": IMAGES}, 4)
        (whole,) = (dict(found.values) for found in OnnxRuntimeActivations(residual, names, [batch]).activations())

        for part in (names[1::2], names[::2]):
            source = OnnxRuntimeActivations(residual, part, [batch], exposed=names)
            (found,) = source.activations()
            assert list(found.values) == part
            assert {name for piece in source._pieces for name in piece.outputs} <= {
                source._outputs[name] for name in part if name != "x"
            }
            for name in part:
                np.testing.assert_array_equal(
                    np.sort(found.values[name], axis=None), np.sort(whole[name], axis=None), err_msg=name
                )


class TestWorkers:
    """Several batches are run at a time."""

    @settings(max_examples=12)
    @given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=7), workers=st.integers(1, 4), layout=st.booleans())
    def test_histograms_do_not_depend_on_workers_or_layout(
        self, sizes: list[int], workers: int, layout: bool, module_tiny_model: Path
    ) -> None:
        """Whoever runs which batch: the counts are those that numpy finds in the activations of a run of each."""
        prepared = prepare(module_tiny_model)
        names = tensors_to_calibrate(prepared, "all")
        images = np.random.default_rng(len(sizes)).normal(size=(4, 3, 8, 8)).astype(np.float32)
        batches = [Batch({"input": images[:size]}, size) for size in sizes]
        one_by_one = delivered(prepared, names, *batches)

        found = collect(OnnxRuntimeActivations(prepared, names, batches, threads=workers, blocked=layout))

        assert (found.batches, found.samples) == (len(sizes), sum(sizes))
        for name, histogram in found.histograms.items():
            values = np.concatenate([batch[name].reshape(-1) for batch in one_by_one])
            bins, counts = np.unique(values.view(np.uint32) << 1 >> 14, return_counts=True)
            np.testing.assert_array_equal(histogram.bins, bins)
            np.testing.assert_array_equal(histogram.counts, counts)
            assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
            assert histogram.zeros == np.count_nonzero(values == 0)

    def test_a_batch_that_fails_is_named(self, tiny_model: Path) -> None:
        """Also when later ones are being run."""
        batches = [Batch({"input": np.zeros((1, 3, 8, 8 if index < 5 else 7), np.float32)}, 1) for index in range(9)]
        prepared = prepare(tiny_model)

        with pytest.raises(InferenceError, match="batch 5: input 'input' has shape"):
            collect(OnnxRuntimeActivations(prepared, ["relu"], batches, threads=3))

    def test_the_number_of_workers(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As many as the user says, else as there are cores, up to 8."""
        prepared = prepare(tiny_model)
        for cores, expected in [(1, 1), (6, 6), (64, 8)]:
            monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
            assert OnnxRuntimeActivations(prepared, ["relu"], []).workers == expected
        assert OnnxRuntimeActivations(prepared, ["relu"], [], threads=12).workers == 12


class TestPadding:
    """A fixed batch is filled up; the filling is not counted."""

    @pytest.fixture
    def fixed(self, graph_builder: Any, tmp_path: Path) -> PreparedModel:
        """Batch 4, an input without rows, a reshape that merges the batch with another axis, and one that turns it."""
        graph = graph_builder()
        x = graph.node("Mul", [graph.input("x", (4, 6, 5)), graph.input("gain", ())], "gained")
        x = graph.node("Add", [x, graph.input("offset", (6, 5))], "shifted")
        merged = graph.node("Reshape", [x, graph.constant(np.int64([24, 5]))], "merged")
        graph.node("MatMul", [merged, graph.normal((5, 2))], "y")
        graph.node("Transpose", ["y"], "turned", perm=[1, 0])
        return prepare(graph.save(tmp_path / "m.onnx", ["y", "turned"]))

    def feeds(self) -> dict[str, Any]:
        x = RNG.normal(size=(4, 6, 5)).astype(np.float32)
        x[3] = 1e6  # the padding
        return {"x": x, "gain": np.array(2, np.float32), "offset": np.ones((6, 5), np.float32)}

    def test_rows_of_padding_are_cut_from_every_tensor(self, fixed: PreparedModel) -> None:
        """Also where the batch was merged with another axis; inputs without a batch axis stay whole."""
        feeds = self.feeds()
        names = ["x", "gain", "offset", "gained", "shifted", "merged", "y"]
        (found,) = delivered(fixed, names, Batch(feeds, 3))

        shapes = {name: value.shape for name, value in found.items()}
        assert shapes == {
            "x": (3, 6, 5), "gain": (), "offset": (6, 5), "gained": (3, 6, 5), "shifted": (3, 6, 5), "merged": (18, 5),
            "y": (18, 2),
        }  # fmt: skip
        assert max(np.abs(value).max() for value in found.values()) < 1e3
        np.testing.assert_allclose(found["merged"], (feeds["x"][:3] * 2 + 1).reshape(18, 5))

    def test_a_full_batch_is_left_whole(self, fixed: PreparedModel) -> None:
        """Nothing is cut where nothing was padded."""
        (found,) = delivered(fixed, ["x", "turned"], Batch(self.feeds(), 4))

        assert [value.shape for value in found.values()] == [(4, 6, 5), (2, 24)]

    def test_padding_that_cannot_be_told_apart_is_an_error(self, fixed: PreparedModel) -> None:
        """A tensor that starts with another axis is named, with its shape and the batch."""
        with pytest.raises(CalibrationError, match=r"padding .* 'turned': its shape \(2, 24\) .* batch of 4"):
            delivered(fixed, ["turned"], Batch(self.feeds(), 3))


class TestBadBatches:
    """The batch is named."""

    @pytest.mark.parametrize(
        ("feeds", "expected"),
        [
            ({"image": IMAGES}, r"batch 1 has no input 'image'. Its inputs are x: float32 \(N, 3, 8, 8\)"),
            ({}, r"batch 1 needs the input 'x', which was not given"),
            ({"x": IMAGES[:, :2]}, r"batch 1: input 'x' has shape \(4, 2, 8, 8\); expected x: float32 \(N, 3, 8, 8\)"),
            ({"x": IMAGES.astype(float)}, r"batch 1: input 'x' has dtype float64; expected x: float32"),
        ],
    )
    def test_a_batch_that_does_not_fit(self, feeds: Any, expected: str, residual: PreparedModel) -> None:
        """What was found and what the model takes stand in one line."""
        with pytest.raises(InferenceError, match=expected):
            delivered(residual, ["trunk"], Batch({"x": IMAGES}, 4), Batch(feeds, 4))

    def test_a_batch_on_which_the_runtime_fails(self, graph_builder: Any, tmp_path: Path) -> None:
        """Shapes that only meet inside the graph: ONNX Runtime's words, with the model and the batch."""
        graph = graph_builder()
        both = graph.node("Add", [graph.input("a", ("N", 4)), graph.input("b", ("M", 4))])
        graph.node("MatMul", [both, graph.normal((4, 2))], "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        feeds = {"a": np.ones((2, 4), np.float32), "b": np.ones((3, 4), np.float32)}

        with pytest.raises(InferenceError, match=r"Calibration of m\.onnx failed in batch 0: .*Add"):
            delivered(prepared, ["y"], Batch(feeds, 2))


def test_constants_are_no_activations(tiny_model: Path) -> None:
    """Weights have scales of their own and are never counted."""
    weights = {tensor.name for tensor in onnx.load(tiny_model).graph.initializer}

    assert not weights & set(tensors_to_calibrate(prepare(tiny_model), "all"))


def test_quantized_model_is_said_to_be_one(graph_builder: Any, tmp_path: Path) -> None:
    """A model whose weights are INT8 already is answered with the FP32 model that is wanted."""
    graph = graph_builder()
    scale, zero = graph.constant(np.float32(0.1)), graph.constant(np.int8(0))
    x = graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [graph.input("x", ("N", 4)), scale, zero]), scale])
    weights = graph.node("DequantizeLinear", [graph.constant(np.ones((4, 2), np.int8)), scale])
    graph.node("MatMul", [x, weights], "y")
    prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))

    with pytest.raises(CalibrationError, match="is quantized already"):
        tensors_to_calibrate(prepared)
