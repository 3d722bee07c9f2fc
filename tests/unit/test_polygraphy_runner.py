"""Our runners behind Polygraphy's interface: nothing is copied, cast or wrapped on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from polygraphy.comparator import Comparator
from polygraphy.datatype import DataType

from engines.runner import TensorSpec
from trt_int8.errors import InferenceError
from trt_int8.polygraphy_files import quiet_polygraphy
from trt_int8.polygraphy_runner import PolygraphyRunner

X = np.array([[1.0, 2.0]], np.float32)


def stream(*runners: PolygraphyRunner, feeds: Any = X) -> Any:
    """Run one batch through Polygraphy, as a comparison does."""
    return Comparator.run(runners, data_loader=iter([{"x": feeds}]), streaming=True)


def test_arrays_are_handed_through_as_they_are(fake_runner: Any) -> None:
    """The model is fed the very array, and the very array that it returned comes out."""
    fed, given = [], np.zeros((1, 2), np.float32)

    def function(x: Any) -> Any:
        fed.append(x)
        return given

    with quiet_polygraphy():
        (result,) = stream(PolygraphyRunner(fake_runner("a", function), "first"))

    ((name, (iteration,)),) = result
    assert name == iteration.runner_name == "first"
    assert fed == [X]
    assert fed[0] is X
    assert iteration["y"] is given
    assert iteration.runtime >= 0


def test_the_model_is_open_while_polygraphy_runs_it(fake_runner: Any) -> None:
    """It is entered with Polygraphy's runner and left with it, also where the stream is given up."""
    runner = fake_runner()
    with quiet_polygraphy():
        running = stream(PolygraphyRunner(runner, "a"))
        next(running)
        assert runner._entered
        running.close()
    assert not runner._entered


@pytest.mark.parametrize("error", [InferenceError("in our words"), KeyboardInterrupt()])
def test_errors_pass_as_they_are(fake_runner: Any, error: BaseException) -> None:
    """What a model raises is neither wrapped nor swallowed, and the model is left."""

    def fail(_: Any) -> Any:
        raise error

    runner = fake_runner("a", fail)
    with quiet_polygraphy(), pytest.raises(type(error)) as caught:
        list(stream(PolygraphyRunner(runner, "a")))
    assert caught.value is error
    assert not runner._entered


def test_inputs_are_described_as_the_model_has_them(fake_runner: Any) -> None:
    """Types and fixed lengths are the runner's own; symbols and unknown lengths are dynamic."""
    runner = fake_runner()
    runner.inputs = (
        TensorSpec("half", np.dtype(np.float16), ("batch", 3)),
        TensorSpec("ids", np.dtype(np.int64), (None, 7)),
    )
    with PolygraphyRunner(runner, "a") as active:
        found = active.get_input_metadata(use_numpy_dtypes=False)

    assert [(name, meta.dtype) for name, meta in found.items()] == [("half", DataType.FLOAT16), ("ids", DataType.INT64)]
    assert [tuple(meta.shape) for meta in found.values()] == [("batch", 3), (None, 7)]
