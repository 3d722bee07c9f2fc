"""Data that do not look like those of the calibration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibrators.input_statistics import statistics_of
from trt_int8 import benchmark, calibrate, compare, quantize
from trt_int8.cli import main
from trt_int8.input_alarm import INPUTS_KEY, InputWatch, read_summary, summary_text
from trt_int8.quantization import convert_fp16

Change = Callable[[np.ndarray], np.ndarray]


def natural(seed: int = 0, count: int = 64, shape: tuple[int, ...] = (8, 8)) -> np.ndarray:
    """Return images in [0, 1] as photographs are: of different brightness, and the mean of red above that of blue."""
    rng = np.random.default_rng(seed)
    brightness = rng.normal(0, 0.12, (count, 1, 1, 1))
    means = np.array([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    return np.clip(means + brightness + rng.normal(0, 0.22, (count, 3, *shape)), 0, 1).astype(np.float32)


class Told:
    """A model that tells what it was calibrated on."""

    def __init__(self, name: str, values: np.ndarray | None) -> None:
        self.name = name
        self.metadata = {} if values is None else {INPUTS_KEY: summary_text({"x": statistics_of(values)})}


def warnings(calibrated: np.ndarray, measured: np.ndarray) -> tuple[str, ...]:
    watch = InputWatch([Told("m.onnx", calibrated)])  # type: ignore[list-item]
    watch.look({"x": measured}, len(measured))
    return watch.warnings()


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda x: x * 255, " times as wide: a division by 255 may have been forgotten"),
        (lambda x: x / 255, " as wide: a division by 255 may be done twice"),
        (lambda x: (x - 0.45) / 0.225, "there. Check the preprocessing"),
        (lambda x: x + 2, "there. Check the preprocessing"),
        (lambda x: np.ascontiguousarray(x[:, ::-1]), "order may be swapped, BGR for RGB"),
        (lambda x: np.zeros_like(x), "there. Check the preprocessing"),
    ],
    ids=["no division", "two divisions", "normalised", "shifted", "BGR", "all zero"],
)
def test_gross_differences(change: Change, hint: str) -> None:
    """One line, with the numbers of both sides and what they suggest."""
    (line,) = warnings(natural(0), change(natural(1)))

    assert hint in line
    assert line.startswith("input 'x' looks unlike what m.onnx was calibrated on: mean ")
    assert "\n" not in line


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 4, 64])
def test_other_samples_of_the_same_kind(seed: int, count: int) -> None:
    """A choice of samples, however small, is no other preprocessing."""
    assert warnings(natural(99), natural(seed, count)) == ()


def test_numbers_are_shown() -> None:
    """Both means, deviations and ranges."""
    (line,) = warnings(np.float32([[0.0, 1.0]]), np.float32([[0.0, 255.0]]))

    assert "mean 128 and deviation 128 in [0, 255] here, mean 0.5 and deviation 0.5 in [0, 1] there" in line


def test_constant_inputs() -> None:
    """The same constant is no difference, another one is."""
    ones = np.ones((2, 3), np.float32)

    assert warnings(ones, ones) == ()
    assert len(warnings(ones, 2 * ones)) == 1


def test_models_that_were_told_the_same_share_a_line() -> None:
    """Others have their own, and models that tell nothing none."""
    image = natural()
    models = [Told("a", image), Told("b", image), Told("c", image / 255), Told("d", None)]
    watch = InputWatch(models)  # type: ignore[arg-type]
    watch.look({"x": image * 255}, len(image))

    assert [line.split(" was ")[0] for line in watch.warnings()] == [
        "input 'x' looks unlike what a, b",
        "input 'x' looks unlike what c",
    ]


def test_padding_does_not_count() -> None:
    """Rows that fill up a batch are left out."""
    watch = InputWatch([Told("m", np.float32([[0.0, 1.0]]))])  # type: ignore[list-item]
    watch.look({"x": np.float32([[0.0, 1.0], [9e9, 9e9]])}, 1)

    assert watch.warnings() == ()


@pytest.mark.parametrize("text", ["{", "[1]", '{"x": 1}', '{"x": {"mean": "a"}}'])
def test_metadata_of_somebody_else(text: str, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read is passed over, with a word in the log."""
    assert read_summary({INPUTS_KEY: text}) == {}
    assert "cannot be read" in caplog.text
    assert read_summary({}) == {}


@pytest.fixture
def quantized(tiny_model: Path, tmp_path: Path) -> Path:
    """An INT8 model that was calibrated on images in [0, 1]."""
    calibration = calibrate(tiny_model, {"input": natural()})
    return quantize(tiny_model, calibration, output=tmp_path / "q.onnx").path


def test_quantized_models_carry_it(quantized: Path) -> None:
    """Short JSON in the metadata: mean, deviation, range, and means of the channels."""
    metadata = {entry.key: entry.value for entry in onnx.load(quantized).metadata_props}
    (values,) = json.loads(metadata[INPUTS_KEY]).values()

    assert values["mean"] == pytest.approx(natural().mean(), rel=1e-4)
    assert values["channels"] == pytest.approx(natural().mean(axis=(0, 2, 3)).tolist(), rel=1e-4)
    assert len(metadata[INPUTS_KEY]) < 200


def test_fp16_models_carry_it_too(quantized: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The same text as the INT8 model of their calibration, and they warn alone."""
    calibration = calibrate(tiny_model, {"input": natural()})
    half = convert_fp16(tiny_model, calibration, output=tmp_path / "half.onnx").path

    texts = [{entry.key: entry.value for entry in onnx.load(file).metadata_props} for file in (half, quantized)]
    assert texts[0][INPUTS_KEY] == texts[1][INPUTS_KEY]
    (line,) = compare(tiny_model, half, {"input": natural(1, 20) * np.float32(255)}).warnings
    assert line.startswith("input 'input' looks unlike what half.onnx was calibrated on")


def test_compare_and_benchmark_warn(quantized: Path, tiny_model: Path) -> None:
    """On other data, and only there; random numbers for timing are not compared."""
    options: dict[str, Any] = {"rounds": 5, "budget_s": 0.05}
    for scale, expected in ((1, 0), (255, 1)):
        data = {"input": natural(1, 20) * np.float32(scale)}
        assert len(compare(tiny_model, quantized, data).warnings) == expected
        found = [line for line in benchmark([tiny_model, quantized], data, **options).warnings if "unlike" in line]
        assert len(found) == expected
    assert not any("unlike" in line for line in benchmark(quantized, **options).warnings)


def test_the_command_prints_it(quantized: Path, tiny_model: Path, tmp_path: Path, capfd: Any) -> None:
    """One line, and in the JSON."""
    np.savez(tmp_path / "d.npz", input=natural(1, 20) * np.float32(255))
    words = ["compare", tiny_model, quantized, "--data", tmp_path / "d.npz", "--json", tmp_path / "r.json"]

    assert main([str(word) for word in words]) == 0

    assert "warning: input 'input' looks unlike what q.onnx was calibrated on" in capfd.readouterr().out
    assert len(json.loads((tmp_path / "r.json").read_text())["warnings"]) == 1
