"""Calibration and test data: whatever the user has, opened as checked batches for one model.

DATA is one of

- an `.npz` file: one array per input name, first axis = samples; other arrays of that length (labels) go along;
- a folder of `.npz`, `.npy` or Polygraphy `.json` files: one batch per file, in the order of their names, as they are;
- a folder of images, with a `Preprocessing`; subfolders are classes and give labels;
- `package.module:callable` or `path/to/file.py:callable`: returns batches, see `open_data`;
- Polygraphy's saved inputs (`.json`) or its data-loader script (`.py` with `load_data()`);
- in Python also a mapping of arrays, or any iterable of batches: a list, a generator, a DataLoader.

Every batch is checked against the model's inputs before it is handed out, and nothing is held longer than one batch.
Batches that come from files are read, checked and hashed in a thread, one ahead of the batch that is used; code of the
user's own runs in the thread that asks for its batches.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.errors import CalibrationError
from calibrators.protocols import Array
from engines.padding import Padding, real_positions, sequence_axis
from engines.runner import TensorSpec
from trt_int8 import loaders, tables
from trt_int8.entry_points import split_entry_point
from trt_int8.errors import ConfigError, DataError, FileAccessError, UsageError
from trt_int8.feeds import Feeds, conform, fixed_batch
from trt_int8.images import Preprocessing, find_images, image_stream
from trt_int8.read_ahead import one_ahead
from trt_int8.streams import BatchStream, DataOptions

_log = logging.getLogger(__name__)

DataSpec = str | Path | Mapping[str, Any] | Iterable[Any]
"""Any form of DATA, as the module's docstring lists them."""


@dataclass(frozen=True, slots=True)
class DataBatch:
    """One batch, ready for the model.

    Attributes:
        index: number of the batch in the stream, counted from 0.
        samples: number of real samples; rows from there on repeat the last, to fill a batch that the model fixes.
        feeds: one array per model input, in the model's order, of its dtype and shape. They belong to the caller.
        extras: other arrays, `samples` rows each: labels.
        rolling_hash: hash of the stream up to and including this batch, in hex; two streams that agree in it have fed
            the same values in the same batches so far.
    """

    index: int
    samples: int
    feeds: dict[str, Array]
    extras: dict[str, Array]
    rolling_hash: str


class BatchSource:
    """A stream of checked batches; iterate it to get `DataBatch` objects. Made by `open_data`.

    Attributes:
        description: the data, for messages and reports.
        inputs: the inputs of the model that the batches fit.
        batches: number of batches, None where only a pass can tell.
        batch_size: samples per batch but for the last, None where the data decide.
        rewindable: whether it can be iterated more than once; a generator cannot.
        preprocessing: what is done to the files' contents, as text for a fingerprint; empty where nothing is.
    """

    def __init__(
        self,
        stream: BatchStream,
        inputs: Sequence[TensorSpec],
        *,
        data_id: str | None,
        label: str | None,
        padding: Padding | None = None,
    ) -> None:
        self.description = stream.description
        self.inputs = tuple(inputs)
        self.batches = stream.batches
        self.batch_size = stream.batch_size
        self.rewindable = stream.rewindable
        self.preprocessing = stream.preprocessing
        self._stream = stream
        self._data_id = data_id
        self._label = label
        self._padding = padding
        self._sequence = None if padding is None else sequence_axis(inputs, padding)
        self._data_hash: str | None = None
        self._rolling_hash: str | None = None
        self._started = False
        self._noted = False

    @property
    def data_hash(self) -> str | None:
        """Identity of the data, known before a pass.

        SHA-256 over the files that a pass reads, computed when first asked for; `id:` and the `data_id` for data that
        do not come from files alone; None where there is neither, so that nothing derived from them can be reused.
        """
        if self._stream.hash_files is None:
            return None if self._data_id is None else f"id:{self._data_id}"
        if self._data_hash is None:
            self._data_hash = self._stream.hash_files()
        return self._data_hash

    @property
    def from_files(self) -> bool:
        """Whether files alone tell the data from others, so that a `data_id` has nothing to say."""
        return self._stream.hash_files is not None

    @property
    def rolling_hash(self) -> str | None:
        """The `rolling_hash` of the last batch of the latest complete pass; None before one."""
        return self._rolling_hash

    def require_rewindable(self, purpose: str) -> None:
        """Check that more than one pass is possible.

        Args:
            purpose: what needs the passes, for the message: "to compare the methods".

        Raises:
            DataError: the data can be read only once.
        """
        if not self.rewindable:
            raise DataError(
                f"The data must be read more than once {purpose}, and {self.description} can be read only once. "
                "Give a list, a DataLoader, a file, or a function that returns the batches anew."
            )

    def __iter__(self) -> Iterator[DataBatch]:
        """Start a pass.

        Raises:
            DataError: the data can be read only once and have been; a batch does not fit; there are no samples.
        """
        if self._started:
            self.require_rewindable("here")
        self._started = True
        return self._pass()

    def _pass(self) -> Iterator[DataBatch]:
        checked = self._checked()
        rolling_hash = ""
        with closing(one_ahead(checked) if self._stream.threadable else checked) as batches:
            for batch in batches:
                yield batch
                rolling_hash = batch.rolling_hash
        self._finish(rolling_hash)

    def _checked(self) -> Generator[DataBatch]:
        """Read a pass and check and hash its batches; may run in a thread of its own."""
        fixed = fixed_batch(self.inputs)
        rolling = hashlib.blake2b(digest_size=32)
        first_sample = 0
        short: DataBatch | None = None
        index = -1
        for index, raw in enumerate(self._stream.read()):
            if short is not None:
                raise DataError(
                    f"Cannot use {self.description}: batch {short.index} has {short.samples} samples; the model's "
                    f"batch is fixed at {fixed}, and only the last may be shorter. Give batches of {fixed}."
                )
            feeds = conform(raw.arrays, self.inputs, where=raw.where, first_sample=first_sample)
            self._check_label(feeds, raw.where)
            self._note_extras(feeds)
            _update(rolling, {**self._padding_array(feeds, raw.where), **feeds.inputs})
            batch = DataBatch(index, feeds.samples, feeds.inputs, feeds.extras, rolling.hexdigest())
            if fixed is not None and feeds.samples < fixed:
                if index == 0:
                    raise DataError(
                        f"Cannot use {raw.where}: it has {feeds.samples} samples; the model's batch is fixed at "
                        f"{fixed}. Give at least that many, or export the model with a dynamic batch."
                    )
                short = batch = _padded(batch, self.inputs, fixed)
            first_sample += feeds.samples
            yield batch
        if index < 0:
            raise DataError(f"Cannot use {self.description}: it gave no batches. Give at least one sample.")

    def _finish(self, rolling_hash: str) -> None:
        if self._rolling_hash not in (None, rolling_hash):
            _log.warning(
                "%s gave other batches than in the pass before; figures of the two passes are not of the same samples",
                self.description,
            )
        self._rolling_hash = rolling_hash

    def _check_label(self, feeds: Feeds, where: str) -> None:
        if self._label is None or self._label in feeds.extras:
            return
        found = ", ".join(feeds.extras) or "none"
        raise DataError(
            f"Cannot use {where}: no labels {self._label!r} with one row per sample; arrays beside the inputs: {found}."
        )

    def _padding_array(self, feeds: Feeds, where: str) -> dict[str, Array]:
        """Check the array that tells padding, and return it; nothing where none does."""
        if self._padding is None or self._sequence is None:
            return {}
        arrays = {**feeds.extras, **feeds.inputs}
        if self._padding.array not in arrays:
            raise DataError(
                f"Cannot use {where}: no {self._padding} with one row per sample, which tells what is padding; found "
                f"{', '.join(arrays)}."
            )
        name, axis = self._sequence
        found = arrays[self._padding.array]
        try:
            real_positions(self._padding, found, feeds.inputs[name].shape[axis], where)
        except CalibrationError as error:
            raise DataError(str(error)) from error
        return {self._padding.array: found}

    def _note_extras(self, feeds: Feeds) -> None:
        if self._noted:
            return
        self._noted = True
        used = (self._label, None if self._padding is None else self._padding.array)
        names = ", ".join(name for name in (*feeds.extras, *feeds.left_out) if name not in used)
        if names:
            _log.info("%s: not fed to the model, which has no such input: %s", self.description, names)


def open_data(
    spec: DataSpec,
    inputs: Sequence[TensorSpec],
    *,
    batch_size: int | None = None,
    max_batches: int | None = None,
    preprocessing: Preprocessing | None = None,
    data_id: str | None = None,
    label: str | None = None,
    padding: Padding | None = None,
) -> BatchSource:
    """Open data as batches for a model with these inputs.

    What yields ready batches (a folder of batch files, a callable, an iterable) decides on their size. Each batch is a
    dict of arrays by input name, or a tuple or list in the order of the model's inputs which labels may follow, or one
    array for a model of one input; arrays may be torch tensors. A model with a fixed batch overrides `batch_size`, and
    has a short last batch filled up by repeating its last sample. Exceptions of the user's code pass through unchanged.

    Args:
        spec: DATA, as the module's docstring lists it.
        inputs: the model's inputs, in its order.
        batch_size: samples per batch for an `.npz` file, arrays or images; 1 where None.
        max_batches: read no more than so many batches.
        preprocessing: how images become input arrays; needed for image folders, and for nothing else.
        data_id: identity of data that come from code, see `BatchSource.data_hash`.
        label: the array that holds the labels. Labels without a name of their own (class folders, the last element of a
            tuple) get this one, or `label` where None. Where given, a batch without it is an error.
        padding: the array that tells padding, which every batch must have; it belongs to what is hashed.

    Raises:
        ConfigError: an option does not go with this kind of data; UsageError where it is the batch size.
        DataError: the data cannot be used. Files and arrays are checked up to their first batch here.
        ModelError: no input of the model has an axis of positions.
        FileAccessError: there is no such file.
    """
    for name, value in (("batch size", batch_size), ("number of batches", max_batches)):
        if value is not None and value < 1:
            raise ConfigError(f"The {name} is {value}; expected at least 1.")
    options = DataOptions(
        inputs=tuple(inputs),
        batch_size=batch_size,
        max_batches=max_batches,
        preprocessing=preprocessing,
        label=label or "label",
    )
    stream = _open(spec, options)
    if batch_size is not None and stream.batch_size is None:
        raise UsageError(
            f"{stream.description} comes in batches already, which are fed as they are; a batch size of {batch_size} "
            "cannot be asked of it. Leave the batch size out."
        )
    if preprocessing is not None and not stream.preprocessing:
        raise ConfigError(
            f"Preprocessing is for folders of images; {stream.description} is fed as it is. "
            "Leave it out, or preprocess the data where they are made."
        )
    if batch_size not in (None, stream.batch_size):
        _log.info("the model fixes its batch: batches of %s instead of %s", stream.batch_size, batch_size)
    source = BatchSource(stream, inputs, data_id=data_id, label=label, padding=padding)
    if stream.hash_files is not None or stream.batch_size is not None:
        # Files and arrays cost nothing to read again, and what does not fit is best said before a long step. The user's
        # own code is not run for a look.
        next(iter(source))
    return source


def same_data(first: DataSpec | None, second: DataSpec | None) -> bool:
    """Tell whether two forms of data name the same: one object, or one path in two spellings."""
    if isinstance(first, str | Path) and isinstance(second, str | Path):
        return os.path.realpath(first) == os.path.realpath(second)
    return first is not None and first is second


def padding_from(mask: str | None, lengths: str | None) -> Padding | None:
    """Return the array that tells padding; None where none does.

    Raises:
        UsageError: two do.
    """
    if mask is not None and lengths is not None:
        raise UsageError(
            f"Padding is told by a mask ({mask!r}) and by lengths ({lengths!r}); expected one of them. Leave out "
            "--padding-mask or --lengths."
        )
    if mask is not None:
        return Padding(mask, "mask")
    return None if lengths is None else Padding(lengths, "lengths")


def _open(spec: DataSpec, options: DataOptions) -> BatchStream:
    if isinstance(spec, str | Path):
        return _open_path(str(spec), options)
    if len(options.inputs) == 1 and (isinstance(spec, np.ndarray) or hasattr(spec, "detach")):
        spec = {options.inputs[0].name: spec}
    if isinstance(spec, Mapping):
        return tables.array_table(spec, options)
    if isinstance(spec, Iterable):
        return loaders.iterable(spec, options)
    raise DataError(
        f"Cannot use a {type(spec).__name__} as data; expected a path, a mapping of arrays, or an iterable of batches."
    )


def _open_path(spec: str, options: DataOptions) -> BatchStream:
    path = Path(spec)
    if not path.exists():
        if split_entry_point(spec) is not None:
            return loaders.entry_point(spec, options)
        raise FileAccessError(
            f"Cannot read the data: there is no file or folder {spec!r}. "
            "Expected an .npz, .json or .py file, a folder, or package.module:callable."
        )
    if path.is_dir():
        return _open_folder(path, options)
    match path.suffix.lower():
        case ".npz":
            return tables.npz_table(path, options)
        case ".json":
            return loaders.polygraphy_json(path, options)
        case ".py":
            return loaders.loader_script(path, options)
    raise DataError(
        f"Cannot use {spec!r} as data: it has the suffix {path.suffix!r}; expected .npz (arrays by input name), "
        ".json (inputs saved by Polygraphy), .py (with load_data()), or a folder."
    )


def _open_folder(folder: Path, options: DataOptions) -> BatchStream:
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in loaders.BATCH_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    images = find_images(folder)
    if files and images:
        raise DataError(
            f"Cannot use {str(folder)!r} as data: it holds both batch files ({files[0].name}) and images "
            f"({images[0].file.name}). Keep them in folders of their own."
        )
    if files:
        return loaders.batch_folder(folder, files, options)
    if images:
        return image_stream(folder, images, options)
    raise DataError(f"Cannot use {str(folder)!r} as data: it holds no .npz, .npy or .json batch files and no images.")


def _update(rolling: hashlib.blake2b, feeds: Mapping[str, Array]) -> None:
    for name, value in feeds.items():
        rolling.update(f"{name}\0{value.dtype.str}\0{value.shape}\0".encode())
        rolling.update(value.reshape(-1).view(np.uint8).data)


def _padded(batch: DataBatch, inputs: Sequence[TensorSpec], size: int) -> DataBatch:
    def fill(spec: TensorSpec) -> Array:
        value = batch.feeds[spec.name]
        if spec.fixed_batch != size or len(value) != batch.samples:
            return value
        return np.concatenate([value, np.repeat(value[-1:], size - batch.samples, axis=0)])

    return replace(batch, feeds={spec.name: fill(spec) for spec in inputs})
