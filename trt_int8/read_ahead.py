"""Work on the data that is done in threads while the model runs on what came before; order and values stay the same.

Most of what takes the time here gives the GIL away: zlib, the hash, numpy while it converts, the file system, and
processes that work in a thread's stead (`trt_int8.decoding`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_THREADS = 32
"""Of `map_ahead`. What takes their results, one after the other, is slower than so many by far."""


def usable_cores() -> int:
    """Return the number of hardware threads that this process may run on."""
    return len(os.sched_getaffinity(0))


def thread_count() -> int:
    """Return in how many threads `map_ahead` works."""
    return min(usable_cores(), _MOST_THREADS)


def one_ahead(items: Generator[Item]) -> Generator[Item]:
    """Make the next item in a thread while the caller uses the last one; never more than that one.

    The first item is made by the caller's own thread, so that a look at it costs no more. An exception comes when its
    item is asked for, after all items before it. Closing the iterator waits for the item in the making, no longer.

    Args:
        items: a generator that may run in another thread than the caller's; it is closed in the end.
    """

    def take() -> list[Item]:
        return list(islice(items, 1))

    yield from take()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        upcoming = pool.submit(take)
        while made := upcoming.result():
            upcoming = pool.submit(take)
            yield from made
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # a generator that runs cannot be closed
        items.close()


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply `function` to `items` in threads, one per usable core, and yield the results in order.

    Twice as many items as there are threads are worked on or wait to be taken: memory stays bounded, and no thread is
    idle because an item before took longer. An exception comes in the place of its item. Closing the iterator drops
    what has not been begun and waits for the items in the making.

    Args:
        function: must be safe to call from several threads at once.
        items: read in the caller's thread.
    """
    threads = thread_count()
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
