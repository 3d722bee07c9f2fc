"""`trt-int8 lint`: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from trt_int8.cli import main
from trt_int8.cli_lint import WIDTH

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `trt-int8 lint ...`: exit status, stdout, stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        status = main(["lint", *map(str, arguments)])
        streams = capsys.readouterr()
        return status, streams.out, streams.err

    return call


@pytest.fixture
def drawn(graph_builder: Any, tmp_path: Path) -> Callable[..., Path]:
    """Save a chain of quantized convolutions: drawn(count, zero point, name prefix)."""

    def draw(count: int, zero: Any, prefix: str = "layer") -> Path:
        graph = graph_builder()
        x = graph.input("x", (1, 4, 8, 8))
        for number in range(count):
            name = f"{prefix}_{number}"
            inputs = [graph.constant(np.float32(0.05)), graph.constant(zero)]
            x = graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [x, *inputs], f"{name}_q"), *inputs], name)
            codes = graph.constant(graph.rng.integers(-127, 128, (4, 4, 1, 1), np.int8))
            scale = [graph.constant(np.float32(0.01)), graph.constant(np.int8(0))]
            x = graph.node("Conv", [x, graph.node("DequantizeLinear", [codes, *scale], f"{name}_w")], f"{name}_y")
        return Path(graph.save(tmp_path / "drawn.onnx", [x]))

    return draw


def test_errors_end_with_1(drawn: Callable[..., Path], run: Run) -> None:
    """Findings go to stdout, with node, rule, cost and fix."""
    status, out, err = run(drawn(1, np.uint8(128)))

    assert status == 1
    assert "error  uint8-codes  1 node" in out
    assert "UINT8 codes, zero point 128: n_layer_0_q" in out
    assert "cost: TensorRT has no UINT8 kernels" in out
    assert "fix: store INT8 codes" in out
    assert "1 error, 0 warnings, 1 note" in out
    assert err == ""


def test_clean_models_end_with_0(drawn: Callable[..., Path], run: Run) -> None:
    """Notes are no failure."""
    status, out, _ = run(drawn(1, np.int8(0)), "--tensorrt", "11")

    assert status == 0
    assert out.startswith(
        "drawn.onnx for TensorRT 11: opset 20, 1 of 1 weighted nodes quantized, 1 pair on activations"
    )
    assert out.endswith("0 errors, 0 warnings, 1 note\n")


def test_many_nodes_with_one_finding(drawn: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    """Fifty nodes are one paragraph within 120 columns, however long their names are; the JSON holds them all."""
    file = drawn(50, np.uint8(7), "a_rather_long_name_of_a_layer_in_a_deep_model/" * 3)
    _, out, _ = run(file, "--json", tmp_path / "lint.json")
    found = [
        item for item in json.loads((tmp_path / "lint.json").read_text())["findings"] if item["severity"] == "error"
    ]

    assert "error  uint8-codes  50 nodes" in out
    assert "and 47 more" in out
    assert len(out.splitlines()) < 30
    assert max(map(len, out.splitlines())) <= WIDTH
    assert len(found) == 50


def test_many_kinds_of_one_finding(graph_builder: Any, run: Run, tmp_path: Path) -> None:
    """Of many different places five are shown, the others counted."""
    graph = graph_builder()
    for number in range(9):
        inputs = [graph.constant(np.float32(-number)), graph.constant(np.int8(0))]
        code = graph.node("QuantizeLinear", [graph.input(f"x{number}"), *inputs])
        graph.node("DequantizeLinear", [code, *inputs], f"y{number}")
    _, out, _ = run(graph.save(tmp_path / "m.onnx", [f"y{number}" for number in range(9)]))

    assert "and 4 nodes more like these; --json lists all" in out


def test_fix(drawn: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    """--fix says what it mended, lints the result, and ends with 0 where no error is left in it."""
    file, output, result = drawn(2, np.uint8(128)), tmp_path / "fixed" / "m.onnx", tmp_path / "lint.json"
    status, out, _ = run(file, "--fix", output, "--json", result)
    data = json.loads(result.read_text())

    assert status == 0
    assert "m.onnx: 2 places mended, 0 left" in out
    assert "mended  uint8-codes: UINT8 - 128 is INT8: the same values: n_layer_0_q, n_layer_1_q" in out
    assert "0 errors" in out.splitlines()[-1]
    assert (data["counts"]["error"], data["fix"]["after"]["counts"]["error"]) == (2, 0)
    assert data["fix"]["mended"][0] == {
        "rule": "uint8-codes", "node": "n_layer_0_q", "what": "UINT8 - 128 is INT8: the same values"
    }  # fmt: skip
    onnx.checker.check_model(onnx.load(output), full_check=True)


def test_fix_of_what_cannot_be_mended(drawn: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    """What is left is listed with its reason, and the status is 1."""
    status, out, _ = run(drawn(1, np.uint8(7)), "--fix", tmp_path / "m.onnx")

    assert status == 1
    assert "left  uint8-codes: only UINT8 with zero point 128 has the values of INT8" in out


@pytest.mark.parametrize("option", ["--fix", "--json"])
def test_the_model_is_never_written_over(option: str, drawn: Callable[..., Path], run: Run) -> None:
    """The input's own name is refused before anything is read or written."""
    file = drawn(1, np.uint8(128))
    content = file.read_bytes()
    status, out, err = run(file, option, file)

    assert (status, out) == (1, "")
    assert f"it is read as well, and would be lost. Name another file with {option}." in err
    assert file.read_bytes() == content


def test_fix_and_json_in_one_file(drawn: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    """Two results cannot have one name."""
    status, _, err = run(drawn(1, np.int8(0)), "--fix", tmp_path / "m", "--json", tmp_path / "m")

    assert status == 1
    assert "twice: --fix and --json both name it" in err


@pytest.mark.parametrize("options", [("--fix", "m.onnx"), ("--tensorrt", "10")])
def test_options_that_do_nothing_for_the_cpu(options: tuple[str, str], drawn: Callable[..., Path], run: Run) -> None:
    """They are about TensorRT: usage."""
    status, _, err = run(drawn(1, np.uint8(0)), "--target", "cpu", *options)

    assert status == 2
    assert f"{options[0]} does nothing for --target cpu" in err


def test_target_cpu(drawn: Callable[..., Path], run: Run) -> None:
    """The other table of rules, by name."""
    status, out, _ = run(drawn(1, np.int8(0)), "--target", "cpu")

    assert status == 0
    assert "for ONNX Runtime's integer kernels" in out
    assert "warning  signed-activation  1 node" in out


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "there is no file"), (b"words", "is not an ONNX model"), (b"", "is not an ONNX")]
)
def test_bad_files(content: bytes | None, expected: str, run: Run, tmp_path: Path) -> None:
    """One line that says what was found."""
    file = tmp_path / "m.onnx"
    if content is not None:
        file.write_bytes(content)
    status, out, err = run(file, "--fix", tmp_path / "out.onnx")

    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert expected in err
    assert err.count("\n") == 1


def test_an_unwritable_place(drawn: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    """Said before the work: a folder in the place of the file, or a file in the place of the folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    file = drawn(1, np.uint8(128))

    assert "it is a folder" in run(file, "--fix", tmp_path / "folder")[2]
    assert "is not a folder" in run(file, "--fix", tmp_path / "file" / "m.onnx")[2]


def test_operators_on_integers_are_told(graph_builder: Any, run: Run, tmp_path: Path) -> None:
    """The first line counts them among the quantized nodes, and says what they are."""
    graph = graph_builder()
    codes = graph.constant(graph.rng.integers(-127, 128, (4, 4), np.int8))
    fed = graph.nodes_of("DynamicQuantizeLinear", [graph.input("x", (2, 4))], ["c", "s", "z"])
    graph.node("Cast", [graph.node("MatMulInteger", [fed[0], codes, fed[2]])], "y", to=1)
    _, out, _ = run(graph.save(tmp_path / "m.onnx", ["y"]), "--target", "cpu")

    assert "1 of 1 weighted nodes quantized (1 as operators on integers), 0 pairs on activations" in out
