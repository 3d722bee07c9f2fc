"""`calibrate --statistics minmax`, from the data to `cache show`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from calibrators.calibration import Calibration
from trt_int8 import calibrate
from trt_int8.cache_merge import merge_calibrations
from trt_int8.caches import show_table
from trt_int8.cli import app
from trt_int8.errors import CalibrationError, UsageError


@pytest.fixture(scope="module")
def images() -> Any:
    """20 samples for `tiny_model`."""
    return np.random.default_rng(5).standard_normal((20, 3, 8, 8), dtype=np.float32)


def test_ranges_and_scales_are_those_of_histograms(tiny_model: Path, images: Any) -> None:
    """The method minmax does not change by a bit; its convergence is kept, too."""
    full = calibrate(tiny_model, {"input": images})

    found = calibrate(tiny_model, {"input": images}, statistics="minmax")

    assert found.statistics == "minmax"
    assert found.tensors == full.tensors
    assert [found.magnitude_range(name) for name in found.tensors] == [
        full.magnitude_range(name) for name in full.tensors
    ]
    assert found.scales("minmax") == full.scales("minmax")
    assert found.all_scales() == {"minmax": full.scales("minmax")}
    assert dict(found.convergence) == {"minmax": full.convergence["minmax"]}


def test_taken_up_again_and_in_passes(tiny_model: Path, tmp_path: Path, images: Any) -> None:
    """Interrupted, resumed, or shared out over passes, the file has the same bytes."""

    def stream() -> Iterator[dict[str, Any]]:
        for index in range(20):
            if index == 13:
                raise KeyError("the power went")
            yield {"input": images[index : index + 1]}

    part = tmp_path / "part.npz"
    with pytest.raises(Exception, match="the power went"):
        calibrate(tiny_model, stream(), statistics="minmax", checkpoint=part, checkpoint_every=4)
    assert Calibration.load(part).statistics == "minmax"
    data = {"input": images}
    resumed = calibrate(tiny_model, data, statistics="minmax", checkpoint=part, resume=True)
    passes = calibrate(tiny_model, data, statistics="minmax", max_memory_bytes=5000, threads=1)

    for name, found in (("a", resumed), ("b", passes), ("c", calibrate(tiny_model, data, statistics="minmax"))):
        found.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_checkpoint_of_histograms_is_not_gone_on_from(tiny_model: Path, tmp_path: Path, images: Any) -> None:
    """Nor the other way round."""
    path = tmp_path / "c.npz"
    calibrate(tiny_model, {"input": images[:4]}).save(path)

    with pytest.raises(CalibrationError, match="made with --statistics histogram, and is now minmax"):
        calibrate(tiny_model, {"input": images}, statistics="minmax", checkpoint=path, resume=True)


def test_stopping_by_another_method(tiny_model: Path, images: Any) -> None:
    """It is refused before anything is read."""
    with pytest.raises(UsageError, match=r"'entropy' are stable: --statistics minmax keeps ranges alone"):
        calibrate(tiny_model, {"input": images}, statistics="minmax", stop_when_stable="entropy")


def test_on_the_command_line(tiny_model: Path, tmp_path: Path, images: Any) -> None:
    """Calibrated, kept at the second call, shown, refused by another method, and replaced by histograms if forced."""
    np.savez(tmp_path / "data.npz", input=images)
    output = tmp_path / "c.npz"
    command = ["calibrate", str(tiny_model), "--data", str(tmp_path / "data.npz"), "--output", str(output)]

    first, second = (CliRunner().invoke(app, [*command, "--statistics", "minmax"]) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "(kept:" not in first.output
    assert "(kept:" in second.output
    table, lines = show_table(output, 99.99)
    assert [str(column.header) for column in table.columns] == ["tensor", "min", "max", "zeros %", "minmax"]
    assert any("ranges alone" in line for line in lines)
    quantized = ["quantize", str(tiny_model), "--calibration", str(output), "--output", str(tmp_path / "q.onnx")]
    assert CliRunner().invoke(app, [*quantized, "--method", "minmax"]).exit_code == 0
    with pytest.raises(CalibrationError, match="ranges alone"):
        CliRunner().invoke(app, quantized, catch_exceptions=False)
    with pytest.raises(CalibrationError, match="it was made with --statistics minmax, and is now histogram"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert Calibration.load(output).statistics == "histogram"


def test_merging_with_histograms_is_refused(tiny_model: Path, tmp_path: Path, images: Any) -> None:
    """The files and what differs are named; two of ranges are merged."""
    halves = {"input": images[:10]}, {"input": images[10:]}
    paths = [tmp_path / f"{k}.npz" for k in range(3)]
    calibrate(tiny_model, halves[0], statistics="minmax").save(paths[0])
    calibrate(tiny_model, halves[1], statistics="minmax").save(paths[1])
    calibrate(tiny_model, halves[1]).save(paths[2])

    merged = merge_calibrations(paths[:2], output=tmp_path / "merged.npz").calibration

    whole = calibrate(tiny_model, {"input": images}, statistics="minmax")
    assert merged.amax("minmax") == whole.amax("minmax")
    with pytest.raises(CalibrationError, match=r"0\.npz.*2\.npz.*statistics \(minmax and histogram\)"):
        merge_calibrations([paths[0], paths[2]], output=tmp_path / "other.npz")
