from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from calibrators.protocols import Array
from engines.runner import TensorSpec
from trt_int8.data import open_data
from trt_int8.errors import ConfigError, DataError
from trt_int8.images import Preprocessing, find_images, is_image_folder
from trt_int8.pixels import decode

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with structure in it, so that resizing and cropping show."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def torchvision_reference(image: Image.Image, resize: int, crop: int) -> Array:
    """Resize(resize), CenterCrop(crop), ToTensor(), Normalize(ImageNet) written out, in float64 from the pixels on."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    longer = int(resize * long / short)
    target = (resize, longer) if width <= height else (longer, resize)
    pixels = np.asarray(image.convert("RGB").resize(target, Image.Resampling.BILINEAR), np.float64) / 255
    top, left = round((pixels.shape[0] - crop) / 2.0), round((pixels.shape[1] - crop) / 2.0)
    cropped = pixels[top : top + crop, left : left + crop]
    normalized: Array = ((cropped - IMAGENET["mean"]) / IMAGENET["std"]).transpose(2, 0, 1)
    return normalized


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (257, 256), (64, 64), (224, 331)])
def test_classifiers_see_what_torchvision_gives_them(size: tuple[int, int]) -> None:
    """Resize 256, crop 224 and normalize agree with torchvision's steps to float32 rounding, for any aspect."""
    image = picture(*size)
    found = Preprocessing(resize=256, crop=224, **IMAGENET).apply(image)

    assert found.dtype == np.float32
    assert found.shape == (3, 224, 224)
    # Values reach 2.7; a few roundings of float32 at that size.
    np.testing.assert_allclose(found, torchvision_reference(image, 256, 224), atol=1e-6, rtol=0)


def test_resizing_agrees_with_torch() -> None:
    """Pillow's antialiased bilinear filter is the one torch has: equal to within one step of the pixels."""
    import torch

    image = picture(300, 200)
    found = Preprocessing(resize=(50, 60), scale=1.0).apply(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(pixels, size=(50, 60), mode="bilinear", antialias=True)[0]

    np.testing.assert_allclose(found, expected.numpy(), atol=1.0, rtol=0)


def test_pixels_by_hand() -> None:
    """One red pixel: (1 - 0.5) / 0.25 = 2 in red, (0 - 0.5) / 0.25 = -2 elsewhere."""
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    halves: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    assert Preprocessing(**halves).apply(red).tolist() == [[[2.0]], [[-2.0]], [[-2.0]]]
    assert Preprocessing(**halves, color="BGR").apply(red).tolist() == [[[-2.0]], [[-2.0]], [[2.0]]]
    assert Preprocessing(**halves, layout="NHWC").apply(red).tolist() == [[[2.0, -2.0, -2.0]]]


def test_mean_and_std_follow_the_order_of_the_channels() -> None:
    """For BGR the first number of mean belongs to blue."""
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    found = Preprocessing(color="BGR", scale=1.0, mean=(1.0, 2.0, 3.0)).apply(red)

    assert found.ravel().tolist() == [0 - 1.0, 0 - 2.0, 255 - 3.0]


def test_grey_has_one_channel() -> None:
    """L gives (1, height, width) and (height, width, 1)."""
    grey = Image.new("L", (3, 2), 51)

    assert Preprocessing(color="L").apply(grey).shape == (1, 2, 3)
    assert Preprocessing(color="L", layout="NHWC").apply(grey).shape == (2, 3, 1)
    np.testing.assert_allclose(Preprocessing(color="L").apply(grey), 0.2, rtol=1e-6)


def test_raw_pixels_stay_bytes() -> None:
    """dtype uint8 with scale 1 feeds the pixels as they are."""
    image = picture(4, 3)
    found = Preprocessing(dtype="uint8", scale=1.0, layout="NHWC").apply(image)

    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(image))


def test_half_precision_is_the_rounded_float32() -> None:
    """float16 rounds once, at the end."""
    image = picture(4, 3)
    full = Preprocessing(**IMAGENET).apply(image)

    np.testing.assert_array_equal(Preprocessing(**IMAGENET, dtype="float16").apply(image), full.astype(np.float16))


def test_crop_of_a_smaller_image_is_padded_with_black() -> None:
    """torchvision pads what is too small: 2 pixels into 5 leave 1 in front and 2 behind."""
    white = Image.new("L", (2, 2), 255)
    found = Preprocessing(color="L", crop=5).apply(white)[0]

    expected = np.zeros((5, 5))
    expected[1:3, 1:3] = 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,)}, "mean has 1 numbers; color RGB needs 3"),
        ({"std": (1.0, 1.0, 1.0), "color": "L"}, "std has 3 numbers; color L needs 1"),
        ({"dtype": "uint8"}, "dtype uint8 feeds raw pixels"),
        ({"std": (0.0, 1.0, 1.0)}, "greater than 0"),
        ({"resize": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    """Wrong numbers of channels, bytes that should be normalized, and divisions by 0 do not get past the settings."""
    with pytest.raises(ValidationError, match=message):
        Preprocessing(**settings)


def test_fingerprint_changes_with_any_setting() -> None:
    """Two preprocessings have one fingerprint only if all their settings agree."""
    variants = [
        Preprocessing(),
        Preprocessing(resize=256),
        Preprocessing(crop=256),
        Preprocessing(layout="NHWC"),
        Preprocessing(color="BGR"),
        Preprocessing(scale=1.0),
        Preprocessing(interpolation="bicubic"),
        Preprocessing(**IMAGENET),
    ]

    assert len({variant.fingerprint() for variant in variants}) == len(variants)
    assert Preprocessing(resize=256).fingerprint() == Preprocessing(resize=256).fingerprint()


SPEC = TensorSpec("image", np.dtype("float32"), ("batch", 3, 8, 8))
SMALL = Preprocessing(resize=8, crop=8)


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Three cats, one dog, and an empty class between them; each image is of one colour that tells which it is."""
    (tmp_path / "cow").mkdir()
    for name, count, first in (("cat", 3, 10), ("dog", 1, 90)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (9, 8), (first + index, 0, 0)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def first_pixels(feeds: Array) -> list[int]:
    return [round(float(value) * 255) for value in feeds[:, 0, 0, 0]]


def test_classes_take_turns_and_give_labels(class_folder: Path) -> None:
    """Labels number the class folders by name, empty ones included; a prefix of the stream has seen every class."""
    source = open_data(class_folder, [SPEC], batch_size=2, preprocessing=SMALL)
    batches = list(source)

    assert (source.batches, source.batch_size) == (2, 2)
    assert [first_pixels(batch.feeds["image"]) for batch in batches] == [[10, 90], [11, 12]]
    assert [batch.extras["label"].tolist() for batch in batches] == [[0, 2], [0, 0]]
    assert batches[0].feeds["image"].shape == (2, 3, 8, 8)


def test_labels_take_the_name_that_is_asked_for(class_folder: Path) -> None:
    """The index of the class goes along under the given name."""
    source = open_data(class_folder, [SPEC], preprocessing=SMALL, label="category")

    assert [batch.extras["category"].tolist() for batch in source] == [[0], [2], [0], [0]]


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    """Images that lie in the folder itself come in the order of their names, unlabelled, whatever their format."""
    for value, name in enumerate(("c.bmp", "a.PNG", "b.webp")):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / name, lossless=True)  # read by WebP alone
    batches = list(open_data(tmp_path, [SPEC], batch_size=3, preprocessing=SMALL))

    assert first_pixels(batches[0].feeds["image"]) == [1, 2, 0]
    assert batches[0].extras == {}


def test_max_batches_hashes_only_what_is_read(class_folder: Path) -> None:
    """The identity of the data is that of the images in use: another one may come and go."""
    two: dict[str, Any] = {"batch_size": 1, "max_batches": 2, "preprocessing": SMALL}
    before = open_data(class_folder, [SPEC], **two).data_hash
    (class_folder / "cat" / "2.png").unlink()

    assert open_data(class_folder, [SPEC], **two).data_hash == before
    (class_folder / "dog" / "0.png").write_bytes((class_folder / "cat" / "0.png").read_bytes())
    assert open_data(class_folder, [SPEC], **two).data_hash != before


def test_source_carries_the_fingerprint_of_the_preprocessing(class_folder: Path) -> None:
    """A cache made under other settings can be told apart."""
    assert open_data(class_folder, [SPEC], preprocessing=SMALL).preprocessing == SMALL.fingerprint()


def test_missing_preprocessing_says_how_to_give_it(class_folder: Path) -> None:
    """Pixels are not fed to a model in a way that somebody guessed."""
    with pytest.raises(ConfigError, match=r"--preprocessing FILE\.yaml, under data\.preprocessing.*Preprocessing\("):
        open_data(class_folder, [SPEC])


def test_undecodable_image_is_named(class_folder: Path) -> None:
    """A damaged file is named with its path."""
    (class_folder / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    with pytest.raises(DataError, match=r"image '.*cat/1\.png': it cannot be decoded"):
        list(open_data(class_folder, [SPEC], preprocessing=SMALL))


def test_truncated_image_is_refused(tmp_path: Path) -> None:
    """An image that ends early is not filled up with grey."""
    picture(64, 64).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])

    with pytest.raises(DataError, match=r"half\.jpg': it cannot be decoded"):
        decode(tmp_path / "half.jpg")


def test_deep_images_are_refused(tmp_path: Path) -> None:
    """16 bits per channel would be cut to 8 in a way that no training did."""
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")

    with pytest.raises(DataError, match=r"deep\.png': its pixels have Pillow's mode 'I;16'; expected 8 bits"):
        decode(tmp_path / "deep.png")


def test_images_of_differing_sizes_need_a_crop(tmp_path: Path) -> None:
    """Without a common size there is no batch; both sizes are named."""
    for index, width in enumerate((8, 12)):
        Image.new("RGB", (width, 8)).save(tmp_path / f"{index}.png")

    with pytest.raises(DataError, match=r"1\.png' gives shape \(3, 8, 12\) and '.*0\.png' \(3, 8, 8\); .*Set crop"):
        open_data(tmp_path, [SPEC], batch_size=2, preprocessing=Preprocessing())


def test_wrong_crop_names_both_shapes(class_folder: Path) -> None:
    """A crop that does not fit the model is found when the folder is opened."""
    with pytest.raises(DataError, match=r"\(1, 3, 4, 4\); the model expects image: float32 \(batch, 3, 8, 8\)"):
        open_data(class_folder, [SPEC], preprocessing=Preprocessing(resize=4, crop=4))


def test_images_feed_one_input_only(class_folder: Path) -> None:
    """A model of two inputs needs something that says which is which."""
    ids = TensorSpec("ids", np.dtype("int64"), ("batch",))

    with pytest.raises(DataError, match=r"feeds one input, and the model takes image: .*; ids: "):
        open_data(class_folder, [SPEC, ids], preprocessing=SMALL)


def test_images_in_and_below_the_folder_are_refused(class_folder: Path) -> None:
    """An image beside the class folders has no class: it is not guessed."""
    Image.new("RGB", (8, 8)).save(class_folder / "stray.png")

    with pytest.raises(DataError, match=r"images lie both in it \(stray\.png\) and in its subfolders \(cat\)"):
        find_images(class_folder)


def test_batch_files_beside_images_are_refused(class_folder: Path) -> None:
    """A folder is one kind of data or the other."""
    np.save(class_folder / "0.npy", np.zeros((1, 3, 8, 8), np.float32))

    with pytest.raises(DataError, match=r"holds both batch files \(0\.npy\) and images \(0\.png\)"):
        open_data(class_folder, [SPEC], preprocessing=SMALL)


def test_image_folders_are_recognised(class_folder: Path, tmp_path: Path) -> None:
    """A folder with images anywhere in it is one; a file or an entry point is none."""
    assert is_image_folder(str(class_folder))
    assert not is_image_folder(str(class_folder / "cow"))
    assert not is_image_folder(str(class_folder / "dog" / "0.png"))
    assert not is_image_folder("package.module:batches")
