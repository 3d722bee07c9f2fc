"""Files that appear whole or not at all.

Every file of the project is written under a temporary name in its own folder and renamed, so that a crash, a full disk
or Ctrl-C never leaves half a file under a name that somebody will read.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calibrators.errors import FileAccessError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block ends well, delete it otherwise.

    The folder is created where it is missing. The temporary name ends with the same suffix, since some writers look at
    it.

    Raises:
        FileAccessError: the folder cannot be written to, or the disk is full.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=f".part{target.suffix}")
        os.close(handle)
    except OSError as error:
        raise _cannot_write(target, error) from error
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; the result gets the permissions that open() would have given it.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(target, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete what processes left that were killed while `atomic_path` wrote `path`; nobody else may be writing it."""
    target = Path(path)
    pattern = f".{glob.escape(target.stem)}.????????.part{glob.escape(target.suffix)}"
    for leftover in target.parent.glob(pattern):
        leftover.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def read_bytes(path: str | os.PathLike[str], what: str) -> bytes:
    """Read the file at `path`.

    Args:
        path: the file.
        what: what the file is to the user, for the message: "the calibration", "the model".

    Raises:
        FileAccessError: there is no such file, it is a folder, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FileAccessError(f"Cannot read {what}: there is no file {os.fspath(path)!r}.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileAccessError(f"Cannot read {what} {os.fspath(path)!r}: {reason}.") from error


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as hex digits, read in pieces."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cannot_write(target: Path, error: OSError) -> FileAccessError:
    reason = error.strerror or str(error)
    return FileAccessError(
        f"Cannot write {os.fspath(target)!r}: {reason}. Nothing was left under that name; "
        "free space or choose another folder."
    )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
