"""Memory that the pieces of a model write into, the same for one batch after the other.

ONNX Runtime takes memory for the outputs of each run, and hands them over one by one. Where the batches have one shape,
it is told once where the outputs belong instead. All pieces write to the same few megabytes, which stay in the cache,
and what is to be done with an array is prepared once: both cost a noticeable part of the inference of a small model.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibrators.protocols import Array
from engines.blocked import Blocked, copy_real_values, real_size
from engines.pieces import Piece

_ALIGNMENT = 64
"""Bytes: a line of the cache, and what vector instructions like best."""

_MOST_LAYOUTS = 8
"""Layouts that a memory keeps, for as many shapes of batches."""

Signature = tuple[tuple[str, str, tuple[int, ...]], ...]
"""What decides the shapes of all arrays: name, dtype and shape of each fed one."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Dtype and shape of an array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the array."""
        return int(self.dtype.itemsize * np.prod(self.shape, dtype=np.int64))


def signature_of(feeds: Mapping[str, Array]) -> Signature:
    """Return what decides the shapes of a batch's arrays."""
    return tuple((name, value.dtype.str, value.shape) for name, value in sorted(feeds.items()))


def specs_of(arrays: Mapping[str, Any]) -> dict[str, ArraySpec] | None:
    """Return dtypes and shapes; None if there is something among them that cannot be written to given memory."""
    specs = {}
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub" or value.size == 0:
            return None
        specs[name] = ArraySpec(value.dtype, value.shape)
    return specs


class Buffers:
    """Names the arrays of one piece and batch of a layout, see `calibrators.protocols.Activations.buffers`."""

    __slots__ = ("__weakref__",)


@dataclass(slots=True)
class Slot:
    """A piece, ready to run on one batch of a group.

    Attributes:
        binding: of the piece's session.
        arrays: tensors that are wanted, as ONNX Runtime lays them out.
        carried: what later pieces read.
        buffers: names the arrays of `values`.
    """

    binding: Any
    arrays: dict[str, Array] = field(default_factory=dict)
    carried: dict[str, Array] = field(default_factory=dict)
    buffers: Buffers = field(default_factory=Buffers)
    _values: dict[str, Array] = field(default_factory=dict)
    _channels: dict[str, int] = field(default_factory=dict)

    def values(self) -> dict[str, Array]:
        """Return the wanted tensors without the channels that fill up the last block; always the same arrays."""
        for tensor, channels in self._channels.items():
            copy_real_values(self.arrays[tensor], channels, self._values[tensor])
        return self._values


class Layout:
    """Where the arrays of a group of batches of one shape lie.

    What later pieces read has a place of its own for each batch of the group until the last of them has run; all else
    is written over by the next piece.

    Args:
        pieces: of the model.
        specs: of everything that the pieces hand out.
        tensors: those that are wanted, with the output that holds them.
        blocked: of these, those laid out in blocks of channels.
        fed: names of the model's inputs.
        group: number of batches.
        memory: what all layouts share.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        specs: Mapping[str, ArraySpec],
        tensors: Mapping[str, str],
        blocked: Mapping[str, Blocked],
        fed: frozenset[str],
        group: int,
        memory: Memory,
    ) -> None:
        carried = frozenset().union(*(piece.later for piece in pieces)) - fed
        own = [{name: _Place(specs[name]) for name in carried} for _ in range(group)]
        shared = [{name: _Place(specs[name]) for name in piece.outputs if name not in carried} for piece in pieces]
        filled = {tensor: found for tensor, found in blocked.items() if specs[found.output].shape[1] != found.channels}
        cut = [
            {
                tensor: _Place(_real_spec(specs[output], filled[tensor].channels))
                for tensor, output in tensors.items()
                if tensor in filled and output in piece.outputs
            }
            for piece in pieces
        ]
        end = _arrange_carried(pieces, {name: [places[name] for places in own] for name in carried})
        ends = [_arrange([*shared[k].values(), *cut[k].values()], end) for k in range(len(pieces))]
        self._room = memory.take(max(ends, default=end))
        self._fed = fed
        self._read = [[name for name in piece.inputs if name in fed] for piece in pieces]
        self._pieces = pieces
        self._slots = [
            [self._slot(piece, shared[k] | own[slot], cut[k], tensors, filled) for slot in range(group)]
            for k, piece in enumerate(pieces)
        ]

    def _slot(
        self,
        piece: Piece,
        places: Mapping[str, _Place],
        cut: Mapping[str, _Place],
        tensors: Mapping[str, str],
        filled: Mapping[str, Blocked],
    ) -> Slot:
        slot = Slot(piece.session.io_binding())
        arrays = {name: place.array(self._room) for name, place in places.items()}
        for name in piece.inputs:
            if name not in self._fed:
                slot.binding.bind_input(name, *_location(arrays[name]))
        for name in piece.outputs:
            slot.binding.bind_output(name, *_location(arrays[name]))
            if name in piece.later:
                slot.carried[name] = arrays[name]
        for tensor, output in tensors.items():
            if output in piece.outputs:
                slot.arrays[tensor] = slot._values[tensor] = arrays[output]
            if tensor in cut:
                slot._channels[tensor] = filled[tensor].channels
                slot._values[tensor] = cut[tensor].array(self._room)
        return slot

    def run(self, piece: int, slot: int, feeds: Mapping[str, Array]) -> Slot:
        """Run a piece on a batch of the group, whose arrays then hold what it hands out.

        Raises:
            Exception: as ONNX Runtime does, also if an output has another shape than it had for another batch.
        """
        found = self._slots[piece][slot]
        # Kept until the run is over, as the binding knows addresses alone.
        fed = {name: np.require(feeds[name], requirements="C") for name in self._read[piece]}
        for name, value in fed.items():
            found.binding.bind_input(name, *_location(value))
        self._pieces[piece].session.run_with_iobinding(found.binding)
        return found

    def carried(self, slot: int) -> dict[str, Array]:
        """Return what pieces hand to later ones for a batch of the group."""
        return {name: array for slots in self._slots for name, array in slots[slot].carried.items()}


class Memory:
    """What groups of batches are run in, one group at a time; it is as large as the largest layout wants it."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)
        self._layouts: dict[Signature, tuple[int, Layout]] = {}

    def take(self, size: int) -> Array:
        """Return memory of `size` bytes that begins with a line of the cache. More than before makes it anew."""
        if size + _ALIGNMENT > self._room.size:
            self._layouts.clear()
            self._room = np.empty(size + _ALIGNMENT, np.uint8)
        offset = -self._room.ctypes.data % _ALIGNMENT
        return self._room[offset : offset + size]

    def find(self, signature: Signature, group: int) -> Layout | None:
        """Return the layout for a group of batches of a shape, if there is one."""
        size, layout = self._layouts.get(signature, (0, None))
        return layout if size >= group else None

    def keep(self, signature: Signature, group: int, layout: Layout) -> Layout:
        """Keep a layout; of more than a few, the one that was made first is given up."""
        while len(self._layouts) >= _MOST_LAYOUTS:
            del self._layouts[next(iter(self._layouts))]
        self._layouts[signature] = (group, layout)
        return layout


@dataclass(slots=True)
class _Place:
    """Where an array lies in the memory."""

    spec: ArraySpec
    offset: int = 0

    def array(self, room: Array) -> Array:
        part = room[self.offset : self.offset + self.spec.nbytes]
        return part.view(self.spec.dtype).reshape(self.spec.shape)


def _arrange(places: Sequence[_Place], start: int) -> int:
    """Put places one after the other; return where the last one ends."""
    for place in places:
        place.offset = start
        start += -(-place.spec.nbytes // _ALIGNMENT) * _ALIGNMENT
    return start


def _arrange_carried(pieces: Sequence[Piece], places: Mapping[str, Sequence[_Place]]) -> int:
    """Put what later pieces read where nothing lies that a piece between its maker and its last reader uses.

    Args:
        pieces: in the order in which they run, each on all batches of the group.
        places: tensor to its places, one for each batch of the group.

    Returns:
        Where the last one ends.
    """
    last_read = {name: number for number, piece in enumerate(pieces) for name in piece.inputs}
    used: list[tuple[int, int, int]] = []
    """Where a tensor begins and ends, and the last piece that reads it, in the order of the memory."""
    highest = 0
    for number, piece in enumerate(pieces):
        used = [part for part in used if part[2] >= number]
        made = [name for name in piece.outputs if name in places]
        for name in sorted(made, key=lambda name: -places[name][0].spec.nbytes):
            size = _arrange(places[name], 0)
            start = 0
            for begin, end, _ in used:
                if start + size <= begin:
                    break
                start = end
            insort(used, (start, start + size, last_read[name]))
            highest = max(highest, _arrange(places[name], start))
    return highest


def _location(array: Array) -> tuple[str, int, Any, tuple[int, ...], int]:
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data


def _real_spec(spec: ArraySpec, channels: int) -> ArraySpec:
    return ArraySpec(spec.dtype, (spec.shape[0], real_size(spec.shape, channels)))
