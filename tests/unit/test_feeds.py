import ml_dtypes
import numpy as np
import pytest

from engines.runner import TensorSpec
from trt_int8.errors import DataError
from trt_int8.feeds import Feeds, batch_input, conform, fixed_batch

IMAGE = TensorSpec("image", np.dtype("float32"), ("batch", 3, 4, 5))
IDS = TensorSpec("ids", np.dtype("int64"), ("batch", "length"))
MASK = TensorSpec("mask", np.dtype("bool"), ("batch", "length"))
SCALAR = TensorSpec("temperature", np.dtype("float32"), ())


def fit(arrays: dict[str, object], *inputs: TensorSpec, first_sample: int = 0) -> Feeds:
    return conform(arrays, inputs, where="batch 2 of 'data.npz'", first_sample=first_sample)


def image(samples: int = 2, dtype: str = "float32") -> np.ndarray:
    return np.arange(samples * 60).reshape(samples, 3, 4, 5).astype(dtype)


def test_exact_arrays_pass_unchanged() -> None:
    """Arrays that fit already come out with the same values, dtype and shape."""
    feeds = fit({"image": image()}, IMAGE)

    assert feeds.samples == 2
    assert feeds.inputs["image"].dtype == np.float32
    np.testing.assert_array_equal(feeds.inputs["image"], image())


def test_feeds_are_copies() -> None:
    """A generator that fills its buffer again does not change a batch that was handed out."""
    buffer = image()
    feeds = fit({"image": buffer}, IMAGE)
    buffer[:] = -1

    np.testing.assert_array_equal(feeds.inputs["image"], image())


def test_strided_and_big_endian_arrays_become_plain_ones() -> None:
    """Byte order and memory order are the reader's business: the values stay, the array is native and contiguous."""
    channels_last = np.ascontiguousarray(image().transpose(0, 2, 3, 1)).astype(">f4")
    fed = fit({"image": channels_last.transpose(0, 3, 1, 2)}, IMAGE).inputs["image"]

    assert fed.dtype == np.dtype("=f4")
    assert fed.flags.c_contiguous
    np.testing.assert_array_equal(fed, image())


def test_torch_tensors_that_need_a_gradient_are_taken() -> None:
    """A tensor is detached and becomes an array of equal values."""
    import torch

    fed = fit({"image": torch.from_numpy(image()).requires_grad_()}, IMAGE).inputs["image"]

    np.testing.assert_array_equal(fed, image())


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_float_widths_are_converted(dtype: str) -> None:
    """float64 and float16 are fed to a float32 input without being asked."""
    fed = fit({"image": image(dtype=dtype)}, IMAGE).inputs["image"]

    assert fed.dtype == np.float32
    np.testing.assert_array_equal(fed, image())


def test_token_ids_are_converted_both_ways() -> None:
    """int32 ids feed an int64 input and int64 ids an int32 one."""
    narrow = TensorSpec("ids", np.dtype("int32"), ("batch", "length"))
    ids = np.array([[1, -2, 2**31 - 1]])

    assert fit({"ids": ids.astype(np.int32)}, IDS).inputs["ids"].tolist() == ids.tolist()
    assert fit({"ids": ids}, narrow).inputs["ids"].tolist() == ids.tolist()
    assert fit({"ids": ids}, narrow).inputs["ids"].dtype == np.int32


def test_ids_that_do_not_fit_are_refused() -> None:
    """An int64 value beyond int32 is not wrapped around but named."""
    narrow = TensorSpec("ids", np.dtype("int32"), ("batch", "length"))

    with pytest.raises(DataError, match=r"int64; the model expects ids: int32 .* 7 to 2147483648, do not fit"):
        fit({"ids": np.array([[7, 2**31]])}, narrow)


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_whole_numbers_for_a_float_input_are_refused(dtype: str) -> None:
    """Raw pixels are refused with the hint that they lack their preprocessing."""
    with pytest.raises(DataError, match=rf"'image' has dtype {dtype}; the model expects image: float32 .*Preprocess"):
        fit({"image": image(dtype=dtype)}, IMAGE)


def test_floats_for_an_integer_input_are_refused() -> None:
    """A wrong dtype is named beside the right one."""
    with pytest.raises(DataError, match=r"'ids' has dtype float32; the model expects ids: int64 \(batch, length\)"):
        fit({"ids": np.zeros((1, 4), np.float32)}, IDS)


def test_bfloat16_is_not_guessed_at() -> None:
    """bfloat16 has fewer bits than anyone expects to lose silently: it is refused with the way to convert it."""
    with pytest.raises(DataError, match=r"bfloat16.*astype\('float32'\)"):
        fit({"image": image().astype(ml_dtypes.bfloat16)}, IMAGE)


def test_missing_input_names_both_sides() -> None:
    """A wrongly named array is not guessed to be the input; what was found and what is wanted are both named."""
    with pytest.raises(
        DataError, match=r"no array 'image'; found x, y\. The model takes image: float32 \(batch, 3, 4, 5\)"
    ):
        fit({"x": image(), "y": np.zeros(2)}, IMAGE)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((2, 3, 5, 5), r"\(2, 3, 5, 5\); the model expects image: float32 \(batch, 3, 4, 5\)\.$"),
        ((3, 4, 5), r"Add the batch axis: array\[None\]"),
        ((2, 4, 5, 3), r"channels to the front: array\.transpose\(0, 3, 1, 2\)"),
        ((60,), r"\(60,\); the model expects"),
    ],
)
def test_wrong_shapes_name_both_and_hint_at_the_usual_slips(shape: tuple[int, ...], hint: str) -> None:
    """A wrong rank or length names both shapes; a lost batch axis and swapped layouts get the line that mends them."""
    with pytest.raises(DataError, match=hint):
        fit({"image": np.zeros(shape, np.float32)}, IMAGE)


def test_channels_first_data_for_a_channels_last_model() -> None:
    """The hint works the other way round as well."""
    channels_last = TensorSpec("image", np.dtype("float32"), (None, 4, 5, 3))

    with pytest.raises(DataError, match=r"channels to the back: array\.transpose\(0, 2, 3, 1\)"):
        fit({"image": image()}, channels_last)


def test_inputs_that_share_the_batch_symbol_have_as_many_samples() -> None:
    """Ids of 2 samples with a mask of 3 are refused."""
    with pytest.raises(DataError, match=r"'mask' has 3 samples and input 'ids' has 2"):
        fit({"ids": np.zeros((2, 4), np.int64), "mask": np.ones((3, 4), bool)}, IDS, MASK)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_non_finite_values_name_the_sample_in_the_whole_stream(value: float, word: str) -> None:
    """A NaN in row 1 of a batch that starts at sample 64 is in sample 65."""
    broken = image()
    broken[1, 2, 0, 3] = value

    with pytest.raises(DataError, match=rf"'image' holds {word} in sample 65 \(at \[1, 2, 0, 3\] in the batch"):
        fit({"image": broken}, IMAGE, first_sample=64)


def test_float64_beyond_float32_is_reported_as_infinity() -> None:
    """A value that float32 cannot hold is not silently made infinite."""
    huge = image(dtype="float64")
    huge[0, 0, 0, 0] = 1e300

    with pytest.raises(DataError, match=r"infinity in sample 0"):
        fit({"image": huge}, IMAGE)


def test_non_finite_scalar_has_no_sample() -> None:
    """An input without a sample axis is named without a sample."""
    with pytest.raises(DataError, match=r"'temperature' holds NaN \(at \[\]"):
        fit({"temperature": np.float32(np.nan)}, SCALAR)


def test_scalars_ids_and_masks_go_together() -> None:
    """Several inputs of several types and ranks make one batch, in the model's order."""
    arrays = {"temperature": 0.5, "mask": np.ones((2, 4), bool), "ids": np.zeros((2, 4), np.int64)}
    feeds = fit(arrays, IDS, MASK, SCALAR)

    assert list(feeds.inputs) == ["ids", "mask", "temperature"]
    assert feeds.samples == 2
    assert feeds.inputs["temperature"].shape == ()


def test_model_of_scalars_has_one_sample_per_batch() -> None:
    """Where no input has an axis, a batch is one sample."""
    assert fit({"temperature": np.float32(1)}, SCALAR).samples == 1


def test_arrays_of_other_names_go_along_where_they_have_a_row_per_sample() -> None:
    """Labels pass, even as text; what has no row per sample is listed as left out."""
    extras = {"label": np.array([3, 4]), "file": ["a", "b"], "classes": np.arange(10), "version": 7}
    feeds = fit({"image": image(), **extras}, IMAGE)

    assert feeds.extras["label"].tolist() == [3, 4]
    assert feeds.extras["file"].tolist() == ["a", "b"]
    assert feeds.left_out == ("classes", "version")


def test_empty_batch_is_refused() -> None:
    """A batch of no samples is an error, not a batch."""
    with pytest.raises(DataError, match=r"\(0, 3, 4, 5\), which holds no sample"):
        fit({"image": image(0)}, IMAGE)


def test_number_for_an_input_with_axes_is_refused() -> None:
    """A single number is no batch of images."""
    with pytest.raises(DataError, match=r"'image' is a single number; the model expects image"):
        fit({"image": 3.0}, IMAGE)


def test_ragged_lists_are_refused() -> None:
    """Lists that make no array are refused in the same words as any other data."""
    with pytest.raises(DataError, match=r"input 'ids' is not an array of one shape and dtype"):
        fit({"ids": [[1, 2], [3]]}, IDS)


def test_model_without_a_stated_rank_takes_any_shape() -> None:
    """Where the graph states no shape, none is checked."""
    anything = TensorSpec("x", np.dtype("float32"), None)

    assert fit({"x": np.zeros((7, 2), np.float32)}, anything).samples == 7


def test_batch_is_counted_by_the_first_input_with_axes() -> None:
    """A leading scalar input does not fix the batch; the first input with axes does."""
    fixed = TensorSpec("image", np.dtype("float32"), (8, 3))

    assert batch_input([SCALAR, fixed]) is fixed
    assert fixed_batch([SCALAR, fixed]) == 8
    assert fixed_batch([IMAGE]) is None
    assert fixed_batch([SCALAR]) is None
