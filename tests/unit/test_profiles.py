"""engines.profiles: ranges of shapes."""

from __future__ import annotations

import numpy as np
import pytest

from engines.errors import EngineBuildError
from engines.profiles import ShapeRange, batch_profile, check_profiles, dynamic_inputs, seen_profile, seen_range
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
    with pytest.raises(EngineBuildError, match=f"input '{spec.name}': .*further dynamic axes"):
        batch_profile([spec], 1, 2, 4)


def test_a_range_of_what_was_seen() -> None:
    """Smallest and largest length per axis, and the shape that came most often; of several the largest."""
    assert seen_range({(4, 10): 2, (4, 12): 1, (2, 11): 1}) == ShapeRange((2, 10), (4, 10), (4, 12))
    assert seen_range({(4, 10): 1, (2, 21): 1, (4, 9): 1}) == ShapeRange((2, 9), (2, 21), (4, 21))
    assert seen_range({(3, 4): 1, (4, 3): 1}).optimum == (4, 3)


def test_a_profile_of_what_was_seen() -> None:
    """The batch may shrink to one sample, other axes keep to what was seen, and fixed inputs need no range."""
    seen = {"text": {(4, 10): 2, (4, 12): 1}, "fixed": {(1, 4): 3}, "unknown": {(9,): 1}}

    assert seen_profile([TEXT, FIXED], seen) == {"text": ShapeRange((1, 10), (4, 10), (4, 12))}
    assert seen_profile([FIXED], {}) == {}


def test_every_axis_that_is_named_like_the_batch_shrinks_with_it() -> None:
    """A state that has the batch in its second axis, or an axis named so twice, is of the same samples."""
    inputs = [
        TensorSpec("input", FLOAT, ("batch", "sequence")),
        TensorSpec("state", FLOAT, (2, "batch", 128)),
        TensorSpec("pairs", FLOAT, ("batch", "batch", "other")),
        TensorSpec("nameless", FLOAT, (2, None)),
    ]
    seen = {"input": {(2, 576): 3}, "state": {(2, 2, 128): 3}, "pairs": {(2, 2, 2): 3}, "nameless": {(2, 2): 3}}
    profile = seen_profile(inputs, seen)

    assert {name: bounds.minimum for name, bounds in profile.items()} == {
        "input": (1, 576),
        "state": (2, 1, 128),
        "pairs": (1, 1, 2),
        "nameless": (2, 2),
    }
    assert {bounds.maximum for bounds in profile.values()} == {(2, 576), (2, 2, 128), (2, 2, 2), (2, 2)}


def test_an_unnamed_batch_says_nothing_of_other_unnamed_axes() -> None:
    """Two axes without a name are not the same one; a first axis without a name is the batch."""
    inputs = [TensorSpec("input", FLOAT, (None, None)), TensorSpec("state", FLOAT, (2, None, 4))]
    profile = seen_profile(inputs, {"input": {(3, 5): 1}, "state": {(2, 3, 4): 1}})

    assert (profile["input"].minimum, profile["state"].minimum) == ((1, 5), (2, 3, 4))


def test_the_batch_axis_is_known_by_its_symbol() -> None:
    """The first axis of the first input that has axes; of other inputs where it has that name, or none."""
    inputs = [
        TensorSpec("scalar", FLOAT, ()),
        TEXT,
        TensorSpec("mask", FLOAT, ("batch", "length")),
        TensorSpec("table", FLOAT, ("rows", 2)),
        TensorSpec("unnamed", FLOAT, (None, 2)),
    ]
    seen = {"text": {(4, 6): 1}, "mask": {(4, 6): 1}, "table": {(7, 2): 1}, "unnamed": {(4, 2): 1}}
    profile = seen_profile(inputs, seen)

    assert {name: bounds.minimum for name, bounds in profile.items()} == {
        "text": (1, 6),
        "mask": (1, 6),
        "table": (7, 2),
        "unnamed": (1, 2),
    }
    assert seen_profile([TensorSpec("x", FLOAT, (4, "length"))], {"x": {(4, 6): 1}})["x"].minimum == (4, 6)


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        ({}, "they hold none of its shapes for input 'text': float32"),
        ({"image": {(1, 3, 8, 8): 1}}, "none of its shapes"),
        ({"text": {(1, 2): 1, (1, 2, 3): 1}}, r"other numbers of axes \(\(1, 2\), \(1, 2, 3\)\)"),
    ],
)
def test_shapes_that_do_not_make_a_profile(seen: dict[str, dict[tuple[int, ...], int]], problem: str) -> None:
    """The input is named."""
    with pytest.raises(EngineBuildError, match=problem):
        seen_profile([TEXT], seen)


def test_profiles_that_fit_pass() -> None:
    """Every dynamic input has a range, fixed ones may have theirs."""
    profile = batch_profile([IMAGE], 1, 2, 4)

    check_profiles("m", [IMAGE], [profile])
    check_profiles("m", [FIXED], [])
    check_profiles("m", [IMAGE, FIXED], [{**profile, "fixed": ShapeRange((1, 4), (1, 4), (1, 4))}, profile])


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ({}, r"input 'text': float32 \(batch, length\) has a dynamic axis and no optimization profile"),
        ({"texts": ShapeRange((1, 1), (1, 1), (1, 1))}, "'texts', which is no input"),
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
