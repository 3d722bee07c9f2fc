"""Compilation with and without a place to cache machine code."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest

from calibrators import compiled
from calibrators.compiled import njit, prefetch


def test_runs_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numba finds no folder to write to, the function is compiled without a cache and gives the same result."""

    def njit_on_a_read_only_disk(*, cache: bool = False, **options: Any) -> Callable[..., Any]:
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available")
        return numba.njit(**options)  # type: ignore[no-any-return]

    monkeypatch.setattr(compiled, "numba", SimpleNamespace(njit=njit_on_a_read_only_disk))

    @njit
    def double(x: int) -> int:
        return 2 * x

    assert double(21) == 42
    assert double.signatures  # type: ignore[attr-defined]


def test_divides_as_numpy_does() -> None:
    """A division by zero gives infinity, not an exception."""

    @njit
    def divide(a: float, b: float) -> float:
        return a / b

    assert divide(1.0, 0.0) == float("inf")


def test_prefetching_changes_nothing() -> None:
    """Neither in the array nor far beyond its end, where nothing is mapped; and the instruction is there."""

    @njit
    def total(values: Any) -> float:
        found = 0.0
        for i in range(values.size):
            prefetch(values, i + 2**40)
            found += values[i]
        return found

    assert total(np.arange(5.0)) == 10.0
    fresh = numba.njit(total.py_func)  # type: ignore[attr-defined]  # what comes out of the cache shows no code
    fresh(np.arange(5.0))
    assert "llvm.prefetch" in next(iter(fresh.inspect_llvm().values()))
