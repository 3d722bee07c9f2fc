"""Where and how often the state of a calibration is kept."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from calibrators.calibration import Calibration, Fingerprint
from calibrators.counter import histogram_of
from calibrators.errors import CacheFormatError, FileAccessError
from calibrators.files import atomic_path
from trt_int8.checkpoint import INTERVAL_S, Checkpoint, checkpoint_beside


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def state() -> Calibration:
    fingerprint = Fingerprint("g", "w", ("d",), "", "0.1.0", 2, 2)
    return Calibration({"x": histogram_of(np.ones(3))}, fingerprint)


def test_it_lies_beside_the_output() -> None:
    """Under a name that says that it is a part."""
    assert checkpoint_beside(Path("runs/calibration.npz")) == Path("runs/calibration.part.npz")


def test_every_so_many_batches(tmp_path: Path) -> None:
    """The clock has no say then."""
    checkpoint = Checkpoint(tmp_path / "c.part.npz", every=3, clock=Clock())

    assert [count for count in range(1, 10) if checkpoint.due(count)] == [3, 6, 9]


def test_once_a_minute(tmp_path: Path) -> None:
    """Batches that are read ahead of the one that is due do not ask again."""
    clock = Clock()
    checkpoint = Checkpoint(tmp_path / "c.part.npz", clock=clock)

    assert not checkpoint.due(1)
    clock.now += INTERVAL_S
    assert [checkpoint.due(count) for count in (2, 3, 4)] == [True, False, False]
    checkpoint.save(state())
    clock.now += INTERVAL_S - 1
    assert not checkpoint.due(5)
    clock.now += 1
    assert checkpoint.due(6)


def test_slow_writing_makes_it_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes two seconds is written every 400: less than 1 % of the time."""
    clock = Clock()
    checkpoint = Checkpoint(tmp_path / "c.part.npz", clock=clock)

    def slow(self: Calibration, path: Path) -> None:
        clock.now += 2

    monkeypatch.setattr(Calibration, "save", slow)
    checkpoint.save(state())
    clock.now += 399
    assert not checkpoint.due(1)
    clock.now += 1
    assert checkpoint.due(2)


def test_state_comes_back(tmp_path: Path) -> None:
    """None where there is none; a file of another kind is refused."""
    checkpoint = Checkpoint(tmp_path / "c.part.npz")
    assert checkpoint.load() is None
    checkpoint.save(state())
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded.sha256 == state().sha256
    checkpoint.path.write_bytes(b"half")
    with pytest.raises(CacheFormatError, match=r"c\.part\.npz"):
        checkpoint.load()


def test_a_full_disk_does_not_end_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning says so; the checkpoint before stays."""
    checkpoint = Checkpoint(tmp_path / "c.part.npz")
    checkpoint.save(state())
    before = checkpoint.path.read_bytes()

    def full(self: Calibration, path: Path) -> None:
        raise FileAccessError("Cannot write 'c.part.npz': No space left on device.")

    monkeypatch.setattr(Calibration, "save", full)
    with caplog.at_level(logging.WARNING):
        checkpoint.save(state())

    assert "No space left" in caplog.text
    assert "starts from its last checkpoint" in caplog.text
    assert checkpoint.path.read_bytes() == before


def test_nothing_is_left(tmp_path: Path) -> None:
    """Neither the passes' files nor what a killed process left half-written; other files stay."""
    checkpoint = Checkpoint(tmp_path / "c.part.npz")
    for path in (checkpoint.path, *(checkpoint.of_pass(index, 3).path for index in range(3)), tmp_path / "c.npz"):
        path.touch()
    killed = atomic_path(checkpoint.of_pass(1, 3).path)
    killed.__enter__()

    checkpoint.remove()

    assert [path.name for path in tmp_path.iterdir()] == ["c.npz"]
    checkpoint.remove()


def test_passes_have_files_of_their_own() -> None:
    """A single one has that of the calibration."""
    checkpoint = Checkpoint(Path("c.part.npz"), 5)

    assert checkpoint.of_pass(0, 1) is checkpoint
    assert checkpoint.of_pass(1, 3).path == Path("c.part.2of3.npz")
    assert checkpoint.of_pass(1, 3).every == 5
