"""Where a result may be written is said before the work is done."""

from pathlib import Path

import pytest

from trt_int8.errors import ConfigError, FileAccessError
from trt_int8.outputs import check_output, check_outputs


def test_new_file_in_a_new_folder_is_fine(tmp_path: Path) -> None:
    """Folders that are missing will be made; nothing is made by the check."""
    (tmp_path / "data.npz").touch()
    check_output(tmp_path / "a" / "b.npz", tmp_path / "data.npz", None, "package.data:batches", [1, 2])

    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_result_may_be_replaced(tmp_path: Path) -> None:
    """A file that is not read is replaced without a question."""
    (tmp_path / "old.npz").touch()

    check_output(tmp_path / "old.npz", tmp_path / "missing.npz")


@pytest.mark.parametrize("name", ["data.npz", "folder/../data.npz", "link.npz"])
def test_source_is_not_replaced(tmp_path: Path, name: str) -> None:
    """What is read cannot be the output, however it is spelt."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.npz").write_text("precious")
    (tmp_path / "link.npz").symlink_to("data.npz")

    with pytest.raises(ConfigError, match=rf"Cannot write '.*{name}': it is read as well"):
        check_output(tmp_path / name, None, str(tmp_path / "data.npz"))


def test_folder_of_batches_gets_no_stranger(tmp_path: Path) -> None:
    """A file written among the batches would be a batch of the next pass."""
    with pytest.raises(ConfigError, match="into a folder of data"):
        check_output(tmp_path / "calibration.npz", tmp_path)


def test_folder_is_no_file(tmp_path: Path) -> None:
    """A folder cannot be written as a file, and a file is no folder to write in."""
    (tmp_path / "file").touch()

    with pytest.raises(FileAccessError, match="it is a folder"):
        check_output(tmp_path)
    with pytest.raises(FileAccessError, match=r"file' is not a folder"):
        check_output(tmp_path / "file" / "calibration.npz")


def test_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only folder is named."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)

    with pytest.raises(FileAccessError, match=rf"'{tmp_path}' cannot be written to"):
        check_output(tmp_path / "deep" / "calibration.npz")


def test_the_option_that_is_to_be_changed_is_named(tmp_path: Path) -> None:
    """The one that named the output: --output unless another did."""
    (tmp_path / "data.npz").touch()
    for output, sources in (
        (tmp_path / "data.npz", [tmp_path / "data.npz"]),
        (tmp_path / "new.cache", [tmp_path]),
        (tmp_path, []),
        (tmp_path / "data.npz" / "x", []),
    ):
        for option in ("--output", "--cache"):
            with pytest.raises((ConfigError, FileAccessError), match=f" with {option}\\.$"):
                check_output(output, *sources, option=option)


def test_files_of_one_command_are_different_ones(tmp_path: Path) -> None:
    """However they are spelt; each is checked like any output."""
    check_outputs([(tmp_path / "a", "--output"), (tmp_path / "b", "--cache")])
    with pytest.raises(ConfigError, match=r"twice: --output and --cache both name it.* with --cache\."):
        check_outputs([(tmp_path / "a", "--output"), (tmp_path / "x" / ".." / "a", "--cache")])
    (tmp_path / "a").touch()
    with pytest.raises(ConfigError, match=r"is read as well.* with --cache\."):
        check_outputs([(tmp_path / "b", "--output"), (tmp_path / "a", "--cache")], tmp_path / "a")
