"""A reference model and its quantized candidates on the same data: how often each is right, and how far they differ.

Polygraphy's `Comparator` runs the models, ONNX files and engines alike, all of them at once, one batch after the other,
and hands each batch's outputs over before it takes the next; so memory does not grow with the data. Figures come from
the whole data (`trt_int8.metrics`), Polygraphy's own verdict from its first batches (`trt_int8.polygraphy_files`).
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrators.protocols import Array, Batch, Track, untracked
from engines.onnxrt import check_feeds
from engines.runner import Runner, TensorSpec
from trt_int8.errors import DataError, InferenceError, ModelError
from trt_int8.feeds import batch_input
from trt_int8.input_alarm import InputWatch
from trt_int8.metrics import AgreementMeter, Difference, DifferenceMeter, LabelMeter, class_axis
from trt_int8.polygraphy_files import PolygraphyCheck, Recording, quiet_polygraphy
from trt_int8.shared_inputs import check_profile

if TYPE_CHECKING:
    from polygraphy.comparator import RunResults

    from trt_int8.data import DataBatch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    """How one model did on the data.

    Attributes:
        name: the runner's name.
        execution: "exact" or "native", see `engines.runner.Runner`.
        simulated: whether another machine's model was only simulated here.
        samples: number of samples.
        top1: samples whose label has the largest logit, per cent; None without labels.
        top5: samples whose label is among the five largest logits, per cent; None without labels.
    """

    name: str
    execution: str
    simulated: bool
    samples: int
    top1: float | None
    top5: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "name": self.name,
            "samples": self.samples,
            "top1": self.top1,
            "top5": self.top5,
            "execution": self.execution,
            "simulated": self.simulated,
        }


@dataclass(frozen=True, slots=True)
class CandidateAccuracy:
    """How one candidate did, and how far it lies from the reference.

    Attributes:
        scores: against the labels.
        agreement: positions where it decides as the reference does, per cent; None for a model that decides nothing.
        difference: over all float outputs together.
        outputs: the same for each float output.
    """

    scores: Scores
    agreement: float | None
    difference: Difference
    outputs: dict[str, Difference]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, in the shape of `accuracy.json`'s candidates."""
        return {
            **self.scores.to_json(),
            "agreement": self.agreement,
            **self.difference.to_json(),
            "outputs": {name: difference.to_json() for name, difference in self.outputs.items()},
        }


@dataclass(frozen=True, slots=True)
class AccuracyResult:
    """A comparison.

    Attributes:
        reference: the reference's own scores.
        candidates: one row per candidate, in the order given.
        labels: name of the array of labels; None without.
        batches: number of batches.
        polygraphy: Polygraphy's verdicts on the first `polygraphy_batches` batches.
        polygraphy_batches: number of batches that it judged.
        warnings: what speaks against the figures, one sentence each: data unlike those of the calibration.
    """

    reference: Scores
    candidates: tuple[CandidateAccuracy, ...]
    labels: str | None
    batches: int
    polygraphy: tuple[PolygraphyCheck, ...]
    polygraphy_batches: int
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: the content of `accuracy.json`."""
        return {
            "reference": self.reference.name,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "reference_scores": self.reference.to_json(),
            "labels": self.labels,
            "batches": self.batches,
            "polygraphy": {
                "batches": self.polygraphy_batches,
                "checks": [check.to_json() for check in self.polygraphy],
            },
            "warnings": list(self.warnings),
        }


def compare(
    reference: Runner,
    candidates: Sequence[Runner],
    batches: Iterable[DataBatch],
    *,
    labels: str | None = None,
    total: int | None = None,
    save_to: str | os.PathLike[str] | None = None,
    track: Track = untracked,
) -> AccuracyResult:
    """Compare `candidates` with `reference` on the same batches, in one pass.

    Rows that only fill up a fixed batch are left out of every figure.
    The arg-max and the labels look at the first float output of rank 2 or more that has at least two classes; labels
    need it to have the shape (samples, classes). Integer and boolean outputs are not compared.

    Args:
        reference: the model that the others are measured against. Runners need not be entered.
        candidates: the other models; with the same inputs and outputs.
        batches: the data.
        labels: name of the array in `DataBatch.extras` that holds one class per sample; None for none.
        total: number of batches where it is known, for the progress.
        save_to: a run's folder, which gets `polygraphy/`; None writes nothing.
        track: shows the progress.

    Raises:
        ModelError: a candidate has other outputs than the reference, or ONNX Runtime refuses a model.
        EngineLoadError: an engine cannot be loaded here.
        DataError: no data, or labels that are missing or do not fit the model.
        InferenceError: a model does not take the data, or fails on it; named with the batch.
        FileAccessError: the folder cannot be written to.
    """
    models = [reference, *candidates]
    for candidate in candidates:
        _check_outputs(reference, candidate)
    if labels is not None:
        check_classifies(reference, labels)
    if not any(_is_float(spec) for spec in reference.outputs):
        _log.warning("%s has no float output: nothing can be compared but whether the models run", reference.name)
    meters = _Meters(reference, len(candidates), labels)
    recording = Recording(models)
    watch = InputWatch(models)
    count = 0
    # Closed at once when something goes wrong in the loop, so that Polygraphy leaves its runners and its logger behind.
    with closing(_run(models, recording.names, track(watch.batches(batches), "compare", total))) as outputs:
        for batch, results in outputs:
            rows = _rows_fed(batch, reference)
            meters.update(batch, [_real_rows(batch, rows, iterations[0]) for _, iterations in results])
            recording.add(batch.feeds, results)
            count += 1
    if not count:
        raise DataError("Cannot compare: the data gave no batches; expected at least one.")
    if save_to is not None:
        recording.write(save_to)
    scores = [meters.scores(model, index) for index, model in enumerate(models)]
    return AccuracyResult(
        reference=scores[0],
        candidates=tuple(meters.accuracy(index, scores[index]) for index in range(1, len(models))),
        labels=labels,
        batches=count,
        polygraphy=recording.check(),
        polygraphy_batches=recording.batches,
        warnings=watch.warnings(),
    )


def _run(
    models: Sequence[Runner], names: Sequence[str], batches: Iterable[DataBatch]
) -> Generator[tuple[DataBatch, RunResults], None, None]:
    """Yield each batch with what the models made of it; valid until the next one is asked for."""
    # Polygraphy imports torch at its first inference, and takes a Ctrl-C in that second for a missing package.
    import torch  # noqa: F401
    from polygraphy.comparator import Comparator
    from polygraphy.exception import PolygraphyException

    from trt_int8.polygraphy_runner import PolygraphyRunner

    runners = [PolygraphyRunner(model, name) for model, name in zip(models, names, strict=True)]
    # Polygraphy draws its inputs from here, after this loop has read them: what goes wrong in the data is raised
    # unwrapped, and no batch outlives its turn (itertools.tee keeps up to 57).
    drawn: deque[Batch] = deque()
    inputs = iter(drawn.popleft, None)
    with quiet_polygraphy(), closing(Comparator.run(runners, data_loader=inputs, streaming=True)) as stream:
        for batch in batches:
            try:
                for model in models:
                    # Before the first model is loaded, and before Polygraphy would cast and reshape what does not fit.
                    check_feeds(model.name, model.inputs, batch.feeds)
                    check_profile(model, {name: value.shape for name, value in batch.feeds.items()})
                drawn.append(batch.feeds)
                results = next(stream)
            except InferenceError as error:
                raise InferenceError(f"Cannot compare on batch {batch.index}: {error}") from error
            except PolygraphyException as error:
                raise InferenceError(
                    f"Cannot compare on batch {batch.index}: Polygraphy failed: {' '.join(str(error).split())}"
                ) from error
            yield batch, results


class _Meters:
    """All the figures of one comparison, in the making."""

    def __init__(self, reference: Runner, candidates: int, labels: str | None) -> None:
        self._labels = labels
        self._floats = [spec.name for spec in reference.outputs if _is_float(spec)]
        self._differences = [{name: DifferenceMeter() for name in self._floats} for _ in range(candidates)]
        self._agreements = [AgreementMeter() for _ in range(candidates)]
        self._right = [LabelMeter() for _ in range(candidates + 1)]
        self._decisive: str | None = None
        self._samples = 0

    def update(self, batch: DataBatch, outputs: Sequence[dict[str, Array]]) -> None:
        """Add one batch: its real rows out of every model, the reference's first."""
        reference, *candidates = outputs
        if self._samples == 0:
            self._decisive = next((name for name in self._floats if _decides(reference[name])), None)
        for name in self._floats:
            for meters, candidate in zip(self._differences, candidates, strict=True):
                if candidate[name].shape != reference[name].shape:
                    raise InferenceError(
                        f"Cannot compare output {name!r} on batch {batch.index}: a candidate gives the shape "
                        f"{candidate[name].shape}, the reference {reference[name].shape}. Outputs whose shape depends "
                        "on the values have no common positions; export the model without its last selection."
                    )
                meters[name].update(reference[name], candidate[name], batch.samples)
        if self._decisive is not None:
            for agreement, candidate in zip(self._agreements, candidates, strict=True):
                agreement.update(reference[self._decisive], candidate[self._decisive])
        if self._labels is not None:
            classes = self._read_labels(batch, reference)
            for right, output in zip(self._right, outputs, strict=True):
                right.update(output[str(self._decisive)], classes)
        self._samples += batch.samples

    def scores(self, model: Runner, index: int) -> Scores:
        """Return the scores of the model of this index; 0 is the reference."""
        right = self._right[index] if self._labels is not None else None
        return Scores(
            name=model.name,
            execution=model.execution,
            simulated=model.simulated,
            samples=self._samples,
            top1=None if right is None else right.top1(),
            top5=None if right is None else right.top5(),
        )

    def accuracy(self, index: int, scores: Scores) -> CandidateAccuracy:
        """Return the row of the candidate of this index, counted from 1."""
        meters = self._differences[index - 1]
        return CandidateAccuracy(
            scores=scores,
            agreement=None if self._decisive is None else self._agreements[index - 1].percent(),
            difference=DifferenceMeter.total(meters.values()).result(),
            outputs={name: meter.result() for name, meter in meters.items()},
        )

    def _read_labels(self, batch: DataBatch, reference: dict[str, Array]) -> NDArray[np.integer[Any]]:
        name = str(self._labels)
        if name not in batch.extras:
            raise DataError(
                f"Cannot score against the labels {name!r}: batch {batch.index} holds no such array; "
                f"beside the inputs it holds {', '.join(sorted(batch.extras)) or 'nothing'}."
            )
        logits = None if self._decisive is None else reference[self._decisive]
        if logits is None or logits.ndim != 2:
            found = "none" if logits is None else f"{self._decisive!r} of shape {logits.shape}"
            raise DataError(
                f"Cannot score against the labels {name!r}: they need an output of shape (samples, classes); "
                f"the first that classifies is {found}. Compare without labels."
            )
        labels = batch.extras[name]
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (batch.samples,):
            raise DataError(
                f"Cannot score against the labels {name!r}: batch {batch.index} holds {labels.dtype.name} "
                f"{batch.extras[name].shape}; expected one integer per sample, ({batch.samples},)."
            )
        outside = np.flatnonzero((labels < 0) | (labels >= logits.shape[1]))
        if outside.size:
            raise DataError(
                f"Cannot score against the labels {name!r}: sample {self._samples + outside[0]} has the label "
                f"{labels[outside[0]]}; output {self._decisive!r} has the classes 0 to {logits.shape[1] - 1}."
            )
        return labels


def check_classifies(model: Runner, labels: str) -> None:
    """Check that a model may have an output that labels can be compared with, as far as the graph states the shapes.

    Args:
        model: the reference; it need not be entered.
        labels: name of the array of labels, for the message.

    Raises:
        DataError: no float output has an axis of at least two classes.
    """
    for spec in model.outputs:
        if not _is_float(spec):
            continue
        if spec.shape is None:
            return
        classes = spec.shape[class_axis(len(spec.shape))] if len(spec.shape) >= 2 else 1
        if not isinstance(classes, int) or classes >= 2:
            return
    found = "; ".join(str(spec) for spec in model.outputs)
    raise DataError(
        f"Cannot score against the labels {labels!r}: they need a float output of shape (samples, classes), and the "
        f"outputs of {model.name} are {found}. Leave the labels out to compare outputs only."
    )


def _check_outputs(reference: Runner, candidate: Runner) -> None:
    expected = [spec.name for spec in reference.outputs]
    found = [spec.name for spec in candidate.outputs]
    if set(expected) != set(found):
        raise ModelError(
            f"Cannot compare {candidate.name} with {reference.name}: its outputs are {', '.join(found)}; "
            f"expected {', '.join(expected)}. Compare two forms of the same model."
        )


def _is_float(spec: TensorSpec) -> bool:
    return np.issubdtype(spec.dtype, np.floating)


def _decides(output: Array) -> bool:
    return output.ndim >= 2 and output.shape[class_axis(output.ndim)] >= 2


def _rows_fed(batch: DataBatch, model: Runner) -> int:
    """Count the rows of a batch, those that fill it up included."""
    leader = batch_input(model.inputs)
    return batch.samples if leader is None else len(batch.feeds[leader.name])


def _real_rows(batch: DataBatch, rows: int, outputs: Any) -> dict[str, Array]:
    """Cut away what rows that fill up a fixed batch became; an output without that batch axis stays whole."""
    return {
        name: value[: batch.samples] if value.ndim and len(value) == rows else value for name, value in outputs.items()
    }
