"""Memory that is free and still with the process."""

from __future__ import annotations

import numpy as np
import psutil

from engines.garbage import give_back_memory


def test_free_memory_beneath_what_stays_is_given_back() -> None:
    """64 MB in pieces of 32 kB, of which the last one stays: the process is as small again as it was."""
    give_back_memory()
    process = psutil.Process()
    before = process.memory_info().rss
    pieces = [np.ones(32_000, np.uint8) for _ in range(2000)]
    assert process.memory_info().rss > before + 50e6
    del pieces[:-1]

    give_back_memory()

    assert process.memory_info().rss < before + 10e6
