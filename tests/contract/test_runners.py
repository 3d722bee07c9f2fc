"""What every `engines.runner.Runner` promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from calibrators.protocols import Array
from engines.errors import InferenceError
from engines.onnxrt import OnnxRuntimeRunner
from engines.runner import Runner


@dataclass(frozen=True)
class Case:
    runner: Runner
    expected: Any  # computes what the runner must give for its feeds, by other means

    def feeds(self, batch: int, seed: int = 0) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {
            spec.name: rng.normal(size=[batch if isinstance(axis, str) else axis for axis in spec.shape]).astype(
                spec.dtype
            )
            for spec in self.runner.inputs
        }


@pytest.fixture(params=["onnxruntime exact", "onnxruntime native", "fake"])
def case(request: pytest.FixtureRequest, tiny_model: Path, fake_runner: Any) -> Case:
    if request.param == "fake":
        return Case(fake_runner(), lambda feeds: {"y": -feeds["x"]})
    reference = ReferenceEvaluator(onnx.load(tiny_model))
    return Case(
        OnnxRuntimeRunner(tiny_model, execution=request.param.split()[1]),
        lambda feeds: {"logits": reference.run(["logits"], dict(feeds))[0]},
    )


def test_describes_itself_before_it_is_entered(case: Case) -> None:
    """Name, execution, simulated, inputs and outputs are there without a session."""
    runner = case.runner

    assert runner.name
    assert runner.execution in {"exact", "native"}
    assert runner.simulated is False
    assert [spec.shape[0] for spec in (*runner.inputs, *runner.outputs)] == ["batch", "batch"]


@pytest.mark.parametrize("batch", [1, 3])
def test_gives_the_right_values(case: Case, batch: int) -> None:
    """The outputs are named and typed as announced, and equal those of an independent computation."""
    feeds = case.feeds(batch)

    with case.runner as runner:
        outputs = runner.infer(feeds)

    assert list(outputs) == [spec.name for spec in runner.outputs]
    for spec in runner.outputs:
        assert outputs[spec.name].dtype == spec.dtype
        np.testing.assert_allclose(outputs[spec.name], case.expected(feeds)[spec.name], rtol=1e-5, atol=1e-5)


def test_entering_gives_the_runner_itself(case: Case) -> None:
    """`with runner as r` binds the same object."""
    with case.runner as entered:
        assert entered is case.runner


def test_leaves_the_feeds_alone(case: Case) -> None:
    """Inference does not write into its inputs."""
    feeds = case.feeds(2)
    before = {name: value.copy() for name, value in feeds.items()}

    with case.runner as runner:
        runner.infer(feeds)

    for name, value in feeds.items():
        np.testing.assert_array_equal(value, before[name])


def test_the_caller_owns_the_outputs(case: Case) -> None:
    """A later inference does not change what an earlier one returned, and writing into it changes nothing else."""
    first, second = case.feeds(2, seed=1), case.feeds(2, seed=2)

    with case.runner as runner:
        kept = runner.infer(first)
        before = {name: value.copy() for name, value in kept.items()}
        runner.infer(second)
        for name, value in kept.items():
            np.testing.assert_array_equal(value, before[name])
            value[...] = 0.0
        again = runner.infer(first)

    for name, value in again.items():
        np.testing.assert_array_equal(value, before[name])


def test_runs_only_while_entered(case: Case) -> None:
    """Before `with` and after it, infer() is a mistake of the program."""
    feeds = case.feeds(1)

    with pytest.raises(RuntimeError, match="with runner"):
        case.runner.infer(feeds)
    with case.runner:
        pass
    with pytest.raises(RuntimeError, match="with runner"):
        case.runner.infer(feeds)


def test_can_be_entered_again(case: Case) -> None:
    """A runner that was left can be entered once more and gives the same."""
    feeds = case.feeds(2)

    with case.runner as runner:
        first = runner.infer(feeds)
    with case.runner as runner:
        second = runner.infer(feeds)

    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)


def without_input(feeds: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {}


def with_unknown_input(feeds: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {**feeds, "stranger": feeds[name]}


def of_other_dtype(feeds: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {name: feeds[name].astype(np.float64)}


def of_other_rank(feeds: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {name: feeds[name][0]}


def of_other_length(feeds: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {name: feeds[name][..., :1]}


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (without_input, "needs the input"),
        (with_unknown_input, "no input 'stranger'"),
        (of_other_dtype, "float64"),
        (of_other_rank, "has shape"),
        (of_other_length, "has shape"),
    ],
)
def test_refuses_feeds_that_do_not_fit(case: Case, spoil: Any, found: str) -> None:
    """The error names the runner, what was found, and the input as the model has it."""
    spec = case.runner.inputs[0]

    with case.runner as runner, pytest.raises(InferenceError, match=found) as caught:
        runner.infer(spoil(case.feeds(2), spec.name))

    assert runner.name in str(caught.value)
    assert str(spec) in str(caught.value)
