"""Where a result may be written: said before the work is done, not after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trt_int8.errors import ConfigError, FileAccessError


def check_output(output: str | os.PathLike[str], *sources: Any) -> None:
    """Check that a file can be written, and that it would not replace or join what is read.

    Args:
        output: the file that will be written.
        sources: what is read: models, data, calibrations. What names no file or folder here (None, an entry point, an
            array) is passed over.

    Raises:
        ConfigError: the output is one of the sources, or would lie among the batches of a data folder.
        FileAccessError: the output is a folder, or its folder cannot be written to.
    """
    target = Path(output)
    for source in sources:
        if not isinstance(source, str | os.PathLike) or not Path(source).exists():
            continue
        if target.exists() and target.samefile(source):
            raise ConfigError(
                f"Cannot write {os.fspath(output)!r}: it is read as well, and would be lost. "
                "Name another file with --output."
            )
        if Path(source).is_dir() and target.parent.exists() and target.parent.samefile(source):
            raise ConfigError(
                f"Cannot write {os.fspath(output)!r} into a folder of data: it would be taken for one of them. "
                "Name a file elsewhere with --output."
            )
    if target.is_dir():
        raise FileAccessError(f"Cannot write {os.fspath(output)!r}: it is a folder. Name a file in it with --output.")
    folder = next(part for part in target.absolute().parents if part.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        found = "cannot be written to" if folder.is_dir() else "is not a folder"
        raise FileAccessError(
            f"Cannot write {os.fspath(output)!r}: {str(folder)!r} {found}. Choose another place with --output."
        )
