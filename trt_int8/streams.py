"""What every kind of data is turned into first: a stream of raw batches, not yet checked against the model.

`loaders`, `tables` and `images` make such streams; `data` checks them and hands them out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrators.files import sha256_of_file
from engines.runner import TensorSpec
from trt_int8.errors import DataError
from trt_int8.feeds import fixed_batch

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """How the user wants the data to be read.

    Attributes:
        inputs: the model's inputs.
        batch_size: samples per batch, None where the user does not say.
        max_batches: read no more batches than this; None for all.
        preprocessing: how images become arrays.
        label: name for labels that have none of their own.
    """

    inputs: tuple[TensorSpec, ...]
    batch_size: int | None = None
    max_batches: int | None = None
    preprocessing: Preprocessing | None = None
    label: str = "label"

    @property
    def cut(self) -> int:
        """Samples per batch where the data are cut here: what the model fixes, else what the user wants, else 1."""
        return fixed_batch(self.inputs) or self.batch_size or 1


@dataclass(frozen=True, slots=True)
class RawBatch:
    """A batch as the data give it.

    Attributes:
        where: the batch, for messages.
        arrays: name to array, tensor or list. They may change when the next batch is asked for.
    """

    where: str
    arrays: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStream:
    """Batches as the data give them.

    Attributes:
        description: the data, for messages and reports.
        read: starts one pass.
        batches: number of batches of a pass, None where only the pass can tell.
        batch_size: samples per batch but for the last, None where the data decide.
        rewindable: whether a second pass is possible.
        hash_files: gives the SHA-256 over the files that a pass reads; None for data that do not come from files alone.
        preprocessing: what is done to the files' contents, as text; empty where they are fed as they are.
        threadable: whether a pass may run in another thread than the one that uses its batches: it reads files, and
            runs no code of the user's, which may count on the thread that called it.
    """

    description: str
    read: Callable[[], Iterator[RawBatch]]
    batches: int | None = None
    batch_size: int | None = None
    rewindable: bool = True
    hash_files: Callable[[], str] | None = None
    preprocessing: str = ""
    threadable: bool = False


def hash_files(files: Sequence[Path]) -> str:
    """Return one SHA-256 over the names and contents of `files`, in their order."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{sha256_of_file(file)}\n".encode())
    return total.hexdigest()


def unreadable(file: Path, expected: str, error: Exception) -> DataError:
    """Return the error for a file that is not what its name says."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(f"Cannot use {str(file)!r}: it is not {expected}: {reason}.")
