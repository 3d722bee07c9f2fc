"""Facts about `engines.onnxrt` and `engines.runner`: how a model file is run, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from calibrators.errors import FileAccessError
from engines.errors import InferenceError, ModelError, UnsupportedModelError
from engines.graph import prepare, save_model
from engines.onnxrt import (
    TARGET_KEY,
    OnnxRuntimeRunner,
    check_feeds,
    execution_of,
    load_header,
    make_session,
    shape_fits,
    tensor_specs,
)
from engines.placement_cpu import place_for_cpu
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import insert_qdq
from engines.runner import Runner, TensorSpec

IMAGES = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)


class TestRunner:
    """A context manager with one method."""

    def test_outputs_are_those_of_the_model(self, tiny_model: Path, run_model: Any) -> None:
        """By name, for any batch; the runner is a `Runner`, and can be entered again."""
        runner: Runner = OnnxRuntimeRunner(tiny_model)

        for _ in range(2):
            with runner as entered:
                assert entered is runner
                found = entered.infer({"input": IMAGES})
            expected = run_model(tiny_model, {"input": IMAGES})
            assert list(found) == ["logits"]
            np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)

    def test_specs_and_name_are_there_before_entering(self, tiny_model: Path) -> None:
        """A benchmark plans with them; the name is the file's unless another is given."""
        runner = OnnxRuntimeRunner(tiny_model)

        assert [str(spec) for spec in runner.inputs] == ["input: float32 (batch, 3, 8, 8)"]
        assert [str(spec) for spec in runner.outputs] == ["logits: float32 (batch, 16)"]
        assert runner.name == "tiny.onnx"
        assert OnnxRuntimeRunner(tiny_model, name="FP32").name == "FP32"

    def test_infer_outside_of_the_context_is_a_bug(self, tiny_model: Path) -> None:
        """Before entering and after leaving there is no session."""
        runner = OnnxRuntimeRunner(tiny_model)
        with pytest.raises(RuntimeError, match="outside"):
            runner.infer({"input": IMAGES})
        with runner:
            pass
        with pytest.raises(RuntimeError, match="outside"):
            runner.infer({"input": IMAGES})

    def test_the_caller_owns_the_outputs(self, tiny_model: Path) -> None:
        """A second run leaves the arrays of the first alone."""
        with OnnxRuntimeRunner(tiny_model) as runner:
            first = runner.infer({"input": IMAGES})["logits"]
            kept = first.copy()
            runner.infer({"input": -IMAGES})

        np.testing.assert_array_equal(first, kept)

    def test_files_that_are_missing_or_no_models(self, tmp_path: Path) -> None:
        """The constructor says so, not the first inference."""
        (tmp_path / "m.onnx").write_bytes(b"\x00" * 99)

        with pytest.raises(FileAccessError, match="is a folder; expected an ONNX file"):
            load_header(tmp_path)
        with pytest.raises(FileAccessError, match="there is no file"):
            OnnxRuntimeRunner(tmp_path / "nothing.onnx")
        with pytest.raises(ModelError, match="is not an ONNX model: 99 bytes that"):
            OnnxRuntimeRunner(tmp_path / "m.onnx")

    def test_a_model_that_the_runtime_refuses(self, graph_builder: Any, tmp_path: Path) -> None:
        """Its own words, in one line, with the file."""
        graph = graph_builder()
        graph.node("Relu", ["nowhere"], "y")
        graph.input()
        path = graph.save(tmp_path / "m.onnx", ["y"])

        with (
            pytest.raises(ModelError, match=r"^ONNX Runtime cannot load '.*m\.onnx': [^\n]+$"),
            OnnxRuntimeRunner(path),
        ):
            pass

    def test_a_run_that_fails_inside_the_graph(self, graph_builder: Any, tmp_path: Path) -> None:
        """Shapes that the specs allow and the graph does not."""
        graph = graph_builder()
        graph.node("Add", [graph.input("a", ("N",)), graph.input("b", ("M",))], "y")
        feeds = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}

        path = graph.save(tmp_path / "m.onnx", ["y"])
        expected = r"^m\.onnx failed in ONNX Runtime: [^\n]*Add[^\n]*$"

        with OnnxRuntimeRunner(path) as runner, pytest.raises(InferenceError, match=expected):
            runner.infer(feeds)


class TestFeeds:
    """Both sides are named, before ONNX Runtime sees anything."""

    @pytest.mark.parametrize(
        ("feeds", "expected"),
        [
            ({}, r"needs the input 'input', .* Its inputs are input: float32 \(batch, 3, 8, 8\)"),
            ({"input": IMAGES, "mask": IMAGES}, r"has no input 'mask'\. Its inputs are input: float32 \(batch"),
            ({"input": IMAGES.astype(np.float16)}, r"'input' has dtype float16; expected input: float32 \(batch"),
            ({"input": IMAGES.astype(np.uint8)}, r"'input' has dtype uint8; expected input: float32"),
            ({"input": IMAGES[0]}, r"'input' has shape \(3, 8, 8\); expected input: float32 \(batch, 3, 8, 8\)"),
            ({"input": IMAGES[:, :, :4]}, r"'input' has shape \(2, 3, 4, 8\); expected input: float32 \(batch, 3, 8"),
        ],
    )
    def test_feeds_that_do_not_fit(self, feeds: Any, expected: str, tiny_model: Path) -> None:
        """Missing, unknown, of another dtype, rank or length."""
        with OnnxRuntimeRunner(tiny_model) as runner, pytest.raises(InferenceError, match=rf"^tiny\.onnx.*{expected}"):
            runner.infer(feeds)

    def test_what_fits_passes(self) -> None:
        """Free axes take any length, scalars none, and a tensor without a stated rank takes every shape."""
        specs = [
            TensorSpec("free", np.dtype(np.int64), ("N", None, 2)),
            TensorSpec("scalar", np.dtype(bool), ()),
            TensorSpec("any", np.dtype(np.float32), None),
        ]
        check_feeds("m", specs, {"free": np.zeros((5, 0, 2), int), "scalar": np.array(True), "any": IMAGES})

        assert not shape_fits((5, 0, 3), specs[0].shape)
        assert not shape_fits((1,), ())

    def test_specs_of_dynamic_unnamed_and_rankless_axes(self, graph_builder: Any) -> None:
        """Names stay names, unnamed axes print as ?, scalars as (), unknown ranks as any shape."""
        graph = graph_builder()
        graph.input("a", ("N", None, 3))
        graph.input("b", ())
        graph.input("c", None, TensorProto.INT32)
        graph.input("d", (7,), TensorProto.BOOL)
        graph.node("Identity", ["a"], "y")
        inputs, outputs = tensor_specs(graph.model(["y"]))

        assert [str(spec) for spec in inputs] == [
            "a: float32 (N, ?, 3)", "b: float32 ()", "c: int32 any shape", "d: bool (7,)"
        ]  # fmt: skip
        assert [spec.fixed_batch for spec in inputs] == [None, None, None, 7]
        assert [spec.name for spec in outputs] == ["y"]

    def test_initializers_among_the_inputs_are_no_inputs(self, graph_builder: Any) -> None:
        """Files of IR version 3 list them."""
        graph = graph_builder()
        weight = graph.normal((3, 3, 1, 1), name="w")
        graph.node("Conv", [graph.input(), weight], "y")
        graph.input("w", (3, 3, 1, 1))

        assert [spec.name for spec in tensor_specs(graph.model(["y"]))[0]] == ["x"]

    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            (helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None), "the type sequence"),
            (onnx.ValueInfoProto(name="y"), "no type"),
        ],
    )
    def test_outputs_that_are_no_tensors(self, value: onnx.ValueInfoProto, kind: str, graph_builder: Any) -> None:
        """They are refused by name and kind."""
        graph = graph_builder()
        graph.node("Identity", [graph.input()], "y")

        with pytest.raises(UnsupportedModelError, match=f"'y' has {kind}; expected a tensor"):
            tensor_specs(graph.model([value]))


class TestExecution:
    """Exact for TensorRT's placement, native for everything else, and recorded."""

    @pytest.fixture
    def quantized(self, tiny_model: Path, tmp_path: Path) -> dict[str, Path]:
        """The tiny model for both targets."""
        prepared = prepare(tiny_model)
        paths = {"fp32": tiny_model}
        for target, place in (("tensorrt", place_for_tensorrt), ("cpu", place_for_cpu)):
            placement = place(prepared.ir())
            result = insert_qdq(prepared, placement, dict.fromkeys(placement.tensors, 0.03), reduce_range=True)
            paths[target] = tmp_path / f"{target}.onnx"
            save_model(ir.to_proto(result.model), paths[target])
        return paths

    def test_the_metadata_decides(self, quantized: dict[str, Path]) -> None:
        """Only the TensorRT placement is a simulation of another machine."""
        found = {name: OnnxRuntimeRunner(path) for name, path in quantized.items()}

        assert {name: (runner.execution, runner.simulated) for name, runner in found.items()} == {
            "fp32": ("native", False), "tensorrt": ("exact", True), "cpu": ("native", False)
        }  # fmt: skip
        assert execution_of({}) == execution_of({TARGET_KEY: "cpu"}) == "native"
        assert execution_of({TARGET_KEY: "tensorrt"}) == "exact"

    def test_the_user_may_override(self, quantized: dict[str, Path]) -> None:
        """A TensorRT placement stays a simulation however it is run."""
        runner = OnnxRuntimeRunner(quantized["tensorrt"], execution="native")

        assert (runner.execution, runner.simulated) == ("native", True)
        assert OnnxRuntimeRunner(quantized["cpu"], execution="exact").execution == "exact"

    def test_exact_runs_the_graph_as_written(self, quantized: dict[str, Path], run_model: Any) -> None:
        """Bit by bit the outputs of a session without any optimization, which it is."""
        with OnnxRuntimeRunner(quantized["tensorrt"]) as runner:
            found = runner.infer({"input": IMAGES})["logits"]
            options = runner.make_session().get_session_options()

        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

        np.testing.assert_array_equal(found, run_model(quantized["tensorrt"], {"input": IMAGES})["logits"])

    def test_exact_and_native_agree_to_some_steps(self, quantized: dict[str, Path]) -> None:
        """Integer kernels and fake quantization are two ways to one result; weights have 7 bits, see placement."""
        outputs = []
        for execution in ("exact", "native"):
            with OnnxRuntimeRunner(quantized["cpu"], execution=execution) as runner:  # type: ignore[arg-type]
                outputs.append(runner.infer({"input": IMAGES})["logits"])

        np.testing.assert_allclose(outputs[0], outputs[1], atol=0.03)

    def test_threads_are_handed_to_the_session(self, tiny_model: Path) -> None:
        """They belong to a measurement."""
        with OnnxRuntimeRunner(tiny_model, threads=1) as runner:
            options = runner.make_session().get_session_options()

        assert options.intra_op_num_threads == 1
        assert make_session(tiny_model, execution="native").get_session_options().intra_op_num_threads == 0
