"""The note on tensors that lose more than a bit by their saturation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.calibration import Calibration, Fingerprint
from calibrators.counter import histogram_of
from engines.placement import ActivationPoint, Placement
from trt_int8.calibration import calibrate
from trt_int8.quantization import quantize
from trt_int8.saturation import costly_saturation, saturation_note

UNIFORM = (np.arange(200_000) + 0.5) / 200_000
"""Evenly spread over [0, 1]: rounding with step s costs s**2 / 12, saturation at t another (1 - t)**3 / 3."""

SINGLE = ActivationPoint("x", "x", None, "weighted-inputs", "data input")


def calibration_of(**values: Any) -> Calibration:
    fingerprint = Fingerprint("g", "w", ("d",), "p", "t", batches=1, samples=1)
    return Calibration({name: histogram_of(array) for name, array in values.items()}, fingerprint, {})


def placement_of(*points: ActivationPoint, groups: Any = ()) -> Placement:
    return Placement("tensorrt", points, (), (), groups)


@pytest.mark.parametrize(("threshold", "listed"), [(0.96, True), (0.97, False), (1.0, False), (1.001, False)])
def test_four_times_the_error_by_hand(threshold: float, listed: bool) -> None:
    """At 0.96: (0.04**3 / 3 + 0.96 (0.96 / 127)**2 / 12) / ((1 / 127)**2 / 12) = 5.01; at 0.97 it is 2.65."""
    found = costly_saturation(placement_of(SINGLE), {"x": threshold}, calibration_of(x=UNIFORM))
    step = threshold / 127
    direct = np.mean((UNIFORM - step * np.minimum(np.rint(UNIFORM / step), 127)) ** 2)
    whole = np.mean((UNIFORM - np.rint(UNIFORM * 127) / 127) ** 2)

    assert list(found) == (["x"] if listed else [])
    assert bool(direct / whole > 4) is listed
    if listed:
        assert found["x"] == pytest.approx(5.01, abs=0.02)
        assert found["x"] == pytest.approx(direct / whole, rel=0.01)


def test_codes_that_do_not_saturate_there() -> None:
    """Never-negative uint8 reaches twice the threshold, affine codes have a span, a Softmax a range of its own."""
    others: list[dict[str, Any]] = [{"unsigned": True, "nonnegative": True}, {"span": (0.0, 0.5)}, {"amax": 1.0}]
    for fields in others:
        point = ActivationPoint("x", "x", None, "weighted-inputs", "data input", **fields)
        assert costly_saturation(placement_of(point), {"x": 0.5}, calibration_of(x=UNIFORM)) == {}
    offset = ActivationPoint("x", "x", None, "weighted-inputs", "data input", unsigned=True)
    assert list(costly_saturation(placement_of(offset), {"x": 0.5}, calibration_of(x=UNIFORM))) == ["x"]


def test_a_shared_scale_is_the_one_that_saturates() -> None:
    """Where the other tensor of a Concat needs the range, this one has it as well."""
    points = [SINGLE, ActivationPoint("y", "y", None, "weighted-inputs", "data input")]
    calibration = calibration_of(x=UNIFORM, y=UNIFORM)
    thresholds = {"x": 0.5, "y": 1.0}

    assert list(costly_saturation(placement_of(*points), thresholds, calibration)) == ["x"]
    assert costly_saturation(placement_of(*points, groups=(("x", "y"),)), thresholds, calibration) == {}


def test_the_note_names_the_worst_and_counts_the_rest() -> None:
    """The costliest first; nothing is said where there is nothing to say."""
    names = [f"t{k}" for k in range(5)]
    points = [ActivationPoint(name, name, None, "weighted-inputs", "data input") for name in names]
    calibration = calibration_of(**dict.fromkeys(names, UNIFORM), zero=np.zeros(3))
    thresholds = {name: 0.9 - 0.1 * k for k, name in enumerate(names)}

    note = saturation_note(placement_of(*points), thresholds, calibration, "percentile 90")
    assert note is not None
    assert note.startswith(
        "percentile 90 saturates 5 of 5 tensors so far that their squared error grows more than four"
    )
    assert note.index("t4 (") < note.index("t3 (") < note.index("t2 (") < note.index(" and 2 more. Where")
    zero = ActivationPoint("zero", "zero", None, "weighted-inputs", "data input")
    assert saturation_note(placement_of(zero), {"zero": 0.0}, calibration, "entropy") is None


def test_quantize_tells_of_it(tiny_model: Path, tmp_path: Path) -> None:
    """For the methods that do not look at the size of errors."""
    feeds = [{"input": np.random.default_rng(4).normal(size=(8, 3, 8, 8)).astype(np.float32)}]
    calibration = calibrate(tiny_model, feeds)

    def notes(**options: Any) -> tuple[str, ...]:
        return quantize(tiny_model, calibration, output=tmp_path / "q.onnx", **options).notes

    assert [note.startswith("percentile 50 saturates ") for note in notes(method="percentile", percentile=50.0)] == [
        True
    ]
    assert notes(method="mse") == notes(method="minmax") == ()
