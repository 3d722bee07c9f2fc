"""Python's garbage collector, which is kept out of what it would disturb, and memory that the C library keeps."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_off() -> Iterator[None]:
    """Keep the collector of cyclic garbage from running meanwhile, in the whole process.

    It would fall into a timed call, or walk again and again through hundreds of thousands of objects that are in use.
    Decorates functions as well.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def give_back_memory() -> None:
    """Have the C library return free memory to the operating system, where it can do that (glibc's malloc_trim).

    By itself it returns only what is free at the end of its heap: opening sessions leaves tens of megabytes free
    beneath something small that stays, in some runs and not in others.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
