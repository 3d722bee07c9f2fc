"""trt_int8.build_options: `--batch` and `--shape` of the command line."""

from __future__ import annotations

import pytest

from engines.profiles import ShapeRange
from trt_int8.build_options import parse_batch, parse_shapes
from trt_int8.errors import UsageError


def test_batches() -> None:
    """Three numbers."""
    assert parse_batch("1,8,32") == (1, 8, 32)


@pytest.mark.parametrize("text", ["1,8", "1,8,32,64", "1,x,3", "", "1;8;32", "8,4,1", "0,1,2"])
def test_other_batches_are_a_usage_error(text: str) -> None:
    """What was given is quoted as it was, and an example is given."""
    with pytest.raises(UsageError, match=rf"--batch is {text!r}; .*ascending: --batch 1,8,32"):
        parse_batch(text)


def test_shapes() -> None:
    """A name, which may hold anything, and three shapes."""
    assert parse_shapes(["x=1x3,2x3,4x3", "a=b:0=1,2,3"]) == {
        "x": ShapeRange((1, 3), (2, 3), (4, 3)),
        "a=b:0": ShapeRange((1,), (2,), (3,)),
    }
    assert parse_shapes([]) == {}


@pytest.mark.parametrize("texts", [["x"], ["=1,2,3"], ["x=1,2"], ["x=1x,2,3"], ["x=1,2,3", "x=1,2,3"]])
def test_other_shapes_are_a_usage_error(texts: list[str]) -> None:
    """What was given stands in the line, and an example."""
    with pytest.raises(UsageError, match=r"--shape is 'x|--shape is '="):
        parse_shapes(texts)


def test_shapes_to_time_ascend() -> None:
    """Axis by axis; one shape stands for all three."""
    assert parse_shapes(["x=2x3"], one_will_do=True)["x"].maximum == (2, 3)
    with pytest.raises(UsageError, match="in ascending order"):
        parse_shapes(["x=8x3,4x3,1x3"], one_will_do=True)
