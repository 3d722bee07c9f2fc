"""Activations of a model, batch by batch, from ONNX Runtime. Implements `calibrators.protocols.ActivationSource`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx

from calibrators.errors import CalibrationError
from calibrators.protocols import Activations, Array, CalibrationBatch
from engines.blocked import Blocked, open_blocked_session, real_values
from engines.errors import InferenceError
from engines.graph import PreparedModel, float_activations, open_session
from engines.onnxrt import check_feeds, tensor_specs
from engines.placement_cpu import place_for_cpu
from engines.placement_tensorrt import place_for_tensorrt

if TYPE_CHECKING:
    import onnxruntime

_MOST_WORKERS = 8


def tensors_to_calibrate(prepared: PreparedModel, which: str = "quantized") -> list[str]:
    """Name the tensors whose statistics are collected, in graph order.

    "quantized": those that a placement for either target takes a scale from, and the graph's float inputs and outputs,
    which cost next to nothing and bound the FP16 range. "all": every float activation, for TensorRT's implicit path,
    which wants them all.

    Raises:
        CalibrationError: nothing in the graph can be quantized, or it is quantized already.
    """
    model = prepared.ir()
    every = float_activations(model)
    if which == "all":
        return every
    wanted = {*place_for_tensorrt(model).tensors, *place_for_cpu(model).tensors}
    if not wanted and any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph):
        raise CalibrationError(
            f"{str(prepared.path)!r} is quantized already: nothing that holds float weights is left in it. "
            "Calibrate the FP32 model that it was made from."
        )
    if not wanted:
        raise CalibrationError(
            f"{str(prepared.path)!r} holds no Conv, ConvTranspose, Gemm or MatMul with constant weights: there is "
            "nothing to quantize. Use --tensors all to calibrate its activations all the same."
        )
    wanted |= {value.name for value in [*model.graph.inputs, *model.graph.outputs] if value.name is not None}
    return [name for name in every if name in wanted]


def worker_count(threads: int | None) -> int:
    """Return how many batches are run at a time: as many as asked for, or one per usable core but no more than 8."""
    return threads or min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


class OnnxRuntimeActivations:
    """Runs the FP32 model once over a stream and hands out the named activations.

    The tensors become extra outputs of the graph; ONNX Runtime's graph optimization stays on, which is 1.6 to 3 times
    faster than calibrating without it, and changes no value beyond float rounding. Where it can, they are taken in ONNX
    Runtime's own layout, see `engines.blocked`.

    A run takes one thread, and several runs may go on at a time: two of them use two cores better than one run of two
    threads, and what is computed does not depend on their number. Implements `calibrators.protocols.ConcurrentSource`.

    Args:
        prepared: the model.
        tensors: names from `tensors_to_calibrate`.
        batches: the stream; consumed once. Its arrays must stay as they are until their batch is done.
        threads: number of runs at a time; None takes one per usable core, but no more than 8, as each of them holds the
            activations of a batch.
        exposed: tensors that are made outputs, `tensors` among them; None for those alone. Nodes are not fused across
            an output, so that for the same values to the bit the same tensors must be exposed.
        blocked: whether tensors may come in ONNX Runtime's layout, their values in another order and without a shape.
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
        first: int = 0,
    ) -> None:
        self.tensors = list(tensors)
        self.workers = worker_count(threads)
        self._first = first
        self._path = prepared.path
        self._batches = batches
        self._inputs, _ = tensor_specs(prepared.proto)
        self._input_names = {spec.name for spec in self._inputs}
        self._producers = {output: node.name for node in prepared.proto.graph.node for output in node.output}
        self._fetched = [name for name in self.tensors if name not in self._input_names]
        self._blocked: Mapping[str, Blocked] = {}
        self._session = self._open(prepared, self.tensors if exposed is None else exposed, blocked=blocked)
        self._outputs = {name: self._blocked[name].output if name in self._blocked else name for name in self._fetched}
        self._run_outputs = list(dict.fromkeys(self._outputs.values()))

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
        index += self._first
        check_feeds(f"batch {index}", self._inputs, batch.feeds)
        try:
            values = self._session.run(self._run_outputs, dict(batch.feeds)) if self._fetched else []
        except Exception as error:  # ONNX Runtime raises its own classes, which share no base
            line = " ".join(str(error).split())[:300]
            raise InferenceError(f"Calibration of {self._path.name} failed in batch {index}: {line}") from error
        computed = dict(zip(self._run_outputs, values, strict=True))
        found = {name: computed[output] for name, output in self._outputs.items()}
        found |= {name: np.asarray(batch.feeds[name]) for name in self.tensors if name in self._input_names}
        rows = _rows(batch.feeds)
        if rows is not None and batch.samples < rows:
            found = {name: self._real_rows(name, value, batch.samples, rows) for name, value in found.items()}
        found |= {name: real_values(found[name], blocked.channels) for name, blocked in self._blocked.items()}
        shapes = {name: value.shape for name, value in batch.feeds.items()}
        return Activations(index, batch.samples, {name: found[name] for name in self.tensors}, shapes)

    def producer(self, tensor: str) -> str:
        """Name the node that produces `tensor`."""
        return "model input" if tensor in self._input_names else f"node {self._producers.get(tensor, '?')!r}"

    def _open(self, prepared: PreparedModel, exposed: Sequence[str], *, blocked: bool) -> onnxruntime.InferenceSession:
        model = onnx.ModelProto()
        model.CopyFrom(prepared.proto)
        present = {value.name for value in model.graph.output}
        added = [name for name in exposed if name not in self._input_names and name not in present]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
        found = open_blocked_session(model, self._fetched, threads=1) if blocked and self._fetched else None
        if found is None:
            return open_session(model, execution="native", threads=1)
        self._blocked = found.blocked
        return found.session

    def _real_rows(self, name: str, value: Array, samples: int, rows: int) -> Array:
        """Cut the padding of a fixed-size batch away; an axis of batch * n (merged by a reshape) keeps its order."""
        if value.ndim == 0 or (name in self._input_names and value.shape[0] != rows):
            return value  # it has no rows, so no padding either
        if value.shape[0] % rows:
            raise CalibrationError(
                f"Cannot keep the padding of the last batch out of {name!r}: its shape {value.shape} does not start "
                f"with the batch of {rows}. Give a number of samples that is a multiple of {rows}."
            )
        return value[: value.shape[0] // rows * samples]


def _rows(feeds: Mapping[str, Array]) -> int | None:
    return next((value.shape[0] for value in feeds.values() if value.ndim), None)
