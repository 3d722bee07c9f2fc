"""What was made of a file last, known again by the file's hash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from calibrators.files import sha256_of_file

Made = TypeVar("Made")

State = tuple[tuple[str, int, int], ...]
"""Of files that may be too large to be hashed each time: path, bytes, time of the last change in nanoseconds."""


class LastMade(Generic[Made]):
    """Keeps what was made of a file last, and gives it again for a file of the same content.

    A file beside it, of external data, is taken for unchanged where path, size and time of the last change are.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: tuple[str, tuple[str, ...], State, Made] | None = None

    def find(self, file: Path, digest: str) -> Made | None:
        """Return what was made of a file of that content; None where another one was the last.

        Args:
            file: the file.
            digest: its hash.
        """
        with self._lock:
            kept = self._kept
        if kept is None or kept[0] != digest or _state(file, kept[1]) != kept[2]:
            return None
        return kept[3]

    def keep(self, file: Path, digest: str, beside: Sequence[str], made: Made) -> None:
        """Keep what was made, in place of what was kept before.

        Args:
            file: the file.
            digest: its hash.
            beside: names of the files that belong to it, relative to its folder.
            made: what was made.
        """
        with self._lock:
            self._kept = (digest, tuple(beside), _state(file, beside), made)

    def forget(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept = None


def digest_of(file: Path) -> str:
    """Return the hash of a file; nothing where it cannot be read."""
    try:
        return sha256_of_file(file)
    except OSError:
        return ""


def _state(file: Path, beside: Sequence[str]) -> State:
    found = [(file.parent / name).resolve() for name in beside]
    stats = [(path, path.stat()) for path in found if path.exists()]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)
