"""Where a result may be written: said before the work is done, not after it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trt_int8.errors import ConfigError, FileAccessError


def check_output(output: str | os.PathLike[str], *sources: Any, option: str = "--output") -> None:
    """Check that a file can be written, and that it would not replace or join what is read.

    Args:
        output: the file that will be written.
        sources: what is read: models, data, calibrations. What names no file or folder here (None, an entry point, an
            array) is passed over.
        option: what names the output on the command line, for messages.

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
                f"Name another file with {option}."
            )
        if Path(source).is_dir() and target.parent.exists() and target.parent.samefile(source):
            raise ConfigError(
                f"Cannot write {os.fspath(output)!r} into a folder of data: it would be taken for one of them. "
                f"Name a file elsewhere with {option}."
            )
    if target.is_dir():
        raise FileAccessError(f"Cannot write {os.fspath(output)!r}: it is a folder. Name a file in it with {option}.")
    folder = next(part for part in target.absolute().parents if part.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        found = "cannot be written to" if folder.is_dir() else "is not a folder"
        raise FileAccessError(
            f"Cannot write {os.fspath(output)!r}: {str(folder)!r} {found}. Choose another place with {option}."
        )


def check_outputs(outputs: Iterable[tuple[Path, str]], *sources: Any) -> None:
    """Check the files of a command that writes several, each with the option that names it.

    Args:
        outputs: files and options.
        sources: see `check_output`.

    Raises:
        ConfigError: as `check_output` does; or two of them are the same file.
        FileAccessError: see `check_output`.
    """
    taken: dict[Path, str] = {}
    for path, option in outputs:
        check_output(path, *sources, option=option)
        place = path.resolve()
        if place in taken:
            raise ConfigError(
                f"Cannot write {str(path)!r} twice: {taken[place]} and {option} both name it, or a file that lies "
                f"beside what they name. Name another file with {option}."
            )
        taken[place] = option
