"""Every architecture of the zoo on both targets: what is quantized, how exact it is, whether the linter is content.

The floors are 2 dB below what was measured, on the target cpu the lower of what weights of 7 and of 8 bits gave (a
processor without VNNI takes the former); with random weights, BatchNorm statistics settled on the data, and the method
of `zoo.harness.METHOD`. They hold placement and arithmetic in place, and say nothing about trained models.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from zoo.architecture import Architecture
from zoo.classifiers import CLASSIFIERS
from zoo.exported import EXPORTED
from zoo.harness import Subject, disagreement
from zoo.inputs import calibration_batches, held_back_batches
from zoo.light import LIGHT
from zoo.predictors import PREDICTORS
from zoo.unusual import UNUSUAL, without_weights

from engines.placement import Target
from trt_int8.calibration import calibrate
from trt_int8.errors import CalibrationError

ZOO = (*CLASSIFIERS, *PREDICTORS, *UNUSUAL, *EXPORTED, *LIGHT)
TARGETS: tuple[Target, ...] = ("tensorrt", "cpu")
HALVES_COST_DB = 2.0
"""What FP16 in the layers that are not quantized may cost."""


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Architecture], Subject]]:
    """Makes an architecture's model, once for all tests, ready to be quantized."""
    folder = tmp_path_factory.mktemp("zoo")
    made: dict[str, Subject] = {}

    def subject(architecture: Architecture) -> Subject:
        if architecture.name not in made:
            path = folder / f"{architecture.name}.onnx"
            inputs = architecture.write(path)
            made[architecture.name] = Subject(path, calibration_batches(inputs), held_back_batches(inputs), folder)
        return made[architecture.name]

    yield subject
    shutil.rmtree(folder)  # pytest would keep the files of three runs


@pytest.fixture
def subject(architecture: Architecture, subjects: Callable[[Architecture], Subject]) -> Subject:
    """The model of one architecture."""
    return subjects(architecture)


def _each(architectures: Iterable[Architecture]) -> pytest.MarkDecorator:
    """Run a test for each of them."""
    return pytest.mark.parametrize("architecture", [pytest.param(entry, id=entry.name) for entry in architectures])


def test_the_zoo_holds_at_least_25_architectures_beside_those_of_the_onnx_package() -> None:
    """Names differ, so that seeds and files do."""
    assert len({architecture.name for architecture in ZOO}) == len(ZOO)
    assert len(ZOO) - len(LIGHT) >= 25


@pytest.mark.parametrize("target", TARGETS)
@_each(ZOO)
def test_as_many_weighted_operators_are_quantized_as_the_rules_promise(
    architecture: Architecture, subject: Subject, target: Target
) -> None:
    """Fewer is a loss of speed, more breaks a rule; either shows which nodes stayed float, and why."""
    promised = {"tensorrt": architecture.tensorrt, "cpu": architecture.cpu}[target]
    found = subject.quantized(target)

    assert found.quantized == promised, found.floating


@pytest.mark.parametrize("target", TARGETS)
@_each(ZOO)
def test_outputs_stay_close_to_those_of_the_fp32_model(
    architecture: Architecture, subject: Subject, target: Target
) -> None:
    """Each float output is above the architecture's floor; the model is run as its target's models are run."""
    floor = {"tensorrt": architecture.tensorrt_db, "cpu": architecture.cpu_db}[target]
    figures = subject.quantized(target).sqnr_db

    assert min(figures.values()) >= floor, figures


@_each(ZOO)
def test_both_targets_answer_alike(subject: Subject) -> None:
    """They differ by no more than two independent errors of that size do."""
    tensorrt, cpu = subject.quantized("tensorrt"), subject.quantized("cpu")
    found = disagreement(subject.reference, tensorrt.outputs, cpu.outputs)

    assert max(found.values()) <= 1.0, found


@pytest.mark.parametrize("target", TARGETS)
@_each(ZOO)
def test_the_linter_finds_no_fault_with_quantized_models(subject: Subject, target: Target) -> None:
    """Neither errors nor warnings."""
    assert subject.quantized(target).findings == []


@_each(entry for entry in ZOO if entry.half)
def test_the_other_layers_can_be_fp16(architecture: Architecture, subject: Subject) -> None:
    """ONNX Runtime takes the types, the linter finds no fault with them, and the answers hardly change."""
    found = subject.quantized("tensorrt", precision="int8+fp16")

    assert found.worst_db >= architecture.tensorrt_db - HALVES_COST_DB, found.sqnr_db
    assert found.quantized == architecture.tensorrt
    assert found.findings == []


def test_a_model_without_weighted_operators_is_refused_by_saying_so(tmp_path: Path) -> None:
    """There is nothing to calibrate, and the message names what was looked for."""
    path = tmp_path / "without_weights.onnx"
    inputs = without_weights.write(path)

    with pytest.raises(CalibrationError, match="nothing to quantize"):
        calibrate(path, calibration_batches(inputs))
