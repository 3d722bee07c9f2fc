import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engines.runner import TensorSpec
from trt_int8.data import open_data
from trt_int8.errors import DataError

FLOAT = np.dtype("float32")
ROWS = TensorSpec("x", FLOAT, ("batch", 2))
X = np.arange(20, dtype=np.float32).reshape(10, 2)


@pytest.fixture(params=["stored", "compressed", "fortran", "in memory"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The same ten rows with labels, in every form that a table of samples comes in."""
    arrays: dict[str, Any] = {"x": X, "label": np.arange(10)}
    file = tmp_path / "data.npz"
    match request.param:
        case "stored":
            np.savez(file, **arrays)
        case "compressed":
            np.savez_compressed(file, **arrays)
        case "fortran":
            np.savez(file, x=np.asfortranarray(X), label=arrays["label"])
        case _:
            return arrays
    return file


def test_rows_are_cut_into_batches_with_a_short_last_one(table: Any) -> None:
    """Ten rows in fours give 4, 4 and 2, with the labels beside them."""
    batches = list(open_data(table, [ROWS], batch_size=4))

    assert [batch.samples for batch in batches] == [4, 4, 2]
    assert [batch.index for batch in batches] == [0, 1, 2]
    np.testing.assert_array_equal(np.concatenate([batch.feeds["x"] for batch in batches]), X)
    assert [batch.extras["label"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_default_is_one_sample_per_batch(table: Any) -> None:
    """Without a batch size there are as many batches as samples."""
    source = open_data(table, [ROWS])

    assert (source.batches, source.batch_size) == (10, 1)
    assert [batch.feeds["x"].tolist() for batch in source] == [[row] for row in X.tolist()]


def test_max_batches_stops_early(table: Any) -> None:
    """Two batches of three are the first six rows."""
    source = open_data(table, [ROWS], batch_size=3, max_batches=2)

    assert source.batches == 2
    np.testing.assert_array_equal(np.concatenate([batch.feeds["x"] for batch in source]), X[:6])


def test_fixed_batch_overrides_and_is_filled_up(table: Any) -> None:
    """A model of batch 4 gets 4, 4 and the last two rows followed by copies of the last."""
    fixed = TensorSpec("x", FLOAT, (4, 2))
    batches = list(open_data(table, [fixed], batch_size=3))

    assert [batch.samples for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(batches[2].feeds["x"], X[[8, 9, 9, 9]])
    assert batches[2].extras["label"].tolist() == [8, 9]


def test_scalars_are_not_filled_up() -> None:
    """In the short last batch of a model that fixes its batch, only what has a row per sample is filled up."""
    inputs = [TensorSpec("x", FLOAT, (4, 2)), TensorSpec("t", FLOAT, ())]
    last = list(open_data({"x": X, "t": np.float32(2)}, inputs))[-1]

    assert last.feeds["x"].shape == (4, 2)
    assert float(last.feeds["t"]) == 2


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 30), size=st.integers(1, 12), limit=st.none() | st.integers(1, 12), fixed=st.booleans())
def test_any_cut_gives_each_row_once(samples: int, size: int, limit: int | None, fixed: bool) -> None:
    """Whatever the sizes, the real rows of all batches are the first rows of the array, each once and in order."""
    assume(not fixed or samples >= size)
    rows = np.arange(2 * samples, dtype=np.float32).reshape(samples, 2)
    spec = TensorSpec("x", FLOAT, (size if fixed else "batch", 2))
    batches = list(open_data({"x": rows}, [spec], batch_size=size, max_batches=limit))

    expected = rows if limit is None else rows[: limit * size]
    np.testing.assert_array_equal(np.concatenate([batch.feeds["x"][: batch.samples] for batch in batches]), expected)
    assert {batch.samples for batch in batches[:-1]} <= {size}
    assert not fixed or {len(batch.feeds["x"]) for batch in batches} == {size}


def test_fewer_samples_than_a_fixed_batch_are_refused(table: Any) -> None:
    """Ten rows cannot fill one batch of 16: padding would outweigh the data."""
    fixed = TensorSpec("x", FLOAT, (16, 2))

    with pytest.raises(DataError, match=r"10 samples; the model's batch is fixed at 16"):
        list(open_data(table, [fixed]))


def test_wrong_shape_is_found_on_opening(table: Any) -> None:
    """What does not fit is refused before anything slow happens, not when it is read."""
    with pytest.raises(DataError, match=r"batch 0 of .*: input 'x' has shape \(1, 2\).* \(batch, 3\)"):
        open_data(table, [TensorSpec("x", FLOAT, ("batch", 3))])


def test_lost_sample_axis_gets_a_hint(tmp_path: Path) -> None:
    """One sample saved without its axis is recognised."""
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 8, 8), np.float32))

    with pytest.raises(DataError, match=r"\(3, 8, 8\).*Add the batch axis"):
        open_data(tmp_path / "data.npz", [TensorSpec("x", FLOAT, ("batch", 3, 8, 8))])


def test_wrong_name_is_not_guessed(tmp_path: Path) -> None:
    """`x` is not taken for `input`, although it is the only candidate."""
    np.savez(tmp_path / "data.npz", x=X, y=np.arange(10))

    with pytest.raises(DataError, match=r"no array 'input'; found x, y\. The model takes input: float32"):
        open_data(tmp_path / "data.npz", [TensorSpec("input", FLOAT, ("batch", 2))])


def test_differing_numbers_of_samples_are_refused() -> None:
    """Ten ids for nine masks is nobody's intention."""
    inputs = [ROWS, TensorSpec("m", FLOAT, ("batch", 2))]

    with pytest.raises(DataError, match=r"'m' has shape \(9, 2\); .* there are 10 samples in batches of 1"):
        open_data({"x": X, "m": X[:9]}, inputs)


def test_extra_array_without_a_row_per_sample_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Class names beside the samples do no harm; the log says that they were left out."""
    caplog.set_level("INFO", "trt_int8")
    batches = list(open_data({"x": X, "names": np.array(["cat", "dog"])}, [ROWS], batch_size=5))

    assert [list(batch.extras) for batch in batches] == [[], []]
    assert "left out" in caplog.text
    assert "names" in caplog.text


def test_scalar_input_is_the_same_for_every_batch() -> None:
    """An array of rank 0 goes whole to each batch."""
    scalar = TensorSpec("t", FLOAT, ())
    batches = list(open_data({"x": X, "t": np.float32(0.5)}, [scalar, ROWS], batch_size=5))

    assert [float(batch.feeds["t"]) for batch in batches] == [0.5, 0.5]
    assert batches[0].feeds["t"].shape == ()


def test_scalar_input_may_have_a_value_per_sample() -> None:
    """An array of rank 1 gives one scalar per batch of one sample, and cannot be shared by larger batches."""
    scalar = TensorSpec("t", FLOAT, ())
    arrays = {"x": X, "t": np.arange(10, dtype=np.float32)}

    assert [float(batch.feeds["t"]) for batch in open_data(arrays, [ROWS, scalar])] == list(range(10))
    with pytest.raises(DataError, match=r"'t' has shape \(10,\); the model expects t: float32 \(\).*batches of 2"):
        open_data(arrays, [ROWS, scalar], batch_size=2)


def test_model_of_one_scalar_takes_one_sample_per_number() -> None:
    """A model whose only input is a scalar sees the numbers one by one."""
    batches = list(open_data({"t": np.array([1, 2], np.float32)}, [TensorSpec("t", FLOAT, ())]))

    assert [(float(batch.feeds["t"]), batch.samples) for batch in batches] == [(1.0, 1), (2.0, 1)]


def test_recurrent_state_goes_whole_or_one_per_sample() -> None:
    """An input whose first axis is not the batch, such as (2, batch, 3), is fed whole, or one per batch of one."""
    state = TensorSpec("state", FLOAT, (2, "batch", 3))
    constant = np.ones((2, 1, 3), np.float32)
    stacked = np.arange(60, dtype=np.float32).reshape(10, 2, 1, 3)

    whole = list(open_data({"x": X, "state": constant}, [ROWS, state]))
    np.testing.assert_array_equal(whole[7].feeds["state"], constant)
    each = list(open_data({"x": X, "state": stacked}, [ROWS, state]))
    np.testing.assert_array_equal(each[7].feeds["state"], stacked[7])


def test_number_cannot_stand_for_a_batch() -> None:
    """A single number is refused for an input with axes."""
    with pytest.raises(DataError, match=r"the arrays: input 'x' is a single number; the model expects x"):
        open_data({"x": 3.0}, [ROWS])


def test_bare_array_feeds_a_model_of_one_input() -> None:
    """An array or tensor alone needs no name."""
    batches = list(open_data(X, [ROWS], batch_size=10))

    np.testing.assert_array_equal(batches[0].feeds["x"], X)


def test_no_samples_are_refused(tmp_path: Path) -> None:
    """A file with an empty array holds no samples, and says so."""
    np.savez(tmp_path / "data.npz", x=X[:0])

    with pytest.raises(DataError, match=r"holds no samples \(input shape \(0, 2\)\)"):
        open_data(tmp_path / "data.npz", [ROWS])


def test_npz_without_arrays_is_refused(tmp_path: Path) -> None:
    """An empty archive names what is missing."""
    np.savez(tmp_path / "data.npz")

    with pytest.raises(DataError, match=r"no array 'x'; found no arrays"):
        open_data(tmp_path / "data.npz", [ROWS])


def test_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    """A renamed text file gets one clear line."""
    (tmp_path / "data.npz").write_text("samples")

    with pytest.raises(DataError, match=r"data\.npz': it is not a whole \.npz file of plain arrays"):
        open_data(tmp_path / "data.npz", [ROWS])


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    """An array of Python objects would need pickle, which runs code: it is not loaded."""
    np.savez(tmp_path / "data.npz", x=np.array([{}], dtype=object))

    with pytest.raises(DataError, match=r"array 'x' holds Python objects"):
        open_data(tmp_path / "data.npz", [ROWS])


def test_second_version_of_the_format_is_read(tmp_path: Path) -> None:
    """The npy format has a second version, for long headers, whose length field is wider; it is read alike."""
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        np.lib.format.write_array(stream, X, version=(2, 0))
    batches = list(open_data(tmp_path / "data.npz", [ROWS], batch_size=10))

    np.testing.assert_array_equal(batches[0].feeds["x"], X)


def test_damaged_rows_are_refused_when_they_are_reached(tmp_path: Path) -> None:
    """An archive whose array is shorter than its header says is refused at the batch where it ends."""
    whole = io.BytesIO()
    np.save(whole, np.zeros((100, 2), np.float32))
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", whole.getvalue()[:-100])
    source = open_data(tmp_path / "data.npz", [ROWS], batch_size=50)

    with pytest.raises(DataError, match=r"not a whole \.npz file"):
        list(source)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Sixteen million bytes on disk are streamed within two million, compressed or not."""
    rows = np.zeros((4000, 1000), np.float32)
    np.savez_compressed(tmp_path / "data.npz", x=rows)
    source = open_data(tmp_path / "data.npz", [TensorSpec("x", FLOAT, ("batch", 1000))], batch_size=10)
    del rows

    tracemalloc.start()
    samples = sum(batch.samples for batch in source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert samples == 4000
    assert peak < 2_000_000
