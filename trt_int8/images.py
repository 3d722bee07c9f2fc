"""Folders of images as model input, preprocessed the way torchvision's evaluation transforms do it.

Resize, centre crop, scale to 0..1 and normalize follow torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize`
step by step, on Pillow as there, so that a model sees in calibration what it saw in training. Like torchvision's
`ImageFolder`, the EXIF orientation is not applied. Images are decoded ahead of the model (`trt_int8.decoding`), a
bounded number of them, and come in the order of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from calibrators.protocols import Array
from trt_int8.decoding import decode_ahead
from trt_int8.errors import ConfigError, DataError
from trt_int8.feeds import describe
from trt_int8.pixels import PixelSteps, preprocess
from trt_int8.settings import Number, PositiveInt, Section
from trt_int8.streams import BatchStream, DataOptions, RawBatch, hash_files

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


Size = PositiveInt | tuple[PositiveInt, PositiveInt]


class Preprocessing(Section):
    """How an image file becomes a model's input: decode, resize, crop, scale, normalize, lay out."""

    resize: Size | None = Field(
        default=None,
        description="length of the shorter side in pixels, or [height, width]; null keeps the size",
    )
    crop: Size | None = Field(
        default=None,
        description="side of the square cut from the centre, or [height, width]; null keeps all",
    )
    interpolation: Literal["bilinear", "bicubic", "nearest"] = Field(
        default="bilinear", description="how resize interpolates (with antialias): bilinear, bicubic, nearest"
    )
    color: Literal["RGB", "BGR", "L"] = Field(
        default="RGB", description="order of the channels: RGB, BGR (OpenCV), or L for one channel of grey"
    )
    scale: Number = Field(default=1 / 255, gt=0, description="pixels of 0..255 are multiplied by this first")
    mean: tuple[Number, ...] = Field(
        default=(), description="subtracted after scale, a number per channel in the order of color; [] for none"
    )
    std: tuple[Annotated[Number, Field(gt=0)], ...] = Field(
        default=(), description="divided by after mean, a number per channel in the order of color; [] for none"
    )
    layout: Literal["NCHW", "NHWC"] = Field(
        default="NCHW", description="order of the axes: NCHW (PyTorch) or NHWC (TensorFlow)"
    )
    dtype: Literal["float32", "float16", "uint8"] = Field(
        default="float32", description="type of the input; uint8 means raw pixels: scale 1, no mean, no std"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        channels = 1 if self.color == "L" else 3
        for name in ("mean", "std"):
            given = len(getattr(self, name))
            if given not in (0, channels):
                raise ValueError(f"{name} has {given} numbers; color {self.color} needs {channels}")
        if self.dtype == "uint8" and (self.scale != 1 or self.mean or self.std):
            raise ValueError("dtype uint8 feeds raw pixels: set scale to 1 and leave mean and std out")
        return self

    def fingerprint(self) -> str:
        """Return the settings as one line of text that changes when any of them does."""
        return self.model_dump_json()

    def apply(self, image: Image.Image) -> Array:
        """Preprocess one decoded image.

        Returns:
            shape (channels, height, width), or (height, width, channels) for NHWC, of `dtype`.
        """
        return preprocess(image, self.steps)

    @property
    def steps(self) -> PixelSteps:
        """The settings as the processes that decode take them."""
        return PixelSteps(**self.model_dump())


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image file and the index of its class folder, None without class folders."""

    file: Path
    label: int | None


def find_images(folder: Path) -> list[LabelledImage]:
    """List the images of a folder; subfolders are classes, numbered from 0 in the order of their names.

    The classes take turns: the first of each, the second of each, and so on. A run that reads only the beginning
    still sees all classes alike.

    Raises:
        DataError: images lie both in the folder itself and in subfolders.
    """
    flat = [LabelledImage(file, None) for file in _image_files(folder.iterdir())]
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_class = [
        [LabelledImage(file, label) for file in _image_files(subfolder.rglob("*"))]
        for label, subfolder in enumerate(classes)
    ]
    labelled = [image for turn in zip_longest(*by_class) for image in turn if image is not None]
    if flat and labelled:
        raise DataError(
            f"Cannot use {str(folder)!r} as data: images lie both in it ({flat[0].file.name}) and in its subfolders "
            f"({labelled[0].file.parent.name}). Put all of them in class folders, or none."
        )
    return flat or labelled


def is_image_folder(data: str) -> bool:
    """Tell whether DATA names a folder of images; looks no further than the first one."""
    folder = Path(data)
    return folder.is_dir() and any(_is_image(path) for path in folder.rglob("*"))


def image_stream(folder: Path, images: Sequence[LabelledImage], options: DataOptions) -> BatchStream:
    """Stream images in batches; the index of the class folder goes along under the name `options.label`.

    Raises:
        ConfigError: no preprocessing was given.
        DataError: the model takes more than one input.
    """
    if options.preprocessing is None:
        raise ConfigError(
            f"Cannot use the images in {str(folder)!r}: it is not said how they become model input. Give resize, crop, "
            "mean and std: with --preprocessing FILE.yaml, under data.preprocessing of a configuration "
            "(`trt-int8 init` writes one), or as preprocessing=Preprocessing(...) in Python."
        )
    if len(options.inputs) != 1:
        raise DataError(
            f"Cannot use the images in {str(folder)!r}: a folder of images feeds one input, and the model takes "
            f"{describe(options.inputs)}. Write a function that yields dicts of arrays instead."
        )
    size, preprocessing, name = options.cut, options.preprocessing, options.inputs[0].name
    chosen = images if options.max_batches is None else images[: options.max_batches * size]
    starts = range(0, len(chosen), size)

    def read() -> Iterator[RawBatch]:
        decoded = decode_ahead([image.file for image in chosen], preprocessing.steps, first=size)
        for index, start in enumerate(starts):
            part = chosen[start : start + size]
            where = f"batch {index} of {str(folder)!r}"
            arrays = {name: _stack(part, list(islice(decoded, len(part))), where)}
            labels = [image.label for image in part if image.label is not None]
            if labels:
                arrays[options.label] = np.array(labels, np.int64)
            yield RawBatch(where, arrays)

    return BatchStream(
        description=f"{folder} ({len(chosen)} images)",
        read=read,
        batches=len(starts),
        batch_size=size,
        hash_files=lambda: hash_files([image.file for image in chosen]),
        preprocessing=preprocessing.fingerprint(),
        threadable=True,
    )


def _image_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _stack(images: Sequence[LabelledImage], arrays: Sequence[Array], where: str) -> Array:
    for image, array in zip(images, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"Cannot use {where}: {str(image.file)!r} gives shape {array.shape} and {str(images[0].file)!r} "
                f"{arrays[0].shape}; a batch needs one size. Set crop, or resize to [height, width]."
            )
    return np.stack(arrays)
