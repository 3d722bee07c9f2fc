"""Whether there were enough data: how each scale moved while the batches came in.

The scale of every tensor by every method is kept when the number of batches has doubled (1, 2, 4, ...) and at the end.
A scale that the last doubling of the data did not move will hardly be moved by the next one. Of a long stream only the
last doublings are kept: finding the scales takes as long as some batches do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Points = tuple[tuple[int, float], ...]
"""(number of batches, scale), ascending."""

History = Mapping[str, Mapping[str, Points]]
"""Method to tensor to the points of its scale; all tensors and methods have theirs at the same numbers of batches."""

TOLERANCE = 0.01
"""A scale stays where it is if it moves by no more than this part of itself."""

LEAST_BATCHES = 32
"""Fewer batches agree by chance too easily to stop there."""

KEPT = 32
"""Scales after fewer batches than this part of the stream are not kept: six points of a thousand batches."""

_DOUBLED = 1.9
"""1000 batches, the usual number, count as twice 512."""

_LISTED = 3


@dataclass(frozen=True, slots=True)
class Convergence:
    """What the history of one method says.

    Attributes:
        method: the calibration method.
        batches: number of batches in all.
        since: the number of batches that the last ones are compared with: the latest of which they are the double; None
            where there was only one batch.
        tensors: number of tensors.
        moving: tensor to the largest distance of a later scale from the one at `since`, as part of the last scale, for
            those that moved by more than `TOLERANCE`; the one that moved most comes first.
    """

    method: str
    batches: int
    since: int | None
    tensors: int
    moving: Mapping[str, float]

    @property
    def stable(self) -> bool:
        """Whether no scale has moved over the last doubling."""
        return self.since is not None and not self.moving

    def __str__(self) -> str:
        """Say it in one line."""
        if self.since is None:
            return f"{self.batches} batch says nothing about whether the scales have settled; give more data"
        if not self.moving:
            return (
                f"no scale has moved by more than {100 * TOLERANCE:.0f} % over the last doubling, since batch "
                f"{self.since} ({self.method})"
            )
        listed = [f"{name} by {100 * part:.1f} %" for name, part in list(self.moving.items())[:_LISTED]]
        more = f" and {len(self.moving) - _LISTED} more" if len(self.moving) > _LISTED else ""
        return (
            f"{len(self.moving)} of {self.tensors} scales have moved by more than {100 * TOLERANCE:.0f} % since batch "
            f"{self.since} ({self.method}): {', '.join(listed)}{more}; more data may move them further"
        )


def is_point(batches: int, total: int | None = None) -> bool:
    """Tell whether scales are kept at this number of batches: at 1, 2, 4, ..., within the last doublings of the stream.

    Args:
        batches: so far.
        total: of the whole stream; None where it is not known, and the end has to tell (`trimmed`).
    """
    return batches > 0 and batches & (batches - 1) == 0 and (total is None or _is_kept(batches, total))


def trimmed(history: History) -> dict[str, dict[str, Points]]:
    """Return the points of a whole stream that are kept, whether or not its length was known before."""
    end = last_point(history)
    return {
        method: {
            tensor: tuple(point for point in points if _is_kept(point[0], end)) for tensor, points in found.items()
        }
        for method, found in history.items()
    }


def extended(history: History, batches: int, scales: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Points]]:
    """Return a history with one more point.

    Args:
        history: so far; empty at first.
        batches: number of batches, more than at the last point.
        scales: method to tensor to scale.
    """
    return {
        method: {
            tensor: (*history.get(method, {}).get(tensor, ()), (batches, scale)) for tensor, scale in found.items()
        }
        for method, found in scales.items()
    }


def last_point(history: History) -> int:
    """Return the number of batches at the last point; 0 for an empty history."""
    return max((points[-1][0] for found in history.values() for points in found.values()), default=0)


def judge(history: History, method: str) -> Convergence | None:
    """Say how far the scales of one method have settled; None where their history was not kept."""
    points = history.get(method, {})
    if not points:
        return None
    counts = [count for count, _ in next(iter(points.values()))]
    last = counts[-1]
    since = max((count for count in counts if last >= _DOUBLED * count), default=None)
    if since is None:
        return Convergence(method, last, None, len(points), {})
    moved = {tensor: _moved(values[counts.index(since) :]) for tensor, values in points.items()}
    ranked = sorted(moved.items(), key=lambda item: -item[1])
    return Convergence(method, last, since, len(points), {tensor: part for tensor, part in ranked if part > TOLERANCE})


def history_to_json(history: History, tensors: Sequence[str]) -> dict[str, Any]:
    """Return the history as JSON can hold it; scales are written with the digits that float32 has.

    Args:
        history: of all `tensors`, or empty.
        tensors: their order.
    """
    if not history or not tensors:
        return {}
    counts = [count for count, _ in next(iter(history.values()))[tensors[0]]]
    rows = {
        method: [[float(str(np.float32(scale))) for _, scale in points[tensor]] for tensor in tensors]
        for method, points in history.items()
    }
    return {"batches": counts, "scales": rows}


def history_from_json(values: Mapping[str, Any], tensors: Sequence[str]) -> dict[str, dict[str, Points]]:
    """Take what `history_to_json` gave.

    Raises:
        ValueError: it is not of these tensors, its numbers of batches do not ascend, or a scale is not positive.
    """
    if not values:
        return {}
    counts = [int(count) for count in values["batches"]]
    if not counts or counts[0] < 1 or any(one >= two for one, two in pairwise(counts)):
        raise ValueError("the batches of its convergence do not ascend")
    return {
        str(method): {
            tensor: tuple(zip(counts, map(_scale, row), strict=True)) for tensor, row in zip(tensors, rows, strict=True)
        }
        for method, rows in values["scales"].items()
    }


def _is_kept(batches: int, total: int) -> bool:
    return KEPT * batches >= total


def _scale(value: Any) -> float:
    scale = float(np.float32(value))
    if not 0 < scale < np.inf:
        raise ValueError(f"its convergence holds the scale {value!r}")
    return scale


def _moved(points: Points) -> float:
    """Return how far later scales lie from the first one, as part of the last; scales are never 0."""
    first, last = points[0][1], points[-1][1]
    return max(abs(scale - first) for _, scale in points) / last
