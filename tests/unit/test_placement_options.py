"""What a user says about where Q/DQ goes: the same on every way to an INT8 model, and kept in the model."""

from __future__ import annotations

import json
import logging
import shlex
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import ModelError
from engines.placement_options import PlacementOptions
from trt_int8 import cli_models
from trt_int8.cache_import import import_cache
from trt_int8.caches import export_cache
from trt_int8.calibration import calibrate
from trt_int8.cli_cache import import_
from trt_int8.errors import ConfigError
from trt_int8.placement_options import PLACEMENT_KEY, placement_entry, placement_of, placement_options
from trt_int8.quantization import quantize

EXPRESSIONS = st.lists(st.text(min_size=1), max_size=3)


def test_the_words_of_the_command_line() -> None:
    """Nothing for a default, an option for each expression."""
    assert PlacementOptions().words() == []
    assert shlex.join(PlacementOptions("float", "int8", ["a.*", "b c"], ["d"]).words()) == (
        "--residual float --attention int8 --exclude 'a.*' --exclude 'b c' --include d"
    )


@given(residual=st.sampled_from(["int8", "float"]), exclude=EXPRESSIONS, include=EXPRESSIONS)
def test_a_model_keeps_them(residual: Any, exclude: list[str], include: list[str]) -> None:
    """What is written into the metadata is read back, whatever the expressions hold."""
    options = PlacementOptions(residual, "int8", exclude, tuple(include))

    assert placement_of(placement_entry(options)) == options


@pytest.mark.parametrize("text", ["", "[]", "{", '{"residual": "int8", "stride": 2}', '{"exclude": "a"}'])
def test_metadata_that_cannot_be_read(text: str, caplog: pytest.LogCaptureFixture) -> None:
    """A warning and no options; a model without the entry says nothing."""
    with caplog.at_level(logging.WARNING):
        assert placement_of({PLACEMENT_KEY: text}) is None
    assert "how Q/DQ was placed is not known" in caplog.text
    assert placement_of({}) is None


def test_a_string_is_no_list_of_expressions() -> None:
    """Its characters would be taken for expressions; the message shows what was meant."""
    with pytest.raises(ModelError, match=r"exclude is the string 'n_.'.* expected a list .*: \['n_.'\]"):
        PlacementOptions(exclude="n_.")
    with pytest.raises(ModelError, match="include is the string"):
        PlacementOptions(include="n_.")


def test_words_that_do_not_exist() -> None:
    """Python callers are told what there is; the command line checks its own."""
    wrong: Any = "none"
    with pytest.raises(ConfigError, match="residual is 'none'; expected 'int8' or 'float'"):
        placement_options(wrong, "float", [], [])
    with pytest.raises(ConfigError, match="attention is 'none'; expected 'float' or 'int8'"):
        placement_options("int8", wrong, [], [])


def test_every_command_that_places_takes_all_of_them() -> None:
    """`quantize`, `build` and `cache import` have the same options, with the same words and help."""
    hints = [
        get_type_hints(command, include_extras=True) for command in (cli_models.quantize, cli_models.build, import_)
    ]
    defaults = [signature(command).parameters for command in (cli_models.quantize, cli_models.build, import_)]

    for name in ("residual", "attention", "exclude", "include"):
        assert hints[0][name] == hints[1][name] == hints[2][name]
        assert len({parameters[name].default for parameters in defaults}) == 1


def attending(builder: Any, path: Path) -> Path:
    """Draw one head of attention over 64 positions, and a projection of 3 columns that no INT8 kernel is fast for."""
    x = builder.input("x", ("N", 64, 64))
    query, key, value = (builder.node("MatMul", [x, builder.normal((64, 64), 0.125)], name) for name in "qkv")
    scores = builder.node("MatMul", [query, builder.node("Transpose", [key], perm=[0, 2, 1])], "scores")
    weights = builder.node("Softmax", [builder.node("Div", [scores, builder.constant(np.float32(8))])], "p")
    context = builder.node("MatMul", [weights, value], "context")
    builder.node("MatMul", [context, builder.normal((64, 3), 0.125)], "y")
    return Path(builder.save(path, ["y"]))


def test_a_cache_is_imported_as_the_model_is_quantized(graph_builder: Any, tmp_path: Path) -> None:
    """Attention and included nodes are the same on both ways, and so are all Q/DQ nodes and codes."""
    model = attending(graph_builder(), tmp_path / "m.onnx")
    feeds = {"x": np.random.default_rng(2).normal(size=(2, 64, 64)).astype(np.float32)}
    calibration = calibrate(model, [feeds])
    calibration.save(tmp_path / "c.npz")
    export_cache(tmp_path / "c.npz", tmp_path / "k.cache", method="minmax", percentile=99.99, tensorrt_version="8.6.1")
    wishes: Any = {"attention": "int8", "include": ["n_y"], "exclude": ["n_q"]}
    direct = quantize(model, calibration, output=tmp_path / "direct.onnx", method="minmax", **wishes)
    imported = import_cache(tmp_path / "k.cache", model, output=tmp_path / "imported.onnx", **wishes)
    models = [onnx.load(tmp_path / f"{name}.onnx") for name in ("direct", "imported")]

    rules = {decision.node: decision.rule for decision in imported.placement.decisions}
    assert rules == {
        "n_q": "excluded",
        "n_k": "weighted-inputs",
        "n_v": "weighted-inputs",
        "n_scores": "attention",
        "n_context": "attention",
        "n_y": "included",
    }
    assert imported.placement.decisions == direct.placement.decisions
    assert models[0].graph == models[1].graph
    kept = [{entry.key: entry.value for entry in model.metadata_props}[PLACEMENT_KEY] for model in models]
    assert kept[0] == kept[1]
    assert json.loads(kept[0]) == {"residual": "int8", "attention": "int8", "exclude": ["n_q"], "include": ["n_y"]}


def test_an_attention_product_whose_scale_a_cache_lacks_stays_float(graph_builder: Any, tmp_path: Path) -> None:
    """It keeps no lone pair on its other operand; the pair of the probabilities needs no scale from the cache."""
    model = attending(graph_builder(), tmp_path / "m.onnx")
    (tmp_path / "k.cache").write_text(
        "TRT-8601-EntropyCalibration2\n" + "".join(f"{name}: 3c010a14\n" for name in ("x", "k", "v", "context"))
    )
    result = import_cache(
        tmp_path / "k.cache", model, output=tmp_path / "q.onnx", attention="int8", include=["n_y"], allow_missing=True
    )
    pairs = {point.tensor: {node for node, _ in point.uses or ()} for point in result.placement.activations}

    assert {d.node: d.rule for d in result.placement.decisions if d.node in ("n_scores", "n_context")} == {
        "n_scores": "no-scale",
        "n_context": "attention",
    }
    assert pairs == {
        "x": {"n_q", "n_k", "n_v"},
        "p": {"n_context"},
        "v": {"n_context"},
        "context": {"n_y"},
    }
