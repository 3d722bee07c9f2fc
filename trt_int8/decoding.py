"""Image files are decoded ahead of the model, in processes of their own where there are cores for them.

A sixth of the time that a JPEG takes (decode, resize, crop, normalize) holds Python's interpreter lock: threads of one
process decode no more than about six cores could, and keep the threads that run the model waiting for the lock. So
there is a process for each core (`trt_int8.decode_worker`), where there are more than two cores, and images enough for
their start to pay. Elsewhere threads decode, which costs less as nothing is handed over; so they do until the processes
have started. Either way the arrays are the same to the bit and come in the order of the files, a few of them ahead.

The processes are plain children, started by their command line. `multiprocessing` would import the user's main script
again, which must be written for that, or fork a process that has threads; and shared memory has a place and a limit of
its own (64 MB in a container by default), where a socket has neither.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trt_int8.decode_worker import LENGTH, LENGTHS, READY, Job, receive, receive_into
from trt_int8.errors import DataError
from trt_int8.pixels import PixelSteps, decode, load_plugins, preprocess
from trt_int8.read_ahead import map_ahead, thread_count

_log = logging.getLogger(__name__)

LEAST_CORES = 3
LEAST_IMAGES = 200
"""With fewer cores or images threads decode: starting the processes takes as long as decoding some dozens."""

_END_S = 5.0
"""What an idle process may take to end."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""There is a process for each core; and the first one forks, which must not have threads."""


def decode_ahead(files: Sequence[Path], steps: PixelSteps, *, first: int) -> Iterator[NDArray[Any]]:
    """Decode and preprocess images, and yield the arrays in order. An exception comes in the place of its image.

    Args:
        files: the images.
        steps: of their preprocessing.
        first: so many are decoded before anything is read ahead: a look at the first batch costs no more than that.

    Raises:
        DataError: an image cannot be decoded; see `trt_int8.pixels.decode`.
    """
    load_plugins()

    def here(file: Path) -> NDArray[Any]:
        return preprocess(decode(file), steps)

    yield from map_ahead(here, files[:first])
    rest = files[first:]
    count = thread_count()
    if count < LEAST_CORES or len(rest) < LEAST_IMAGES:
        yield from map_ahead(here, rest)
        return
    with DecodingProcesses(steps, count) as processes:
        yield from map_ahead(processes.decode, rest)


class DecodingProcesses:
    """Processes that decode images; they run inside of `with`.

    Where they cannot be started, and until they have, `decode` works in the thread that calls it.

    Args:
        steps: of the preprocessing.
        count: number of processes; as many threads may call `decode` at a time.
    """

    def __init__(self, steps: PixelSteps, count: int) -> None:
        self._steps = steps
        self._count = count
        self._process: subprocess.Popen[bytes] | None = None
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()

    def __enter__(self) -> Self:
        """Start the processes; they are not waited for."""
        self._workers = [_Worker() for _ in range(self._count)]
        try:
            self._process = _start(self._workers, self._steps)
        except OSError as error:  # no such interpreter, no more processes, no more open files
            _log.info("images are decoded in threads: processes cannot be started (%s)", error)
        for worker in self._workers:
            self._idle.put(worker)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the processes; no thread may be in `decode` any more."""
        for worker in self._workers:
            worker.close()
        if self._process is None:
            return
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # it was stopped, or waits for a file system that does not answer
            self._process.kill()
            self._process.wait()

    def decode(self, file: Path) -> NDArray[Any]:
        """Decode and preprocess one image.

        Raises:
            DataError: it cannot be decoded, or the process that decoded it is gone.
        """
        worker = self._idle.get()
        try:
            return worker.decode(file) if worker.is_ready() else preprocess(decode(file), self._steps)
        finally:
            self._idle.put(worker)


class _Worker:
    """This program's end of the connection with one of the processes; used by one thread at a time."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = None
        self._ready = False

    def connect(self) -> socket.socket:
        """Make the connection, and return the other end of it."""
        self._connection, other = socket.socketpair()
        return other

    def send_job(self, job: bytes) -> None:
        """Say what is to be done with all images; it is read when the process has started."""
        if self._connection is not None:
            self._connection.sendall(LENGTH.pack(len(job)) + job)

    def close(self) -> None:
        """Let the process end."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def is_ready(self) -> bool:
        """Tell whether the process has started; one that has ended before it could start is no more asked."""
        if not self._ready and self._connection is not None:
            try:
                self._ready = self._connection.recv(1, socket.MSG_DONTWAIT) == READY
            except BlockingIOError:
                return False
            except ConnectionError:
                self._ready = False
            if not self._ready:
                _log.info("some images are decoded in threads: a process for them did not start")
                self.close()
        return self._ready

    def decode(self, file: Path) -> NDArray[Any]:
        """Have one image decoded; see `DecodingProcesses.decode`."""
        connection = self._connection
        try:
            if connection is None:
                raise EOFError
            name = os.fsencode(file)
            connection.sendall(LENGTH.pack(len(name)) + name)
            described, _ = LENGTHS.unpack(receive(connection, LENGTHS.size))
            made = pickle.loads(receive(connection, described))
            if not isinstance(made, Exception):
                shape, dtype = made
                made = np.empty(shape, dtype)
                receive_into(connection, made.data.cast("B"))
        except (EOFError, ConnectionError) as error:
            self.close()
            raise DataError(
                f"Cannot use the image {str(file)!r}: the process that decoded it is gone; it was killed, perhaps for "
                "lack of memory, or the file makes a decoder crash. Look at the free memory and at the file."
            ) from error
        if isinstance(made, Exception):
            raise made
        array: NDArray[Any] = made
        return array


def _start(workers: Sequence[_Worker], steps: PixelSteps) -> subprocess.Popen[bytes]:
    """Start a process for each worker; the first is our child, the others are its own."""
    from PIL import Image, ImageFile

    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("this program is no Python interpreter that could be started again")
    with ExitStack() as stack:
        descriptors = [stack.enter_context(worker.connect()).fileno() for worker in workers]
        process = subprocess.Popen(
            # -P: nothing in the current folder is taken for a module.
            [sys.executable, "-P", "-m", "trt_int8.decode_worker", *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            process_group=0,  # Ctrl-C is for us; they end when we close the connection
        )
    job = pickle.dumps(Job(steps, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES))
    for worker in workers:
        with suppress(OSError):  # it has ended already, which is found out when it is asked for an image
            worker.send_job(job)
    return process
