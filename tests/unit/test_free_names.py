"""Names for what is added to a graph."""

from engines.free_names import FreeNames


def test_the_first_free_one_is_taken() -> None:
    """The stem where it is free, else the lowest number from 2 on; what was given once is taken."""
    names = FreeNames(["scale", "scale_3", None])

    assert [names.take("scale") for _ in range(3)] == ["scale_2", "scale_4", "scale_5"]
    assert names.take("zero") == "zero"
    assert names.take("zero") == "zero_2"
