"""Padding is left out of the statistics: what is counted is what the sequences give one by one, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from calibrators.calibration import Calibration
from calibrators.errors import CalibrationError
from calibrators.protocols import Array
from engines.calibrated_tensors import tensors_to_calibrate
from engines.graph import PreparedModel, prepare
from engines.padding import PaddedTensors, Padding, real_positions
from engines.sequence_axes import find_padding
from trt_int8 import calibrate
from trt_int8.cache_check import check_data
from trt_int8.cache_merge import merge_calibrations
from trt_int8.calibrate_stage import calibrate_into
from trt_int8.calibration import padding_left_out
from trt_int8.calibration_job import CalibrationJob
from trt_int8.checkpoint import Checkpoint
from trt_int8.config import DataConfig
from trt_int8.errors import DataError, ModelError, UsageError
from trt_int8.ray_worker import Shard, ShardBatch, count_shard, pack

Batch = dict[str, Array]
MASK = Padding("mask", "mask")
WIDTH, HEADS, HEAD = 8, 2, 4
VOCABULARY = 50
PAD = VOCABULARY - 1


def encoder(graph_builder: Any, path: Path, *, samples: int | str = "batch", positions: int | str = "sequence") -> Path:
    """Draw an encoder of two layers whose numbers are small integers, so that every sum of them is exact in float32.

    Its attention weighs by clipped scores times the mask, so that padding touches no real position. The embedding of
    padding is far larger than any other.
    """
    graph = graph_builder()
    rng = np.random.default_rng(5)

    def integers(*shape: int, low: int = -1, high: int = 1) -> str:
        return str(graph.constant(rng.integers(low, high + 1, shape).astype(np.float32)))

    ids = graph.input("ids", (samples, positions), TensorProto.INT64)
    mask = graph.input("mask", (samples, positions), TensorProto.INT64)
    table = rng.integers(-3, 4, (VOCABULARY, WIDTH)).astype(np.float32)
    table[PAD] = 100
    x = graph.node("Gather", [graph.constant(table), ids], "embedded")
    keys = graph.node("Cast", [graph.node("Unsqueeze", [mask, graph.constant(np.array([1, 2]))])], to=1)
    split = graph.constant(np.array([0, 0, HEADS, HEAD]))
    together = graph.constant(np.array([0, 0, WIDTH]))
    for layer in range(2):

        def heads(x: str, perm: list[int]) -> str:
            projected = graph.node("MatMul", [x, integers(WIDTH, WIDTH)])
            return str(graph.node("Transpose", [graph.node("Reshape", [projected, split])], perm=perm))

        query, key, value = heads(x, [0, 2, 1, 3]), heads(x, [0, 2, 3, 1]), heads(x, [0, 2, 1, 3])
        scores = graph.clip(graph.node("MatMul", [query, key], f"scores_{layer}"), 0, 2)
        weights = graph.node("Mul", [scores, keys], f"weights_{layer}")
        context = graph.node("Transpose", [graph.node("MatMul", [weights, value])], perm=[0, 2, 1, 3])
        x = graph.node(
            "Add", [x, graph.node("MatMul", [graph.node("Reshape", [context, together]), integers(WIDTH, WIDTH)])]
        )
        hidden = graph.node("Relu", [graph.node("MatMul", [x, integers(WIDTH, 2 * WIDTH)])], f"hidden_{layer}")
        x = graph.clip(graph.node("Add", [x, graph.node("MatMul", [hidden, integers(2 * WIDTH, WIDTH)])]), -3, 3)
    flat = graph.node("Reshape", [x, graph.constant(np.array([-1, WIDTH]))], "flat")
    graph.node("MatMul", [flat, integers(WIDTH, 3)], "flat_logits")
    first = graph.node("Gather", [x, graph.constant(np.int64(0))], "first", axis=1)
    graph.node("MatMul", [first, integers(WIDTH, 3)], "y")
    return Path(graph.save(path / "encoder.onnx", ["flat_logits", "y"]))


@pytest.fixture(scope="module")
def model(graph_builder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with free axes."""
    return encoder(graph_builder, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def sequences() -> list[Array]:
    """Token ids of different lengths."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, PAD, length) for length in (3, 9, 1, 6, 4, 4, 12, 2, 7)]


def one_by_one(sequences: list[Array]) -> list[Batch]:
    return [{"ids": ids[None], "mask": np.ones((1, len(ids)), np.int64)} for ids in sequences]


def padded(sequences: list[Array], size: int, length: int | None = None) -> list[Batch]:
    """Cut the sequences into batches of `size`, each filled up to its longest one (or to `length`)."""
    batches = []
    for start in range(0, len(sequences), size):
        group = sequences[start : start + size]
        ids = np.full((len(group), length or max(map(len, group))), PAD)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(group):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        batches.append({"ids": ids, "mask": mask})
    return batches


def assert_equal(found: Calibration, expected: Calibration, *, but: tuple[str, ...] = ()) -> None:
    assert found.tensors == expected.tensors
    for name in found.tensors:
        if name in but:
            continue
        one, other = found.histogram(name), expected.histogram(name)
        np.testing.assert_array_equal(one.bins, other.bins, err_msg=name)
        np.testing.assert_array_equal(one.counts, other.counts, err_msg=name)
        assert (one.minimum, one.maximum, one.zeros) == (other.minimum, other.maximum, other.zeros), name


@pytest.fixture(scope="module")
def expected(model: Path, sequences: list[Array]) -> Calibration:
    """What the sequences give one by one."""
    return calibrate(model, one_by_one(sequences), tensors="all")


def test_counts_are_those_of_the_sequences_alone(model: Path, sequences: list[Array], expected: Calibration) -> None:
    """Every activation, bit for bit: hidden states, heads, scores of queries and keys, flattened rows, pooled ones."""
    found = calibrate(model, padded(sequences, 4), tensors="all", padding_mask="mask")
    whole = calibrate(model, padded(sequences, 4), tensors="all")

    assert_equal(found, expected)
    assert len(found.tensors) > 30
    # Without the mask padding counts: the test would notice.
    assert whole.amax("minmax")["embedded"] == 100 > found.amax("minmax")["embedded"]
    for name in ("scores_0", "weights_1", "hidden_1", "flat", "flat_logits"):
        assert whole.histogram(name).counts.sum() > found.histogram(name).counts.sum()


@pytest.mark.parametrize("kind", ["lengths", "mask beside the inputs", "bool", "left"])
def test_padding_is_told_in_several_ways(kind: str, model: Path, sequences: list[Array], expected: Calibration) -> None:
    """By the number of real positions, by a mask that the model does not take, of any type, on either side."""
    batches = padded(sequences, 4)
    told: dict[str, str] = {"padding_mask": "real"}
    for batch in batches:
        batch["real"] = batch["mask"].astype(np.float32)
        if kind == "lengths":
            batch["real"] = batch["mask"].sum(axis=1).astype(np.int32)
            told = {"lengths": "real"}
        elif kind == "bool":
            batch["real"] = batch["mask"] == 1
        elif kind == "left":
            batch |= {name: value[:, ::-1] for name, value in batch.items()}
    found = calibrate(model, batches, tensors="all", **told)

    # The first position is padding there, or a sequence's last token.
    assert_equal(found, expected, but=("first", "y") if kind == "left" else ())


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3}, {"max_memory_bytes": 24_000}])
def test_threads_and_passes_change_nothing(
    options: dict[str, int], model: Path, sequences: list[Array], expected: Calibration
) -> None:
    """However the batches and the tensors are shared out."""
    assert_equal(calibrate(model, padded(sequences, 2), tensors="all", padding_mask="mask", **options), expected)


def test_a_fixed_batch_that_is_short_is_left_out_too(
    graph_builder: Any, tmp_path: Path, sequences: list[Array], expected: Calibration
) -> None:
    """Nine sequences in batches of 4: three rows of the last fill it up."""
    model = encoder(graph_builder, tmp_path, samples=4)
    found = calibrate(model, padded(sequences, 4), tensors="all", padding_mask="mask")

    assert_equal(found, expected)


@pytest.mark.parametrize("samples", [1, 3, "batch"])
def test_a_graph_may_fix_the_number_of_positions(
    samples: int | str, graph_builder: Any, tmp_path: Path, sequences: list[Array], expected: Calibration
) -> None:
    """12 positions always: they are recognised by their number where a tensor has one axis of it."""
    model = encoder(graph_builder, tmp_path, samples=samples, positions=12)
    size = samples if isinstance(samples, int) else 2
    job = CalibrationJob(model, padded(sequences, size, 12), tensors="all", padding_mask="mask")
    found = job.run()
    doubtful = tuple(name for name in found.tensors if any(name in note for note in job.notes))

    assert doubtful
    assert_equal(found, expected, but=doubtful)
    assert all("scores" in name or "clip" in name or "weights" in name for name in doubtful)


def test_taken_up_again_it_ends_the_same(model: Path, tmp_path: Path, sequences: list[Array]) -> None:
    """An interrupted run goes on with the mask, and refuses to go on with another."""
    batches = padded(sequences, 2)
    part = tmp_path / "c.part.npz"

    def interrupted() -> Iterator[Batch]:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CalibrationJob(model, interrupted(), padding_mask="mask").run(Checkpoint(part, 1))
    with pytest.raises(CalibrationError, match="padding was mask 'mask' and is none"):
        CalibrationJob(model, batches).run(Checkpoint(part, 1), resume=True)
    found = CalibrationJob(model, batches, padding_mask="mask").run(Checkpoint(part, 1), resume=True)

    assert found.sha256 == calibrate(model, batches, padding_mask="mask").sha256


def test_a_worker_of_a_cluster_leaves_it_out(model: Path, sequences: list[Array], expected: Calibration) -> None:
    """What tells padding travels with the batches, be it an input or not."""
    prepared = prepare(model)
    names = tensors_to_calibrate(prepared, "all")
    job = pack(prepared, names, padded=find_padding(prepared, names, Padding("n", "lengths")))
    shards = [ShardBatch(batch, len(batch["ids"]), {"n": batch["mask"].sum(axis=1)}) for batch in padded(sequences, 4)]
    found = count_shard(job, Shard(0, tuple(shards))).histograms

    for name in names:
        np.testing.assert_array_equal(found[name].counts, expected.histogram(name).counts, err_msg=name)


def test_a_kept_calibration_is_bound_to_its_padding(model: Path, tmp_path: Path, sequences: list[Array]) -> None:
    """The same settings and data are recognised; without the mask, or with other lengths, it is another one."""
    output = tmp_path / "c.npz"
    batches = padded(sequences, 4)
    for batch in batches:
        batch["n"] = batch["mask"].sum(axis=1)

    def kept(**told: str) -> bool:
        return calibrate_into(output, CalibrationJob(model, batches, **told)).kept

    assert not kept(lengths="n")
    assert kept(lengths="n")
    with pytest.raises(CalibrationError, match="padding was lengths 'n' and is none"):
        kept()
    batches[0]["n"] = np.minimum(batches[0]["n"], 2)
    with pytest.raises(CalibrationError, match="the data have changed"):
        kept(lengths="n")


def test_new_data_are_checked_without_their_padding(model: Path, sequences: list[Array], expected: Calibration) -> None:
    """The same sequences, cut otherwise, leave no range, and clip what they clipped before; padding would leave it."""
    calibration = calibrate(model, padded(sequences, 4), padding_mask="mask")
    found = check_data(calibration, padded(sequences, 2), model)
    counted = check_data(calibrate(model, one_by_one(sequences)), padded(sequences, 2), model)

    assert all(row.amax_ratio == 1 and row.clipped == row.calibrated_clipped for row in found.tensors)
    assert max(row.amax_ratio for row in counted.tensors) > 1


def test_merged_parts_keep_their_padding(model: Path, sequences: list[Array], tmp_path: Path) -> None:
    """So that smoothing and checks leave it out too; parts that left out other padding are refused."""
    files = [tmp_path / "0.npz", tmp_path / "1.npz", tmp_path / "whole.npz"]
    for file, part in zip(files, (sequences[:5], sequences[5:]), strict=False):
        calibrate(model, padded(part, 4), padding_mask="mask").save(file)
    calibrate(model, padded(sequences[5:], 3)).save(files[2])
    merge_calibrations(files[:2], output=tmp_path / "both.npz")

    assert padding_left_out(Calibration.load(tmp_path / "both.npz")) == Padding("mask", "mask")
    with pytest.raises(CalibrationError, match=r"differ in the padding left out \(mask 'mask' and none\)"):
        merge_calibrations([files[0], files[2]], output=tmp_path / "mixed.npz")
    with pytest.raises(CalibrationError, match="by mask 'mask' in one and by nothing in the other"):
        Calibration.load(files[0]).merge(Calibration.load(files[2]))


class TestRoles:
    """Which axis is which is found in the graph."""

    def found(self, graph: Any, tmp_path: Path, outputs: list[str]) -> PaddedTensors:
        prepared: PreparedModel = prepare(graph.save(tmp_path / "m.onnx", outputs))
        return find_padding(prepared, tensors_to_calibrate(prepared, "all"), MASK)

    @pytest.fixture
    def graph(self, graph_builder: Any) -> Any:
        """An input of 6 features at each position, and a mask."""
        graph = graph_builder()
        graph.input("x", ("n", "t", 6))
        graph.input("mask", ("n", "t"), TensorProto.BOOL)
        return graph

    def test_merged_axes_are_read_in_their_order(self, graph: Any, tmp_path: Path) -> None:
        """Rows of samples x positions, or the other way round where the sequence comes first."""
        shape = graph.constant(np.array([-1, 6]))
        graph.node("Reshape", [graph.node("Relu", ["x"], "r"), shape], "rows")
        turned = graph.node("Transpose", ["r"], "turned", perm=[1, 0, 2])
        graph.node("Sigmoid", [graph.node("Reshape", [turned, shape], "columns")], "later")
        padded = self.found(graph, tmp_path, ["rows", "later"])
        values = np.arange(2 * 3 * 6, dtype=np.float32).reshape(2, 3, 6)
        real = np.array([[True, True, False], [True, False, False]])
        kept = np.sort(values[real], axis=None)

        assert padded.roles["rows"] == ("samples x positions", "other")
        assert padded.roles["columns"] == padded.roles["later"] == ("positions x samples", "other")
        assert padded.roles["turned"] == ("positions", "samples", "other")
        for name, same in {
            "r": values,
            "rows": values.reshape(6, 6),
            "turned": values.transpose(1, 0, 2),
            "later": values.transpose(1, 0, 2).reshape(6, 6),
        }.items():
            np.testing.assert_array_equal(np.sort(padded.without(name, same, real), axis=None), kept, err_msg=name)

    def test_heads_merged_into_the_batch(self, graph: Any, tmp_path: Path) -> None:
        """(samples * heads, positions, size): every head of a sample has its padding."""
        split = graph.node("Reshape", ["x", graph.constant(np.array([0, 0, 2, 3]))])
        heads = graph.node("Transpose", [split], "heads", perm=[0, 2, 1, 3])
        shapes = [graph.node("Shape", ["x"], start=i, end=i + 1) for i in (0, 1)]
        target = graph.node("Concat", [graph.node("Mul", [shapes[0], graph.constant(np.array([2]))]), shapes[1],
                                       graph.constant(np.array([3]))], axis=0)  # fmt: skip
        graph.node("Relu", [graph.node("Reshape", [heads, target], "merged")], "y")
        padded = self.found(graph, tmp_path, ["y"])
        values = np.arange(2 * 2 * 4 * 3, dtype=np.float32).reshape(4, 4, 3)
        real = np.array([[True, True, False, False], [True, True, True, False]])

        assert padded.roles["merged"] == ("samples", "positions", "other")
        kept = np.concatenate([values[0:2, :2].ravel(), values[2:4, :3].ravel()])
        np.testing.assert_array_equal(np.sort(padded.without("merged", values, real), axis=None), np.sort(kept))

    def test_what_belongs_to_no_sample_counts_where_any_is_real(self, graph: Any, tmp_path: Path) -> None:
        """Scores of positions alone are used as far as the longest sequence goes."""
        rows = graph.node("ReduceMax", ["x", graph.constant(np.array([0]))], "rows", keepdims=0)
        graph.node("MatMul", [rows, graph.node("Transpose", [rows], perm=[1, 0])], "scores")
        padded = self.found(graph, tmp_path, ["scores"])
        values = np.arange(9, dtype=np.float32).reshape(3, 3)
        real = np.array([[True, False, False], [True, True, False]])

        assert padded.roles["scores"] == ("positions", "positions")
        np.testing.assert_array_equal(padded.without("scores", values, real), [0, 1, 3, 4])

    def test_an_axis_that_is_longer_by_one_cannot_be_told(self, graph: Any, tmp_path: Path) -> None:
        """A token put before the sequence; a tensor without positions is nobody's concern."""
        first = graph.node("ReduceMax", ["x", graph.constant(np.array([1]))], "first")
        graph.node("Concat", [first, "x"], "longer", axis=1)
        padded = self.found(graph, tmp_path, ["longer"])

        assert padded.unknown == ("longer",)
        assert "first" not in padded.roles

    def test_unnamed_axes(self, graph_builder: Any, tmp_path: Path) -> None:
        """The first one counts samples; the one of the mask's second axis positions."""
        graph = graph_builder()
        graph.input("x", (None, None, 6))
        graph.input("mask", (None, None), TensorProto.BOOL)
        graph.node("Relu", ["x"], "y")

        assert self.found(graph, tmp_path, ["y"]).roles["y"] == ("samples", "positions", "other")

    def test_a_shape_that_the_graph_did_not_state(self, graph: Any, tmp_path: Path) -> None:
        """Is refused, with both."""
        graph.node("Relu", ["x"], "y")
        padded = self.found(graph, tmp_path, ["y"])

        with pytest.raises(CalibrationError, match=r"padding out of 'y': its shape is \(2, 5, 6\), and 2 samples of 3"):
            padded.without("y", np.zeros((2, 5, 6), np.float32), np.eye(2, 3, dtype=bool))


class TestErrors:
    """What tells padding is checked before anything is run."""

    def data(self, **arrays: Any) -> list[Batch]:
        return [{"ids": np.zeros((2, 3), np.int64), "mask": np.ones((2, 3), np.int64), **arrays}]

    @pytest.mark.parametrize(
        ("told", "arrays", "message"),
        [
            ({"padding_mask": "real"}, {}, r"batch 0 .*no mask 'real'.*found ids, mask"),
            ({"padding_mask": "mask"}, {"mask": np.full((2, 3), 2)}, "other numbers than 0 and 1"),
            ({"padding_mask": "mask"}, {"mask": np.zeros((2, 3), np.int64)}, "all 6 positions are padding.*inverted"),
            ({"padding_mask": "real"}, {"real": np.ones((2, 4))}, r"shape \(2, 4\); expected \(samples, 3\)"),
            ({"lengths": "n"}, {"n": np.array([1, 4])}, "are 1 to 4; expected 0 to 3"),
            ({"lengths": "n"}, {"n": np.array([1.0, 2.0])}, "are float64 of shape"),
        ],
    )
    def test_arrays_that_cannot_be_it(self, told: dict[str, str], arrays: Batch, message: str, model: Path) -> None:
        """Missing, of another shape, with other values."""
        with pytest.raises(DataError, match=message):
            calibrate(model, self.data(**arrays), **told)

    def test_one_way_at_a_time(self, model: Path) -> None:
        """In Python, and in a configuration."""
        with pytest.raises(UsageError, match="--padding-mask or --lengths"):
            calibrate(model, self.data(), padding_mask="mask", lengths="n")
        with pytest.raises(ValueError, match="expected one of them"):
            DataConfig(calibration="x.npz", padding_mask="mask", lengths="n")

    def test_a_mask_of_four_axes(self, graph_builder: Any, tmp_path: Path) -> None:
        """What the model adds to its scores is no mask of positions."""
        graph = graph_builder()
        graph.input("x", ("n", "t", 6))
        graph.input("mask", ("n", 1, 1, "t"))
        graph.node("Add", [graph.gemm(graph.node("Flatten", ["x"]), (6, 6)), graph.node("ReduceMax", ["mask"])], "y")
        model = graph.save(tmp_path / "m.onnx", ["y"])

        with pytest.raises(
            ModelError, match=r"mask: float32 \(n, 1, 1, t\); expected the shape \(samples, positions\)"
        ):
            calibrate(model, self.data(), padding_mask="mask")

    def test_an_image_has_no_positions(self, graph_builder: Any, tmp_path: Path) -> None:
        """A vector for each sample."""
        graph = graph_builder()
        graph.node("Relu", [graph.input("x", ("n",))], "y")
        model = graph.save(tmp_path / "m.onnx", ["y"])

        with pytest.raises(ModelError, match="no input of the model has an axis of positions"):
            calibrate(model, [{"x": np.ones(2, np.float32)}], tensors="all", lengths="n")

    def test_not_on_a_gpu(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel counts tensors whole."""
        from trt_int8 import calibration_job
        from trt_int8.calibration_backend import CalibrationBackend

        monkeypatch.setattr(
            calibration_job, "choose_calibration_backend", lambda name: CalibrationBackend("cuda", "found", {})
        )
        with pytest.raises(UsageError, match=r"--backend cuda.*Take --backend onnxruntime"):
            calibrate(model, self.data(), padding_mask="mask", backend="cuda")


def test_lengths_may_be_zero() -> None:
    """A sample of nothing but padding is nothing."""
    real = real_positions(Padding("n", "lengths"), np.array([0, 2]), 3, "a batch")

    np.testing.assert_array_equal(real, [[False] * 3, [True, True, False]])


@pytest.mark.parametrize("padding", [MASK, Padding('it\'s "n"', "lengths")])
def test_a_text_gives_the_padding_back(padding: Padding) -> None:
    """What a calibration's file tells is enough to leave the same out again."""
    assert Padding.parse(str(padding)) == padding


@pytest.mark.parametrize("text", ["", "mask", "mask 3", "lengths ['n']", "window 'n'", "mask 'n' + 'm'"])
def test_no_other_text_does(text: str) -> None:
    """A file may hold anything."""
    with pytest.raises(CalibrationError, match=r"it says .*; expected mask 'NAME' or lengths"):
        Padding.parse(text)
