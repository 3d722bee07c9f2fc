"""Facts about one scale per weight, and about affine activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from calibrators.numerics import SMALLEST_SCALE, scale_from_amax
from engines.granularity import with_affine_activations, with_one_weight_scale
from engines.placement import ActivationPoint, Placement, WeightPoint
from engines.qdq import point_scale
from trt_int8.api import calibrate, quantize
from trt_int8.errors import UsageError

RNG = np.random.default_rng(11)
BATCHES = [{"input": RNG.uniform(-1, 3, size=(4, 3, 8, 8)).astype(np.float32)} for _ in range(4)]


def affine_point(smallest: float, largest: float, amax: float, *, nonnegative: bool = False) -> ActivationPoint:
    point = ActivationPoint("x", "x", None, "rule", "reason", unsigned=True, nonnegative=nonnegative)
    placed = with_affine_activations(Placement("cpu", (point,), (), ()), {"x": amax}, {"x": (smallest, largest)})
    return placed.activations[0]


def test_codes_reach_from_the_smallest_to_the_largest_value() -> None:
    """[-1, 4]: scale 5 / 255, zero point 51."""
    point = affine_point(-1.0, 4.0, 4.0)

    assert point.span == (-1.0, 4.0)
    assert point_scale(point, {"x": 4 / 127}) == np.float32(5 / 255)
    assert point.zero_point == 51


def test_the_threshold_clips_both_sides() -> None:
    """Values in [-10, 4], threshold 2.5: [-2.5, 2.5]; 0 is the code 128 of 127.5."""
    point = affine_point(-10.0, 4.0, 2.5)

    assert point.span == (-2.5, 2.5)
    assert point.zero_point == 128


def test_zero_is_always_among_the_codes() -> None:
    """Values in [2, 5]: [0, 5]. Values in [-5, -2]: [-5, 0], where 0 is the highest code."""
    assert (affine_point(2.0, 5.0, 5.0).span, affine_point(2.0, 5.0, 5.0).zero_point) == ((0.0, 5.0), 0)
    assert (affine_point(-5.0, -2.0, 5.0).span, affine_point(-5.0, -2.0, 5.0).zero_point) == ((-5.0, 0.0), 255)


def test_a_tensor_that_the_graph_keeps_from_being_negative_has_zero_point_0() -> None:
    """Whatever rounding left below 0."""
    assert affine_point(-1e-9, 4.0, 4.0, nonnegative=True).span == (0.0, 4.0)


def test_a_tensor_that_is_always_0_keeps_its_scale() -> None:
    """There is nothing to divide."""
    point = affine_point(0.0, 0.0, 127.0)

    assert point.span is None
    assert point_scale(point, {"x": 1.0}) == 1.0


@pytest.mark.parametrize("largest", [1e-44, 1e-40, 2.0**-126])
def test_no_scale_is_too_small_to_divide_by(largest: float) -> None:
    """What engines flush to 0 makes infinities; codes that are affine or below an upper clip have the finest steps."""
    clipped = ActivationPoint("x", "x", None, "rule", "reason", unsigned=True, nonnegative=True, divisor=255)

    assert point_scale(affine_point(0.0, largest, 1.0), {"x": 1.0}) == SMALLEST_SCALE
    assert point_scale(clipped, {"x": scale_from_amax(largest)}) == SMALLEST_SCALE


@given(
    st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32), st.floats(2.0**-10, 1e6, width=32)
)  # fmt: skip
def test_what_lies_inside_is_off_by_half_a_step(one: float, other: float, amax: float) -> None:
    """Every value in the span comes back within a step: half of one for rounding, half for the zero point's."""
    point = affine_point(min(one, other), max(one, other), amax)
    if point.span is None:
        return
    scale, zero = point_scale(point, {"x": amax / 127}), point.zero_point
    values = np.linspace(*point.span, 100)
    codes = np.clip(np.rint(values / scale) + zero, 0, 255)

    assert 0 <= zero <= 255
    assert np.abs((codes - zero) * scale - values).max() <= scale * 1.001


def test_weights_get_one_scale() -> None:
    """The axis of every weight is dropped; nothing else changes."""
    placement = Placement("tensorrt", (), (WeightPoint("conv", 1, 0, "x"), WeightPoint("fc", 1, 1, "y", True)), ())

    assert with_one_weight_scale(placement).weights == (
        WeightPoint("conv", 1, None, "x"),
        WeightPoint("fc", 1, None, "y", True),
    )


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_a_model_with_one_scale_per_weight(target: Any, tiny_model: Path, tmp_path: Path, run_model: Any) -> None:
    """Scales of weights and biases are scalars, the weight's is max|w| / 127, and the answers stay near the model's."""
    calibration = calibrate(tiny_model, BATCHES)
    quantize(
        tiny_model, calibration, output=tmp_path / "q.onnx", target=target, weights="per-tensor", reduce_range=False
    )
    quantized = onnx.load(tmp_path / "q.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tiny_model).graph.initializer}
    axes = [node for node in quantized.graph.node if node.op_type == "DequantizeLinear" and node.attribute]

    assert constants["conv.weight_scale"] == pytest.approx(np.abs(weights["conv.weight"]).max() / 127)
    assert axes == []
    expected = run_model(tiny_model, BATCHES[0])["logits"]
    found = run_model(quantized, BATCHES[0], optimized=target == "cpu")["logits"]
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_affine_codes_are_finer_where_the_range_is_lopsided(tiny_model: Path, tmp_path: Path, run_model: Any) -> None:
    """Inputs in [-1, 3]: min-max spends 255 codes on 4 instead of on 6, and the answers come closer."""
    calibration = calibrate(tiny_model, BATCHES)
    errors, expected = [], run_model(tiny_model, BATCHES[0])["logits"]
    kinds: Any = ("symmetric", "affine")
    for activations in kinds:
        file = tmp_path / f"{activations}.onnx"
        quantize(
            tiny_model, calibration, output=file, method="minmax", target="cpu", activations=activations,
            reduce_range=False,
        )  # fmt: skip
        errors.append(np.linalg.norm(run_model(file, BATCHES[0])["logits"] - expected))
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "affine.onnx").graph.initializer}
    smallest, largest = calibration.range("input")

    assert constants["input_scale"] == np.float32((largest - smallest) / 255)
    assert constants["input_zero_point"] == round(-smallest * 255 / (largest - smallest))
    assert errors[1] < errors[0]


def test_tensorrt_takes_symmetric_codes_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Affine activations for TensorRT are refused before anything is written."""
    with pytest.raises(UsageError, match=r"TensorRT's INT8 is symmetric, with zero point 0\. Take the target cpu"):
        quantize(tiny_model, calibrate(tiny_model, BATCHES), output=tmp_path / "q.onnx", activations="affine")
    assert not (tmp_path / "q.onnx").exists()
