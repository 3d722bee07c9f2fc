"""Progress bars on stderr, quiet when nobody watches; and how much of the time a model waits for its data."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from calibrators.protocols import Track

Item = TypeVar("Item")

_log = logging.getLogger(__name__)

HINT_SHARE = 0.5
HINT_AFTER_S = 5.0
"""A stage that waits for its data for more than this share of the time is told of it, where it takes so long at all."""


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """Show a bar with an estimate of the time left while `items` are iterated.

    Implements `calibrators.protocols.Track`.
    The bar is drawn on stderr and only there where stderr is a terminal. For `Timed` items it ends with the shares of
    the time that went into waiting for data and into the rest: "data 4 % model 96 %".
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shares]}"),
    )
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, shares="")
        for item in items:
            yield item
            progress.update(task, advance=1, shares=items.shares() if isinstance(items, Timed) else "")


@dataclass(slots=True)
class Timed(Generic[Item]):
    """Items of a stage that runs a model over data, and how long that has waited for them.

    Attributes:
        items: what is iterated.
        waited_s: tells how many seconds the model has waited for data so far; of several runs at a time, each on
            average.
    """

    items: Iterable[Item]
    waited_s: Callable[[], float]
    _started: float = field(default=0.0, init=False)
    _waited_before: float = field(default=0.0, init=False)

    def __iter__(self) -> Iterator[Item]:
        """Iterate, and say in the log when most of a long time went into waiting."""
        self._started = time.perf_counter()
        self._waited_before = self.waited_s()
        yield from self.items
        share = self._share()
        if share > HINT_SHARE and time.perf_counter() - self._started > HINT_AFTER_S:
            _log.warning(
                "the model waits for the data: reading it took %.0f %% of the time. Give batches that need less "
                "decoding (.npy or .npz files of ready arrays, smaller images), a faster disk, or more cores",
                100 * share,
            )

    def shares(self) -> str:
        """Return the two shares as text."""
        data = round(100 * self._share())
        return f"data {data} % model {100 - data} %"

    def _share(self) -> float:
        elapsed = time.perf_counter() - self._started
        return min((self.waited_s() - self._waited_before) / elapsed, 1.0) if elapsed > 0 else 0.0


def time_data(shown: Track, waited_s: Callable[[], float]) -> Track:
    """Return a `Track` that hands `Timed` items to `shown`.

    Args:
        shown: shows the progress.
        waited_s: as in `Timed`.
    """

    def tracked(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
        return shown(Timed(items, waited_s), description, total)

    return tracked
