"""Options of `quantize` that do not go together, or have no effect: refused, or told where the model decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from calibrators.calibration import Calibration
from trt_int8.api import calibrate, quantize
from trt_int8.cli import app
from trt_int8.errors import UsageError
from trt_int8.images import Preprocessing

RNG = np.random.default_rng(3)
DATA = {"input": RNG.normal(size=(8, 3, 8, 8)).astype(np.float32)}
PREPROCESSING = Preprocessing()


@pytest.fixture
def calibration(tiny_model: Path) -> Calibration:
    """A calibration of the tiny model."""
    return calibrate(tiny_model, DATA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"percentile": 99.9},
            r"--percentile would change nothing: the method is entropy\. .* add --method percentile",
        ),
        (
            {"percentile": 99.9, "method": "auto"},
            r"--percentile would change nothing: without data, the method auto is",
        ),
        ({"data": DATA}, r"--data would change nothing: --method auto and --smooth alone read data\. Leave it out"),
        ({"held_back": DATA}, r"--held-back would change nothing: the method auto alone reads it"),
        ({"method": "auto", "data": DATA, "held_back": DATA}, r"--data would change nothing: .* those of --held-back"),
        ({"preprocessing": PREPROCESSING}, r"--preprocessing would change nothing: there are no data"),
        ({"residual": "float", "target": "cpu"}, r"--residual float would change nothing: the Adds of the target cpu"),
        ({"method": "auto", "smooth": 0.5, "data": DATA}, r"smooth and choose by the method auto on the same data: .*"),
        ({"precision": "int8+fp16", "target": "cpu"}, r"Cannot write int8\+fp16 for the target cpu"),
        ({"activations": "affine"}, r"Cannot write affine activations for the target tensorrt"),
    ],
)
def test_options_without_effect_are_refused(
    options: Any, message: str, tiny_model: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """The option is named, and what would give it an effect; nothing is written."""
    with pytest.raises(UsageError, match=message):
        quantize(tiny_model, calibration, output=tmp_path / "q.onnx", **options)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "mse"}, "the method mse"),
        ({"percentile": 99.9}, "the percentile 99.9"),
        ({"residual": "float"}, "residual float"),
        ({"smooth": 0.5}, "smoothing"),
        ({"data": DATA}, "data"),
        ({"held_back": DATA}, "held-back data"),
        ({"preprocessing": PREPROCESSING}, "a preprocessing"),
        ({"force": True}, "force, which is about calibrations"),
    ],
)
@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_modes_without_a_calibration_take_few_options(
    mode: Any, options: Any, what: str, tiny_model: Path, tmp_path: Path
) -> None:
    """What is about a calibration is refused there."""
    with pytest.raises(UsageError, match=f"^The mode {mode} does not take {what}: that is for the mode static"):
        quantize(tiny_model, output=tmp_path / "q.onnx", mode=mode, target="cpu", **options)


@pytest.mark.parametrize("reduce_range", [True, False])
def test_weights_alone_have_no_products_to_saturate(reduce_range: bool, tiny_model: Path, tmp_path: Path) -> None:
    """Their codes have 8 bits, whatever the processor."""
    with pytest.raises(UsageError, match="The mode weight-only does not take reduce_range"):
        quantize(tiny_model, output=tmp_path / "q.onnx", mode="weight-only", reduce_range=reduce_range)


def test_options_with_an_effect_are_taken(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """A percentile for its method and for auto with data; data held back under either name."""
    accepted: list[Any] = [
        {"percentile": 99.9, "method": "percentile"},
        {"percentile": 99.9, "method": "auto", "data": DATA},
        {"percentile": 99.9, "method": "auto", "held_back": DATA},
    ]
    found = [quantize(tiny_model, calibration, output=tmp_path / "q.onnx", **options) for options in accepted]

    assert found[1].auto is not None
    assert found[1].auto == found[2].auto
    assert not [note for result in found for note in result.notes if "changed nothing" in note]


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"residual": "float"}, ["residual float changed nothing: the model has no Add whose skip input"]),
        ({"attention": "int8"}, ["attention int8 changed nothing: the model has no product of attention"]),
        ({"include": ["conv"]}, ["include 'conv' changed nothing: what it matches is in INT8 without it, or stays"]),
        ({"exclude": ["fc", "f.*"]}, []),
        (
            {"exclude": ["fc"], "include": ["f.*"]},
            ["include 'f.*' changed nothing: what it matches is in INT8 without it, or stays float with it"],
        ),
    ],
)
def test_wishes_that_the_model_does_not_answer_are_told(
    options: Any, notes: list[str], tiny_model: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Conv, Relu, Flatten, Gemm: no skip, no attention, both weighted nodes in INT8 by themselves."""
    result = quantize(tiny_model, calibration, output=tmp_path / "q.onnx", **options)
    told = [note for note in result.notes if "changed nothing" in note]

    assert len(told) == len(notes)
    assert all(note.startswith(expected) for note, expected in zip(told, notes, strict=True))


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_the_other_modes_tell_it_too(mode: Any, tiny_model: Path, tmp_path: Path) -> None:
    """An included node that is quantized by itself."""
    result = quantize(tiny_model, output=tmp_path / "q.onnx", mode=mode, target="cpu", include=["fc"])

    assert result.notes[1:] == (
        "include 'fc' changed nothing: what it matches is in INT8 without it, or stays float with it",
    )


def test_an_excluded_node_that_is_float_anyway(graph_builder: Any, tmp_path: Path) -> None:
    """Five channels in and three out are too few for TensorRT's kernels; on the CPU the same wish has an effect."""
    graph = graph_builder()
    graph.conv(graph.conv(graph.conv(graph.input("input"), (3, 16), "stem"), (16, 5), "x"), (5, 3), "y")
    model = graph.save(tmp_path / "m.onnx", ["y"])
    made = calibrate(model, DATA)
    targets: list[Any] = ["tensorrt", "cpu"]
    told = {
        target: [
            note
            for note in quantize(model, made, output=tmp_path / "q.onnx", target=target, exclude=["n_y"]).notes
            if "changed nothing" in note
        ]
        for target in targets
    }

    assert told == {"tensorrt": ["exclude 'n_y' changed nothing: what it matches stays float without it"], "cpu": []}


def test_residual_skips_that_stay_float_are_no_idle_wish(graph_builder: Any, tmp_path: Path) -> None:
    """Where a convolution is added to its input, `--residual float` saves a pair, and no note is given."""
    graph = graph_builder()
    x = graph.node("Relu", [graph.conv(graph.input("input"), (3, 16), "stem")], "r")
    branch = graph.conv(graph.node("Relu", [graph.conv(x, (16, 16), "a")], "s"), (16, 16), "b")
    graph.conv(graph.node("Relu", [graph.node("Add", [branch, x], "sum")], "t"), (16, 16), "y")
    model = graph.save(tmp_path / "m.onnx", ["y"])
    made = calibrate(model, DATA)
    plain = quantize(model, made, output=tmp_path / "q.onnx")
    result = quantize(model, made, output=tmp_path / "q.onnx", residual="float")

    assert result.placement.activations != plain.placement.activations
    assert not [note for note in result.notes if "changed nothing" in note]


def test_what_fp16_has_no_range_of_is_told_with_the_cure(graph_builder: Any, tmp_path: Path) -> None:
    """An Exp between two convolutions is not calibrated by default, so that it stays FP32; with all tensors it is."""
    graph = graph_builder()
    x = graph.node("Exp", [graph.conv(graph.input("input"), (3, 16), "c")], "e")
    graph.conv(graph.node("Sigmoid", [x], "s"), (16, 16), "y")
    model = graph.save(tmp_path / "m.onnx", ["y"])

    def told(tensors: Any) -> list[str]:
        made = calibrate(model, DATA, tensors=tensors)
        result = quantize(model, made, output=tmp_path / "q.onnx", precision="int8+fp16")
        return [note for note in result.notes if "--tensors all" in note]

    (note,) = told("quantized")
    assert note == (
        "the calibration does not tell how large the values of 2 nodes get, which FP32 holds whatever they are. "
        "Calibrate with --tensors all to know the range of every tensor."
    )
    assert told("all") == []


def test_the_command_ends_with_the_status_of_usage(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The same refusal on the command line."""
    calibration.save(tmp_path / "c.npz")
    arguments = ["quantize", str(tiny_model), "--calibration", str(tmp_path / "c.npz"), "--percentile", "99.9"]
    answer = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "q.onnx")])

    assert isinstance(answer.exception, UsageError)
    assert str(answer.exception).startswith("--percentile would change nothing: the method is entropy.")
