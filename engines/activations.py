"""Activations of a model, batch by batch, from ONNX Runtime. Implements `calibrators.protocols.ActivationSource`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np
import onnx

from calibrators.errors import CalibrationError
from calibrators.protocols import Activations, Array, CalibrationBatch
from engines.blocked import Blocked, open_blocked_session, real_values
from engines.errors import InferenceError
from engines.garbage import give_back_memory
from engines.graph import PreparedModel, exceeds_one_file, open_session
from engines.onnxrt import check_feeds, tensor_specs
from engines.outside_weights import outside_bytes
from engines.padding import PaddedTensors
from engines.piece_buffers import ArraySpec, Buffers, Layout, Memory, Signature, signature_of, specs_of
from engines.pieces import Piece, whole

_log = logging.getLogger(__name__)

_MOST_WORKERS = 8

_LARGEST_GROUP = 8
"""Batches that are run together; more gain little."""

_MOST_SHAPES = 64
"""Shapes of batches whose arrays are known; where lengths differ that much, they hardly come again."""

_GROUP_BYTES = 16 * 2**20
"""What the batches of a group may feed and carry between pieces together."""

CARRIED_BYTES = 2 * _GROUP_BYTES
"""What a worker keeps between pieces at most, as a piece reads from one part of it and writes to another; only a batch
that takes more alone, which is a group of its own, has more."""


def worker_count(threads: int | None) -> int:
    """Return how many batches are run at a time: as many as asked for, or one per usable core but no more than 8."""
    return threads or min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


class OnnxRuntimeActivations:
    """Runs the FP32 model once over a stream and hands out the named activations.

    The tensors become extra outputs of the graph; ONNX Runtime's graph optimization stays on, which is 1.6 to 3 times
    faster than calibrating without it, and changes no value beyond float rounding. Where it can, they are taken in ONNX
    Runtime's own layout, see `engines.blocked`.

    A run takes one thread, and several runs may go on at a time: two of them use two cores better than one run of two
    threads, and what is computed does not depend on their number. Implements `calibrators.protocols.GroupedSource`.

    Args:
        prepared: the model.
        tensors: names from `engines.calibrated_tensors.tensors_to_calibrate`.
        batches: the stream; consumed once. Its arrays must stay as they are until their batch is done.
        threads: number of runs at a time; None takes one per usable core, but no more than 8, as each of them holds the
            activations of a batch.
        exposed: tensors that are made outputs, `tensors` among them; None for those alone. Nodes are not fused across
            an output, so that for the same values to the bit the same tensors must be exposed.
        blocked: whether tensors may come in ONNX Runtime's layout, their values in another order and without a shape.
        padded: where padding lies in the tensors, which is left out of them: it takes ONNX's layout; None for nowhere.
        first: index of the first batch of the stream, where others were run before it; for messages.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        tensors: Sequence[str],
        batches: Iterable[CalibrationBatch],
        *,
        threads: int | None = None,
        exposed: Sequence[str] | None = None,
        blocked: bool = True,
        padded: PaddedTensors | None = None,
        first: int = 0,
    ) -> None:
        self.tensors = list(tensors)
        self.workers = worker_count(threads)
        self._first = first
        self._padded = padded
        self._path = prepared.path
        self._batches = batches
        self._inputs, _ = tensor_specs(prepared.proto)
        self._input_names = {spec.name for spec in self._inputs}
        self._producers = {output: node.name for node in prepared.proto.graph.node for output in node.output}
        self._fetched = [name for name in self.tensors if name not in self._input_names]
        self._blocked: Mapping[str, Blocked] = {}
        self._pieces = self._open(
            prepared, self.tensors if exposed is None else exposed, blocked=blocked and padded is None
        )
        give_back_memory()
        self._outputs = {name: self._blocked[name].output if name in self._blocked else name for name in self._fetched}
        self._carried = 0
        self._specs: dict[Signature, dict[str, ArraySpec] | None] = {}
        self._memories: SimpleQueue[Memory] = SimpleQueue()

    def batches(self) -> Iterator[CalibrationBatch]:
        """Start reading the stream."""
        return iter(self._batches)

    def activations(self) -> Iterator[Activations]:
        """Run the model over the stream, one batch after the other.

        Raises:
            InferenceError: a batch does not fit the model, or ONNX Runtime failed on it; the batch is named.
        """
        return (self.run(index, batch) for index, batch in enumerate(self._batches))

    def run(self, index: int, batch: CalibrationBatch) -> Activations:
        """Run the model on one batch. May be called from several threads at once.

        Args:
            index: of the batch, counted from 0 in this stream.
            batch: what is fed.

        Returns:
            The activations.

        Raises:
            InferenceError: the batch does not fit the model, or ONNX Runtime failed on it; the batch is named.
        """
        parts: list[Activations] = []
        self._run_group(index, [batch], parts.append, layout=None)
        found = {name: value for part in parts for name, value in part.values.items()}
        last = parts[-1]
        return Activations(
            last.batch, last.samples, {name: found[name] for name in self.tensors}, input_shapes=last.input_shapes
        )

    @property
    def group_size(self) -> int:
        """Number of batches that are best run together: as many as there is room for what they carry between pieces."""
        return max(1, min(_LARGEST_GROUP, _GROUP_BYTES // max(1, self._carried)))

    def run_group(self, first: int, batches: Sequence[CalibrationBatch], take: Callable[[Activations], None]) -> None:
        """Run the model on consecutive batches, piece by piece. May be called from several threads at once.

        Args:
            first: index of the first batch, counted from 0 in this stream.
            batches: what is fed.
            take: is handed the activations; see `calibrators.protocols.GroupedSource`.

        Raises:
            InferenceError: a batch does not fit the model, or ONNX Runtime failed on it; the batch is named.
        """
        try:
            memory = self._memories.get_nowait()
        except Empty:
            memory = Memory()
        try:
            self._run_group(first, batches, take, self._layout(batches, memory))
        finally:
            self._memories.put(memory)

    def _run_group(
        self,
        first: int,
        batches: Sequence[CalibrationBatch],
        take: Callable[[Activations], None],
        layout: Layout | None,
    ) -> None:
        runs = [_Run(self._first + first + k, batch, dict(batch.feeds)) for k, batch in enumerate(batches)]
        if layout is not None:
            for k, run in enumerate(runs):
                run.values |= layout.carried(k)
        wrong: Exception | None = None
        for number, piece in enumerate(self._pieces):
            for k, run in enumerate(runs):
                try:
                    if number == 0:
                        check_feeds(f"batch {run.index}", self._inputs, run.batch.feeds)
                        self._take_inputs(run, take)
                    found = None if layout is None else self._run_in(layout, number, k, run)
                    if found is None:
                        layout = None
                        found = self._run_piece(piece, run)
                    take(found)
                except Exception as error:
                    # The batches before go on: if one of them is wrong, too, it is the one to report.
                    wrong = error
                    del runs[k:]
                    break
        if wrong is not None:
            raise wrong
        for run in runs:
            if run.specs and len(self._specs) < _MOST_SHAPES:
                self._specs.setdefault(signature_of(run.batch.feeds), run.specs)

    def _layout(self, batches: Sequence[CalibrationBatch], memory: Memory) -> Layout | None:
        """Return where the arrays of a group of batches belong; None where their shapes are not known, or differ."""
        signatures = {signature_of(batch.feeds) for batch in batches}
        signature = signatures.pop()
        specs = self._specs.get(signature)
        if signatures or specs is None:
            return None
        return memory.find(signature, len(batches)) or memory.keep(
            signature,
            len(batches),
            Layout(
                self._pieces,
                specs,
                self._outputs,
                self._blocked,
                frozenset(self._input_names),
                len(batches),
                memory,
            ),
        )

    def _run_in(self, layout: Layout, number: int, slot: int, run: _Run) -> Activations | None:
        """Run a piece on a batch, in memory of its own; None if ONNX Runtime does not do it."""
        batch = run.batch
        try:
            done = layout.run(number, slot, batch.feeds)
        except Exception as error:  # ONNX Runtime raises its own classes, which share no base
            # The shape of an output may depend on the values: then it is run without given memory from now on. If the
            # batch is at fault, that will tell.
            _log.debug("batch %d in given memory: %s", run.index, error)
            self._specs[signature_of(batch.feeds)] = None
            return None
        if self._padded is not None or batch.samples < (_rows(batch.feeds) or 0):
            return self._activations(run, self._real_values(done.arrays, batch))
        return self._activations(run, done.values(), done.buffers)

    def _take_inputs(self, run: _Run, take: Callable[[Activations], None]) -> None:
        fed = {name: np.asarray(run.batch.feeds[name]) for name in self.tensors if name in self._input_names}
        if fed:
            take(self._activations(run, self._real(fed, run.batch)))

    def _run_piece(self, piece: Piece, run: _Run) -> Activations:
        batch = run.batch
        try:
            feeds = {name: run.values[name] for name in piece.inputs}
            values = piece.session.run(piece.outputs, feeds) if piece.outputs else []
        except Exception as error:  # ONNX Runtime raises its own classes, which share no base
            line = " ".join(str(error).split())[:300]
            raise InferenceError(f"Calibration of {self._path.name} failed in batch {run.index}: {line}") from error
        computed = dict(zip(piece.outputs, values, strict=True))
        run.note(computed)
        run.values |= computed
        run.values = {name: value for name, value in run.values.items() if name in piece.later or name in batch.feeds}
        self._carried = max(self._carried, sum(value.nbytes for value in run.values.values()))
        found = {name: computed[output] for name, output in self._outputs.items() if output in computed}
        return self._activations(run, self._real_values(found, batch))

    def _activations(self, run: _Run, values: dict[str, Array], buffers: Buffers | None = None) -> Activations:
        shapes = {name: value.shape for name, value in run.batch.feeds.items()}
        return Activations(run.index, run.batch.samples, values, shapes, buffers)

    def _real_values(self, found: dict[str, Array], batch: CalibrationBatch) -> dict[str, Array]:
        """Leave out what fills up sequences, the batch, and blocks of channels."""
        found = self._real(found, batch)
        return found | {
            name: real_values(found[name], blocked.channels) for name, blocked in self._blocked.items() if name in found
        }

    def _real(self, found: dict[str, Array], batch: CalibrationBatch) -> dict[str, Array]:
        """Leave out what fills up sequences, and the batch."""
        padded: dict[str, Array] = {}
        if self._padded is not None:
            real = self._padded.real(batch.feeds, batch.extras, batch.samples)
            padded = {
                name: self._padded.without(name, value, real)
                for name, value in found.items()
                if name in self._padded.roles
            }
        rows = _rows(batch.feeds)
        if rows is not None and batch.samples < rows:
            found = {
                name: self._real_rows(name, value, batch.samples, rows)
                for name, value in found.items()
                if name not in padded
            }
        return found | padded

    def producer(self, tensor: str) -> str:
        """Name the node that produces `tensor`."""
        return "model input" if tensor in self._input_names else f"node {self._producers.get(tensor, '?')!r}"

    def _open(self, prepared: PreparedModel, exposed: Sequence[str], *, blocked: bool) -> Sequence[Piece]:
        model = prepared.editable()
        present = {value.name for value in model.graph.output}
        added = [name for name in exposed if name not in self._input_names and name not in present]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
        # The optimised graph of a model of many gigabytes would be a copy of all of its weights on the disk.
        sensible = blocked and bool(self._fetched) and not (outside_bytes(model) and exceeds_one_file(model))
        found = open_blocked_session(model, self._fetched, threads=1) if sensible else None
        if found is None:
            return [whole(open_session(model, execution="native", threads=1), self._fetched)]
        self._blocked = found.blocked
        return found.pieces

    def _real_rows(self, name: str, value: Array, samples: int, rows: int) -> Array:
        real = real_shape(name, value.shape, samples, rows, fed=name in self._input_names)
        return value[: real[0]] if real else value


@dataclass(slots=True)
class _Run:
    """A batch on its way through the pieces.

    Attributes:
        index: of the batch, counted from 0 in the whole stream.
        batch: what is fed.
        values: what the pieces to come may read.
        specs: of what the pieces handed out; None if some of it cannot be written to given memory.
    """

    index: int
    batch: CalibrationBatch
    values: dict[str, Array]
    specs: dict[str, ArraySpec] | None = field(default_factory=dict)

    def note(self, computed: Mapping[str, Array]) -> None:
        """Keep the specs of what a piece has handed out."""
        found = specs_of(computed)
        self.specs = None if self.specs is None or found is None else self.specs | found


def real_shape(name: str, shape: tuple[int, ...], samples: int, rows: int, *, fed: bool) -> tuple[int, ...]:
    """Return the shape of a tensor without the padding of a fixed-size batch, which is at the end of its first axis.

    An axis of batch * n (merged by a reshape) keeps its order.

    Args:
        name: of the tensor.
        shape: with the padding.
        samples: number of real samples in the batch.
        rows: length of the batch.
        fed: whether the tensor is a model input.

    Raises:
        CalibrationError: its first axis is not the batch.
    """
    if not shape or (fed and shape[0] != rows):
        return shape  # it has no rows, so no padding either
    if shape[0] % rows:
        raise CalibrationError(
            f"Cannot keep the padding of the last batch out of {name!r}: its shape {shape} does not start "
            f"with the batch of {rows}. Give a number of samples that is a multiple of {rows}."
        )
    return (shape[0] // rows * samples, *shape[1:])


def _rows(feeds: Mapping[str, Array]) -> int | None:
    return next((value.shape[0] for value in feeds.values() if value.ndim), None)
