"""Facts about smoothing: the factors, where it applies, and what it does to a model and its calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from typer.testing import CliRunner

from engines.graph import prepare
from engines.smoothing import SMALLEST_FACTOR, smooth, smoothing_factors, smoothing_sites
from trt_int8.api import calibrate, quantize
from trt_int8.cli import app
from trt_int8.config import RunConfig
from trt_int8.errors import CalibrationError, ConfigError, DataError, UsageError
from trt_int8.quantize_stage import quantize_all
from trt_int8.run_plan import MODEL
from trt_int8.smoothing import smooth_model

CHANNELS = 16
RNG = np.random.default_rng(9)
DATA = {"x": RNG.normal(size=(24, 6, CHANNELS)).astype(np.float32)}
LOUD = 5
"""The channel whose scale in the normalization is 60 times that of the others."""


def norm_constants(graph: Any) -> list[str]:
    scale = graph.rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32)
    scale[LOUD] = 60.0
    return [graph.constant(scale, "gamma"), graph.normal((CHANNELS,), 0.2, "beta")]


@pytest.fixture
def transformer(graph_builder: Any, tmp_path: Path) -> Path:
    """LayerNormalization, read by two MatMuls, a Gemm behind a Reshape; their sum goes out."""
    graph = graph_builder(4)
    x = graph.input("x", ("N", 6, CHANNELS))
    normed = graph.node("LayerNormalization", [x, *norm_constants(graph)], "normed")
    one = graph.node("MatMul", [normed, graph.normal((CHANNELS, 24), 0.2)], "one")
    two = graph.node("MatMul", [normed, graph.normal((CHANNELS, 24), 0.2)], "two")
    flat = graph.node("Reshape", [normed, graph.constant(np.array([-1, CHANNELS]))], "flat")
    three = graph.gemm(flat, (CHANNELS, 24), "three")
    three = graph.node("Reshape", [three, graph.constant(np.array([-1, 6, 24]))], "unflat")
    graph.node("Add", [graph.node("Add", [one, two], "sum"), three], "y")
    return Path(graph.save(tmp_path / "transformer.onnx", ["y"]))


def decomposed(graph: Any, x: str) -> str:
    """A LayerNormalization as old opsets spell it out."""
    axes = graph.constant(np.array([-1]))
    centred = graph.node("Sub", [x, graph.node("ReduceMean", [x, axes], "mean")], "centred")
    squared = graph.node("Pow", [centred, graph.constant(np.float32(2))], "squared")
    variance = graph.node("ReduceMean", [squared, axes], "variance")
    shifted = graph.node("Add", [variance, graph.constant(np.float32(1e-5))], "shifted")
    divided = graph.node("Div", [centred, graph.node("Sqrt", [shifted], "deviation")], "divided")
    gamma, beta = norm_constants(graph)
    return str(graph.node("Add", [graph.node("Mul", [divided, gamma], "scaled"), beta], "normed"))


def test_factors_by_hand() -> None:
    """alpha 0.5: sqrt(x / w). alpha 1: x. alpha 0: 1 / w."""
    x, w = np.array([4.0, 9.0]), np.array([1.0, 0.25])

    assert smoothing_factors(x, w, 0.5).tolist() == [2.0, 6.0]
    assert smoothing_factors(x, w, 1.0).tolist() == [4.0, 9.0]
    assert smoothing_factors(x, w, 0.0).tolist() == [1.0, 4.0]


def test_a_channel_that_is_always_0_is_left_as_it_is() -> None:
    """On either side; and no factor is smaller than the least one."""
    assert smoothing_factors(np.array([0.0, 3.0]), np.array([2.0, 0.0]), 1.0).tolist() == [1.0, 1.0]
    assert smoothing_factors(np.array([1e-30]), np.array([1.0]), 1.0).tolist() == [SMALLEST_FACTOR]


@given(
    arrays.arrays(np.float64, 8, elements=st.floats(1e-3, 1e3)),
    arrays.arrays(np.float64, 8, elements=st.floats(1e-3, 1e3)),
)
def test_half_and_half_makes_both_sides_alike(x: Any, w: Any) -> None:
    """With alpha 0.5 the largest magnitudes of X / s and s W are equal in every channel."""
    factor = smoothing_factors(x, w, 0.5)

    np.testing.assert_allclose(x / factor, w * factor, rtol=1e-9)


def test_the_readers_of_a_normalization_are_found(transformer: Path) -> None:
    """Directly, and behind a Reshape that keeps the channels last."""
    (site,) = smoothing_sites(prepare(transformer).ir())

    assert (site.tensor, site.channels, site.shared) == ("normed", CHANNELS, False)
    assert site.readers == ("n_one", "n_two", "n_three")


def test_a_normalization_of_old_opsets_is_found(graph_builder: Any, tmp_path: Path) -> None:
    """Its last Mul and Add take the factors."""
    graph = graph_builder(4)
    normed = decomposed(graph, graph.input("x", ("N", 6, CHANNELS)))
    graph.node("MatMul", [normed, graph.normal((CHANNELS, 24))], "y")
    (site,) = smoothing_sites(prepare(graph.save(tmp_path / "old.onnx", ["y"])).ir())

    assert (site.tensor, site.readers) == ("normed", ("n_y",))


@pytest.fixture
def post_norm(graph_builder: Any, tmp_path: Path) -> Path:
    """A block of BERT: the normalized tensor goes into a MatMul, one behind a Reshape, and the residual Add."""
    graph = graph_builder(4)
    x = graph.input("x", ("N", 6, CHANNELS))
    normed = graph.node("LayerNormalization", [x, *norm_constants(graph)], "normed")
    product = graph.node("MatMul", [normed, graph.normal((CHANNELS, CHANNELS))], "product")
    flat = graph.node("Reshape", [normed, graph.constant(np.array([-1, CHANNELS]))], "flat")
    graph.node("MatMul", [flat, graph.normal((CHANNELS, 24), 0.2)], "z")
    graph.node("Add", [product, normed], "y")
    return Path(graph.save(tmp_path / "post.onnx", ["y", "z"]))


def test_a_tensor_that_others_read_keeps_its_values(post_norm: Path, run_model: Any) -> None:
    """Each product reads it times constants; the residual Add reads what it read before, and the answers stay."""
    prepared = prepare(post_norm)
    (site,) = smoothing_sites(prepared.ir())
    smoothed = smooth_model(prepared, calibrate(post_norm, DATA), DATA, 0.5)
    nodes = {node.name: node for node in smoothed.prepared.ir().graph}

    assert (site.tensor, site.readers, site.shared) == ("normed", ("n_product", "n_z"), True)
    assert {name: nodes[name].inputs[0].name for name in ("n_product", "n_z")} == {
        "n_product": "normed_divided", "n_z": "flat_divided"
    }  # fmt: skip
    assert "normed" in [value.name for value in nodes["n_y"].inputs]
    assert set(smoothed.factors) == {"normed_divided", "flat_divided"}
    assert smoothed.notes[0].endswith(
        "alpha 0.5: normed; 1 of them, which other nodes read too, by a Mul of its own: normed"
    )
    before, after = (run_model(model, DATA) for model in (prepared.proto, smoothed.prepared.proto))
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, atol=1e-4 * np.abs(values).max())


def test_quantizing_a_smoothed_post_norm_block_loses_less(post_norm: Path, tmp_path: Path, run_model: Any) -> None:
    """One loud channel beside quiet ones: with the factors both products lose less than half as much."""
    calibration = calibrate(post_norm, DATA)
    expected = run_model(post_norm, DATA)
    errors = []
    smoothing: dict[str, Any] = {"smooth": 0.5, "data": DATA}
    for options in ({}, smoothing):
        quantize(post_norm, calibration, output=tmp_path / "q.onnx", method="minmax", **options)
        found = run_model(tmp_path / "q.onnx", DATA)
        errors.append({name: float(((found[name] - expected[name]) ** 2).mean()) for name in expected})

    assert all(errors[1][name] < 0.5 * errors[0][name] for name in expected), errors


def test_a_product_of_constants_is_no_normalization(graph_builder: Any, tmp_path: Path) -> None:
    """Mul and Add by vectors without a division by a deviation before them."""
    graph = graph_builder(4)
    gamma, beta = norm_constants(graph)
    x = graph.node("Mul", [graph.input("x", ("N", 6, CHANNELS)), gamma], "scaled")
    graph.node("MatMul", [graph.node("Add", [x, beta], "moved"), graph.normal((CHANNELS, 4))], "y")

    assert smoothing_sites(prepare(graph.save(tmp_path / "m.onnx", ["y"])).ir()) == ()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_answers_stay(alpha: float, transformer: Path, run_model: Any) -> None:
    """Up to float rounding; the smoothed tensor's channels are divided by the factors that are told."""
    prepared = prepare(transformer)
    before = run_model(prepared.proto, DATA, fetch=["y", "normed"])
    amax = np.abs(before["normed"]).max(axis=(0, 1))
    model = prepared.ir()
    factors = smooth(model, {"normed": amax}, alpha)
    after = run_model(ir.to_proto(model), DATA, fetch=["y", "normed"])

    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after["normed"], before["normed"] / factors["normed"], rtol=1e-4, atol=1e-5)


def test_shared_weights_are_changed_for_their_reader_alone(graph_builder: Any, tmp_path: Path, run_model: Any) -> None:
    """A matrix that another tensor is multiplied with too keeps its values there."""
    graph = graph_builder(4)
    x = graph.input("x", ("N", 6, CHANNELS))
    shared = graph.normal((CHANNELS, 8))
    normed = graph.node("LayerNormalization", [x, *norm_constants(graph)], "normed")
    graph.node("MatMul", [normed, shared], "y")
    graph.node("MatMul", [x, shared], "z")
    prepared = prepare(graph.save(tmp_path / "shared.onnx", ["y", "z"]))
    before = run_model(prepared.proto, DATA)
    smoothed = smooth_model(prepared, calibrate(prepared.path, DATA), DATA, 0.5)
    after = run_model(smoothed.prepared.proto, DATA)

    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(after["z"], before["z"])


def test_the_calibration_follows(transformer: Path) -> None:
    """Only the smoothed tensor is counted anew: what it counts is what the smoothed model gives."""
    calibration = calibrate(transformer, DATA)
    smoothed = smooth_model(prepare(transformer), calibration, DATA, 0.5)
    again = calibrate_prepared(smoothed, transformer)

    assert smoothed.calibration.amax("minmax")["normed"] == pytest.approx(again["normed"], rel=1e-5)
    assert smoothed.calibration.amax("minmax")["normed"] < 0.2 * calibration.amax("minmax")["normed"]
    assert smoothed.calibration.amax("minmax")["y"] == calibration.amax("minmax")["y"]
    assert smoothed.calibration.settings["smooth"] == "0.5"
    assert smoothed.notes == ("smoothed 1 normalized tensors with alpha 0.5: normed",)


def calibrate_prepared(smoothed: Any, path: Path) -> dict[str, float]:
    """Largest magnitudes of the smoothed model, found by a calibration of its own."""
    import onnx

    file = path.with_name("smoothed.onnx")
    onnx.save(smoothed.prepared.proto, file)
    return dict(calibrate(file, DATA).amax("minmax"))


def test_quantizing_a_smoothed_model_loses_less(transformer: Path, tmp_path: Path, run_model: Any) -> None:
    """One channel is 60 times as loud as the others: smoothing halves the error, and more."""
    calibration = calibrate(transformer, DATA)
    expected = run_model(transformer, DATA)["y"]
    quantize(transformer, calibration, output=tmp_path / "plain.onnx", method="minmax")
    quantize(transformer, calibration, output=tmp_path / "smooth.onnx", method="minmax", smooth=0.5, data=DATA)
    plain, smoothed = (
        np.linalg.norm(run_model(tmp_path / name, DATA)["y"] - expected) for name in ("plain.onnx", "smooth.onnx")
    )

    assert smoothed < 0.5 * plain


@pytest.mark.parametrize(
    ("alpha", "data", "kind", "message"),
    [
        (1.5, DATA, ConfigError, r"smooth is 1\.5; expected a number from 0 to 1"),
        (0.5, None, UsageError, r"Cannot smooth without data"),
        (0.5, iter([DATA]), DataError, r"read more than once to smooth"),
    ],
)
def test_what_it_needs(alpha: float, data: Any, kind: Any, message: str, transformer: Path, tmp_path: Path) -> None:
    """A share between 0 and 1, and data for two passes; told before the first of them."""
    calibration = calibrate(transformer, DATA)
    with pytest.raises(kind, match=message):
        quantize(transformer, calibration, output=tmp_path / "q.onnx", smooth=alpha, data=data)


def test_ranges_alone_are_refused_before_the_data_are_read(transformer: Path) -> None:
    """The tensors that are not smoothed keep their histograms, so there must be some."""
    ranges = calibrate(transformer, DATA, statistics="minmax")
    with pytest.raises(CalibrationError, match="histogram of"):
        smooth_model(prepare(transformer), ranges, "no-such-file.npz", 0.5)


def test_on_the_command_line(transformer: Path, tmp_path: Path) -> None:
    """--smooth with --data; the note says what was smoothed."""
    calibrate(transformer, DATA).save(tmp_path / "c.npz")
    np.savez(tmp_path / "data.npz", **DATA)
    arguments = ["quantize", str(transformer), "--calibration", str(tmp_path / "c.npz"), "--smooth", "0.5"]
    shown = CliRunner().invoke(
        app, [*arguments, "--data", str(tmp_path / "data.npz"), "--output", str(tmp_path / "q.onnx")]
    )

    assert shown.exit_code == 0, shown.output
    assert "smoothed 1 normalized tensors with alpha 0.5: normed" in shown.stdout


PADDING = np.zeros(CHANNELS, np.float32)
PADDING[2] = 1000
"""Normalized, its third channel is larger than any real one."""


def padded() -> tuple[dict[str, Any], dict[str, Any]]:
    """Give sequences of 6, 4 and 2 positions, filled up, with their lengths; and their positions without gaps."""
    lengths = np.tile([6, 4, 2], len(DATA["x"]) // 3)
    real = np.arange(6) < lengths[:, None]
    filled = np.where(real[..., None], DATA["x"], PADDING)
    return {"x": filled, "lengths": lengths}, {"x": DATA["x"][real].reshape(-1, 6, CHANNELS)}


@pytest.mark.parametrize("divided", [False, True], ids=["in the normalization", "by a product of its own"])
def test_what_the_calibration_left_out_is_left_out_again(divided: bool, transformer: Path, post_norm: Path) -> None:
    """The factors and the statistics are those of the real positions alone."""
    file = post_norm if divided else transformer
    filled, packed = padded()
    found = smooth_model(prepare(file), calibrate(file, filled, lengths="lengths"), filled, 0.5)
    expected = smooth_model(prepare(file), calibrate(file, packed), packed, 0.5)
    counted = smooth_model(prepare(file), calibrate(file, filled), filled, 0.5)

    assert found.factors.keys() == expected.factors.keys()
    for tensor, factors in expected.factors.items():
        np.testing.assert_array_equal(found.factors[tensor], factors)
        mine, theirs = found.calibration.histogram(tensor), expected.calibration.histogram(tensor)
        np.testing.assert_array_equal(mine.bins, theirs.bins)
        np.testing.assert_array_equal(mine.counts, theirs.counts)
        assert counted.factors[tensor][2] > factors[2]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_all_samples_of_the_calibration_smooth(batch_size: int | None, transformer: Path) -> None:
    """However they are cut into batches: the loudest sample is the last of the calibration, and others come after."""
    x = DATA["x"].copy()
    x[15, :, LOUD] += np.float32(50)
    calibration = calibrate(transformer, {"x": x}, batch_size=4, max_batches=4)
    found = smooth_model(prepare(transformer), calibration, {"x": x}, 0.5, batch_size=batch_size)
    expected = smooth_model(prepare(transformer), calibration, [{"x": x[:16]}], 0.5)

    np.testing.assert_array_equal(found.factors["normed"], expected.factors["normed"])
    assert found.calibration.histogram("normed").count == 16 * 6 * CHANNELS


def test_the_array_that_tells_padding_is_needed(transformer: Path) -> None:
    """Data without it are not those of the calibration."""
    filled, packed = padded()
    calibration = calibrate(transformer, filled, lengths="lengths")
    with pytest.raises(DataError, match="no lengths 'lengths' with one row per sample"):
        smooth_model(prepare(transformer), calibration, packed, 0.5)


def test_a_run_names_what_it_smoothed(transformer: Path, tmp_path: Path) -> None:
    """The calibration's own figures of these tensors are not those of the models."""
    np.savez(tmp_path / "data.npz", **DATA)
    sections = {"model": {"source": str(transformer)}, "data": {"calibration": str(tmp_path / "data.npz")}}
    config = RunConfig.model_validate({**sections, "quantize": {"methods": ["mse"], "method": "mse", "smooth": 0.5}})
    (tmp_path / MODEL).write_bytes(transformer.read_bytes())
    calibration = calibrate(transformer, DATA)
    held_back = str(tmp_path / "data.npz")

    assert quantize_all(config, [], calibration, tmp_path, held_back=held_back)["smoothed"] == ["normed"]
    without = config.model_copy(update={"quantize": config.quantize.model_copy(update={"smooth": None})})
    assert quantize_all(without, [], calibration, tmp_path, held_back=held_back)["smoothed"] == []


def test_an_unknown_padding_is_told_before_the_model_is_prepared(transformer: Path, tmp_path: Path) -> None:
    """The model's file is not even looked at."""
    calibration = calibrate(transformer, DATA).annotated(settings={"padding": "a guess"})
    with pytest.raises(CalibrationError, match="it says 'a guess'; expected mask 'NAME'"):
        quantize(tmp_path / "none.onnx", calibration, output=tmp_path / "q.onnx", smooth=0.5, data=DATA)


def test_auto_judges_a_smoothed_model_on_data_of_its_own(transformer: Path, tmp_path: Path) -> None:
    """`data` smooth, `held_back` judge: the choice was made on 5 samples, not on the 24 that were smoothed by."""
    calibration = calibrate(transformer, DATA)
    other = {"x": DATA["x"][:5] * 0.5}
    wishes: Any = {"method": "auto", "smooth": 0.5}
    result = quantize(transformer, calibration, output=tmp_path / "q.onnx", data=DATA, held_back=other, **wishes)

    assert result.auto is not None
    assert result.auto.samples == 5
    assert result.notes[0].startswith("smoothed 1 normalized tensors")
    with pytest.raises(UsageError, match="others with --held-back, which auto judges on"):
        quantize(transformer, calibration, output=tmp_path / "q.onnx", data=DATA, **wishes)
    np.savez(tmp_path / "data.npz", **DATA)
    same = {"data": str(tmp_path / "data.npz"), "held_back": tmp_path / ".." / tmp_path.name / "data.npz"}
    for both in (same, {"data": DATA, "held_back": DATA}):
        with pytest.raises(UsageError, match="others with --held-back, which auto judges on"):
            quantize(transformer, calibration, output=tmp_path / "q.onnx", **both, **wishes)
