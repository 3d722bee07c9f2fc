"""The HTML report, made from a small run folder: a real model, calibration and quantization, measurements by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import StrictUndefined
from onnx import TensorProto, helper, numpy_helper

from calibrators.calibration import Calibration
from calibrators.counter import MagnitudeCounter
from trt_int8 import report
from trt_int8.calibration import calibrate
from trt_int8.errors import ConfigError
from trt_int8.plot_histogram import histogram_figure
from trt_int8.plot_svg import PALETTE, inline_svg, round_positions
from trt_int8.plots import SizeBar, size_figure
from trt_int8.quantization import convert_fp16, quantize
from trt_int8.report import render_report
from trt_int8.report_models import model_rows
from trt_int8.report_tensors import clipped_share, tensor_rows
from trt_int8.report_text import fixed, format_bytes, moment, percent, significant
from trt_int8.report_verdict import headline, judge

METHODS = ("minmax", "entropy", "percentile", "mse")
ODD_NAME = "a<b>&c/relu"
VOID = {"meta", "br", "wbr", "input", "link", "img", "hr"}


def _model(path: Path) -> None:
    """Write Conv, Relu, Conv, Relu, Flatten, Gemm with a tensor whose name HTML would take for a tag."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], "first<conv>", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], [ODD_NAME], "relu1"),
        helper.make_node("Conv", [ODD_NAME, "w2"], ["c2"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("Flatten", ["r2"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w3"], ["logits"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [weight("w1", 16, 3, 3, 3), weight("w2", 16, 16, 3, 3), weight("w3", 576, 10)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def _benchmark() -> dict[str, Any]:
    def row(name: str, median: float, speedup: float, low: float, high: float, **more: Any) -> dict[str, Any]:
        tail = {"p90_ms": median * 1.1, "p95_ms": median * 1.2, "p99_ms": median * 1.5}
        rate = {"samples_per_s": 1000 / median, "speedup": speedup, "speedup_low": low, "speedup_high": high}
        return {"name": name, "median_ms": median, **tail, **rate, "simulated": False, "execution": "native", **more}

    return {
        "rounds": 20,
        "reference": "FP32",
        "batch_size": 1,
        "warnings": ["the clocks were unsteady"],
        "candidates": [
            row("FP32", 2.0, 1.0, 1.0, 1.0, threads=None, note=""),
            row("FP16", 2.02, 0.99, 0.97, 1.01, threads=None, note=""),
            row("INT8 entropy, cpu", 1.3, 1.54, 1.42, 1.61, threads=None, note=""),
        ],
    }


def _accuracy() -> dict[str, Any]:
    def row(name: str, top1: float, agreement: float, sqnr: float, **more: Any) -> dict[str, Any]:
        scores = {"samples": 1000, "top1": top1, "top5": 99.0, "agreement": agreement, "sqnr_db": sqnr}
        rest = {"cosine": 0.999, "max_abs": 0.25, "execution": "native", "simulated": "tensorrt" in name}
        return {"name": name, **scores, **rest, "identical": False, "nonfinite": 0, "outputs": {}, **more}

    models = [
        row(f"INT8 {method}, {target}", 91.6, 99.2, 25.0 + index + (target == "tensorrt"))
        for target in ("cpu", "tensorrt")
        for index, method in enumerate(METHODS)
    ]
    check = {"name": "FP16", "metric": "snr", "threshold": 10.0, "worst": {"logits": 61.2}, "passed": True}
    return {
        "reference": "FP32",
        "reference_scores": {"name": "FP32", "samples": 1000, "top1": 91.7, "top5": 99.1, "simulated": False},
        "candidates": [row("FP16", 91.7, 100.0, 66.0), *models],
        "labels": "label",
        "warnings": ["input 'image' looks unlike"],
        "polygraphy": {"batches": 4, "checks": [check]},
    }


def _sizes(files: dict[str, str]) -> dict[str, Any]:
    def row(name: str, file: str) -> dict[str, Any]:
        weights = {"INT8": 250_000, "FLOAT": 4_000} if "INT8" in name else {"FLOAT": 1_000_000}
        size = sum(weights.values()) + 16_000
        return {"name": name, "file": file, "file_bytes": size, "weight_bytes": weights, "ratio": 1_016_000 / size}

    return {"models": [row(name, file) for name, file in files.items()]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a run; tests copy it."""
    folder = tmp_path_factory.mktemp("run")
    _model(folder / "model.onnx")
    rng = np.random.default_rng(1)
    images = rng.laplace(0, 1, (24, 3, 6, 6)).astype(np.float32)
    calibration = calibrate(folder / "model.onnx", {"image": images}, batch_size=8)
    calibration.save(folder / "calibration.npz")
    models = []
    files = {"FP32": "model.onnx", "FP16": "model.fp16.onnx"}
    for method in METHODS:
        for target in ("tensorrt", "cpu"):
            file = f"methods/{method}.{target}.onnx"
            result = quantize(
                folder / "model.onnx",
                calibration,
                output=folder / file,
                method=method,
                target=target,
                exclude=["head"],
                reduce_range=False,
            )
            models.append({**result.to_json(), "file": file})
            files[f"INT8 {method}, {target}"] = file
    half = convert_fp16(folder / "model.onnx", calibration, output=folder / "model.fp16.onnx").to_json()
    half["held"] = [{"node": "second", "op_type": "Conv", "reason": "calibration saw 7e4"}]
    spec = {"name": "image", "dtype": "float32", "shape": ["batch", 3, 6, 6]}
    contents: dict[str, Any] = {
        "quantization.json": {"models": models, "fp16": half},
        "benchmark.json": _benchmark(),
        "accuracy.json": _accuracy(),
        "sizes.json": _sizes(files),
        "export.json": {
            "inputs": [spec],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}],
            "opset": 20,
            "differences": [{"output": "logits", "batch": 2, "max_abs": 1.25e-6, "max_rel": 3.5e-7}],
            "notes": ["checked on 2 samples"],
        },
        "manifest.json": {
            "format": 1,
            "tool": "0.1.0",
            "created": "2026-01-05T10:12:13+00:00",
            "title": "A <script>alert(1)</script> run",
            "config": {
                "data": {"calibration": "c.npz", "evaluation": "e.npz"},
                "quantize": {"method": "entropy", "percentile": 99.9},
            },
            "machine": {
                "cpu": {"model": "Some CPU", "features": ["avx2"], "cores_physical": 2, "cores_logical": 4},
                "memory_bytes": 8_000_000_000,
                "cuda": {"error": "no driver", "gpus": []},
                "versions": {"onnxruntime": "1.30", "tensorrt": None},
            },
            "stages": {"export": {"seconds": 1.5}, "calibrate": {"seconds": 2.25}},
            "files": {"model.onnx": {"sha256": "ab" * 32, "bytes": 1_016_000}},
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def rendered(finished: Path) -> tuple[str, _Page]:
    """Give the page of the complete run, as text and read."""
    return _render(finished)


class _Page(HTMLParser):
    """Collects what a page holds, and checks that its tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"script", "style"}.intersection(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def _render(folder: Path) -> tuple[str, _Page]:
    text = render_report(folder).read_text()
    return text, _Page(text)


def _edit(folder: Path, file: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))


def _edit_candidate(folder: Path, file: str, name: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    rows = [{**row, **changes} if row["name"] == name else row for row in content["candidates"]]
    _edit(folder, file, candidates=rows)


def test_page_asks_nothing_of_the_network(rendered: tuple[str, _Page]) -> None:
    """No address, no image, script or style sheet from elsewhere; links lead only into the page."""
    text, page = rendered
    assert "http:" not in text
    assert "https:" not in text
    assert "//" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "@import" not in text
    assert not page.values("src")
    assert page.values("href")
    assert all(value.startswith("#") for value in page.values("href"))
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", text))


def test_identifiers_are_unique_and_every_reference_has_its_target(rendered: tuple[str, _Page]) -> None:
    """Figures share one page: their clip paths and markers must not clash, and none may be lost."""
    text, page = rendered
    identifiers = page.values("id")
    assert len(identifiers) == len(set(identifiers))
    references = [value[1:] for value in page.values("href")] + re.findall(r"url\(#([^)]*)\)", text)
    assert set(references) <= set(identifiers)


def test_names_are_escaped(rendered: tuple[str, _Page]) -> None:
    """Titles, tensors and nodes may hold `<` and `&`, and appear as they are written."""
    text, page = rendered
    assert "alert(1)</script>" not in text
    assert "A <script>alert(1)</script> run" in page.text
    assert "a<b>&c/relu" in page.text
    assert "first<conv>" in page.text
    assert any(ODD_NAME in label for label in page.values("aria-label"))


def test_every_name_in_the_template_exists_for_a_complete_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With undefined names being errors, a complete run still renders."""
    monkeypatch.setattr(report, "ChainableUndefined", StrictUndefined)
    _, page = _render(run)
    assert "All models" in page.text


def test_same_run_gives_same_page(run: Path, rendered: tuple[str, _Page]) -> None:
    """Nothing in the page depends on the clock, on chance or on where the folder lies."""
    assert _render(run)[0] == rendered[0]


def test_verdict_states_speed_size_and_accuracy(rendered: tuple[str, _Page]) -> None:
    """The first sentence names the delivered model, its interval, its size and what it loses."""
    _, page = rendered
    assert (
        "INT8 (entropy) runs 1.54x as fast as FP32 on this CPU (95 % interval 1.42 to 1.61), is 3.8x smaller, "
        "and loses 0.1 points of top-1 (91.7 to 91.6 %)." in page.text
    )
    # 8 of 1000 answers changed: 2 * sqrt(8) / 1000 = 0.57 points.
    assert "8 of 1,000 answers differ from FP32's; with so few, a difference of up to 0.6 points" in page.text


def test_simulation_is_named(rendered: tuple[str, _Page]) -> None:
    """Figures for TensorRT are called simulated, and no GPU is claimed."""
    _, page = rendered
    assert "simulated, by exact fake quantization in ONNX Runtime; no GPU was measured" in page.text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.80, 0.90, "is not faster than FP32 on this CPU, but slower: 0.85x its speed (95 % interval 0.80 to 0.90)."),
        (0.96, 1.04, "is not faster than FP32 on this CPU: the two cannot be told apart (1.00x, 95 % interval"),
        (1.004, 1.2, "is not faster than FP32 on this CPU: the two cannot be told apart"),
    ],
)
def test_not_faster_is_said_plainly(run: Path, low: float, high: float, words: str) -> None:
    """An interval that reaches 1.00, as printed, is no speed-up; the first sentence says so."""
    _edit_candidate(
        run, "benchmark.json", "INT8 entropy, cpu", speedup=(low + high) / 2, speedup_low=low, speedup_high=high
    )
    _, page = _render(run)
    assert f"INT8 (entropy) {words}" in page.text
    assert "as fast as FP32" not in page.text


def test_thresholds_of_all_methods_stand_in_the_histogram(rendered: tuple[str, _Page], finished: Path) -> None:
    """Each figure labels min-max, entropy, percentile and MSE with the calibration's own thresholds."""
    text, _ = rendered
    calibration = Calibration.load(finished / "calibration.npz")
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    figure = next(figure for figure in figures if "magnitudes of r2," in figure)
    for method in METHODS:
        label = "percentile 99.9" if method == "percentile" else method
        assert f">{label}: {calibration.amax(method, percentile=99.9)['r2']:.4g}<" in figure


def _with_history(folder: Path, batches: tuple[int, ...], scales: dict[str, tuple[float, ...]]) -> tuple[str, _Page]:
    """Give the page of a run whose entropy scales moved like that; those of other tensors and methods stayed at 1."""
    calibration = Calibration.load(folder / "calibration.npz")
    steady = tuple(1.0 for _ in batches)
    history = {
        method: {
            tensor: tuple(zip(batches, scales.get(tensor, steady) if method == "entropy" else steady, strict=True))
            for tensor in calibration.tensors
        }
        for method in METHODS
    }
    calibration.annotated(convergence=history).save(folder / "calibration.npz")
    return _render(folder)


def test_scales_that_still_move_are_drawn(run: Path) -> None:
    """The sentence names them, the curve is orange, and each method's count is written behind its own."""
    text, page = _with_history(run, (2, 4, 8), {"r2": (1.5, 1.02, 1.0), "image": (3.0, 1.005, 1.0)})
    count = len(Calibration.load(run / "calibration.npz").tensors)

    assert f"1 of {count} scales have moved by more than 1 % since batch 4 (entropy): r2 by 2.0 %; more" in page.text
    figure = re.search(r'<svg[^>]*aria-label="How the scales moved over 8 batches: .*?</svg>', text, re.DOTALL)
    assert figure is not None
    assert len(re.findall(r"stroke: var\(--method-percentile,#c4530a\); stroke-width: 1.2", figure[0])) == 1
    assert all(f">{label}<" in figure[0] for label in ("entropy: 1", "mse: 0", "minmax: 0", "percentile 99.99: 0"))
    assert all(f">{label}<" in figure[0] for label in ("+30 %", "0", "-1 %", "2", "4", "8", "batches"))


def test_scales_that_have_settled_are_said_to(run: Path) -> None:
    """Of the delivered method."""
    _, page = _with_history(run, (256, 512, 1000), {"r2": (1.5, 1.001, 1.0)})

    assert "No scale has moved by more than 1 % over the last doubling, since batch 512 (entropy)." in page.text


def test_one_batch_draws_no_curve(run: Path) -> None:
    """There is nothing to compare it with, which is said; nor where no history was kept."""
    text, page = _with_history(run, (1,), {})
    assert "1 batch says nothing about whether the scales have settled; give more data." in page.text
    assert "How the scales moved" not in text

    Calibration.load(run / "calibration.npz").annotated(convergence={}).save(run / "calibration.npz")
    assert "Enough data?" not in _render(run)[1].text


def test_table_lists_every_tensor_where_only_some_are_drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the figures is said, and the table keeps all tensors."""
    monkeypatch.setattr(report, "PLOTTED_TENSORS", 1)
    text, page = _render(run)
    tensors = Calibration.load(run / "calibration.npz").tensors
    assert len(tensors) > 2
    assert f"Of {len(tensors)} tensors only the 1 on which the methods differ most are drawn" in page.text
    assert text.count("Histogram of the magnitudes of") == 1
    assert all(name in page.text for name in tensors)


def test_what_stays_float_is_shown_with_its_reason(rendered: tuple[str, _Page]) -> None:
    """Excluded nodes and nodes held back from FP16 are listed with the reason."""
    _, page = rendered
    assert "1 node stays float: head (Gemm), excluded: excluded by the expression 'head'" in page.text
    assert "2 of 3 weighted nodes compute on INT8" in page.text
    assert "nodes stay FP32, since their values could leave the range of FP16: second (Conv): calibration saw 7e4" in (
        page.text
    )


@pytest.mark.parametrize(
    ("mode", "heading", "held"),
    [
        ("dynamic", "cpu target, dynamic: 1 of 2 weighted nodes compute on INT8", "1 node stays float: conv (Conv)"),
        (
            "weight-only",
            "cpu target, weight-only: 1 of 2 weights are stored as INT8",
            "1 weight stays float: conv (Conv)",
        ),
    ],
)
def test_a_mode_without_pairs_is_named(mode: str, heading: str, held: str, run: Path) -> None:
    """It has a heading of its own and no empty tables, and is no calibration method that could come closest."""
    decisions = [
        {"node": "conv", "op_type": "Conv", "quantized": False, "rule": "needs-scales", "reason": "fixed scales"},
        {"node": "fc", "op_type": "Gemm", "quantized": True, "rule": mode, "reason": "stored as INT8"},
    ]
    model = {"name": f"INT8 {mode}, cpu", "file": f"modes/{mode}.onnx", "target": "cpu", "precision": "int8"}
    model |= {"mode": mode, "method": mode, "decisions": decisions, "pairs": [], "scales": {}, "notes": []}
    models = json.loads((run / "quantization.json").read_text())["models"]
    _edit(run, "quantization.json", models=[*models, model])
    accuracy = json.loads((run / "accuracy.json").read_text())["candidates"]
    _edit(run, "accuracy.json", candidates=[*accuracy, {**accuracy[-1], "name": model["name"], "sqnr_db": 99.5}])
    _, page = _render(run)

    assert heading in page.text
    assert held in page.text
    assert page.text.count("Every weighted node") == 3
    assert page.text.count("Every Q/DQ pair on an activation") == 2
    assert "99.5" in page.text
    assert "On the cpu target" in page.text
    assert f"On the cpu target {mode} comes closest" not in page.text


def test_smoothed_tensors_are_called_so(run: Path) -> None:
    """The models quantize them with other scales than the table's, which says so; other tensors are as they were."""
    name = Calibration.load(run / "calibration.npz").tensors[1]
    before = _render(run)[1].text
    _edit(run, "quantization.json", smoothed=[name])
    _, page = _render(run)

    assert "smoothed" not in before.lower()
    assert page.text.count("before smoothing") == 1
    assert page.text.count("cpu, tensorrt, smoothed") == 1
    assert "Smoothed tensors stand here as they were before" in page.text


def test_export_machine_and_reproduction_are_shown(rendered: tuple[str, _Page]) -> None:
    """The exporter's check, the machine, the configuration as YAML and the hashes are in the page."""
    _, page = rendered
    assert "image: float32 (batch, 3, 6, 6)" in page.text
    assert "1.25e-06".replace("-", "\N{MINUS SIGN}") in page.text
    assert "Some CPU" in page.text
    assert "onnxruntime 1.30" in page.text
    assert "tensorrt None" not in page.text
    assert "quantize: method: entropy percentile: 99.9" in page.text
    assert "ab" * 32 in page.text
    assert "2026-01-05 10:12 UTC" in page.text


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("benchmark.json", "Speed was not measured"),
        ("accuracy.json", "Accuracy was not measured"),
        ("sizes.json", "Sizes were not measured"),
        ("calibration.npz", "The thresholds are not known"),
        ("quantization.json", "Nothing was quantized"),
        ("export.json", "The export was not checked"),
    ],
)
def test_missing_part_is_said(run: Path, file: str, sentence: str) -> None:
    """Any file but the manifest may be missing; its section says so and the page stays whole."""
    (run / file).unlink()
    _, page = _render(run)
    assert f"{sentence}: this run holds no {file}." in page.text


def test_manifest_alone_gives_a_page(run: Path) -> None:
    """A run that has done nothing yet still has a page, with no figure in it."""
    for path in run.iterdir():
        if path.name != "manifest.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text, page = _render(run)
    assert "This run holds no INT8 model yet." in page.text
    assert "<svg" not in text


def test_no_labels_drop_the_columns_of_top1(run: Path) -> None:
    """Without labels the verdict speaks of agreement, and no column stays empty."""
    for row in json.loads((run / "accuracy.json").read_text())["candidates"]:
        _edit_candidate(run, "accuracy.json", row["name"], top1=None, top5=None)
    _edit(run, "accuracy.json", reference_scores={"samples": 1000, "top1": None}, labels=None)
    _, page = _render(run)
    assert "decides as FP32 does on 99.2 % of 1,000 samples" in page.text
    assert "top-1 %" not in page.text
    assert "Without labels: the models are compared with FP32's outputs" in page.text


def test_no_fp16_model_is_said(run: Path) -> None:
    """A run without FP16 has a sentence in its place."""
    _edit(run, "quantization.json", fp16=None)
    _, page = _render(run)
    assert "No FP16 model was made in this run." in page.text


def test_absent_keys_are_absent_figures(run: Path) -> None:
    """Rows with nothing but a name and a time render; what they lack is a dash."""
    _edit(run, "benchmark.json", candidates=[{"name": "FP32", "median_ms": 2.0}, {"name": "other", "median_ms": 1.0}])
    _edit(run, "accuracy.json", candidates=[{"name": "other"}], polygraphy=None)
    (run / "export.json").write_text("{}")
    _, page = _render(run)
    assert "INT8 (entropy) is 3.8x smaller than FP32." in page.text


def test_accuracy_on_the_calibration_data_is_called_flattering(run: Path) -> None:
    """A run without evaluation data says that its accuracy is that of the calibration data."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["data"]["evaluation"] = None
    (run / "manifest.json").write_text(json.dumps(manifest))
    _, page = _render(run)
    assert "Accuracy was judged on the calibration data, which flatters" in page.text


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """A folder without a manifest is named, and nothing is written to it."""
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        render_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{half", "[1, 2]"])
def test_damaged_result_is_refused_and_leaves_the_old_page(run: Path, content: str) -> None:
    """A result file that is no JSON object is named; the page of before stays."""
    (run / "report.html").write_text("the page of before")
    (run / "accuracy.json").write_text(content)
    with pytest.raises(ConfigError, match=r"accuracy\.json"):
        render_report(run)
    assert (run / "report.html").read_text() == "the page of before"


def test_figures_leave_matplotlib_as_it_was(run: Path, rendered: tuple[str, _Page]) -> None:
    """The settings of the user's own plots neither change nor show in the report."""
    import matplotlib as mpl

    with mpl.rc_context({"axes.linewidth": 5.0, "xtick.major.width": 4.0}):
        before = dict(mpl.rcParams)
        styled, _ = _render(run)
        assert dict(mpl.rcParams) == before
    assert styled == rendered[0]


def test_light_and_dark_page_have_every_colour() -> None:
    """Colours are CSS variables: a light one stands for its variable, so no two may be equal."""
    light = [colours[0] for colours in PALETTE.values()]
    assert len(set(light)) == len(light)
    figure = size_figure([SizeBar("FP32", {"FLOAT": 10, "rest": 2})], "sizes", "size")
    used = set(re.findall(r"var\(--([a-z0-9-]+),", figure))
    assert {"dtype-float", "dtype-rest", "plot-text"} <= used <= set(PALETTE)


def test_page_defines_every_colour_of_its_figures(rendered: tuple[str, _Page]) -> None:
    """Each variable that a figure uses has a light and a dark value in the style sheet."""
    text, _ = rendered
    for name in set(re.findall(r"var\(--([a-z0-9-]+)", text)):
        assert len(re.findall(rf"--{name}: #", text)) == 2, name


def test_names_in_figures_are_text() -> None:
    """A label with markup, mathematics or letters that matplotlib's font lacks is written as it is."""
    figure = size_figure([SizeBar("<i>$x$</i> 模型", {"FLOAT": 10, "rest": 2})], "a < b", "size")
    assert "&lt;i&gt;$x$&lt;/i&gt; 模型" in figure
    assert 'aria-label="a &lt; b"' in figure


def test_histogram_of_a_long_tail_shows_its_bulk() -> None:
    """A threshold far below the maximum makes the axis logarithmic: powers of ten, not one bar at the left edge."""
    counter = MagnitudeCounter()
    values = np.random.default_rng(0).lognormal(0, 1, 10_000).astype(np.float32)
    counter.update(np.append(values, np.float32(1e4)))
    figure = histogram_figure(
        counter.histogram(), {"minmax": 1e4, "percentile": 20.0}, dict.fromkeys(("minmax", "percentile"), "m"), "", "h"
    )
    assert ">10⁴<" in figure
    heights = [float(y) for _, y in re.findall(r"L ([\d.]+) ([\d.]+)", figure)]
    assert len({round(height) for height in heights}) > 30


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_round_positions_lie_within_the_limits(low: float, width: float) -> None:
    """Two to eight positions, ascending, evenly spaced, inside."""
    high = low + width
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    positions = round_positions(low, high)
    assert 2 <= len(positions) <= 8
    slack = 1e-6 * width + 1e-9 * abs(low)
    assert low - slack <= positions[0]
    assert positions[-1] <= high + slack
    steps = np.diff(positions)
    assert np.allclose(steps, steps[0], rtol=1e-3, atol=1e-9 * abs(low))


def test_clipped_share_counts_what_lies_above() -> None:
    """Of 0, 0, 1, -2, 4, 8 two lie above 3 in magnitude; none above the maximum."""
    counter = MagnitudeCounter()
    counter.update(np.array([0, 0, 1, -2, 4, 8], np.float32))
    histogram = counter.histogram()
    assert clipped_share(histogram, 3.0) == pytest.approx(2 / 6)
    assert clipped_share(histogram, 4.0) == pytest.approx(2 / 6)  # the bin that begins at 4 counts as above it
    assert clipped_share(histogram, 8.0) == 0.0


def test_tensor_rows_hold_the_calibrations_own_figures(run: Path) -> None:
    """Scale = threshold / 127 in float32; clipped shares agree with a count over the data."""
    calibration = Calibration.load(run / "calibration.npz")
    rows = tensor_rows(calibration, json.loads((run / "quantization.json").read_text()), 99.9)
    image = rows[0]
    values = np.abs(np.random.default_rng(1).laplace(0, 1, (24, 3, 6, 6)).astype(np.float32))
    assert (image.name, image.count) == ("image", values.size)
    for threshold in image.thresholds:
        assert threshold.scale == np.float32(threshold.amax / 127)
        assert threshold.clipped == pytest.approx(float((values > threshold.amax).mean()), abs=2 / values.size)
    limits = [threshold.amax for threshold in image.thresholds]
    assert image.spread == pytest.approx(max(limits) / min(limits))
    assert image.targets == ("cpu", "tensorrt")


def test_rows_are_joined_by_name_and_by_file() -> None:
    """Measurements may call a model by its file: they join the row that quantization knows by method and target."""
    quantization = {"models": [{"file": "methods/mse.onnx", "method": "mse", "target": "tensorrt"}], "fp16": None}
    accuracy = {"reference": "model.onnx", "candidates": [{"name": "mse.onnx", "samples": 10, "agreement": 90.0}]}
    sizes = {"models": [{"name": "model.onnx", "file_bytes": 100}, {"name": "methods/mse.onnx", "file_bytes": 30}]}
    reference, model = model_rows(quantization, None, accuracy, sizes)
    assert (reference.name, reference.precision, reference.reference) == ("model.onnx", "fp32", True)
    assert (model.name, model.precision) == ("INT8 mse, tensorrt", "int8")
    assert model.accuracy is not None
    assert model.accuracy.agreement == 90.0
    assert model.size is not None
    assert model.size.file_bytes == 30


def test_headline_is_the_delivered_model_that_was_timed() -> None:
    """The configured method decides, then auto; of its targets the one that was timed, or else the CPU's."""
    models = [
        {"file": f"{method}.{target}", "method": method, "target": target}
        for method in ("mse", "auto", "entropy")
        for target in ("tensorrt", "cpu")
    ]
    timed = {"reference": "FP32", "candidates": [{"name": "INT8 mse, tensorrt", "median_ms": 1.0}]}
    rows = model_rows({"models": models}, timed, None, None)
    chosen = [headline(rows, method) for method in ("mse", "entropy", None, "percentile")]
    assert [row.name for row in chosen if row is not None] == [
        "INT8 mse, tensorrt",
        "INT8 entropy, cpu",
        "INT8 auto, cpu",
        "INT8 auto, cpu",
    ]


def test_loss_beyond_chance_is_said() -> None:
    """5 points lost with 60 changed answers of 1000: chance explains 2 * sqrt(60) / 10 = 1.5 points."""
    quantization = {"models": [{"file": "m", "method": "mse", "target": "cpu"}]}
    row = {"name": "INT8 mse, cpu", "samples": 1000, "top1": 85.0, "agreement": 94.0}
    accuracy = {"reference": "FP32", "reference_scores": {"samples": 1000, "top1": 90.0}, "candidates": [row]}
    verdict = judge(model_rows(quantization, None, accuracy, None), "mse", own_evaluation=True)
    assert verdict.sentence == "INT8 (mse) loses 5.0 points of top-1 (90.0 to 85.0 %)."
    (remark,) = verdict.remarks
    assert remark.startswith("60 of 1,000 answers differ from FP32's; chance explains about 1.5 points of top-1, and")
    assert (verdict.tiles[0].value, verdict.tiles[0].tone) == ("\N{MINUS SIGN}5.0", "bad")


def test_unchanged_answers_are_said() -> None:
    """Where no answer differs there is nothing for chance to explain."""
    quantization = {"models": [{"file": "m", "method": "mse", "target": "cpu"}]}
    row = {"name": "INT8 mse, cpu", "samples": 540, "top1": 99.0, "agreement": 100.0}
    accuracy = {"reference": "FP32", "reference_scores": {"samples": 540, "top1": 99.0}, "candidates": [row]}
    verdict = judge(model_rows(quantization, None, accuracy, None), "mse", own_evaluation=True)
    assert verdict.sentence == "INT8 (mse) keeps its top-1 of 99.0 %."
    assert verdict.remarks == ("None of its 540 answers differs from FP32's.",)


def test_outputs_that_are_not_finite_are_said() -> None:
    """A model that gives NaN has no accuracy: the verdict says that instead."""
    quantization = {"models": [{"file": "m", "method": "mse", "target": "cpu"}]}
    row = {"name": "INT8 mse, cpu", "samples": 10, "top1": 10.0, "sqnr_db": None, "nonfinite": 7}
    rows = model_rows(quantization, None, {"reference": "FP32", "candidates": [row]}, None)
    assert judge(rows, "mse", own_evaluation=True).sentence == "INT8 (mse) gives 7 values that are NaN or infinite."


@given(st.floats(0, 1))
def test_percent_never_rounds_to_none_or_all(share: float) -> None:
    """Only an exact 0 is written as 0 %, only an exact 1 as 100 %; what is written is within 5 % of the share."""
    written = percent(share)
    assert (written == "0 %") == (share == 0)
    assert (written == "100 %") == (share == 1)
    assert float(written.removesuffix(" %")) == pytest.approx(100 * share, rel=0.06)


def test_numbers_are_written_for_reading() -> None:
    """A true minus, thousands apart, significant digits kept, dashes for what is not known."""
    assert fixed(-1234.567, 1) == "\N{MINUS SIGN}1,234.6"
    assert fixed(None, 2) == "\N{EN DASH}"
    assert significant(0.020787, 4) == "0.02079"
    assert significant(5.3, 4) == "5.300"
    assert significant(127.0, 3) == "127"
    assert significant(0.0) == "0"
    assert significant(math.inf) == "inf"
    assert [format_bytes(count) for count in (None, 35, 5_720, 344_178, 1_092_897)] == [
        "\N{EN DASH}", "35 B", "5.72 kB", "344 kB", "1.09 MB",
    ]  # fmt: skip
    assert moment("yesterday") == "yesterday"


def test_svg_needs_no_namespace() -> None:
    """The element is for an HTML page: no XML header and no addresses of standards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1], [1, 0], marker="o")
    text = inline_svg(figure, "p", "a line")
    assert text.startswith('<svg class="plot" role="img" aria-label="a line"')
    assert "xmlns" not in text
    assert "http" not in text
    assert re.findall(r' id="([^"]*)"', text)
    assert all(identifier.startswith("p-") for identifier in re.findall(r' id="([^"]*)"', text))
