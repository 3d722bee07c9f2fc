"""Small batches joined into larger ones: single samples are slow to run hundreds of times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

from calibrators.protocols import Array
from engines.runner import TensorSpec
from trt_int8.data import DataBatch


def joined(batches: Iterable[DataBatch], inputs: Sequence[TensorSpec], samples: int) -> Iterator[DataBatch]:
    """Join consecutive batches until each holds about `samples` samples.

    Batches stay as they are where they cannot be joined: the model fixes a batch or has inputs without a batch axis,
    or two neighbours differ in another axis. Samples keep their order.

    Args:
        batches: the stream.
        inputs: the inputs of the model that it was opened for.
        samples: size at which a joined batch is handed out.
    """
    free = all(spec.shape and spec.fixed_batch is None for spec in inputs)
    waiting: list[DataBatch] = []
    for batch in batches:
        if waiting and not (free and _fits(waiting[0], batch)):
            yield _join(waiting)
            waiting = []
        waiting.append(batch)
        if sum(item.samples for item in waiting) >= samples:
            yield _join(waiting)
            waiting = []
    if waiting:
        yield _join(waiting)


def _fits(first: DataBatch, second: DataBatch) -> bool:
    def shapes(batch: DataBatch) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, value.shape[1:]) for name, value in chain(batch.feeds.items(), batch.extras.items())]

    return shapes(first) == shapes(second)


def _join(batches: Sequence[DataBatch]) -> DataBatch:
    if len(batches) == 1:
        return batches[0]

    def concatenated(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return DataBatch(
        index=batches[0].index,
        samples=sum(batch.samples for batch in batches),
        feeds=concatenated([batch.feeds for batch in batches]),
        extras=concatenated([batch.extras for batch in batches]),
        rolling_hash=batches[-1].rolling_hash,
    )
