"""The demo's data and training: 1797 scans of handwritten digits that come with scikit-learn, so nothing is downloaded.

The data are the test part of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibrators.files import atomic_path
from calibrators.protocols import Array, Track, untracked

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 32
HELD_BACK = 540
"""Scans that are kept from training and calibration, 30 per cent, each digit in its share."""

CALIBRATION_SCANS = 1000


class DigitsSplit(NamedTuple):
    """Images float32 [N, 1, 32, 32] in -1..1 and labels int64 [N], for training and held back."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that training depends on.

    Attributes:
        width: channels of the network's first stage.
        epochs: passes over the training scans.
        batch_size: scans per step.
        learning_rate: peak of the one-cycle schedule (Smith and Topin, 2018, arXiv:1708.07120).
        momentum: Nesterov momentum.
        weight_decay: L2 penalty.
        label_smoothing: share of each target that is spread over all classes.
        max_shift: largest random shift of a scan, in pixels, along each axis.
        seed: of the weights, the order and the shifts.
    """

    width: int = 32
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    max_shift: float = 2.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A training.

    Attributes:
        accuracy: share of the held-back scans that the network names rightly, 0 to 1.
        epochs: passes over the training scans.
        seconds: time that training took.
    """

    accuracy: float
    epochs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """What the pipeline starts from.

    Attributes:
        checkpoint: weights for `trt_int8.demo.model:digits_resnet`, as safetensors.
        calibration_data: 1000 training scans: `image` float32 [1000, 1, 32, 32], `label` int64 [1000].
        choosing_data: the other 257 training scans, in the same form, for `auto` to choose by.
        evaluation_data: the held-back scans, in the same form.
        accuracy: share of the held-back scans that the FP32 network names rightly, 0 to 1.
        training: how it was trained; None where the checkpoint was there already.
    """

    checkpoint: Path
    calibration_data: Path
    choosing_data: Path
    evaluation_data: Path
    accuracy: float
    training: TrainResult | None


def load_digits_split() -> DigitsSplit:
    """Load the scans, enlarged from 8x8 to 32x32, and hold some back; always the same ones.

    The grey values 0..16 become -1..1, value / 8 - 1, after bilinear interpolation.
    """
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    small = torch.from_numpy(scans.images).float()[:, None]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = torch.nn.functional.interpolate(small, size=size, mode="bilinear", align_corners=False) / 8 - 1
    train, test = train_test_split(
        np.arange(len(scans.target)), test_size=HELD_BACK, random_state=0, stratify=scans.target
    )
    labels = scans.target.astype(np.int64)
    return DigitsSplit(images.numpy()[train], labels[train], images.numpy()[test], labels[test])


def train(model: torch.nn.Module, split: DigitsSplit, recipe: Recipe, *, track: Track = untracked) -> TrainResult:
    """Train a network in place; it ends in evaluation mode. The same recipe gives the same weights on the same machine.

    Stochastic gradient descent with Nesterov momentum over one cycle of the learning rate, on randomly shifted scans.

    Args:
        model: maps images to logits.
        split: the scans.
        recipe: how to train; `width` plays no part, the weights are taken as they are.
        track: shows the progress over the steps.
    """
    import torch

    started = time.perf_counter()
    images, labels = torch.from_numpy(split.train_images), torch.from_numpy(split.train_labels)
    generator = torch.Generator().manual_seed(recipe.seed)
    steps_per_epoch = len(images) // recipe.batch_size
    steps = recipe.epochs * steps_per_epoch
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)

    def minibatches() -> Iterator[torch.Tensor]:
        for _ in range(recipe.epochs):
            # The last, short batch of an epoch is left out: BatchNorm and the schedule like even steps.
            order = torch.randperm(len(images), generator=generator)
            yield from order[: steps_per_epoch * recipe.batch_size].reshape(-1, recipe.batch_size).unbind()

    model.train()
    for chosen in track(minibatches(), "train the network", steps):
        loss = loss_of(model(_shifted(images[chosen], recipe.max_shift, generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    seconds = time.perf_counter() - started
    return TrainResult(_accuracy(model, split), recipe.epochs, seconds)


def prepare_demo(folder: Path, *, recipe: Recipe | None = None, track: Track = untracked) -> DemoFiles:
    """Write the demo's checkpoint and data into a folder.

    The network is trained only where `digits.safetensors` is not there already or was trained by another recipe.

    Args:
        folder: where the files go.
        recipe: how to train; the demo's own where None.
        track: shows the progress of training.

    Raises:
        FileAccessError: the folder cannot be written to.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from trt_int8.demo.model import digits_resnet

    recipe = recipe or Recipe()
    split = load_digits_split()
    calibration = folder / "calibration_data.npz"
    _write(calibration, split.train_images[:CALIBRATION_SCANS], split.train_labels[:CALIBRATION_SCANS])
    choosing = folder / "choosing_data.npz"
    _write(choosing, split.train_images[CALIBRATION_SCANS:], split.train_labels[CALIBRATION_SCANS:])
    evaluation = folder / "evaluation_data.npz"
    _write(evaluation, split.test_images, split.test_labels)
    checkpoint = folder / "digits.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = digits_resnet(recipe.width)
    training = None
    made_by = _recipe_hash(recipe, model)
    if _recipe_of(checkpoint) == made_by:
        model.load_state_dict(load_file(checkpoint))
        accuracy = _accuracy(model.eval(), split)
    else:
        training = train(model, split, recipe, track=track)
        accuracy = training.accuracy
        with atomic_path(checkpoint) as temporary:
            save_file(model.state_dict(), temporary, metadata={"recipe": made_by})
    return DemoFiles(checkpoint, calibration, choosing, evaluation, accuracy, training)


def _shifted(images: torch.Tensor, max_shift: float, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to `max_shift` pixels along each axis; what comes in from outside repeats the border."""
    import torch

    # affine_grid's unit is half an image.
    shift = (2 * torch.rand(len(images), 2, 1, generator=generator) - 1) * (2 * max_shift / images.shape[-1])
    transform = torch.cat([torch.eye(2).expand(len(images), 2, 2), shift], dim=2)
    grid = torch.nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _accuracy(model: torch.nn.Module, split: DigitsSplit) -> float:
    import torch

    images = torch.from_numpy(split.test_images)
    with torch.inference_mode():
        answers = [model(images[start : start + 128]).argmax(dim=1) for start in range(0, len(images), 128)]
    return float(np.mean(torch.cat(answers).numpy() == split.test_labels))


def _recipe_hash(recipe: Recipe, model: torch.nn.Module) -> str:
    """Hash a recipe and the names and shapes of the weights, so that another network is trained anew as well."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    text = json.dumps({"recipe": asdict(recipe), "shapes": shapes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _recipe_of(checkpoint: Path) -> str | None:
    """Return the hash that a checkpoint was written with; None where there is none to read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return metadata.get("recipe")


def _write(path: Path, images: Array, labels: Array) -> None:
    with atomic_path(path) as temporary:
        np.savez(temporary, image=images, label=labels)
