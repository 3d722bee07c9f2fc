"""Images decoded in processes of their own: the same arrays, errors that keep their text, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from engines.runner import TensorSpec
from trt_int8 import decoding, read_ahead
from trt_int8.data import open_data
from trt_int8.decoding import DecodingProcesses, decode_ahead
from trt_int8.errors import DataError
from trt_int8.images import Preprocessing
from trt_int8.pixels import decode

PREPROCESSING = Preprocessing(resize=20, crop=16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PIXELS = (TensorSpec("x", np.dtype(np.float32), ("n", 3, 16, 16)),)


def save_pictures(folder: Path, count: int) -> list[Path]:
    """Structured pictures of different sizes and formats, with names that are not all ASCII."""
    rng = np.random.default_rng(3)
    files = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        files.append(folder / f"{index:02} {'äöü'[index % 3]}.{('png', 'jpg', 'webp', 'tif')[index % 4]}")
        coarse.resize((24 + index, 40 - index), Image.Resampling.BICUBIC).save(files[-1])
    return files


@pytest.fixture
def processes() -> Iterator[DecodingProcesses]:
    """Two of them."""
    with DecodingProcesses(PREPROCESSING.steps, 2) as started:
        yield started


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait until something is true, a minute at most."""
    end = time.monotonic() + 60
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def all_ready(processes: DecodingProcesses) -> bool:
    return wait_for(lambda: all(worker.is_ready() for worker in processes._workers))


def members(group: int) -> set[int]:
    """The living processes of a process group."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(its_group) == group and state != "Z":
                found.add(int(entry.name))
    return found


def pids(processes: DecodingProcesses) -> set[int]:
    assert processes._process is not None
    return members(processes._process.pid)


def test_the_arrays_are_the_same_bit_for_bit(
    processes: DecodingProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every format; none is decoded in this process once the others have started."""
    files = save_pictures(tmp_path, 9)
    expected = [PREPROCESSING.apply(decode(file)).tobytes() for file in files]
    assert all_ready(processes)
    monkeypatch.setattr(decoding, "decode", lambda file: pytest.fail(f"{file} was decoded here"))

    assert [processes.decode(file).tobytes() for file in files] == expected
    assert len(pids(processes)) == 2


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"color": "L"}, {"layout": "NHWC"}, {"crop": None}])
def test_shapes_and_dtypes_are_told(tmp_path: Path, change: dict[str, Any]) -> None:
    """Whatever the preprocessing makes, sizes that differ from image to image too."""
    preprocessing = Preprocessing(**{"resize": 20, "crop": 16, **change})
    files = save_pictures(tmp_path, 3)
    with DecodingProcesses(preprocessing.steps, 1) as processes:
        assert all_ready(processes)
        for file in files:
            found, expected = processes.decode(file), preprocessing.apply(decode(file))
            assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def test_errors_keep_class_and_text(processes: DecodingProcesses, tmp_path: Path) -> None:
    """The file is named as it would be without processes, and the next one is decoded."""
    whole, broken = save_pictures(tmp_path, 2)
    broken.write_bytes(broken.read_bytes()[:60])
    assert all_ready(processes)

    for _ in range(2):
        with pytest.raises(DataError) as here:
            decode(broken)
        with pytest.raises(DataError) as there:
            processes.decode(broken)
        assert str(there.value) == str(here.value)
        assert processes.decode(whole).shape == (3, 16, 16)


def test_another_error_tells_where_it_was_raised(tmp_path: Path) -> None:
    """What is no fault of the file: here an array that no machine can hold."""
    (file,) = save_pictures(tmp_path, 1)
    with DecodingProcesses(Preprocessing(resize=[4, 2**31 - 8]).steps, 1) as processes:
        assert all_ready(processes)
        with pytest.raises((MemoryError, ValueError, OverflowError)) as error:
            processes.decode(file)
    assert "In the process that decoded" in error.value.__notes__[0]
    assert "Traceback" in error.value.__notes__[0]


def test_pillow_is_set_as_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that lets Pillow take truncated files has them taken in the processes too."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    file = save_pictures(tmp_path, 2)[1]
    file.write_bytes(file.read_bytes()[:-40])
    with DecodingProcesses(PREPROCESSING.steps, 1) as processes:
        assert all_ready(processes)

        assert processes.decode(file).tobytes() == PREPROCESSING.apply(decode(file)).tobytes()


def test_a_process_that_is_lost_is_told(processes: DecodingProcesses, tmp_path: Path) -> None:
    """Killed, as for lack of memory: the image that it was to decode is named."""
    (file,) = save_pictures(tmp_path, 1)
    assert all_ready(processes)
    killed = pids(processes)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not pids(processes))

    for _ in killed:
        with pytest.raises(
            DataError, match=r"^Cannot use the image '.*00 ä\.png': the process that decoded it is gone"
        ):
            processes.decode(file)


def test_without_an_interpreter_threads_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost but speed."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    (file,) = save_pictures(tmp_path, 1)

    with DecodingProcesses(PREPROCESSING.steps, 2) as processes:
        assert processes._process is None
        assert processes.decode(file).tobytes() == PREPROCESSING.apply(decode(file)).tobytes()


def test_processes_that_do_not_start_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They end before they have said that they are ready; the images are decoded here, and the log says so."""
    caplog.set_level("INFO")
    monkeypatch.setattr(sys, "executable", "/bin/true")
    (file,) = save_pictures(tmp_path, 1)

    with DecodingProcesses(PREPROCESSING.steps, 1) as processes:
        assert processes._process is not None
        processes._process.wait()
        assert processes.decode(file).tobytes() == PREPROCESSING.apply(decode(file)).tobytes()
    assert "a process for them did not start" in caplog.text


def test_they_end_with_the_iteration(tmp_path: Path) -> None:
    """All of them, whether all images were taken or not."""
    with DecodingProcesses(PREPROCESSING.steps, 3) as processes:
        assert all_ready(processes)
        group = processes._process.pid if processes._process is not None else 0
        assert len(members(group)) == 3
    assert members(group) == set()


def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record with how many processes decoding starts."""
    counts: list[int] = []

    class Recorded(DecodingProcesses):
        def __init__(self, steps: Any, count: int) -> None:
            counts.append(count)
            super().__init__(steps, count)

    monkeypatch.setattr(decoding, "DecodingProcesses", Recorded)
    return counts


@pytest.mark.parametrize(
    ("cores", "least", "expected"), [(1, 2, []), (2, 2, []), (3, 2, [3]), (40, 2, [32]), (3, 9, [])]
)
def test_when_there_are_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, least: int, expected: list[int]
) -> None:
    """With more than two cores, and images enough beside those that are decoded for a look: here 8."""
    monkeypatch.setattr(read_ahead, "usable_cores", lambda: cores)
    monkeypatch.setattr(decoding, "LEAST_IMAGES", least)
    counts = started(monkeypatch)
    files = save_pictures(tmp_path, 10)

    arrays = list(decode_ahead(files, PREPROCESSING.steps, first=2))

    assert counts == expected
    assert [array.tobytes() for array in arrays] == [PREPROCESSING.apply(decode(file)).tobytes() for file in files]


def test_a_look_at_the_first_batch_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the data reads one batch; a pass starts the processes for the second one."""
    monkeypatch.setattr(read_ahead, "usable_cores", lambda: 3)
    monkeypatch.setattr(decoding, "LEAST_IMAGES", 2)
    counts = started(monkeypatch)
    files = save_pictures(tmp_path, 11)

    source = open_data(tmp_path, PIXELS, batch_size=4, preprocessing=PREPROCESSING)
    assert counts == []
    batches = list(source)

    assert counts == [3]
    assert [batch.samples for batch in batches] == [4, 4, 3]
    found = np.concatenate([batch.feeds["x"] for batch in batches])
    assert found.tobytes() == np.stack([PREPROCESSING.apply(decode(file)) for file in files]).tobytes()


PROGRAM = """
import sys, time
from pathlib import Path
from trt_int8 import decoding, read_ahead
from trt_int8.images import Preprocessing

read_ahead.usable_cores = lambda: 3
decoding.LEAST_IMAGES = 2
files = sorted(Path(sys.argv[1]).glob("*.*")) * 100000
arrays = decoding.decode_ahead(files, Preprocessing(resize=20, crop=16).steps, first=1)
begun, said = time.monotonic(), False
for array in arrays:
    if time.monotonic() > begun + 0.2 and not said:
        print("running", flush=True)
        said = True
    if time.monotonic() > begun + 120:
        break
"""
"""A program without a guard around its main part, which ends by itself if nobody ends it."""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_program(tmp_path: Path, sent: signal.Signals) -> None:
    """Whatever ends it; and Ctrl-C prints the traceback of the program alone."""
    save_pictures(tmp_path, 5)
    words = [
        sys.executable,
        "-c",
        f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{PROGRAM}",
    ]
    with subprocess.Popen(
        [*words, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "running\n"
        children = Path(f"/proc/{program.pid}/task").glob("*/children")
        workers = {int(word) for file in children for word in file.read_text().split()}
        assert len(workers) == 1
        (group,) = workers
        assert wait_for(lambda: len(members(group)) == 3)
        os.killpg(program.pid, sent)  # as a terminal does
        _, errors = program.communicate(timeout=60)

    assert program.returncode != 0
    assert wait_for(lambda: not members(group))
    assert errors.count("Traceback") == (sent == signal.SIGINT)
