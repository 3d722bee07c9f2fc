from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from trt_int8.config import RunConfig
from trt_int8.config_template import DataKind, template
from trt_int8.settings import Section, nested_section, validated

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS: list[DataKind] = ["images", "arrays"]


def leaves(section: Section, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key of a configuration as (dotted path, value, default)."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{path}{name}.")
        elif nested_section(field) is not None and value:
            for item in value:
                yield from leaves(item, f"{path}{name}.")
        else:
            yield f"{path}{name}", value, field.default


def keys(raw: Any, path: str = "") -> Iterator[str]:
    """Every key of nested mappings and lists as a dotted path."""
    if isinstance(raw, dict) and raw:
        for name, value in raw.items():
            yield from keys(value, f"{path}.{name}" if path else str(name))
    elif isinstance(raw, list) and raw and isinstance(raw[0], dict):
        for item in raw:
            yield from keys(item, path)
    else:
        yield path


@pytest.mark.parametrize("kind", KINDS)
def test_template_is_a_valid_configuration(kind: DataKind) -> None:
    """What `trt-int8 init` writes passes the checks as it is."""
    config = validated(RunConfig, yaml.safe_load(template(kind)), "the template")

    assert (config.data.preprocessing is not None) == (kind == "images")


def test_template_holds_every_key() -> None:
    """No key has to be looked up elsewhere."""
    config = validated(RunConfig, yaml.safe_load(template("images")), "the template")
    expected = {path for path, _, _ in leaves(config)} - {"model.inputs.dynamic"} | {"model.inputs.dynamic.0"}

    assert set(keys(yaml.safe_load(template("images")))) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_defaults_unless_marked_as_examples(kind: DataKind) -> None:
    """Deleting a line that is not marked as an example changes nothing."""
    text = template(kind)
    config = validated(RunConfig, yaml.safe_load(text), "the template")
    differing = [path.rsplit(".")[-1] for path, value, default in leaves(config) if value != default]
    lines = text.splitlines()
    marked = [
        lines[number + 1].strip().removeprefix("- ").split(":")[0]
        for number, line in enumerate(lines)
        if line.endswith("(example)")
    ]

    assert marked == differing
    assert "source" in marked


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_its_comment(kind: DataKind) -> None:
    """Each key follows a comment, and no line is too long to read."""
    lines = template(kind).splitlines()

    for before, line in pairwise(lines):
        if line.strip() and "#" not in line and not line.lstrip().startswith("- "):
            assert before.lstrip("- ").startswith("#"), line
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", ["digits", "imagenet"])
def test_examples_are_valid_configurations(name: str) -> None:
    """The examples pass the checks; the files that they name are the user's to provide."""
    config = validated(RunConfig, yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()), name)

    assert config.data.labels == "label"


def test_imagenet_example_is_torchvisions_preprocessing() -> None:
    """The example spells out Resize(256), CenterCrop(224), ToTensor() and Normalize() with ImageNet's figures."""
    raw = yaml.safe_load((EXAMPLES / "imagenet.yaml").read_text())
    preprocessing = validated(RunConfig, raw, "imagenet").data.preprocessing

    assert preprocessing is not None
    assert (preprocessing.resize, preprocessing.crop, preprocessing.layout) == (256, 224, "NCHW")
    assert preprocessing.scale == 1 / 255
    assert preprocessing.mean == (0.485, 0.456, 0.406)
    assert preprocessing.std == (0.229, 0.224, 0.225)
