"""Calibration that is taken up again, shared out over passes, stopped early, or not run at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibrators.calibration import Calibration
from calibrators.convergence import judge
from trt_int8 import __version__, calibrate, calibration_job
from trt_int8.calibrate_stage import calibrate_into
from trt_int8.calibration_backend import CalibrationBackend
from trt_int8.calibration_job import CalibrationJob
from trt_int8.checkpoint import Checkpoint
from trt_int8.data import BatchSource, DataBatch
from trt_int8.errors import CalibrationError, DataError, ModelError, UsageError

Images = np.ndarray


@pytest.fixture(scope="module")
def images() -> Images:
    """37 samples for `tiny_model`; the later ones are larger, so that every batch matters."""
    rng = np.random.default_rng(3)
    growing = np.linspace(1, 2, 37, dtype=np.float32).reshape(-1, 1, 1, 1)
    return rng.standard_normal((37, 3, 8, 8), dtype=np.float32) * growing


def saved(calibration: Calibration, path: Path) -> bytes:
    """Return the bytes of a calibration's file."""
    calibration.save(path)
    return path.read_bytes()


class PowerError(Exception):
    """The power went."""


def interrupted(values: Images, after: int) -> Iterator[dict[str, Images]]:
    """Give batches until the power goes."""
    for index in range(len(values)):
        if index == after:
            raise PowerError
        yield {"input": values[index : index + 1]}


@pytest.mark.parametrize("after", [1, 4, 5, 16, 36])
@pytest.mark.parametrize("every", [1, 5, 37])
def test_taken_up_again_it_ends_the_same(
    tiny_model: Path, tmp_path: Path, images: Images, after: int, every: int
) -> None:
    """Interrupted after any batch, with checkpoints as seldom as may be, the file has the same bytes in the end."""
    whole = saved(calibrate(tiny_model, {"input": images}), tmp_path / "whole.npz")
    part = tmp_path / "c.part.npz"

    with pytest.raises(PowerError):
        calibrate(tiny_model, interrupted(images, after), checkpoint=part, checkpoint_every=every)
    assert not part.exists() or after >= every
    calibration = calibrate(tiny_model, {"input": images}, checkpoint=part, checkpoint_every=every, resume=True)

    assert saved(calibration, tmp_path / "c.npz") == whole
    assert not part.exists()


def test_interrupted_twice(tiny_model: Path, tmp_path: Path, images: Images) -> None:
    """Each run goes on where the last one was; what was counted is not run through the model again."""
    whole = saved(calibrate(tiny_model, {"input": images}), tmp_path / "whole.npz")
    part = tmp_path / "c.part.npz"
    for after in (7, 20):
        with pytest.raises(PowerError):
            calibrate(tiny_model, interrupted(images, after), checkpoint=part, checkpoint_every=3, resume=True)

    assert Calibration.load(part).fingerprint.batches == 18
    ran: list[tuple[str, int]] = []

    def track(items: Any, description: str, total: int | None = None) -> Any:
        ran.append((description, total or 0))
        return items

    calibration = calibrate(tiny_model, {"input": images}, checkpoint=part, resume=True, track=track)
    assert ran == [("resume", 18), ("calibrate", 19)]
    assert saved(calibration, tmp_path / "c.npz") == whole


def test_a_checkpoint_of_everything(tiny_model: Path, tmp_path: Path, images: Images) -> None:
    """Killed between the last batch and the end, nothing is run again."""
    whole = saved(calibrate(tiny_model, {"input": images}), tmp_path / "whole.npz")
    kept = Checkpoint(tmp_path / "c.part.npz", 37)
    CalibrationJob(tiny_model, {"input": images}).run(kept)
    assert kept.path.exists()

    calibration = calibrate(tiny_model, {"input": images}, checkpoint=kept.path, resume=True)

    assert saved(calibration, tmp_path / "c.npz") == whole


def test_without_a_checkpoint_it_starts_from_the_beginning(
    tiny_model: Path, tmp_path: Path, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so."""
    with caplog.at_level(logging.INFO):
        calibration = calibrate(tiny_model, {"input": images}, checkpoint=tmp_path / "c.part.npz", resume=True)

    assert "there is no checkpoint" in caplog.text
    assert calibration.fingerprint.batches == 37


def test_an_unused_checkpoint_is_pointed_out(
    tiny_model: Path, tmp_path: Path, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    """Who starts anew learns that there was something to go on from."""
    (tmp_path / "c.part.npz").touch()
    with caplog.at_level(logging.INFO):
        calibrate(tiny_model, {"input": images}, checkpoint=tmp_path / "c.part.npz")

    assert "is not used: --resume would go on from it" in caplog.text


@pytest.fixture
def part(tiny_model: Path, tmp_path: Path, images: Images) -> Path:
    """The checkpoint of ten batches."""
    path = tmp_path / "c.part.npz"
    with pytest.raises(PowerError):
        calibrate(tiny_model, interrupted(images, 11), checkpoint=path, checkpoint_every=10)
    return path


def test_other_data_are_refused(tiny_model: Path, part: Path, images: Images) -> None:
    """One value of one batch that was counted suffices; the checkpoint stays."""
    images = images.copy()
    images[9, 0, 0, 0] += 1
    with pytest.raises(DataError, match=r"from batch 10: the first 10 batches are not the ones .*data have changed"):
        calibrate(tiny_model, {"input": images}, checkpoint=part, resume=True)
    with pytest.raises(DataError, match="from batch 10: the data end before it"):
        calibrate(tiny_model, {"input": images[:9]}, checkpoint=part, resume=True)
    assert part.exists()


def changed_weights(model: Path) -> None:
    proto = onnx.load(model)
    weight = proto.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, weight.name))
    onnx.save(proto, model)


def test_another_model_is_refused(tiny_model: Path, part: Path, images: Images) -> None:
    """Weights and graph are told apart."""
    changed_weights(tiny_model)
    with pytest.raises(CalibrationError, match=r"Cannot resume from '.*c\.part\.npz': the weights have changed since"):
        calibrate(tiny_model, {"input": images}, checkpoint=part, resume=True)
    proto = onnx.load(tiny_model)
    proto.graph.node[0].name = "other"
    onnx.save(proto, tiny_model)
    with pytest.raises(CalibrationError, match=r"the graph has changed since; the weights have changed since"):
        calibrate(tiny_model, {"input": images}, checkpoint=part, resume=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stop_when_stable": "mse"}, "--stop-when-stable was none and is mse"),
        ({"tensors": "all"}, "it holds 3 tensors, and 5 are asked for, 2 of which it lacks"),
    ],
)
def test_other_settings_are_refused(
    tiny_model: Path, part: Path, images: Images, options: dict[str, Any], expected: str
) -> None:
    """What was told before and what is told now stand in the line."""
    with pytest.raises(CalibrationError, match=expected):
        calibrate(tiny_model, {"input": images}, checkpoint=part, resume=True, **options)


def test_another_version_is_refused(
    tiny_model: Path, part: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may count otherwise."""
    monkeypatch.setattr("trt_int8.calibration_job.__version__", "99")
    with pytest.raises(CalibrationError, match=f"trt-int8 was {__version__} and is 99"):
        calibrate(tiny_model, {"input": images}, checkpoint=part, resume=True)


class TestPasses:
    """Several passes, each for some of the tensors."""

    @pytest.fixture
    def wide(self, graph_builder: Any, tmp_path: Path) -> Path:
        """A residual net, whose fusions depend on which tensors are outputs."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input("input"), (3, 16))], "trunk")
        for index in range(3):
            inner = graph.node("Relu", [graph.conv(x, (16, 16))], f"inner{index}")
            x = graph.node("Relu", [graph.node("Add", [graph.conv(inner, (16, 16)), x])], f"block{index}")
        graph.gemm(graph.node("Flatten", [graph.node("GlobalAveragePool", [x])]), (16, 5), "logits")
        return Path(graph.save(tmp_path / "wide.onnx", ["logits"]))

    def test_the_result_is_that_of_one_pass(
        self, wide: Path, tmp_path: Path, images: Images, caplog: pytest.LogCaptureFixture
    ) -> None:
        """To the bit, though activations are computed in another fusion where other tensors are outputs."""
        whole = saved(calibrate(wide, {"input": images}), tmp_path / "whole.npz")
        for limit in (4096, 9000):
            with caplog.at_level(logging.INFO):
                calibration = calibrate(wide, {"input": images}, max_memory_bytes=limit, threads=1)
            assert saved(calibration, tmp_path / "c.npz") == whole
        assert "passes over the data" in caplog.text

    @pytest.mark.parametrize("after", [3, 40, 75])
    def test_interrupted_in_any_pass(self, wide: Path, tmp_path: Path, images: Images, after: int) -> None:
        """Passes that are done are not run again, and the one that was interrupted goes on."""
        whole = saved(calibrate(wide, {"input": images}), tmp_path / "whole.npz")
        part = tmp_path / "c.part.npz"
        left = [after]

        class Failing(list[dict[str, Images]]):
            def __iter__(self) -> Iterator[dict[str, Images]]:
                for item in super().__iter__():
                    left[0] -= 1
                    if left[0] < 0:
                        raise PowerError
                    yield item

        data = Failing({"input": image[None]} for image in images)
        options: dict[str, Any] = {"max_memory_bytes": 9000, "threads": 1, "checkpoint": part, "checkpoint_every": 2}
        with pytest.raises(PowerError):
            calibrate(wide, data, **options)
        assert list(tmp_path.glob("c.part.*of*.npz"))
        left[0] = 10**6
        calibration = calibrate(wide, data, resume=True, **options)

        assert saved(calibration, tmp_path / "c.npz") == whole
        assert not list(tmp_path.glob("c.part*"))

    def test_data_that_can_be_read_once(self, wide: Path, images: Images) -> None:
        """They are refused before the first pass; where all fits into one pass, they will do."""
        stream = ({"input": image[None]} for image in images)
        with pytest.raises(DataError, match=r"to calibrate in \d+ passes"):
            calibrate(wide, stream, max_memory_bytes=9000)
        stream = ({"input": image[None]} for image in images)
        assert calibrate(wide, stream, max_memory_bytes=10**6).fingerprint.batches == 37

    def test_data_that_change_between_passes(self, wide: Path, images: Images) -> None:
        """Both passes are named with what they read."""

        class Changing(list[dict[str, Images]]):
            passes = 0

            def __iter__(self) -> Iterator[dict[str, Images]]:
                self.passes += 1
                return iter([{"input": image[None] + self.passes} for image in images])

        with pytest.raises(DataError, match=r"changed between the passes: 37 batches, 37 samples \(hash .*in pass 2"):
            calibrate(wide, Changing(), max_memory_bytes=9000)

    def test_stopping_early_needs_all_tensors_at_once(self, wide: Path, images: Images) -> None:
        """No pass sees them all."""
        with pytest.raises(UsageError, match="Cannot stop when scales are stable in a calibration of"):
            calibrate(wide, {"input": images}, max_memory_bytes=9000, stop_when_stable="mse")

    def test_a_tensor_that_does_not_fit(self, wide: Path, images: Images) -> None:
        """It is named before anything is run."""
        with pytest.raises(ModelError, match="alone takes"):
            calibrate(wide, {"input": images}, max_memory_bytes=100)


def test_the_bound_is_said_before_the_first_batch(
    tiny_model: Path, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    """Activations beyond plain inference for each batch at a time, 3 histograms of at most 1.125 MiB for each."""
    with caplog.at_level(logging.INFO):
        calibrate(tiny_model, {"input": np.repeat(images, 20, axis=0)}, batch_size=512, threads=3)

    (line,) = [record.message for record in caplog.records if record.message.startswith("memory")]
    relu_and_logits = 4 * 512 * (8 * 64 + 16) / 2**20
    assert f"+ 3 x ({relu_and_logits:.1f} of activations for batches like the first + 32.0 between parts" in line
    assert line.endswith("+ 10.1 of histograms")
    assert f"at most {200 + 3 * (relu_and_logits + 32) + 10.125:.0f} MiB above plain inference: 200 of code" in line


def test_each_worker_of_a_cluster_has_the_memory_for_itself(
    tiny_model: Path, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    """They run one batch at a time, whatever the cores of this machine."""

    def passes(**options: Any) -> tuple[tuple[str, ...], ...]:
        job = CalibrationJob(tiny_model, {"input": images}, max_memory_bytes=2500, **options)
        return job._passes({"input": (1, 3, 8, 8)})

    with caplog.at_level(logging.INFO):
        assert len(passes(ray="local")) == len(passes(threads=1)) == 1
    assert "memory of each worker: at most" in caplog.text
    with pytest.raises(ModelError, match="alone takes"):
        passes(threads=2)


def test_ranges_take_no_histograms(tiny_model: Path, images: Images, caplog: pytest.LogCaptureFixture) -> None:
    """Their extremes are a few bytes."""
    with caplog.at_level(logging.INFO):
        calibrate(tiny_model, {"input": images}, statistics="minmax")

    assert "+ 0.0 of histograms" in caplog.text


class TestConvergence:
    """The history of the scales."""

    def test_scales_are_those_of_so_many_batches(self, tiny_model: Path, images: Images) -> None:
        """At the last doublings and at the end, for every method: those that a calibration of so many batches has."""
        calibration = calibrate(tiny_model, {"input": images})

        assert set(calibration.convergence) == {"minmax", "entropy", "percentile", "mse"}
        for method, points in calibration.convergence.items():
            assert list(points) == list(calibration.tensors)
            for tensor, values in points.items():
                assert [count for count, _ in values] == [2, 4, 8, 16, 32, 37]
                assert values[-1][1] == calibration.scales(method)[tensor]
        early = calibrate(tiny_model, {"input": images[:8]})
        assert {name: values[2][1] for name, values in calibration.convergence["mse"].items()} == early.scales("mse")

    def test_it_stops_where_nothing_moves(self, tiny_model: Path, tmp_path: Path) -> None:
        """Equal batches: after 32 of them, as fewer agree by chance; interrupted and taken up again, at the same."""
        values = np.repeat(np.random.default_rng(5).standard_normal((1, 3, 8, 8), dtype=np.float32), 100, axis=0)
        stopped = calibrate(tiny_model, {"input": values}, stop_when_stable="minmax")
        verdict = judge(stopped.convergence, "minmax")

        assert stopped.fingerprint.batches == 32
        assert verdict is not None
        assert verdict.stable
        assert stopped.fingerprint.data == calibrate(tiny_model, {"input": values[:32]}).fingerprint.data
        options: dict[str, Any] = {"stop_when_stable": "minmax", "checkpoint": tmp_path / "p", "checkpoint_every": 3}
        with pytest.raises(PowerError):
            calibrate(tiny_model, interrupted(values, 31), **options)
        again = calibrate(tiny_model, {"input": values}, resume=True, **options)
        assert saved(again, tmp_path / "a.npz") == saved(stopped, tmp_path / "b.npz")

    def test_it_goes_on_where_scales_move(self, tiny_model: Path, images: Images) -> None:
        """Growing samples never settle."""
        assert calibrate(tiny_model, {"input": images}, stop_when_stable="minmax").fingerprint.batches == 37


def test_what_was_fed_is_kept(tiny_model: Path, images: Images) -> None:
    """Mean, deviation and range of the input, per channel; however the samples were cut."""
    one = calibrate(tiny_model, {"input": images}).input_statistics["input"]

    assert one.overall.mean == pytest.approx(images.astype(np.float64).mean(), rel=1e-9)
    assert one.channels[2].deviation == pytest.approx(images[:, 2].astype(np.float64).std(), rel=1e-9)
    assert (one.overall.minimum, one.overall.maximum) == (images.min(), images.max())
    assert calibrate(tiny_model, {"input": images}, batch_size=5).input_statistics["input"] == one


class TestReuse:
    """A file that is there already."""

    def job(self, model: Path, images: Images, **options: Any) -> CalibrationJob:
        return CalibrationJob(model, {"input": images}, **options)

    def test_what_fits_is_kept(
        self, tiny_model: Path, tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is run and nothing written; a forgotten checkpoint goes."""
        output = tmp_path / "c.npz"
        assert not calibrate_into(output, self.job(tiny_model, images)).kept
        (tmp_path / "c.part.npz").touch()
        before = output.stat().st_mtime_ns
        monkeypatch.setattr(CalibrationJob, "run", None)

        result = calibrate_into(output, self.job(tiny_model, images))

        assert result.kept
        assert result.calibration.sha256 == Calibration.load(output).sha256
        assert [path.name for path in tmp_path.glob("c*")] == ["c.npz"]
        assert output.stat().st_mtime_ns == before

    def test_force_calibrates_anew(self, tiny_model: Path, tmp_path: Path, images: Images) -> None:
        """Although it fits."""
        calibrate_into(tmp_path / "c.npz", self.job(tiny_model, images))
        assert not calibrate_into(tmp_path / "c.npz", self.job(tiny_model, images), force=True).kept

    def test_what_changed_is_refused(self, tiny_model: Path, tmp_path: Path, images: Images) -> None:
        """Data, their number, weights, settings, a merged file, a file that is none; --force replaces it each time."""
        output = tmp_path / "c.npz"

        def reason(values: Images, **options: Any) -> str:
            before = output.read_bytes()
            with pytest.raises(CalibrationError, match=r"Name another --output, or .* with --force\.$") as caught:
                calibrate_into(output, self.job(tiny_model, values, **options))
            assert output.read_bytes() == before
            result = calibrate_into(output, self.job(tiny_model, values, **options), force=True)
            assert Calibration.load(output).sha256 == result.calibration.sha256
            return str(caught.value)

        calibrate_into(output, self.job(tiny_model, images))
        assert "the data have changed: their hash is" in reason(images + 1)
        assert "the data give 9 batches now, and gave 37" in reason(images[:9])
        assert "the data give 10 batches now, and gave 9" in reason(images[:10])
        told = {"stop_when_stable": "mse"}
        assert "--stop-when-stable was none and is mse" in reason(images[:10], **told)
        changed_weights(tiny_model)
        assert "the weights have changed since" in reason(images[:10], **told)
        Calibration.load(output).merge(Calibration.load(output)).save(output)
        assert "it was merged of 2 parts" in reason(images[:10], **told)
        output.write_text("something else")
        assert "holds no calibration that can be read" in reason(images[:10], **told)

    def test_each_change_is_told_once(self, tiny_model: Path, images: Images) -> None:
        """What is counted, and of which tensors; another model has other tensors anyhow."""
        some = calibrate(tiny_model, {"input": images}, tensors="tensorrt")
        every = calibrate(tiny_model, {"input": images}, tensors="all")
        more, less = len(every.tensors), len(some.tensors)

        def change(earlier: Calibration, **options: Any) -> str | None:
            return CalibrationJob(tiny_model, {"input": images}, **options).what_changed(earlier)

        assert change(every, tensors="all", statistics="minmax") == (
            "it was made with --statistics histogram, and is now minmax"
        )
        assert change(some, tensors="all") == (
            f"it holds {less} tensors, and {more} are asked for, {more - less} of which it lacks"
        )
        assert change(every, tensors="tensorrt") == f"it holds {more} tensors, and {less} are asked for"
        changed_weights(tiny_model)
        assert change(some, tensors="all") == "the weights have changed since"

    def test_a_calibration_that_stopped_early_is_recognised(self, tiny_model: Path, tmp_path: Path) -> None:
        """By the data that it read."""
        values = np.repeat(np.random.default_rng(5).standard_normal((1, 3, 8, 8), dtype=np.float32), 50, axis=0)
        options = {"stop_when_stable": "minmax"}
        calibrate_into(tmp_path / "c.npz", self.job(tiny_model, values, **options))

        assert calibrate_into(tmp_path / "c.npz", self.job(tiny_model, values, **options)).kept

    def test_data_that_can_be_read_once_are_never_recognised(self, tiny_model: Path, images: Images) -> None:
        """Reading them for a look would leave nothing to calibrate on."""
        calibration = calibrate(tiny_model, {"input": images})
        job = CalibrationJob(tiny_model, ({"input": image[None]} for image in images))

        assert "can be read only once" in (job.what_changed(calibration) or "")


def test_a_checkpoint_is_written_while_the_disk_is_full(
    tiny_model: Path, tmp_path: Path, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that cannot be written to costs the checkpoints, not the calibration."""
    blocked = tmp_path / "file"
    blocked.touch()
    calibration = calibrate(tiny_model, {"input": images}, checkpoint=blocked / "c.part.npz", checkpoint_every=20)

    assert calibration.fingerprint.batches == 37
    assert "The calibration goes on" in caplog.text


def test_hashes_belong_to_the_batch_that_was_counted(
    tiny_model: Path, tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where batches are read ahead, the checkpoint holds the hash of those that were counted."""
    read = BatchSource.__iter__

    def ahead(self: BatchSource) -> Iterator[DataBatch]:
        return iter(list(read(self)))

    monkeypatch.setattr(BatchSource, "__iter__", ahead)
    kept = Checkpoint(tmp_path / "c.part.npz", 10)
    CalibrationJob(tiny_model, {"input": images}).run(kept)

    assert Calibration.load(kept.path).fingerprint.data == calibrate(
        tiny_model, {"input": images[:30]}
    ).fingerprint.data  # fmt: skip


def test_batches_have_their_numbers_after_a_resume(tiny_model: Path, part: Path, images: Images) -> None:
    """An activation that overflows is reported with the batch of the whole stream."""
    images = images.copy()
    images[25] = 3e38
    with pytest.raises(CalibrationError, match="in batch 25"):
        calibrate(tiny_model, {"input": images}, checkpoint=part, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": True}, "resume would change nothing: there is no checkpoint. Leave it out, or name its file"),
        ({"checkpoint_every": 4}, "checkpoint_every would change nothing"),
        ({"threads": 2, "ray": "local"}, "--threads would change nothing: each worker of a Ray cluster runs one batch"),
    ],
)
def test_options_without_effect_are_refused(options: Any, message: str, tiny_model: Path, images: Images) -> None:
    """Nothing would come of them."""
    with pytest.raises(UsageError, match=message):
        calibrate(tiny_model, {"input": images}, **options)


def test_threads_are_for_the_processor(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, images: Images) -> None:
    """A GPU that was asked for runs one batch at a time; where auto finds one, threads were meant for the case it had
    not."""
    on_gpu = CalibrationBackend("cuda", "found", {})
    monkeypatch.setattr(calibration_job, "choose_calibration_backend", lambda name: on_gpu)
    with pytest.raises(UsageError, match="--threads would change nothing: a GPU runs one batch at a time"):
        CalibrationJob(tiny_model, {"input": images}, backend="cuda", threads=2)
    CalibrationJob(tiny_model, {"input": images}, backend="auto", threads=2)
