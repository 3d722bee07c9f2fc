"""The demo's network, data and training, at a width and length that take no time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch  # noqa: TID253
from safetensors.torch import load_file

from calibrators.errors import FileAccessError
from trt_int8.demo.digits import DigitsSplit, Recipe, load_digits_split, prepare_demo, train
from trt_int8.demo.model import BasicBlock, digits_resnet

Item = TypeVar("Item")

QUICK = Recipe(width=4, epochs=1, batch_size=256)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Train on one thread: steps this small wait for each other longer than they compute where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def split() -> DigitsSplit:
    """The scans."""
    return load_digits_split()


def test_the_network_maps_images_to_ten_logits() -> None:
    """Any batch of 32x32 images; the stages halve the size and double the channels."""
    torch.manual_seed(0)
    model = digits_resnet(4).eval()
    assert model(torch.zeros(3, 1, 32, 32)).shape == (3, 10)
    kinds = [type(part).__name__ for part in model.modules()]
    assert kinds.count("BasicBlock") == 3
    assert kinds.count("BatchNorm2d") == 9


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_a_block_adds_its_shortcut(inputs: int, outputs: int, stride: int) -> None:
    """With the residual branch silenced, a block is the ReLU of its shortcut: identity or projection."""
    torch.manual_seed(0)
    block = BasicBlock(inputs, outputs, stride).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    features = torch.randn(2, inputs, 8, 8)
    if stride == 1:
        expected = features
    else:
        projection = block.shortcut.get_parameter("0.weight")
        # A fresh BatchNorm has mean 0 and variance 1.
        expected = torch.einsum("oi,nihw->nohw", projection[:, :, 0, 0], features[:, :, ::2, ::2]) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(block(features), expected.clamp(min=0))


def test_the_scans_are_split_by_digit_and_always_alike(split: DigitsSplit) -> None:
    """540 of 1797 are held back, each digit in its share; shapes and dtypes are the network's."""
    assert split.train_images.shape == (1257, 1, 32, 32)
    assert split.test_images.shape == (540, 1, 32, 32)
    assert split.train_images.dtype == split.test_images.dtype == np.float32
    assert split.train_labels.dtype == split.test_labels.dtype == np.int64
    train_counts, test_counts = np.bincount(split.train_labels), np.bincount(split.test_labels)
    assert np.abs(test_counts - (train_counts + test_counts) * 540 / 1797).max() < 1
    for first, second in zip(split, load_digits_split(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_no_scan_is_on_both_sides(split: DigitsSplit) -> None:
    """Nothing that is held back was seen in training, nor by calibration."""
    seen = {image.tobytes() for image in split.train_images}
    again = sum(image.tobytes() in seen for image in split.test_images)
    assert again == 0


def test_scans_are_enlarged_bilinearly(split: DigitsSplit) -> None:
    """Every image is one of scikit-learn's scans, each axis interpolated between the pixels' centres."""
    from sklearn.datasets import load_digits

    centres = (np.arange(32) + 0.5) / 4 - 0.5
    weights = np.stack([np.interp(centres, np.arange(8), row) for row in np.eye(8)], axis=1)
    enlarged = (weights @ load_digits().images @ weights.T / 8 - 1).reshape(-1, 1024)
    for image in split.test_images[:10]:
        assert np.abs(enlarged - image.reshape(1024)).max(axis=1).min() < 1e-6


def test_training_learns_and_leaves_the_global_state_alone(split: DigitsSplit) -> None:
    """A few steps of a tiny net are far above chance; every step is tracked; random state and threads stay."""
    seen: list[tuple[str, int | None, int]] = []

    def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
        listed = list(items)
        seen.append((description, total, len(listed)))
        return listed

    torch.manual_seed(1)
    recipe = Recipe(width=8, epochs=1, batch_size=32)
    model = digits_resnet(recipe.width)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    result = train(model, split, recipe, track=track)
    assert result.accuracy > 0.3
    assert (result.epochs, result.seconds > 0) == (1, True)
    assert seen == [("train the network", 39, 39)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not any(part.training for part in model.modules())


def test_the_demo_trains_once_for_each_recipe(tmp_path: Path) -> None:
    """The checkpoint is loaded the second time; another recipe or a damaged file trains anew, to the same weights."""
    state = torch.get_rng_state()
    first = prepare_demo(tmp_path, recipe=QUICK)
    assert first.training is not None
    assert first.training.accuracy == first.accuracy
    weights = load_file(first.checkpoint)

    second = prepare_demo(tmp_path, recipe=QUICK)
    assert second.training is None
    assert second.accuracy == first.accuracy

    other = prepare_demo(tmp_path, recipe=replace(QUICK, seed=1))
    assert other.training is not None
    assert not torch.equal(load_file(other.checkpoint)["fc.weight"], weights["fc.weight"])

    other.checkpoint.write_bytes(other.checkpoint.read_bytes()[:1000])
    third = prepare_demo(tmp_path, recipe=QUICK)
    assert third.training is not None
    for name, value in load_file(third.checkpoint).items():
        assert torch.equal(value, weights[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "calibration_data.npz",
        "choosing_data.npz",
        "digits.safetensors",
        "evaluation_data.npz",
    ]


def test_the_files_hold_training_and_held_back_scans(tmp_path: Path, split: DigitsSplit) -> None:
    """Training scans to calibrate on and to choose by, the held-back ones to judge by, and weights for the network."""
    files = prepare_demo(tmp_path / "new folder", recipe=QUICK)
    with np.load(files.calibration_data) as data:
        np.testing.assert_array_equal(data["image"], split.train_images[:1000])
        np.testing.assert_array_equal(data["label"], split.train_labels[:1000])
    with np.load(files.choosing_data) as data:
        np.testing.assert_array_equal(data["image"], split.train_images[1000:])
        np.testing.assert_array_equal(data["label"], split.train_labels[1000:])
    with np.load(files.evaluation_data) as data:
        np.testing.assert_array_equal(data["image"], split.test_images)
        labels, images = data["label"], data["image"]
    model = digits_resnet(QUICK.width)
    model.load_state_dict(load_file(files.checkpoint))
    with torch.no_grad():
        answers = model.eval()(torch.from_numpy(images)).argmax(dim=1).numpy()
    assert np.mean(answers == labels) == pytest.approx(files.accuracy, abs=1 / len(labels))


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """A file in the folder's place is told before anything is trained."""

    def never(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
        raise AssertionError(description)

    (tmp_path / "file").write_text("")
    with pytest.raises(FileAccessError, match="Cannot write"):
        prepare_demo(tmp_path / "file", recipe=QUICK, track=never)
