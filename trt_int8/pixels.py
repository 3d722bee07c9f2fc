"""An image file becomes an array: decoded, resized, cropped, scaled, normalized, laid out.

Needs Pillow and numpy alone, since every process that decodes images starts with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_int8.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Size = int | tuple[int, int]


@dataclass(frozen=True, slots=True)
class PixelSteps:
    """The settings of `trt_int8.images.Preprocessing`, whose descriptions say what they mean."""

    resize: Size | None
    crop: Size | None
    interpolation: str
    color: str
    scale: float
    mean: Sequence[float]
    std: Sequence[float]
    layout: str
    dtype: str


def load_plugins() -> None:
    """Load Pillow's plugins before threads open images.

    Left to itself Pillow loads the rarer ones when no other takes a file. A thread that comes to that point just after
    another one has loaded them is told that there is nothing more to load, and gives its image up.
    """
    from PIL import Image

    Image.init()


def decode(file: Path) -> Image.Image:
    """Decode an image file of 8 bits per channel.

    Raises:
        DataError: the file is no image, is damaged, or has deeper pixels.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # a bad PNG is a SyntaxError
        reason = str(error).rstrip(".")
        raise DataError(f"Cannot use the image {str(file)!r}: it cannot be decoded: {reason}.") from error
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"Cannot use the image {str(file)!r}: its pixels have Pillow's mode {image.mode!r}; expected 8 bits per "
            "channel. Convert it, or write a function that yields arrays."
        )
    return image


def preprocess(image: Image.Image, steps: PixelSteps) -> NDArray[Any]:
    """Preprocess one decoded image.

    Returns:
        shape (channels, height, width), or (height, width, channels) for NHWC, of `steps.dtype`.
    """
    image = image.convert("L" if steps.color == "L" else "RGB")
    image = _center_crop(_resize(image, steps.resize, steps.interpolation), steps.crop)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if steps.color == "BGR":
        pixels = pixels[:, :, ::-1]
    if steps.layout == "NCHW":
        pixels = pixels.transpose(2, 0, 1)
    if steps.dtype == "uint8":
        return np.ascontiguousarray(pixels)
    channels_last = (-1,) if steps.layout == "NHWC" else (-1, 1, 1)
    values = pixels.astype(np.float32, order="C")
    values *= np.float32(steps.scale)
    if steps.mean:
        values -= np.array(steps.mean, np.float32).reshape(channels_last)
    if steps.std:
        values /= np.array(steps.std, np.float32).reshape(channels_last)
    return values.astype(steps.dtype, copy=False)


def _resize(image: Image.Image, size: Size | None, interpolation: str) -> Image.Image:
    """Resize as torchvision does: one length is that of the shorter side, and the longer one is cut to an integer."""
    from PIL import Image

    if size is None:
        return image
    if isinstance(size, tuple):
        height, width = size
    elif image.width <= image.height:
        height, width = int(size * image.height / image.width), size
    else:
        height, width = size, int(size * image.width / image.height)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling[interpolation.upper()])


def _center_crop(image: Image.Image, size: Size | None) -> Image.Image:
    """Cut the centre as torchvision does; what lies outside of a smaller image is 0 before scaling."""
    if size is None:
        return image
    height, width = size if isinstance(size, tuple) else (size, size)
    left = _offset(image.width, width)
    top = _offset(image.height, height)
    return image.crop((left, top, left + width, top + height))


def _offset(length: int, crop: int) -> int:
    # torchvision rounds half to even when it cuts and rounds down when it pads in front.
    return round((length - crop) / 2) if length >= crop else -((crop - length) // 2)
