"""How scales moved while the data came in."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators.convergence import (
    History,
    extended,
    history_from_json,
    history_to_json,
    is_point,
    judge,
    last_point,
    trimmed,
)


def history(counts: list[int], **scales: list[float]) -> History:
    """Return the history of one method, entropy."""
    return {"entropy": {name: tuple(zip(counts, values, strict=True)) for name, values in scales.items()}}


def test_doublings() -> None:
    """1, 2, 4, 8, ..."""
    assert [count for count in range(70) if is_point(count)] == [1, 2, 4, 8, 16, 32, 64]


def test_of_a_long_stream_the_last_doublings_are_kept() -> None:
    """Five before the last batch or six, and the same whether or not the length was known before."""
    known = [count for count in range(1001) if is_point(count, 1000)]
    counts = [count for count in range(1001) if is_point(count)]
    kept = trimmed(history([*counts, 1000], a=[1.0] * 11))

    assert known == [32, 64, 128, 256, 512]
    assert [count for count, _ in kept["entropy"]["a"]] == [*known, 1000]
    assert [count for count in range(33) if is_point(count, 32)] == [1, 2, 4, 8, 16, 32]


def test_points_are_added_at_the_end() -> None:
    """For every method and tensor."""
    first = extended({}, 1, {"mse": {"a": 1.0}, "minmax": {"a": 2.0}})

    assert extended(first, 2, {"mse": {"a": 3.0}, "minmax": {"a": 4.0}}) == {
        "mse": {"a": ((1, 1.0), (2, 3.0))},
        "minmax": {"a": ((1, 2.0), (2, 4.0))},
    }
    assert (last_point({}), last_point(first)) == (0, 1)


def test_settled_scales() -> None:
    """Within 1 % since half the batches, whatever they did before."""
    verdict = judge(history([1, 2, 4, 8], a=[5.0, 9.0, 1.0, 1.009], b=[1.0, 1.0, 1.0, 1.0]), "entropy")

    assert verdict is not None
    assert verdict.stable
    assert str(verdict) == "no scale has moved by more than 1 % over the last doubling, since batch 4 (entropy)"


def test_moving_scales_are_named_with_the_worst_first() -> None:
    """Distances are parts of the last scale."""
    verdict = judge(history([4, 8], a=[1.0, 1.25], b=[1.0, 1.0], c=[2.0, 1.0], d=[1.0, 1.02], e=[1.0, 0.9]), "entropy")

    assert verdict is not None
    assert not verdict.stable
    assert list(verdict.moving) == ["c", "a", "e", "d"]
    assert verdict.moving["a"] == pytest.approx(0.2)
    assert str(verdict) == (
        "4 of 5 scales have moved by more than 1 % since batch 4 (entropy): c by 100.0 %, a by 20.0 %, e by 11.1 % "
        "and 1 more; more data may move them further"
    )


def test_a_scale_that_came_back_has_moved() -> None:
    """What happened between half the batches and all of them counts."""
    verdict = judge(history([4, 8, 11], a=[1.0, 2.0, 1.0]), "entropy")

    assert verdict is not None
    assert (verdict.since, verdict.stable) == (4, False)


@pytest.mark.parametrize(("batches", "since"), [(1000, 512), (513, 256), (1024, 512), (3, 1), (2, 1)])
def test_the_last_doubling(batches: int, since: int) -> None:
    """The latest kept number of batches of which the last is the double; 1000 counts as twice 512."""
    counts = sorted({count for count in range(1, batches + 1) if is_point(count)} | {batches})
    verdict = judge(history(counts, a=[1.0] * len(counts)), "entropy")

    assert verdict is not None
    assert verdict.since == since


def test_one_batch_says_nothing() -> None:
    """It is neither stable nor moving."""
    verdict = judge(history([1], a=[1.0]), "entropy")

    assert verdict is not None
    assert not verdict.stable
    assert "says nothing" in str(verdict)


def test_no_history() -> None:
    """A merged calibration has none."""
    assert judge({}, "entropy") is None
    assert judge(history([1], a=[1.0]), "mse") is None


scales = st.floats(2**-100, 2**100, width=32)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(scales, min_size=n, max_size=n), min_size=1, max_size=3)))
def test_json_is_exact(values: list[list[float]]) -> None:
    """Scales are float32, and come back as they were."""
    counts = [2**index for index in range(len(values[0]))]
    names = [f"t{index}" for index in range(len(values))]
    written = {"mse": {name: tuple(zip(counts, row, strict=True)) for name, row in zip(names, values, strict=True)}}

    assert history_from_json(json.loads(json.dumps(history_to_json(written, names))), names) == written


def test_empty_histories() -> None:
    """No history and no tensors are written as nothing."""
    assert history_to_json({}, ["a"]) == history_to_json({"mse": {}}, []) == {}
    assert history_from_json({}, ["a"]) == {}


@pytest.mark.parametrize(
    "values",
    [
        {"batches": [], "scales": {}},
        {"batches": [2, 2], "scales": {}},
        {"batches": [0], "scales": {}},
        {"batches": [1], "scales": {"mse": [[1.0]]}},
        {"batches": [1], "scales": {"mse": [[1.0], [1.0, 2.0]]}},
        {"batches": [1], "scales": {"mse": [[1.0], [0.0]]}},
        {"batches": [1], "scales": {"mse": [[1.0], [np.nan]]}},
    ],
)
def test_impossible_histories_are_refused(values: dict[str, object]) -> None:
    """Counts that do not ascend, rows that do not fit the tensors, scales that are none."""
    with pytest.raises(ValueError):
        history_from_json(values, ["a", "b"])
