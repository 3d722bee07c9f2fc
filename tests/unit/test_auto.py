"""The choice of scales by their harm to the model's outputs."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibrators.calibration import Calibration
from engines.graph import prepare
from engines.onnxrt import OnnxRuntimeRunner, make_session
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import insert_qdq
from trt_int8 import auto
from trt_int8.calibration import calibrate
from trt_int8.data import open_data
from trt_int8.errors import DataError
from trt_int8.quantization import quantize


def images(count: int, seed: int, outlier: float = 0.0) -> np.ndarray:
    """Return standard normal images; `outlier` is put into one pixel of the first."""
    values = np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)
    if outlier:
        values[0, 0, 0, 0] = outlier
    return values


@pytest.fixture
def skewed(tiny_model: Path) -> Calibration:
    """A calibration whose one outlier makes min-max a bad choice."""
    return calibrate(tiny_model, {"input": images(64, 0, outlier=60.0)})


def choose(model: Path, calibration: Calibration, held_back: np.ndarray) -> auto.AutoChoice:
    """Choose scales for a model."""
    prepared = prepare(model)
    placement = place_for_tensorrt(prepared.ir())
    inputs = open_data({"input": held_back}, make_inputs(model))
    return auto.choose_scales(prepared, placement, calibration, inputs, percentile=99.99)


def make_inputs(model: Path) -> tuple:
    """Return the specs of a model's inputs."""
    return tuple(OnnxRuntimeRunner(model).inputs)


def test_outlier_rules_out_minmax(tiny_model: Path, skewed: Calibration):
    """Where one outlier stretches min-max, another method does less harm and is taken, with the reason said."""
    choice = choose(tiny_model, skewed, images(40, 1))

    assert choice.whole_model["minmax"] == max(choice.whole_model.values())
    assert choice.methods["input"] != "minmax"
    assert choice.harm <= min(choice.whole_model.values())
    assert choice.samples == 40
    assert choice.reasons[0].startswith("whole model: ")


def test_harm_is_the_relative_error_of_the_outputs(tiny_model: Path, skewed: Calibration):
    """The harm of a method is the outputs' squared error over their energy, as float64 numpy computes it."""
    held_back = images(20, 2)
    choice = choose(tiny_model, skewed, held_back)
    prepared = prepare(tiny_model)
    placement = place_for_tensorrt(prepared.ir())
    model = insert_qdq(prepared, placement, skewed.scales("entropy")).model
    session = make_session(ir.to_proto(model).SerializeToString(), execution="exact")
    (found,) = session.run(None, {"input": held_back})
    (expected,) = make_session(tiny_model, execution="native").run(None, {"input": held_back})
    error = ((expected.astype(np.float64) - found) ** 2).sum(axis=1)
    harm = (error / (expected.astype(np.float64) ** 2).sum(axis=1).mean()).mean()

    assert choice.whole_model["entropy"] == pytest.approx(harm, rel=1e-4)


def test_quantize_without_data_takes_mse(tiny_model: Path, skewed: Calibration, tmp_path: Path):
    """Without held-back data auto equals mse, and says so."""
    chosen = quantize(tiny_model, skewed, output=tmp_path / "a.onnx", method="auto")
    mse = quantize(tiny_model, skewed, output=tmp_path / "m.onnx", method="mse")

    assert chosen.scales == mse.scales
    assert "took mse" in chosen.notes[0]


def test_quantize_with_data_uses_the_choice(tiny_model: Path, skewed: Calibration, tmp_path: Path):
    """With data the model gets the chosen scales; the CPU placement takes the same choice without measuring again."""
    held_back = {"input": images(40, 1)}
    chosen = quantize(tiny_model, skewed, output=tmp_path / "a.onnx", method="auto", data=held_back)
    cpu = quantize(
        tiny_model, skewed, output=tmp_path / "c.onnx", method="auto", target="cpu", auto=chosen.auto, reduce_range=True
    )

    assert chosen.auto is not None
    assert chosen.scales["input"] == chosen.auto.scales["input"]
    assert cpu.scales["input"] == chosen.scales["input"]


def test_no_samples_is_an_error(tiny_model: Path, skewed: Calibration):
    """An empty stream cannot choose."""
    prepared = prepare(tiny_model)
    with pytest.raises(DataError, match="no sample"):
        auto.choose_scales(prepared, place_for_tensorrt(prepared.ir()), skewed, [], percentile=99.99)


def test_gain_must_exceed_noise():
    """A gain counts beyond two standard errors of the paired differences and one per cent of the harm."""
    before = np.array([1.0, 1.0, 1.0, 1.0])

    assert auto.gains(before, before - 0.1)
    assert not auto.gains(before, before - 0.005)  # below one per cent
    assert not auto.gains(before, before - np.array([1.0, -0.8, 0.9, -0.6]))  # mean 0.125, standard error 0.48
    assert not auto.gains(before, before + 0.1)
    assert auto.gains(np.array([1.0]), np.array([0.5]))  # one sample knows no noise
