"""Whether a model is measured on inputs that look like those it was calibrated on.

A forgotten division by 255, another normalisation, BGR for RGB: nothing fails, and every figure is wrong. So a model
that was made with a calibration carries mean, deviation and range of its inputs in its metadata, an engine in its
sidecar, and what measures them compares. One model that tells serves all that are fed the same data.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from calibrators.input_statistics import Inputs, InputStatistics, merge_inputs, statistics_of_feeds
from calibrators.protocols import Array
from engines.runner import Runner
from trt_int8.data import DataBatch

_log = logging.getLogger(__name__)

INPUTS_KEY = "trt_int8.input_statistics"
"""Metadata key of models that were made with a calibration: what was fed in it, as JSON."""

GROSS_RATIO = 3.0
"""Deviations further apart than this factor are no matter of the choice of samples."""

GROSS_SHIFT = 1.0
"""Nor are means further apart than this part of the larger deviation."""

_CHANNELS = 3
_LEAST_SAMPLES = 16
_LEAST_SPREAD = 0.1
"""Means of the first and last channel closer than this part of the deviation say nothing about their order."""

_KNOWN_FACTOR = 255.0
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What one input was fed, in a few numbers.

    Attributes:
        mean: of all values.
        deviation: their standard deviation.
        minimum: the smallest.
        maximum: the largest.
        channels: the mean of each channel of an image; empty for other inputs.
    """

    mean: float
    deviation: float
    minimum: float
    maximum: float
    channels: tuple[float, ...]

    def __str__(self) -> str:
        """Give `mean 0.449 and deviation 0.226 in [0, 1]`."""
        return f"mean {self.mean:.3g} and deviation {self.deviation:.3g} in [{self.minimum:.3g}, {self.maximum:.3g}]"


def summarize_input(statistics: InputStatistics) -> InputSummary:
    """Return the numbers of one input."""
    overall = statistics.overall
    channels = [channel.mean for channel in statistics.channels] if len(statistics.channels) > 1 else []
    return InputSummary(overall.mean, overall.deviation, overall.minimum, overall.maximum, tuple(channels))


def summary_text(inputs: Inputs) -> str:
    """Return what a model's metadata hold of its calibration inputs: JSON with six digits."""
    return json.dumps(
        {name: _rounded(asdict(summarize_input(statistics))) for name, statistics in inputs.items()}, sort_keys=True
    )


def note_inputs(model: onnx.ModelProto, inputs: Inputs) -> None:
    """Write into a model's metadata, in place, what it was fed in calibration; nothing where that is not known."""
    if not inputs:
        return
    entries = {entry.key: entry.value for entry in model.metadata_props} | {INPUTS_KEY: summary_text(inputs)}
    onnx.helper.set_model_props(model, entries)


def read_summary(metadata: Mapping[str, str]) -> dict[str, InputSummary]:
    """Return what a model says of its calibration inputs; nothing where it does not, or not in these words."""
    try:
        values = json.loads(metadata.get(INPUTS_KEY, "{}"))
        return {
            str(name): InputSummary(
                float(entry["mean"]),
                float(entry["deviation"]),
                float(entry["minimum"]),
                float(entry["maximum"]),
                tuple(float(mean) for mean in entry["channels"]),
            )
            for name, entry in values.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _log.warning("The metadata %s cannot be read (%s): inputs are not compared with it", INPUTS_KEY, error)
        return {}


class InputWatch:
    """Looks at the batches that models are fed, and says which differ grossly from their calibration's.

    Args:
        models: those whose metadata tell of their calibration; others are passed over.
    """

    def __init__(self, models: Sequence[Runner]) -> None:
        told = {model.name: read_summary(getattr(model, "metadata", {})) for model in models}
        self._told = {name: summaries for name, summaries in told.items() if summaries}
        self._seen: Inputs = {}
        self._samples = 0

    def batches(self, batches: Iterable[DataBatch]) -> Iterator[DataBatch]:
        """Pass batches on, and look at them."""
        for batch in batches:
            self.look(batch.feeds, batch.samples)
            yield batch

    def look(self, feeds: Mapping[str, Array], samples: int) -> None:
        """Look at one batch; rows beyond `samples` fill it up."""
        if self._told:
            self._seen = merge_inputs(self._seen, statistics_of_feeds(feeds, samples))
            self._samples += samples

    def warnings(self) -> tuple[str, ...]:
        """Return one sentence for each input that looks different; models that were told the same share it."""
        found: dict[tuple[str, InputSummary], list[str]] = {}
        for model, summaries in self._told.items():
            for name, told in summaries.items():
                if name in self._seen:
                    found.setdefault((name, told), []).append(model)
        sentences = []
        for (name, told), models in found.items():
            seen = summarize_input(self._seen[name])
            difference = gross_difference(told, seen, self._samples)
            if difference is not None:
                sentences.append(
                    f"input {name!r} looks unlike what {', '.join(models)} was calibrated on: {seen} here, {told} "
                    f"there{difference}. Check the preprocessing; figures of other inputs say nothing about the model"
                )
        return tuple(sentences)


def gross_difference(told: InputSummary, seen: InputSummary, samples: int) -> str | None:
    """Return what the numbers suggest (or nothing), where two inputs differ grossly; None where they do not.

    Args:
        told: what was fed in calibration.
        seen: what is fed now.
        samples: number of samples of the latter.
    """
    low, high = sorted((told.deviation, seen.deviation))
    if high == 0:
        same = math.isclose(told.mean, seen.mean, rel_tol=1e-3, abs_tol=1e-6)
        return None if same else ""
    if high > GROSS_RATIO * low or abs(seen.mean - told.mean) > GROSS_SHIFT * high:
        ratio = seen.deviation / told.deviation if low else 0.0
        if math.isclose(ratio, _KNOWN_FACTOR, rel_tol=0.5):
            return f" (about {ratio:.0f} times as wide: a division by 255 may have been forgotten)"
        if ratio and math.isclose(1 / ratio, _KNOWN_FACTOR, rel_tol=0.5):
            return f" (about 1/{1 / ratio:.0f} as wide: a division by 255 may be done twice)"
        return ""
    if _swapped(told, seen, samples):
        means = [", ".join(f"{mean:.3g}" for mean in part.channels) for part in (seen, told)]
        return f" (means of the channels {means[0]} and {means[1]}: their order may be swapped, BGR for RGB)"
    return None


def _swapped(told: InputSummary, seen: InputSummary, samples: int) -> bool:
    """Tell whether the first and the last of three channels have changed places.

    Only their difference is looked at: what all channels share, such as brightness, varies much more between samples.
    """
    if len(told.channels) != _CHANNELS or len(seen.channels) != _CHANNELS or samples < _LEAST_SAMPLES:
        return False
    before, now = (part.channels[0] - part.channels[-1] for part in (told, seen))
    return abs(before) > _LEAST_SPREAD * told.deviation and abs(now + before) < 0.5 * abs(before)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}")
