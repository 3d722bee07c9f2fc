"""Our runners as Polygraphy's, so that its `Comparator` runs ONNX files and engines alike, and they fail in our words.

Importing this module imports Polygraphy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from calibrators.protocols import Array
from engines.runner import Runner


class PolygraphyRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy ships no types
    """A `Runner` with the methods that Polygraphy calls on its own ones.

    Feeds and outputs are handed through as they are: nothing is copied, and nothing is cast as long as the feeds have
    the types and shapes of `runner.inputs`.

    Args:
        runner: the model; entered when Polygraphy activates this runner, and left when it deactivates it.
        name: the name under which Polygraphy keeps its outputs.
    """

    def __init__(self, runner: Runner, name: str) -> None:
        super().__init__(name=name)
        self._runner = runner

    def activate_impl(self) -> None:
        """Enter the runner."""
        self._runner.__enter__()

    def deactivate_impl(self) -> None:
        """Leave the runner."""
        self._runner.__exit__(None, None, None)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Describe the inputs as Polygraphy does."""
        metadata = TensorMetadata()
        for spec in self._runner.inputs:
            metadata.add(spec.name, dtype=DataType.from_dtype(spec.dtype, "numpy"), shape=spec.shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see `engines.runner.Runner.infer`."""
        start = time.perf_counter()
        outputs = self._runner.infer(feed_dict)
        self.inference_time = time.perf_counter() - start  # seconds
        return outputs
