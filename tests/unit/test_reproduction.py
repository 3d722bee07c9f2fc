"""The proof that a file computes what its model computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from calibrators.protocols import Array
from trt_int8.errors import ExportError
from trt_int8.reproduction import batch_of, check_reproduction, measure_difference, with_batch


def doubling(folder: Path, shape: list[int | str | None], inner: list[int] | None = None) -> Path:
    """Write a model that doubles its input, through a reshape to `inner` where that is given."""
    rank = len(inner or shape)
    nodes = [helper.make_node("Add", ["x", "x"], ["y" if inner is None else "sum"])]
    if inner is not None:
        nodes.append(helper.make_node("Reshape", ["sum", "inner"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "doubling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [helper.make_tensor("inner", TensorProto.INT64, [rank], inner)] if inner is not None else [],
    )
    path = folder / "doubling.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


SAMPLES = {"x": np.arange(1, 13, dtype=np.float32).reshape(4, 3)}


def test_differences_by_hand() -> None:
    """The absolute one is the largest; the relative one is against the largest magnitude of the reference."""
    found = np.array([1.0, -4.0, 0.5], dtype=np.float32)
    result = measure_difference("y", 3, found, np.array([1.0, -4.5, 0.0], dtype=np.float32))
    assert (result.output, result.batch, result.max_abs) == ("y", 3, 0.5)
    assert result.max_rel == pytest.approx(0.5 / 4.5)


def test_tiny_outputs_are_judged_as_if_they_reached_a_thousandth() -> None:
    """Against an output of zeros a rounding of 1e-9 is 1e-6, not infinite."""
    result = measure_difference("y", None, np.array([1e-9]), np.zeros(1))
    assert result.max_rel == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.inf, -np.inf], [np.inf, -np.inf], 0.0),
        ([np.inf], [-np.inf], np.inf),
        ([np.nan], [1.0], np.inf),
        ([1.0], [np.nan], np.inf),
        ([], [], 0.0),
        ([True, False], [True, True], 1.0),
    ],
)
def test_what_is_not_finite_must_be_so_on_both_sides(
    found: list[float], expected: list[float], difference: float
) -> None:
    """NaN agrees with NaN, an infinity with itself, and with nothing else."""
    assert measure_difference("y", None, np.array(found), np.array(expected)).max_abs == difference


@given(
    hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(1e-3, 1e3),
)
def test_the_relative_difference_does_not_depend_on_the_unit(values: Array, factor: float) -> None:
    """Outputs and their errors scaled alike give the same figure, as long as they are not tiny."""
    expected = values.astype(np.float64)
    expected[0] = 1e3
    found = expected + np.float64(0.25)
    one = measure_difference("y", None, found, expected).max_rel
    other = measure_difference("y", None, found * factor, expected * factor).max_rel
    assert other == pytest.approx(one, rel=1e-6)


def test_the_batch_is_changed_along_every_axis_that_bears_its_symbol() -> None:
    """Samples are cut or repeated in order; other axes and inputs stay."""
    samples = {"a": np.array([1, 2, 3]), "b": np.arange(6).reshape(2, 3), "scale": np.array(5)}
    free: Mapping[str, Mapping[int, str]] = {"a": {0: "n"}, "b": {0: "m", 1: "n"}}
    assert batch_of(samples, free) == 3
    assert batch_of(samples, {"b": {1: "n"}}) is None
    two = with_batch(samples, {"a": {0: "n"}, "b": {1: "n"}}, 2)
    assert two["a"].tolist() == [1, 2]
    assert two["b"].tolist() == [[0, 1], [3, 4]]
    assert two["scale"] == 5
    assert with_batch(samples, {"a": {0: "n"}}, 5)["a"].tolist() == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("shape", "samples", "batches"),
    [
        (["batch", 3], SAMPLES["x"], [4, 1]),
        ([None, 3], SAMPLES["x"], [4, 1]),
        (["batch", 3], SAMPLES["x"][:1], [1, 2]),
        ([4, 3], SAMPLES["x"], [None]),
    ],
)
def test_a_free_batch_is_checked_at_two_sizes(
    tmp_path: Path, shape: list[int | str | None], samples: Array, batches: list[int | None]
) -> None:
    """A free batch is run as given and with another size, a fixed one as given."""
    differences = check_reproduction(doubling(tmp_path, shape), lambda feeds: {"y": feeds["x"] * 2}, {"x": samples})
    assert [difference.batch for difference in differences] == batches
    assert all(difference.max_abs == 0 for difference in differences)


def test_a_batch_held_inside_the_graph_fails_at_the_second_size(tmp_path: Path) -> None:
    """A Reshape to four samples runs with four and not with one."""
    model = doubling(tmp_path, ["batch", 3], inner=[4, 3])
    with pytest.raises(ExportError, match=r"does not run at batch 1: .*x.shape\[0\]"):
        check_reproduction(model, lambda feeds: {"y": feeds["x"] * 2}, SAMPLES)


def test_another_shape_is_an_error(tmp_path: Path) -> None:
    """Both shapes stand in the message."""
    model = doubling(tmp_path, ["batch", 3], inner=[-1])
    with pytest.raises(ExportError, match=r"at batch 4: output 'y' has shape \(12,\); expected \(4, 3\)"):
        check_reproduction(model, lambda feeds: {"y": feeds["x"] * 2}, SAMPLES)


def test_the_tolerance_decides(tmp_path: Path) -> None:
    """The largest value is 24: being off by 0.06 there is 0.0025 of it."""
    model = doubling(tmp_path, ["batch", 3])

    def reference(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"y": feeds["x"] * 2 + np.float32(0.06) * (feeds["x"] == 12)}

    with pytest.raises(ExportError, match=r"output 'y' differs by 0\.06, which is 0\.00249 .*at most 0\.001"):
        check_reproduction(model, reference, SAMPLES)
    assert check_reproduction(model, reference, SAMPLES, tolerance=0.01)[0].max_abs == pytest.approx(0.06, rel=1e-4)
