"""Accumulators of `trt_int8.metrics`."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trt_int8.metrics import AgreementMeter, Difference, DifferenceMeter, LabelMeter, class_axis, winners

FINITE = {"allow_nan": False, "allow_infinity": False, "width": 32, "min_value": -1e3, "max_value": 1e3}


def difference(reference: Any, candidate: Any, samples: int | None = None) -> Difference:
    reference, candidate = np.asarray(reference, np.float32), np.asarray(candidate, np.float32)
    meter = DifferenceMeter()
    meter.update(reference, candidate, len(reference) if samples is None else samples)
    return meter.result()


def test_sqnr_by_hand() -> None:
    """Signal 3^2 + 4^2 = 25, noise 0.5^2 = 0.25: 10 log10(100) = 20 dB."""
    assert difference([[3.0, 4.0]], [[3.0, 4.5]]).sqnr_db == pytest.approx(20.0)


def test_sqnr_pools_the_samples() -> None:
    """A loud sample weighs more: (100 + 1) / (1 + 1) is 17.03 dB, not the mean of 20 and 0 dB."""
    assert difference([[10.0], [1.0]], [[11.0], [2.0]]).sqnr_db == pytest.approx(10 * math.log10(101 / 2))


def test_cosine_by_hand() -> None:
    """Cosines 1, 0 and -1 of three samples have the mean 0; scale does not matter."""
    result = difference([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[5.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])

    assert result.cosine == pytest.approx(0.0)


@pytest.mark.parametrize(("candidate", "expected"), [([[0.0, 0.0]], 1.0), ([[1.0, 0.0]], 0.0)])
def test_cosine_of_zero_vectors(candidate: list[list[float]], expected: float) -> None:
    """Two zero vectors are alike; one alone is orthogonal to everything."""
    assert difference([[0.0, 0.0]], candidate).cosine == expected


def test_max_abs_by_hand() -> None:
    """The largest error counts, whatever its sign."""
    assert difference([[1.0, -2.0], [0.0, 4.0]], [[1.5, -4.25], [0.0, 3.0]]).max_abs == 2.25


def test_output_of_the_whole_batch_is_one_vector() -> None:
    """An output without the batch axis counts as one vector: cos((1, 0), (1, 1)), not cosines of rows of three."""
    assert difference([1.0, 0.0], [1.0, 1.0], samples=3).cosine == pytest.approx(1 / math.sqrt(2))


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(**FINITE)),
    st.integers(0, 2**32 - 1),
)
def test_agrees_with_torch_in_float64(reference: np.ndarray, seed: int) -> None:
    """SQNR, cosine and largest error are what torch computes in float64."""
    import torch

    noise = np.random.default_rng(seed).normal(0, 0.1, reference.shape)
    candidate = (reference + noise).astype(np.float32)

    result = difference(reference, candidate)

    r, c = torch.from_numpy(reference).double(), torch.from_numpy(candidate).double()
    cosine = torch.nn.functional.cosine_similarity(r.flatten(1), c.flatten(1), eps=1e-300).mean().item()
    assert result.max_abs == (r - c).abs().max().item()
    assert result.cosine == pytest.approx(cosine, abs=1e-9)
    if r.any() and not torch.equal(r, c):
        assert result.sqnr_db == pytest.approx(10 * torch.log10(r.square().sum() / (r - c).square().sum()).item())


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_batches_do_not_matter(cut: int, seed: int) -> None:
    """Cutting the samples into other batches gives the same figures."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(10, 3)).astype(np.float32)
    candidate = (reference + rng.normal(0, 0.01, reference.shape)).astype(np.float32)
    meter = DifferenceMeter()
    meter.update(reference[:cut], candidate[:cut], cut)
    meter.update(reference[cut:], candidate[cut:], 10 - cut)

    whole = difference(reference, candidate)

    assert meter.result().sqnr_db == pytest.approx(whole.sqnr_db)
    assert meter.result().cosine == pytest.approx(whole.cosine)
    assert meter.result().max_abs == whole.max_abs


def test_sums_are_kept_in_float64() -> None:
    """An error of 1 beside a million values of 1000 is not lost, as it would be in a float32 sum."""
    reference = np.full((1, 1_000_000), 1000.0, np.float32)
    candidate = reference.copy()
    candidate[0, -1] += 1.0

    assert difference(reference, candidate).sqnr_db == pytest.approx(120.0)


def test_total_of_several_outputs() -> None:
    """Outputs together: sums of sums (9 + 16) / (0 + 0.25), mean of all cosines, largest error."""
    first, second = DifferenceMeter(), DifferenceMeter()
    first.update(np.array([[3.0]]), np.array([[3.0]]), 1)
    second.update(np.array([[4.0]]), np.array([[4.5]]), 1)

    total = DifferenceMeter.total([first, second]).result()

    assert total.sqnr_db == pytest.approx(20.0)
    assert total.cosine == 1.0
    assert total.max_abs == 0.5
    assert total.elements == 2


def test_identical_outputs_have_infinite_sqnr_and_null_in_json() -> None:
    """JSON has no infinity: null, and `identical` says which of the undefined cases it is."""
    result = difference([[1.0, 2.0]], [[1.0, 2.0]])

    assert result.sqnr_db == math.inf
    assert json.loads(json.dumps(result.to_json(), allow_nan=False)) == {
        "sqnr_db": None,
        "cosine": 1.0,
        "max_abs": 0.0,
        "identical": True,
        "nonfinite": 0,
    }


def test_noise_without_signal_is_not_identical() -> None:
    """A reference of zeros gives minus infinity, null in JSON, and is told apart from identity."""
    result = difference([[0.0, 0.0]], [[0.0, 0.1]])

    assert result.sqnr_db == -math.inf
    assert result.to_json()["sqnr_db"] is None
    assert result.to_json()["identical"] is False


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_counted_not_averaged_away(bad: float) -> None:
    """One NaN or infinity among good values leaves no figure standing, and its count is reported."""
    meter = DifferenceMeter()
    meter.update(np.array([[1.0, 2.0]]), np.array([[1.0, 2.0]]), 1)
    meter.update(np.array([[1.0, 2.0]]), np.array([[bad, 2.0]]), 1)

    result = meter.result()

    assert result.nonfinite == 1
    assert math.isnan(result.sqnr_db)
    assert math.isnan(result.cosine)
    assert math.isnan(result.max_abs)
    assert result.identical is False
    json.dumps(result.to_json(), allow_nan=False)


def test_masked_positions_of_the_reference_are_left_out() -> None:
    """Minus infinity in both is the same value; in the reference alone it is a difference that no number measures."""
    alike = difference([[-math.inf, 3.0, 4.0]], [[-math.inf, 3.0, 4.5]])
    unlike = difference([[-math.inf, 3.0, 4.0]], [[-9.0, 3.0, 4.5]])

    assert alike.sqnr_db == pytest.approx(20.0)
    assert alike.nonfinite == 0
    assert unlike.nonfinite == 1


def test_nothing_compared_is_no_identity() -> None:
    """A model without float outputs gets no figures, rather than perfect ones."""
    result = DifferenceMeter.total([]).result()

    assert result.identical is False
    assert result.to_json()["cosine"] is None


def test_agreement_by_hand() -> None:
    """Three of four samples have the same arg-max: 75 per cent."""
    meter = AgreementMeter()
    meter.update(np.eye(3), np.eye(3)[[0, 1, 0]])
    meter.update(np.array([[1.0, 2.0, 0.0]]), np.array([[0.0, 9.0, 8.0]]))

    assert meter.percent() == 75.0


@pytest.mark.parametrize(("rank", "axis"), [(2, 1), (3, 2), (4, 1), (5, 1)])
def test_class_axis(rank: int, axis: int) -> None:
    """Logits and token logits have their classes last, dense predictions second."""
    assert class_axis(rank) == axis


def test_dense_predictions_agree_per_pixel() -> None:
    """Two of four pixels of (1, 2 classes, 2, 2) keep their class: 50 per cent."""
    reference = np.array([[[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]]])
    candidate = np.array([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]])
    meter = AgreementMeter()
    meter.update(reference, candidate)

    assert meter.percent() == 50.0


def test_token_logits_agree_per_token() -> None:
    """(1, 2 tokens, 3 words): the first token agrees, the second does not."""
    meter = AgreementMeter()
    meter.update(np.array([[[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]]]), np.array([[[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]]))

    assert meter.percent() == 50.0


def test_overflow_never_agrees() -> None:
    """A NaN or an infinite logit wins every arg-max; it must not count as a decision, not even in both models."""
    overflown = np.array([[math.inf, 0.0], [math.nan, 0.0], [-math.inf, 1.0]], np.float16)
    meter = AgreementMeter()
    meter.update(overflown, overflown)

    np.testing.assert_array_equal(winners(overflown), [-1, -1, 1])
    assert meter.percent() == pytest.approx(100 / 3)


def test_top_k_by_hand() -> None:
    """Of seven classes in falling order, label 0 is top-1, label 4 top-5, label 5 neither."""
    logits = np.tile(np.arange(7.0, 0.0, -1.0), (3, 1))
    meter = LabelMeter()
    meter.update(logits, np.array([0, 4, 5]))

    assert meter.top1() == pytest.approx(100 / 3)
    assert meter.top5() == pytest.approx(200 / 3)


def test_ties_go_to_the_lower_class() -> None:
    """Equal logits rank by class, as arg-max does: of six equal ones, label 0 is top-1, 4 top-5, 5 neither."""
    meter = LabelMeter()
    meter.update(np.zeros((3, 6), np.float32), np.array([0, 4, 5], np.uint8))

    assert meter.top1() == pytest.approx(100 / 3)
    assert meter.top5() == pytest.approx(200 / 3)


def test_broken_logits_are_never_right() -> None:
    """A sample with NaN or infinity as its largest logit counts as wrong, even where the label is that class."""
    logits = np.array([[math.nan, 0.0], [math.inf, 0.0], [1.0, -math.inf]])
    meter = LabelMeter()
    meter.update(logits, np.array([0, 0, 0]))

    assert meter.top1() == pytest.approx(100 / 3)
    assert meter.top5() == pytest.approx(100 / 3)


@given(st.integers(1, 12), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_top_k_agrees_with_torch(samples: int, classes: int, seed: int) -> None:
    """Top-1 and top-5 equal those of torch.topk where no two logits are the same."""
    import torch

    rng = np.random.default_rng(seed)
    logits = rng.permuted(np.tile(np.arange(classes, dtype=np.float32), (samples, 1)), axis=1)
    labels = rng.integers(classes, size=samples)
    meter = LabelMeter()
    meter.update(logits, labels)

    best = torch.from_numpy(logits).topk(min(5, classes)).indices.numpy()
    assert meter.top1() == pytest.approx(100 * np.mean(best[:, 0] == labels))
    assert meter.top5() == pytest.approx(100 * np.mean((best == labels[:, None]).any(axis=1)))
