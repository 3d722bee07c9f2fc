import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.runner import TensorSpec
from trt_int8.data import open_data
from trt_int8.errors import ConfigError, DataError, FileAccessError
from trt_int8.images import Preprocessing

X = TensorSpec("x", np.dtype("float32"), ("batch", 2))
ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", x=ROWS, label=np.arange(6))
    return tmp_path / "data.npz"


def test_missing_path_is_named(tmp_path: Path) -> None:
    """A path that is not there is an error of access, with what could stand in its place."""
    with pytest.raises(FileAccessError, match=r"no file or folder '.*none\.npz'\. Expected an \.npz"):
        open_data(tmp_path / "none.npz", [X])


def test_unknown_suffix_is_named(tmp_path: Path) -> None:
    """A file of another kind is refused with the kinds that are known."""
    (tmp_path / "data.csv").write_text("1,2")

    with pytest.raises(DataError, match=r"suffix '\.csv'; expected \.npz"):
        open_data(tmp_path / "data.csv", [X])


@pytest.mark.parametrize("option", ["batch_size", "max_batches"])
def test_counts_below_one_are_refused(npz: Path, option: str) -> None:
    """Zero batches, or batches of none, are a mistake in the options."""
    with pytest.raises(ConfigError, match=r"is 0; expected at least 1"):
        open_data(npz, [X], **{option: 0})  # type: ignore[arg-type]


def test_preprocessing_of_arrays_is_refused(npz: Path) -> None:
    """Preprocessing that would not be carried out is not silently ignored."""
    with pytest.raises(ConfigError, match=r"Preprocessing is for folders of images; .*data\.npz"):
        open_data(npz, [X], preprocessing=Preprocessing())


def test_batch_size_of_an_iterable_is_refused() -> None:
    """Batches that are made already cannot be cut anew."""
    with pytest.raises(ConfigError, match=r"a list comes in batches already"):
        open_data([{"x": ROWS}], [X], batch_size=2)


def test_missing_labels_are_refused_on_opening(npz: Path) -> None:
    """Labels that are asked for by name must be there, and the others are named."""
    assert next(iter(open_data(npz, [X], label="label"))).extras["label"].tolist() == [0]
    with pytest.raises(DataError, match=r"no labels 'y' with one row per sample; arrays beside the inputs: label"):
        open_data(npz, [X], label="y")


def test_arrays_that_are_no_input_are_noted_once(npz: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line of the log tells that the labels are not fed, however many batches there are."""
    caplog.set_level("INFO", "trt_int8")
    list(open_data(npz, [X]))

    assert [record.getMessage() for record in caplog.records if "not fed" in record.getMessage()] == [
        f"{str(npz)!r} (6 samples): not fed to the model, which has no such input: label"
    ]


def test_labels_that_are_asked_for_are_not_noted(npz: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That they are not fed is what their reader expects."""
    caplog.set_level("INFO", "trt_int8")
    list(open_data(npz, [X], label="label"))

    assert not caplog.records


def test_nan_is_counted_over_the_whole_stream() -> None:
    """A NaN in the second row of the third batch of two is in sample 5."""
    rows = ROWS.copy()
    rows[5, 1] = np.nan

    with pytest.raises(DataError, match=r"batch 2 of the arrays: input 'x' holds NaN in sample 5"):
        list(open_data({"x": rows}, [X], batch_size=2))


def test_short_batch_in_the_middle_of_a_fixed_model_is_refused() -> None:
    """Only the last batch may be filled up; a short one before it means that the batches do not fit."""
    fixed = TensorSpec("x", np.dtype("float32"), (2, 2))
    batches = [{"x": ROWS[:2]}, {"x": ROWS[2:3]}, {"x": ROWS[3:5]}]

    with pytest.raises(DataError, match=r"batch 1 has 1 samples; the model's batch is fixed at 2"):
        list(open_data(batches, [fixed]))


def test_too_large_a_batch_for_a_fixed_model_is_refused() -> None:
    """Six rows do not go into a batch of two."""
    with pytest.raises(DataError, match=r"\(6, 2\); the model expects x: float32 \(2, 2\)"):
        list(open_data([{"x": ROWS}], [TensorSpec("x", np.dtype("float32"), (2, 2))]))


class TestHashes:
    def test_files_are_known_up_front(self, npz: Path) -> None:
        """The hash of a file stands before any pass: SHA-256 over its name and its own SHA-256."""
        inner = hashlib.sha256(npz.read_bytes()).hexdigest()
        expected = hashlib.sha256(f"data.npz\0{inner}\n".encode()).hexdigest()

        assert open_data(npz, [X]).data_hash == expected

    def test_code_is_known_only_by_its_id(self) -> None:
        """Batches that come from code have no hash of their own, but may be given an identity."""
        assert open_data([{"x": ROWS}], [X]).data_hash is None
        assert open_data([{"x": ROWS}], [X], data_id="rows-v1").data_hash == "id:rows-v1"

    def test_an_id_does_not_hide_a_changed_file(self, npz: Path) -> None:
        """Files are hashed even where an id is given."""
        assert open_data(npz, [X], data_id="rows-v1").data_hash == open_data(npz, [X]).data_hash

    def test_rolling_hash_is_known_after_a_pass(self) -> None:
        """None before the first complete pass, then the hash over the names, types, shapes and values it fed."""
        source = open_data([{"x": ROWS[:4]}, {"x": ROWS[4:]}], [X])
        expected = hashlib.blake2b(digest_size=32)
        for part in (ROWS[:4], ROWS[4:]):
            expected.update(f"x\0<f4\0{part.shape}\0".encode() + part.tobytes())

        batches = iter(source)
        first = next(batches)
        assert source.rolling_hash is None
        last = next(batches)
        assert list(batches) == []
        assert first.rolling_hash != last.rolling_hash == source.rolling_hash == expected.hexdigest()

    def test_same_values_from_another_place_hash_alike(self, npz: Path) -> None:
        """The rolling hash is of what is fed, wherever it came from."""
        from_file, from_memory = open_data(npz, [X], batch_size=4), open_data([{"x": ROWS[:4]}, {"x": ROWS[4:]}], [X])
        assert [b.rolling_hash for b in from_file] == [b.rolling_hash for b in from_memory]

    def test_padding_does_not_count(self) -> None:
        """A model that fixes its batch sees the same stream as one that does not."""
        fixed = TensorSpec("x", np.dtype("float32"), (4, 2))
        free, padded = open_data({"x": ROWS}, [X], batch_size=4), open_data({"x": ROWS}, [fixed])

        assert [b.rolling_hash for b in free] == [b.rolling_hash for b in padded]

    @settings(max_examples=30, deadline=None)
    @given(cut=st.integers(1, 5), row=st.integers(0, 5), change=st.sampled_from(["value", "order", "cut", "type"]))
    def test_any_difference_shows(self, cut: int, row: int, change: str) -> None:
        """Another value, order, cut or type of the samples gives another hash."""
        changed, spec, size = ROWS.copy(), X, cut
        match change:
            case "value":
                changed[row, 0] += 1
            case "order":
                changed = changed[::-1]
            case "cut":
                size = cut + 1
            case _:
                changed, spec = changed.astype(np.float64), TensorSpec("x", np.dtype("float64"), ("batch", 2))
        before, after = open_data({"x": ROWS}, [X], batch_size=cut), open_data({"x": changed}, [spec], batch_size=size)
        list(before), list(after)

        assert before.rolling_hash != after.rolling_hash

    def test_other_data_in_a_second_pass_is_noted(self, caplog: pytest.LogCaptureFixture) -> None:
        """A loader that shuffles gives different passes; the log says that their figures do not compare."""
        batches = [{"x": ROWS[:3]}, {"x": ROWS[3:]}]
        source = open_data(batches, [X])
        list(source)
        list(source)
        assert not caplog.records
        batches.reverse()
        list(source)

        assert "gave other batches than in the pass before" in caplog.text
