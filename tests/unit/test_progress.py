"""Progress bars, and the share of the time that goes into waiting for data."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Iterator

import pytest

from calibrators.protocols import Item
from trt_int8 import progress
from trt_int8.progress import Timed, time_data, track


class Clock:
    """A clock that stands still, and a stage of `data_s` of waiting and `model_s` of work for each item."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data_s: float, model_s: float) -> None:
        self.now = 100.0
        self.waited = 1000.0  # from a pass before
        self.data_s, self.model_s = data_s, model_s
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)

    def items(self, count: int) -> Iterator[int]:
        for item in range(count):
            self.now += self.data_s + self.model_s
            self.waited += self.data_s
            yield item


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_items_pass_through_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal nothing is written."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)

    assert list(track(iter([3, 1]), "step", 2)) == [3, 1]
    assert out.getvalue() == ""


@pytest.mark.parametrize("total", [None, 3])
def test_the_bar_counts(monkeypatch: pytest.MonkeyPatch, total: int | None) -> None:
    """On a terminal it ends with all items counted; a list tells its length itself."""
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "120")

    assert list(track([3, 1, 2], "step", total)) == [3, 1, 2]
    assert "step" in out.getvalue()
    assert "3/3" in out.getvalue()
    assert "data" not in out.getvalue()


def test_the_bar_shows_where_the_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 s of waiting and 24 s of the rest per item are 4 and 96 per cent."""
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "120")
    clock = Clock(monkeypatch, 1.0, 24.0)

    assert list(time_data(track, lambda: clock.waited)(clock.items(3), "calibrate", 3)) == [0, 1, 2]
    assert "data 4 % model 96 %" in out.getvalue()
    assert "3/3" in out.getvalue()


def test_any_track_takes_timed_items() -> None:
    """Description and total reach it, and the items pass through."""
    calls: list[tuple[str, int | None]] = []

    def shown(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
        calls.append((description, total))
        return items

    assert list(time_data(shown, lambda: 0.0)([7, 8], "calibrate", 2)) == [7, 8]
    assert calls == [("calibrate", 2)]


@pytest.mark.parametrize(
    ("data_s", "model_s", "count", "said"),
    [
        (6.0, 4.0, 10, True),  # 60 % of 100 s
        (5.0, 5.0, 10, False),  # just half
        (0.1, 0.1, 10, False),
        (0.06, 0.04, 10, False),  # over in a second
    ],
)
def test_the_hint(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    data_s: float,
    model_s: float,
    count: int,
    said: bool,
) -> None:
    """A model that waits for more than half of a long time is reported, once."""
    clock = Clock(monkeypatch, data_s, model_s)

    with caplog.at_level(logging.WARNING):
        list(Timed(clock.items(count), lambda: clock.waited))

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == said
    assert all(line.startswith("the model waits for the data: reading it took 60 % of the time. ") for line in lines)


def test_before_any_time_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No division by zero."""
    clock = Clock(monkeypatch, 0.0, 0.0)
    items = Timed(clock.items(1), lambda: clock.waited)

    assert list(items) == [0]
    assert items.shares() == "data 0 % model 100 %"
