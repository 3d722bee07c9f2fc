"""A process that decodes images for another one: `python -m trt_int8.decode_worker FD ...`.

Each FD is one end of a socket pair that the process inherits. It imports what it needs once, forks itself until there
is a process for each of them, and each then serves its own until the other end is closed, which the death of the other
process does as well. Nothing is shared but the socket: no file, no shared memory, no name.

First comes the job (`Job`), answered by `READY`; then one file name after the other, each answered by its array or by
the exception that it raised. Lengths come before contents: `LENGTH` before a job or a name, `LENGTHS` before an
answer.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_int8.errors import TrtInt8Error
from trt_int8.pixels import PixelSteps, decode, load_plugins, preprocess

READY = b"R"

LENGTH = struct.Struct("<Q")
LENGTHS = struct.Struct("<QQ")
"""Octets of the description, which is pickled, and of the array."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all images of a pass have in common.

    Attributes:
        steps: of their preprocessing.
        most_pixels: Pillow's `Image.MAX_IMAGE_PIXELS`, which the program may have changed.
        truncated: Pillow's `ImageFile.LOAD_TRUNCATED_IMAGES`, likewise.
    """

    steps: PixelSteps
    most_pixels: int | None
    truncated: bool


def receive(connection: socket.socket, octets: int) -> bytearray:
    """Read so many octets.

    Raises:
        EOFError: the other end is closed, or its process is gone.
    """
    content = bytearray(octets)
    receive_into(connection, memoryview(content))
    return content


def receive_into(connection: socket.socket, target: memoryview) -> None:
    """Fill `target`; see `receive`."""
    filled = 0
    while filled < len(target):
        read = connection.recv_into(target[filled:])
        if read == 0:
            raise EOFError
        filled += read


def serve(connection: socket.socket) -> None:
    """Decode what is asked for until the other end is closed."""
    try:
        job = pickle.loads(_message(connection))
        _adopt(job)
        connection.sendall(READY)
        while True:
            _answer(connection, _made(Path(os.fsdecode(bytes(_message(connection)))), job.steps))
    except (EOFError, ConnectionError):
        return  # nobody asks any more


def main(descriptors: Sequence[int]) -> None:
    """Serve all of `descriptors`, a process each."""
    load_plugins()
    own, *others = descriptors
    for other in others:
        try:
            child = os.fork()
        except OSError:  # no more processes are allowed: the end of its socket tells
            break
        if child == 0:
            own = other
            break
    for descriptor in descriptors:
        if descriptor != own:
            os.close(descriptor)
    with socket.socket(fileno=own) as connection:
        serve(connection)
    with suppress(ChildProcessError):  # the first process has the others as children, who end when it does
        while True:
            os.wait()


def _message(connection: socket.socket) -> bytearray:
    (octets,) = LENGTH.unpack(receive(connection, LENGTH.size))
    return receive(connection, octets)


def _adopt(job: Job) -> None:
    from PIL import Image, ImageFile

    Image.MAX_IMAGE_PIXELS = job.most_pixels
    ImageFile.LOAD_TRUNCATED_IMAGES = job.truncated


def _made(file: Path, steps: PixelSteps) -> NDArray[Any] | Exception:
    try:
        return preprocess(decode(file), steps)
    except TrtInt8Error as error:
        return error
    except Exception as error:
        error.add_note(f"In the process that decoded {str(file)!r}:\n{traceback.format_exc()}")
        return error


def _answer(connection: socket.socket, made: NDArray[Any] | Exception) -> None:
    if isinstance(made, Exception):
        description = pickle.dumps(made)
        connection.sendall(LENGTHS.pack(len(description), 0) + description)
        return
    values = np.ascontiguousarray(made)
    description = pickle.dumps((values.shape, values.dtype.str))
    connection.sendall(LENGTHS.pack(len(description), values.nbytes) + description)
    connection.sendall(values.data.cast("B"))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
