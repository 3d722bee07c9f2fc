"""Reading ahead of the model: order, bounds, errors, and threads that end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.runner import TensorSpec
from trt_int8 import read_ahead
from trt_int8.data import BatchSource, DataSpec, open_data
from trt_int8.errors import DataError
from trt_int8.images import Preprocessing
from trt_int8.pixels import decode
from trt_int8.read_ahead import map_ahead, one_ahead
from trt_int8.streams import BatchStream, RawBatch

X = (TensorSpec("x", np.dtype(np.float32), ("n", 2)),)
PIXELS = (TensorSpec("x", np.dtype(np.float32), ("n", 3, 16, 16)),)
PREPROCESSING = Preprocessing(resize=20, crop=16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, whatever the machine has."""
    monkeypatch.setattr(read_ahead, "usable_cores", lambda: 2)


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "read-ahead"))]


def counted(drawn: list[int], until: int = 100) -> Generator[int]:
    for item in range(until):
        drawn.append(item)
        yield item


# --- many threads ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_cores")
def test_results_keep_the_order_of_the_items() -> None:
    """The first item cannot end before the second one has: they run at the same time, and still come in order."""
    second = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second.wait(30)
        if item == 1:
            second.set()
        return item * item

    assert list(map_ahead(work, range(20))) == [item * item for item in range(20)]


@pytest.mark.usefixtures("two_cores")
def test_no_more_than_twice_the_threads_are_ahead() -> None:
    """Two threads: with one result taken, four others are made or in the making, whatever the number of items."""
    drawn: list[int] = []
    results = map_ahead(lambda item: item, counted(drawn))

    assert next(results) == 0
    assert len(drawn) == 5
    assert next(results) == 1
    assert len(drawn) == 6


@pytest.mark.usefixtures("two_cores")
def test_an_exception_comes_in_its_place() -> None:
    """What lies before it is handed out first, and nothing of the class or text is changed."""

    def work(item: int) -> int:
        if item == 3:
            raise DataError("item 3 is broken")
        return item

    results = map_ahead(work, range(9))

    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"^item 3 is broken$"):
        next(results)
    assert threads_of_ours() == []


@pytest.mark.usefixtures("two_cores")
def test_threads_end_with_the_iteration() -> None:
    """Threads are there while the results are taken, and gone when they are all taken or the rest is dropped."""
    whole = map_ahead(lambda item: item, range(9))
    assert next(whole) == 0
    assert threads_of_ours() != []
    assert list(whole) == list(range(1, 9))
    assert threads_of_ours() == []

    dropped = map_ahead(lambda item: item, range(9))
    assert next(dropped) == 0
    del dropped
    assert threads_of_ours() == []


# --- one item ahead --------------------------------------------------------------------------------------------------


def test_one_item_is_made_ahead() -> None:
    """The first in the caller's thread; from then on the next one while the last is used, and no more."""
    made: list[tuple[int, bool]] = []
    reached = {item: threading.Event() for item in range(6)}

    def make() -> Generator[int]:
        for item in range(5):
            made.append((item, threading.current_thread() is threading.main_thread()))
            reached[item].set()
            yield item

    items = one_ahead(make())

    assert next(items) == 0
    assert made == [(0, True)]
    assert next(items) == 1
    assert reached[2].wait(30)
    assert next(items) == 2
    assert reached[3].wait(30)
    assert made == [(0, True), (1, False), (2, False), (3, False)]
    assert list(items) == [3, 4]
    assert threads_of_ours() == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_streams(count: int) -> None:
    """None, one, two."""
    assert list(one_ahead(counted([], count))) == list(range(count))


def test_an_exception_of_the_next_item_waits_for_its_turn() -> None:
    """It is met while the item before is used, and raised when the item itself is asked for."""

    def make() -> Generator[int]:
        yield 0
        yield 1
        raise DataError("no third")

    items = one_ahead(make())

    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(DataError, match=r"^no third$"):
        next(items)
    assert threads_of_ours() == []


def test_closing_closes_the_generator() -> None:
    """Files that it holds open are closed."""
    closed = threading.Event()

    def make() -> Generator[int]:
        try:
            yield from range(9)
        finally:
            closed.set()

    items = one_ahead(make())
    assert [next(items), next(items)] == [0, 1]

    items.close()

    assert closed.is_set()
    assert threads_of_ours() == []


# --- data ------------------------------------------------------------------------------------------------------------


def save_pictures(folder: Path, count: int) -> list[Path]:
    """Structured pictures of different sizes and formats."""
    rng = np.random.default_rng(3)
    files = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        files.append(folder / f"{index:02}.{('png', 'jpg', 'webp', 'tif')[index % 4]}")
        coarse.resize((24 + index, 40 - index), Image.Resampling.BICUBIC).save(files[-1])
    return files


@pytest.mark.usefixtures("two_cores")
def test_images_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    """Batches hold what decoding one file after the other gives."""
    files = save_pictures(tmp_path, 11)

    batches = list(open_data(tmp_path, PIXELS, batch_size=4, preprocessing=PREPROCESSING))

    assert [batch.samples for batch in batches] == [4, 4, 3]
    found = np.concatenate([batch.feeds["x"] for batch in batches])
    expected = np.stack([PREPROCESSING.apply(decode(file)) for file in files])
    assert found.tobytes() == expected.tobytes()


@pytest.mark.usefixtures("two_cores")
def test_a_broken_image_is_named_after_the_batches_before_it(tmp_path: Path) -> None:
    """The batches before it are used as they would be without reading ahead."""
    files = save_pictures(tmp_path, 9)
    files[5].write_bytes(files[5].read_bytes()[:60])
    batches = iter(open_data(tmp_path, PIXELS, batch_size=2, preprocessing=PREPROCESSING))

    assert [next(batches).index, next(batches).index] == [0, 1]
    with pytest.raises(DataError, match=r"^Cannot use the image '.*05\.jpg': it cannot be decoded: "):
        next(batches)
    assert threads_of_ours() == []


@pytest.mark.usefixtures("two_cores")
def test_ctrl_c_ends_the_threads(tmp_path: Path) -> None:
    """An interrupt while the model runs leaves nothing behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
    save_pictures(tmp_path, 9)
    source = open_data(tmp_path, PIXELS, batch_size=2, preprocessing=PREPROCESSING)

    def run() -> None:
        for batch in source:
            if batch.index == 2:
                assert threads_of_ours() != []
                signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert threads_of_ours() == []


def recording(threadable: bool, threads: list[threading.Thread]) -> BatchSource:
    def read() -> Iterator[RawBatch]:
        for index in range(3):
            threads.append(threading.current_thread())
            yield RawBatch(f"batch {index}", {"x": np.full((1, 2), index, np.float32)})

    return BatchSource(
        BatchStream(description="batches", read=read, threadable=threadable), X, data_id=None, label=None
    )


def test_code_of_the_users_own_runs_in_the_callers_thread(tmp_path: Path) -> None:
    """Files are read in another one from the second batch on; the batches are the same."""
    here: list[threading.Thread] = []
    there: list[threading.Thread] = []

    own, files = list(recording(False, here)), list(recording(True, there))

    assert [batch.rolling_hash for batch in own] == [batch.rolling_hash for batch in files]
    assert set(here) == {threading.main_thread()}
    assert [thread is threading.main_thread() for thread in there] == [True, False, False]


def test_which_data_are_read_in_a_thread(tmp_path: Path) -> None:
    """Files are; iterables and functions are not."""
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", x=np.zeros((3, 2), np.float32))
    threads: list[str] = []

    def batches() -> Iterator[np.ndarray]:
        for _ in range(3):
            threads.append(threading.current_thread().name)
            yield np.zeros((1, 2), np.float32)

    def ahead(spec: DataSpec) -> list[bool]:
        return [bool(threads_of_ours()) for _ in islice(open_data(spec, X), 2)]

    assert ahead(tmp_path / "a.npz") == [False, True]
    assert ahead(tmp_path) == [False, True]
    assert ahead(batches()) == [False, False]
    assert set(threads) == {"MainThread"}


def test_the_rolling_hash_is_of_batches_that_were_used(tmp_path: Path) -> None:
    """A batch that was read ahead and not taken is no part of a pass, and the pass is complete only after the last."""
    np.savez(tmp_path / "a.npz", x=np.arange(6, dtype=np.float32).reshape(3, 2))
    source = open_data(tmp_path / "a.npz", X)

    batches = iter(source)
    taken = [next(batches), next(batches), next(batches)]
    assert source.rolling_hash is None
    assert list(batches) == []
    assert source.rolling_hash == taken[-1].rolling_hash
