"""Python's garbage collector, which is kept out of what it would disturb."""

from __future__ import annotations

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
