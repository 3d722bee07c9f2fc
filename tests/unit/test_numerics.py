"""Scales, rounding and clamping of symmetric INT8."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from calibrators.errors import CalibrationError
from calibrators.numerics import (
    SMALLEST_SCALE,
    dequantize,
    fp16_scale,
    quantize,
    quantize_weights,
    scale_from_amax,
)

finite_float32 = st.floats(-(2.0**100), 2.0**100, width=32)
amaxes = st.floats(0, 2.0**120)


def test_scale_is_amax_over_127() -> None:
    """127 real units for 127 codes make a step of one."""
    assert scale_from_amax(127.0) == 1.0
    assert scale_from_amax(254.0) == 2.0
    assert scale_from_amax(1.0) == float(np.float32(1 / 127))


@pytest.mark.parametrize(
    ("amax", "pattern"),
    [
        (2048.5 / 2048, "3c010a14"),
        (255 * 2048.5 / 2048, "4000890a"),
        (2040.5 / 2048, "3c008912"),
        (2047.5 / 2048, "3c00f9f4"),
    ],
)
def test_scale_has_the_bits_that_tensorrt_writes(amax: float, pattern: str) -> None:
    """Thresholds at bin centres give the scales found in calibration caches of TensorRT 7 to 10."""
    assert np.float32(scale_from_amax(amax)).view(np.uint32) == int(pattern, 16)


def test_scale_of_a_zero_tensor_is_one() -> None:
    """A tensor that is always zero is exact under any scale; 1 divides nothing by zero."""
    assert scale_from_amax(0.0) == 1.0
    assert scale_from_amax(np.zeros(3)).tolist() == [1.0, 1.0, 1.0]


@given(amaxes)
def test_scale_is_a_normal_float32(amax: float) -> None:
    """Every scale is above zero, not subnormal, and exact in float32."""
    scale = scale_from_amax(amax)

    assert scale >= SMALLEST_SCALE
    assert scale == np.float32(scale)


@given(hnp.arrays(np.float64, st.integers(0, 5), elements=amaxes))
def test_scales_of_an_array_are_those_of_its_elements(amax: np.ndarray) -> None:
    """An array gives one float32 scale for each element, equal to the element's own."""
    scales = scale_from_amax(amax)

    assert scales.dtype == np.float32
    assert scales.tolist() == [scale_from_amax(float(value)) for value in amax]


@pytest.mark.parametrize("amax", [-1.0, float("nan"), float("inf"), 1e300])
def test_scale_of_an_impossible_amax_is_refused(amax: float) -> None:
    """Negative, not finite and beyond float32 are refused, alone and inside an array."""
    with pytest.raises(CalibrationError, match="Cannot make a scale of amax"):
        scale_from_amax(amax)
    with pytest.raises(CalibrationError, match="Cannot make a scale of amax"):
        scale_from_amax(np.array([1.0, amax]))


def test_activations_round_half_to_even_and_saturate() -> None:
    """Ties go to the even code; codes end at -128 and 127."""
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4, 200, -127.5, -128.4, -500, np.inf, -np.inf]

    codes = quantize(values, 1.0)

    assert codes.dtype == np.int8
    assert codes.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128, 127, -128]


def test_nan_has_no_code() -> None:
    """NaN is refused rather than turned into some integer."""
    with pytest.raises(CalibrationError, match="NaN"):
        quantize([0.0, np.nan], 1.0)


def test_scale_broadcasts() -> None:
    """A scale for each channel applies along its own axis, in both directions."""
    values = np.array([[1.0, 2.0], [1.0, 2.0]])
    scale = np.array([[1.0], [0.5]], dtype=np.float32)

    codes = quantize(values, scale)

    assert codes.tolist() == [[1, 2], [2, 4]]
    assert dequantize(codes, scale).tolist() == values.tolist()


def test_codes_are_those_of_onnx_runtime() -> None:
    """QuantizeLinear and DequantizeLinear of ONNX Runtime give the same bits for values of every size."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["real"]),
    ]
    graph = helper.make_graph(
        nodes,
        "quantize",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("codes", TensorProto.INT8, ["n"]),
            helper.make_tensor_value_info("real", TensorProto.FLOAT, ["n"]),
        ],
        [helper.make_tensor("zero", TensorProto.INT8, [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(5)
    halves = np.arange(-300, 300) / 2  # ties wherever the scale is a power of two
    for scale in (1.0, 0.25, 1 / 127, 0.0123, 3e-7, 1e20):
        x = np.concatenate([halves, rng.normal(0, 60, 2000), [0.0, -0.0]]).astype(np.float32) * np.float32(scale)
        codes, real = session.run(None, {"x": x, "scale": np.array(scale, dtype=np.float32)})

        np.testing.assert_array_equal(quantize(x, scale), codes)
        np.testing.assert_array_equal(dequantize(codes, scale), real)


@given(hnp.arrays(np.float32, 20, elements=finite_float32))
def test_error_within_the_range_is_half_a_step(values: np.ndarray) -> None:
    """With amax as the threshold nothing saturates: every value comes back to within half a step."""
    scale = scale_from_amax(float(np.abs(values).max()))

    error = np.abs(dequantize(quantize(values, scale), scale).astype(np.float64) - values)

    assert error.max() <= scale / 2 * (1 + 2**-15)  # the quotient is itself rounded to float32


def test_weights_get_a_scale_for_each_channel() -> None:
    """Each output channel uses all 127 codes, whatever the size of the others."""
    weights = np.array([[1.27, -0.635, 0.1], [-254.0, 3.0, 0.0]])

    codes, scales = quantize_weights(weights, axis=0)

    assert codes.tolist() == [[127, -64, 10], [-127, 2, 0]]
    assert scales.tolist() == [np.float32(0.01), 2.0]
    assert codes.dtype == np.int8
    assert scales.dtype == np.float32


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=4), elements=finite_float32),
    st.data(),
)
def test_weights_along_any_axis(weights: np.ndarray, data: st.DataObject) -> None:
    """Along an axis, positive or negative, each slice is quantized as if it were alone."""
    axis = data.draw(st.integers(-weights.ndim, weights.ndim - 1))

    codes, scales = quantize_weights(weights, axis)

    assert scales.shape == (weights.shape[axis],)
    for channel, scale in enumerate(scales):
        alone, scale_alone = quantize_weights(weights.take(channel, axis), None)
        assert scale == scale_alone
        np.testing.assert_array_equal(codes.take(channel, axis), alone)


@given(hnp.arrays(np.float32, (3, 5), elements=finite_float32), st.sampled_from([127, 63]))
def test_weights_come_back_to_within_half_a_step(weights: np.ndarray, limit: int) -> None:
    """Codes stay within the limit, opposite weights have opposite codes, and the error is half a step at most."""
    codes, scale = quantize_weights(weights, None, limit=limit)

    assert scale.shape == ()
    assert np.abs(codes.astype(int)).max() <= limit
    np.testing.assert_array_equal(quantize_weights(-weights, None, limit=limit)[0], -codes)
    error = np.abs(dequantize(codes, scale).astype(np.float64) - weights)
    assert error.max() <= float(scale) / 2 * (1 + 2**-15)


def test_weights_of_seven_bits() -> None:
    """With limit 63 the largest weight gets code 63 and the scale amax / 63."""
    codes, scale = quantize_weights([63.0, -31.0, 0.4], None, limit=63)

    assert codes.tolist() == [63, -31, 0]
    assert scale == 1.0


def test_scales_of_weights_have_a_lower_bound() -> None:
    """A minimum scale holds channel by channel; one scale for all obeys the largest of them."""
    weights = np.array([[127.0], [1.27]])

    codes, scales = quantize_weights(weights, 0, minimum_scale=[0.5, 0.5])
    _, scale = quantize_weights(weights, None, minimum_scale=[0.5, 4.0])

    assert codes.tolist() == [[127], [3]]
    assert scales.tolist() == [1.0, 0.5]
    assert scale == 4.0


def test_channels_without_weights_worth_the_name() -> None:
    """An all-zero channel gets scale 1 and a subnormal one the smallest normal scale; no scale is 0."""
    codes, scales = quantize_weights(np.array([[0.0, -0.0], [1e-44, 0.0], [1.0, 0.0]]), axis=0)

    assert scales.tolist() == [1.0, SMALLEST_SCALE, np.float32(1 / 127)]
    assert codes.tolist() == [[0, 0], [0, 0], [127, 0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    """The message counts the bad weights and names the shape."""
    with pytest.raises(CalibrationError, match=r"shape \(2, 2\): 1 of them"):
        quantize_weights([[1.0, 2.0], [bad, 3.0]], axis=0)


def test_axis_must_exist() -> None:
    """An axis beyond the shape is refused with both named."""
    with pytest.raises(CalibrationError, match=r"shape \(2,\).*axis 1"):
        quantize_weights([1.0, 2.0], axis=1)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1.0, 1.0),
        (1.0001, 1 + 2**-10),  # the next number of FP16, although 1 is nearer
        (1.0009, 1 + 2**-10),
        (0.1, 1639 * 2**-14),  # 1638.4 units of 2^-14
        (2048.5, 2050.0),  # above 2048 they are 2 apart
        (65504.0, 65504.0),
        (1e-5, 168 * 2**-24),  # 167.8 units; below 2^-14 they are 2^-24
        (1e-12, 2**-24),
        (SMALLEST_SCALE, 2**-24),
    ],
)
def test_fp16_scales_are_rounded_up(scale: float, expected: float) -> None:
    """To the next number that FP16 holds, the smallest of which is 2^-24: an engine refuses a scale of 0."""
    assert fp16_scale(scale) == expected
    found = fp16_scale(np.float32([[scale]]))
    assert found.dtype == np.float32
    assert found.tolist() == [[fp16_scale(float(np.float32(scale)))]]


@given(st.floats(2.0**-126, 65504.0, width=32))
def test_fp16_scales_are_the_next_ones_up(scale: float) -> None:
    """FP16 holds the result; it is not below the scale, and FP16's number before it is."""
    found = fp16_scale(scale)

    assert float(np.float16(found)) == found >= scale
    assert float(np.nextafter(np.float16(found), np.float16(0))) < scale


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, 65505.0])
def test_scales_that_fp16_cannot_hold(bad: float) -> None:
    """The number is named, and what to do."""
    with pytest.raises(CalibrationError, match=rf"the scale {bad} in FP16: .* at most 65504. Keep .* in FP32"):
        fp16_scale(np.array([1.0, bad]))


def test_weights_with_fp16_scales() -> None:
    """The codes are made with the rounded scale: 9.021 is 4.502 steps of 254.5 / 127, and 4.497 of FP16's next one."""
    weights = np.array([[254.5, 9.021], [1.0, 0.0], [0.0, 0.0]])

    codes, scales = quantize_weights(weights, axis=0, half=True)
    exact, _ = quantize_weights(weights, axis=0)
    _, one = quantize_weights(weights, None, half=True, minimum_scale=3.0001)

    assert scales.tolist() == [2 + 3 * 2**-9, fp16_scale(1 / 127), 1.0]
    assert scales.dtype == np.float32
    assert (codes.tolist(), exact.tolist()) == ([[127, 4], [127, 0], [0, 0]], [[127, 5], [127, 0], [0, 0]])
    assert one == 3 + 2**-9


@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-60000, 60000, width=32)))
def test_weights_with_fp16_scales_come_back(weights: np.ndarray) -> None:
    """Nothing clips: the error is half a step at most, of a step that is 2^-10 coarser at most, or 2^-24."""
    codes, scales = quantize_weights(weights, axis=0, half=True)
    _, exact = quantize_weights(weights, axis=0)

    assert (scales <= np.maximum(exact * (1 + 2.0**-10), exact + 2.0**-24)).all()
    error = np.abs(dequantize(codes, scales[:, None]).astype(np.float64) - weights)
    assert (error <= scales[:, None] / 2 * (1 + 2**-15)).all()
