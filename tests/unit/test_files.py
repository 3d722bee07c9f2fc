"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from calibrators.errors import FileAccessError
from calibrators.files import atomic_path, read_bytes, remove_leftovers, sha256_of_file, write_bytes, write_text


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    """Until then the content has another name in the same folder, with the same suffix."""
    target = tmp_path / "model.onnx"

    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".onnx"

    assert target.read_bytes() == b"new"
    assert names_in(tmp_path) == ["model.onnx"]


def test_folders_are_made(tmp_path: Path) -> None:
    """A missing folder is no reason to fail."""
    write_text(tmp_path / "a" / "b" / "c.txt", "ü")

    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "ü".encode()


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    """The new content takes the name over."""
    target = tmp_path / "x.json"
    target.write_bytes(b"old")

    write_bytes(target, b"new")

    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failed_block_changes_nothing(error: BaseException, tmp_path: Path) -> None:
    """After an exception or Ctrl-C the old file is as it was, and no temporary one is left."""
    target = tmp_path / "x.json"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()

    assert target.read_bytes() == b"old"
    assert names_in(tmp_path) == ["x.json"]


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    """The reason is the system's, nothing is left, and the next step is named."""
    target = tmp_path / "x.json"

    with (
        pytest.raises(FileAccessError, match=r"x\.json.*No space left on device.*choose another folder"),
        atomic_path(target),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert names_in(tmp_path) == []


def test_a_writer_that_removes_its_file_is_an_error(tmp_path: Path) -> None:
    """If there is nothing to rename, the target was not written, and that is said."""
    with pytest.raises(FileAccessError, match=r"x\.json"), atomic_path(tmp_path / "x.json") as temporary:
        temporary.unlink()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A file where the folder should be is reported as such."""
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(FileAccessError, match="Cannot write"):
        write_bytes(tmp_path / "file" / "x.json", b"")


def test_target_that_is_a_folder(tmp_path: Path) -> None:
    """A folder is not replaced by a file."""
    (tmp_path / "out").mkdir()

    with pytest.raises(FileAccessError, match="Is a directory"):
        write_bytes(tmp_path / "out", b"")

    assert names_in(tmp_path) == ["out"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    """Results can be read by whom the user's umask lets read, unlike temporary files."""
    previous = os.umask(0o027)
    try:
        write_bytes(tmp_path / "x", b"")
    finally:
        os.umask(previous)

    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_reading_names_what_is_missing(tmp_path: Path) -> None:
    """What the file is to the user, and its path."""
    (tmp_path / "x").write_bytes(b"\0\1")

    assert read_bytes(tmp_path / "x", "the model") == b"\0\1"
    with pytest.raises(FileAccessError, match=r"Cannot read the model: there is no file '.*nothing'"):
        read_bytes(tmp_path / "nothing", "the model")
    with pytest.raises(FileAccessError, match=r"Cannot read the model '.*': Is a directory"):
        read_bytes(tmp_path, "the model")


def test_hash_is_sha256(tmp_path: Path) -> None:
    """The same digits as of the bytes in memory."""
    (tmp_path / "x").write_bytes(b"abc" * 100_000)

    assert sha256_of_file(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Only what was to become this file: neither the file itself nor its neighbours, whatever their names."""
    target = tmp_path / "c[1].npz"
    killed = [atomic_path(path) for path in (target, tmp_path / "other.npz")]
    for writing in killed:
        writing.__enter__()  # never left, as in a process that was killed
    target.touch()

    remove_leftovers(target)

    assert [name.split(".")[1] for name in names_in(tmp_path) if name.startswith(".")] == ["other"]
    assert target.exists()
