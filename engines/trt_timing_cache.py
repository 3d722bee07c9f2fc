"""TensorRT's timing cache on disk: kernel times that are kept between builds, in a file that nobody else wrote.

TensorRT documents no header of these files, so nothing in a file tells one of another release or GPU, which is of no
use any more, from something else that must not be lost. So `FILE.json` beside it holds the SHA-256 of what was written
here: only such a file is replaced.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from calibrators.errors import FileAccessError
from calibrators.files import read_bytes, write_bytes, write_text
from engines.trt_log import tensorrt_log

_KIND = "TensorRT timing cache"
_REMEMBERED = 8
"""Hashes that a record keeps: builds that run at the same time each write the cache."""

_ADVICE = "Name another file with --timing-cache, or remove it if it is of no use any more."


class TimingCacheFile:
    """The timing cache of a build.

    Args:
        path: of the cache; its record is `<path>.json`.

    Raises:
        FileAccessError: one of the two cannot be read, or the record is a file of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record_path = path.with_name(f"{path.name}.json")
        self._content = read_bytes(path, "the timing cache") if path.exists() else b""
        self._own = _digest(self._content) in self._recorded()
        self._keeps = True

    @property
    def foreign(self) -> bool:
        """Whether there is content that was not written here."""
        return bool(self._content) and not self._own

    def attach(self, trt: Any, config: Any) -> str | None:
        """Give a build the kernel times of the file, or none where they are of another GPU or release.

        Args:
            trt: the module `tensorrt`.
            config: an `IBuilderConfig`.

        Returns:
            What the user should know.

        Raises:
            FileAccessError: TensorRT does not take the file, and it is not known to be a timing cache.
        """
        # What TensorRT logs about a cache that does not fit is no reason for anything that fails later.
        with tensorrt_log(trt).aside():
            cache = config.create_timing_cache(self._content)
            fits = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
        if fits:
            if not self.foreign:
                return None
            self._keeps = False
            return f"The timing cache {self.path.name} was not written by trt-int8: it is read, and left as it is."
        if self.foreign:
            raise FileAccessError(
                f"Cannot keep kernel times in {str(self.path)!r}: TensorRT {trt.__version__} does not take it as a "
                f"timing cache, no {self.record_path.name!r} tells that trt-int8 wrote it, and it would be lost. "
                f"{_ADVICE}"
            )
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        return f"The timing cache {self.path.name} is of another GPU or TensorRT release, and is made anew."

    def write(self, content: bytes) -> None:
        """Write the cache of a build, unless the file is somebody else's.

        The record goes first and knows the old content as well, so that it holds whatever becomes of the second file.

        Raises:
            FileAccessError: the files cannot be written.
        """
        if not self._keeps:
            return
        hashes = list(dict.fromkeys([_digest(content), _digest(self._content), *self._recorded()]))[:_REMEMBERED]
        write_text(self.record_path, json.dumps({"kind": _KIND, "sha256": hashes}, indent=2) + "\n")
        write_bytes(self.path, content)

    def _recorded(self) -> list[str]:
        if not self.record_path.exists():
            return []
        try:
            record = json.loads(read_bytes(self.record_path, "the timing cache's record"))
        except ValueError:
            record = None
        if not isinstance(record, dict) or record.get("kind") != _KIND or not isinstance(record.get("sha256"), list):
            raise FileAccessError(
                f"Cannot keep kernel times in {str(self.path)!r}: {self.record_path.name!r} beside it is a file of "
                f"something else, and would be lost; it is where trt-int8 records which caches are its own. {_ADVICE}"
            )
        return [str(digest) for digest in record["sha256"]]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
