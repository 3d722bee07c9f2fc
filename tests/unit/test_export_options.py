"""The options of `trt-int8 export`."""

from pathlib import Path

import pytest

from trt_int8.cli import main
from trt_int8.errors import ConfigError
from trt_int8.export_options import model_config


def config(*inputs: str, dynamic: tuple[str, ...] = (), arguments: tuple[str, ...] = (), source: str = "m:net"):
    """Make a configuration from options."""
    return model_config(
        source,
        inputs=inputs,
        dynamic=dynamic,
        arguments=arguments,
        checkpoint=None,
        checkpoint_key=None,
        opset=20,
    )


def test_inputs_are_parsed():
    """Name, shape and dtype are read; the batch is free, float32 the default; a scalar has no axes."""
    image, ids, scalar = config("image:1x3x8x8", "ids:1x16:int64", "t:").inputs

    assert (image.name, image.shape, image.dtype, image.free_axes) == ("image", (1, 3, 8, 8), "float32", {0: "batch"})
    assert (ids.shape, ids.dtype) == ((1, 16), "int64")
    assert (scalar.shape, scalar.free_axes) == ((), {})


def test_dynamic_axes_are_added():
    """--dynamic names an axis beside the batch."""
    (image,) = config("image:1x3x8x8", dynamic=("image:2=height", "image:3=width")).inputs

    assert image.free_axes == {0: "batch", 2: "height", 3: "width"}


def test_arguments_are_yaml():
    """Arguments of the factory are YAML values."""
    assert config("x:1", arguments=("depth=3", "name=a", "flags=[1, 2]")).arguments == {
        "depth": 3,
        "name": "a",
        "flags": [1, 2],
    }


def test_onnx_file_takes_no_opset():
    """An .onnx file keeps its own opset; the option's default is no contradiction."""
    assert config(source="m.onnx").kind == "onnx"


@pytest.mark.parametrize("text", ["image:axb", ":1x2", "image:1x-2"])
def test_bad_input(text: str):
    """An --input that cannot be read is quoted with the form that is expected."""
    with pytest.raises(ConfigError, match="NAME:SHAPE"):
        config(text)


@pytest.mark.parametrize("text", ["image:2", "image:x=height", "image:2="])
def test_bad_dynamic(text: str):
    """A --dynamic that cannot be read is quoted with the form that is expected."""
    with pytest.raises(ConfigError, match="NAME:AXIS=SYMBOL"):
        config("image:1x3x8x8", dynamic=(text,))


def test_dynamic_of_an_unknown_input():
    """A --dynamic for an input that is not there names the inputs."""
    with pytest.raises(ConfigError, match=r"\['image'\]"):
        config("image:1x3x8x8", dynamic=("picture:2=height",))


@pytest.mark.parametrize("text", ["depth", "=3", "depth=["])
def test_bad_argument(text: str):
    """An --arg that cannot be read is quoted."""
    with pytest.raises(ConfigError, match="--arg"):
        config("x:1", arguments=(text,))


def test_an_opset_for_a_file_that_has_one():
    """An .onnx file holds its opset: another one is refused, the default passes."""
    assert config(source="m.onnx").opset == 20
    with pytest.raises(ConfigError, match=r"opset cannot be set for 'm\.onnx', which holds that itself"):
        model_config("m.onnx", inputs=(), dynamic=(), arguments=(), checkpoint=None, checkpoint_key=None, opset=21)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["m.onnx", "--data", "d.npz"], "--data would change nothing: only what a factory makes is fed"),
        (
            ["m:net", "--input", "x:1", "--preprocessing", "p.yaml"],
            "--preprocessing would change nothing: there are no",
        ),
    ],
)
def test_data_that_nothing_reads(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Refused as usage, before the model is looked at."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text("resize: 8\n")

    assert main(["export", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
