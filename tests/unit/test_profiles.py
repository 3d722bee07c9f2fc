"""engines.profiles: ranges of shapes."""

from __future__ import annotations

import numpy as np
import pytest

from engines.errors import EngineBuildError
from engines.profiles import ShapeRange, batch_profile, check_profiles, dynamic_inputs, seen_profile
from engines.runner import TensorSpec

FLOAT = np.dtype(np.float32)
IMAGE = TensorSpec("image", FLOAT, ("batch", 3, 8, 8))
FIXED = TensorSpec("fixed", FLOAT, (1, 4))
TEXT = TensorSpec("text", FLOAT, ("batch", "length"))


def test_a_range_holds_the_shapes_within() -> None:
    """Both ends belong to it; another rank does not."""
    shapes = ShapeRange((1, 8), (2, 8), (4, 8))

    assert (1, 8) in shapes
    assert (4, 8) in shapes
    assert (5, 8) not in shapes
    assert (2, 7) not in shapes
    assert (2,) not in shapes
    assert str(shapes) == "min (1, 8), opt (2, 8), max (4, 8)"


def test_a_batch_profile_varies_the_first_axis() -> None:
    """Inputs without a dynamic axis need no range."""
    assert dynamic_inputs([IMAGE, FIXED]) == [IMAGE]
    assert batch_profile([IMAGE, FIXED], 1, 8, 32) == {
        "image": ShapeRange((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8)),
    }


@pytest.mark.parametrize("spec", [TEXT, TensorSpec("any", FLOAT, None)])
def test_batch_sizes_do_not_tell_other_axes(spec: TensorSpec) -> None:
    """A second dynamic axis is named."""
    with pytest.raises(EngineBuildError, match=f"input {spec.name}: .*further dynamic axes"):
        batch_profile([spec], 1, 2, 4)


def test_a_profile_from_what_was_seen() -> None:
    """Smallest and largest length per axis, and the shape that came most often."""
    batches = [{"text": (4, 10)}, {"text": (4, 12)}, {"text": (4, 10)}, {"text": (2, 11)}]

    assert seen_profile(batches) == {"text": ShapeRange((2, 10), (4, 10), (4, 12))}
    with pytest.raises(EngineBuildError, match="held no batch"):
        seen_profile([])


def test_profiles_that_fit_pass() -> None:
    """Every dynamic input has a range, fixed ones may have theirs."""
    profile = batch_profile([IMAGE], 1, 2, 4)

    check_profiles("m", [IMAGE], [profile])
    check_profiles("m", [FIXED], [])
    check_profiles("m", [IMAGE, FIXED], [{**profile, "fixed": ShapeRange((1, 4), (1, 4), (1, 4))}, profile])


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ({}, r"input text: float32 \(batch, length\) has a dynamic axis and no optimization profile"),
        ({"texts": ShapeRange((1, 1), (1, 1), (1, 1))}, "no optimization profile"),
        (
            {"text": ShapeRange((1, 1), (1, 1), (1, 1)), "texts": ShapeRange((1,), (1,), (1,))},
            "'texts', which is no input",
        ),
        ({"text": ShapeRange((1,), (1,), (1,))}, "another number of axes"),
        ({"text": ShapeRange((1, 4), (1, 3), (1, 4))}, "not in ascending order in axis 1"),
        ({"text": ShapeRange((-1, 4), (1, 4), (1, 4))}, "not in ascending order in axis 0"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(profile: dict[str, ShapeRange], problem: str) -> None:
    """The input, the axis and the shapes are named."""
    with pytest.raises(EngineBuildError, match=problem):
        check_profiles("m", [TEXT], [profile])


def test_a_fixed_axis_stays() -> None:
    """A profile cannot change what the model has fixed."""
    with pytest.raises(EngineBuildError, match="fixed length 8 of axis 2"):
        check_profiles("m", [IMAGE], [{"image": ShapeRange((1, 3, 4, 8), (1, 3, 8, 8), (1, 3, 8, 8))}])
