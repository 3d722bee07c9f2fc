"""The data of a run: what each is used for, whether they fit the model, and what tells them from others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from calibrators.calibration import InputShapes
from engines.onnxrt import OnnxRuntimeRunner
from engines.padding import Padding
from engines.profiles import batch_axes, free_axes
from engines.runner import TensorSpec
from trt_int8.accuracy import check_classifies
from trt_int8.auto import MAX_SAMPLES
from trt_int8.config import RunConfig
from trt_int8.data import BatchSource, open_data, padding_from

Use = Literal["calibration", "held_back", "evaluation"]


class RunData:
    """Opens the data that a configuration names, each for its use.

    Args:
        config: the configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._identities: dict[Use, str | None] = {}

    @property
    def held_back(self) -> str:
        """The data that `auto` chooses by: never those that accuracy is reported on."""
        return self._config.data.held_back or self._config.data.calibration

    @property
    def evaluation(self) -> str:
        """The data that accuracy is reported on, and that is timed."""
        return self._config.data.evaluation or self._config.data.calibration

    def open_evaluation(self, inputs: Sequence[TensorSpec], *, batch_size: int | None) -> BatchSource:
        """Open the data that accuracy is reported on, as far as the configuration wants them judged."""
        limit = self._config.accuracy.max_samples
        return self._open(
            self.evaluation,
            inputs,
            batch_size=batch_size,
            max_batches=None if limit is None else max(1, limit // (batch_size or 1)),
            label=self._config.data.labels,
        )

    def judged_shapes(self, inputs: Sequence[TensorSpec]) -> InputShapes:
        """Read which shapes the models will be judged on, where the model has free axes beside the batch.

        Args:
            inputs: the model's inputs.

        Returns:
            Model input to its shapes, each with its number of batches; nothing where only the batch is free.
        """
        if all(set(free_axes(spec)) <= batch_axes(spec, inputs) for spec in inputs):
            return {}
        data, accuracy = self._config.data, self._config.accuracy
        shapes: dict[str, Counter[tuple[int, ...]]] = {spec.name: Counter() for spec in inputs}
        for batch in self.open_evaluation(inputs, batch_size=accuracy.batch_size or data.batch_size):
            for name, value in batch.feeds.items():
                shapes[name][value.shape] += 1
        return shapes

    def check(self, model: OnnxRuntimeRunner) -> list[str]:
        """Open all the data, before the first slow stage.

        Args:
            model: the exported model; it need not be entered.

        Returns:
            The data that nothing tells apart from others: code without a `data_id`.

        Raises:
            DataError: some of the data do not fit the model, or the model does not fit labels.
        """
        data = self._config.data
        if data.labels is not None:
            check_classifies(model, data.labels)
        sources: dict[Use, BatchSource] = {
            "calibration": self._open(
                data.calibration,
                model.inputs,
                batch_size=data.batch_size,
                max_batches=data.max_batches,
                padding=padding_from(data.padding_mask, data.lengths),
            ),
            # `auto` reads so many samples at most, and a batch holds at least one.
            "held_back": self._open(self.held_back, model.inputs, batch_size=None, max_batches=MAX_SAMPLES),
            "evaluation": self.open_evaluation(model.inputs, batch_size=data.batch_size),
        }
        self._identities = {use: source.data_hash for use, source in sources.items()}
        return list(dict.fromkeys(source.description for source in sources.values() if source.data_hash is None))

    def identified(self, key: Mapping[str, Any], *uses: Use) -> dict[str, Any] | None:
        """Add the identity of data to a stage's key; None where they have none, so that the stage is run again."""
        identities = {use: self._identities[use] for use in uses}
        return None if None in identities.values() else {**key, "data_identity": identities}

    def _open(
        self,
        spec: str,
        inputs: Sequence[TensorSpec],
        *,
        batch_size: int | None,
        max_batches: int | None,
        label: str | None = None,
        padding: Padding | None = None,
    ) -> BatchSource:
        data = self._config.data
        return open_data(
            spec,
            inputs,
            batch_size=batch_size,
            max_batches=max_batches,
            preprocessing=data.preprocessing_for(spec),
            data_id=data.data_id,
            label=label,
            padding=padding,
        )
