"""INT8 on the CPU beside FP32, ONNX Runtime's own quantizers and ModelOpt: speed, exactness, and what stays float.

    python benchmarks/int8_cpu.py [--models resnet50 mobilenetv2 bert] [--threads 1 2] [--seconds 25]
                                  [--modelopt-python PYTHON] [--output docs/int8-cpu.md]

All variants of a model take turns in one run (`trt_int8.benchmarking`), and ratios are taken within a round. They are
calibrated by the maximum on the same batches; SQNR is of the output on others. Operators are counted in the graph that
ONNX Runtime makes of each file: a Conv that is left there is computed in float.

Speed depends on the processor: with VNNI or AMX one instruction multiplies four times as many 8-bit numbers as 32-bit
ones, without them products saturate in pairs, so that weights get 7 bits, and INT8 gains less. Exit status 1: one of
our models keeps a convolution in float, or more Q/DQ than the best of ONNX Runtime's own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import calibration_models
import numpy as np
import onnx
import onnxruntime
from modelopt_runs import HOW_TO_INSTALL, Job, is_there, quantize_all
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from calibrators.files import write_text
from engines.graph import prepare, save_model
from engines.onnxrt import OnnxRuntimeRunner
from trt_int8.benchmark_result import BenchmarkResult
from trt_int8.benchmarking import time_side_by_side
from trt_int8.calibration import calibrate
from trt_int8.machine import read_machine, saturates_unsigned_products
from trt_int8.quantization import quantize

CALIBRATION_BATCHES = 8
HELD_BACK = 16

OURS = ("trt-int8 static", "trt-int8 dynamic")
FLOAT_WEIGHTED = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")

Feeds = Mapping[str, NDArray[Any]]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands batches to ONNX Runtime's calibrators."""

    def __init__(self, batches: Sequence[Feeds]) -> None:
        self._left = iter(batches)

    def get_next(self) -> Feeds | None:
        """Return the next batch, or None at the end."""
        return next(self._left, None)


@dataclass(frozen=True, slots=True)
class Variant:
    """A quantized model.

    Attributes:
        name: of the way in which it was made.
        operators: what ONNX Runtime executes, by operator.
        sqnr_db: of the output against FP32.
    """

    name: str
    operators: Counter[str]
    sqnr_db: float

    @property
    def floats(self) -> int:
        """Number of weighted operators, attention products among them, that are computed in float."""
        return sum(self.operators[kind] for kind in FLOAT_WEIGHTED)

    @property
    def conversions(self) -> int:
        """Number of QuantizeLinear and DequantizeLinear that are left."""
        return self.operators["QuantizeLinear"] + self.operators["DequantizeLinear"]


def main() -> int:
    """Measure, print or write the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=calibration_models.MODELS, choices=calibration_models.MODELS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=25.0, help="of each model and number of threads")
    parser.add_argument(
        "--modelopt-python", default=sys.executable, metavar="PYTHON", help="an interpreter that has it"
    )
    parser.add_argument("--output", type=Path, help="Markdown file for the tables; without it they are printed")
    options = parser.parse_args()
    modelopt = options.modelopt_python if is_there(options.modelopt_python) else None
    if modelopt is None:
        print(f"Without ModelOpt's models: {options.modelopt_python}: {HOW_TO_INSTALL}", file=sys.stderr)
    lines, faults = _head(), []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            variants = _made(name, Path(folder), modelopt)
            files = {variant.name: Path(folder) / f"{variant.name}.onnx" for variant in variants}
            timed = {}
            for threads in options.threads:
                runners = [
                    OnnxRuntimeRunner(file, name=variant, execution="native", threads=threads)
                    for variant, file in files.items()
                ]
                feeds = list(calibration_models.batches(name, CALIBRATION_BATCHES))
                timed[threads] = time_side_by_side(runners, feeds, budget_s=options.seconds)
        lines += [f"## {TITLES[name]}", "", *_table(variants, timed), ""]
        faults += [f"{name}: {fault}" for fault in _faults(variants)]
    text = "\n".join(lines)
    if options.output is None:
        print(text)
    else:
        write_text(options.output, text)
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


TITLES = {
    "resnet50": "ResNet-50, 224 x 224",
    "mobilenetv2": "MobileNetV2, 224 x 224",
    "bert": "BERT-like encoder, 6 layers of 384, 128 tokens",
}


def _head() -> list[str]:
    cpu = read_machine().cpu
    wide = not saturates_unsigned_products()
    remark = (
        "This processor multiplies 8-bit numbers with VNNI or AMX."
        if wide
        else "This processor has neither VNNI nor AMX, so these are not the figures to expect of one that does: 8-bit "
        "products saturate in pairs here, weights get 7 bits where they could, and ONNX Runtime gains less over FP32."
    )
    machine = (
        f"{cpu.model}, {cpu.cores_usable} of {cpu.cores_logical} cores, {', '.join(cpu.features)}; ONNX Runtime "
        f"{onnxruntime.__version__}; batch 1, random weights, calibrated by the maximum on {CALIBRATION_BATCHES} "
        f"batches. Load of the machine over 15 minutes when this began: {os.getloadavg()[2]:.1f}, so trust the ratios "
        "more than the milliseconds."
    )
    return ["# INT8 on the CPU", "", machine, remark, "", *INTRODUCTION.splitlines(), ""]


INTRODUCTION = """Speed-up against FP32 with its 95 % interval, all variants taking turns in one run of

```bash
python benchmarks/int8_cpu.py --modelopt-python PYTHON   # one that has ModelOpt; without it: make bench-int8
```

Q and DQ: QuantizeLinear and DequantizeLinear that are left after ONNX Runtime's optimizations. Float: convolutions and
matrix products that are left in float, among them the 12 products of two activations of the encoder.
SQNR of the output against FP32: it compares the variants, and says nothing about trained models."""


def _made(name: str, folder: Path, modelopt: str | None) -> list[Variant]:
    """Write all variants of a model into a folder, and look at them."""
    source = folder / "FP32.onnx"
    calibration_models.build(name, source)
    batches = list(calibration_models.batches(name, CALIBRATION_BATCHES + HELD_BACK))
    calibration_batches, held_back = batches[:CALIBRATION_BATCHES], batches[CALIBRATION_BATCHES:]
    for write in (_ours, _of_onnxruntime):
        write(name, source, calibration_batches, folder)
    if modelopt is not None:
        prepared = folder / "prepared" / "model.onnx"
        prepared.parent.mkdir()
        graph = prepare(source)
        save_model(graph.proto, prepared)
        output = folder / "ModelOpt.onnx"
        fault = quantize_all(modelopt, [Job(prepared, calibration_batches, output)], prepared.parent).faults[output]
        if fault is not None:
            print(f"{name}: ModelOpt wrote nothing: {fault}", file=sys.stderr)
    reference = _answers(source, held_back)
    files = [source, *sorted(folder.glob("*.onnx"), key=lambda file: file.stat().st_mtime_ns)]
    return [
        Variant(file.stem, _executed(file), _sqnr_db(reference, _answers(file, held_back)))
        for file in dict.fromkeys(files)
    ]


def _ours(name: str, source: Path, batches: Sequence[Feeds], folder: Path) -> None:
    calibration = calibrate(source, batches)
    quantize(source, calibration, output=folder / f"{OURS[0]}.onnx", target="cpu", method="minmax")
    if name == "bert":  # dynamic quantization serves matrix products alone
        quantize(source, output=folder / f"{OURS[1]}.onnx", target="cpu", mode="dynamic")


def _of_onnxruntime(name: str, source: Path, batches: Sequence[Feeds], folder: Path) -> None:
    """Quantize with ONNX Runtime's own tools, in the configurations that its documentation gives for x86."""
    reduced = saturates_unsigned_products()
    with _quiet():
        scratch = folder / "scratch"
        scratch.mkdir()
        processed = scratch / "processed.onnx"
        quant_pre_process(source, processed, skip_symbolic_shape=True)
        for title, form in (("QDQ", QuantFormat.QDQ), ("QOperator", QuantFormat.QOperator)):
            quantize_static(
                processed, folder / f"ONNX Runtime {title} U8S8.onnx", Reader(batches), quant_format=form,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True, reduce_range=reduced,
                op_types_to_quantize=["MatMul", "Gemm"] if name == "bert" else None,
            )  # fmt: skip
        if name == "bert":
            quantize_dynamic(
                processed, folder / "ONNX Runtime dynamic.onnx", weight_type=QuantType.QInt8, per_channel=True,
                reduce_range=reduced,
            )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _executed(file: Path) -> Counter[str]:
    """Count the operators of the graph that ONNX Runtime makes of a file."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def _answers(file: Path, batches: Sequence[Feeds]) -> NDArray[np.float64]:
    with OnnxRuntimeRunner(file, execution="native") as runner:
        return np.concatenate([next(iter(runner.infer(feeds).values())) for feeds in batches]).astype(np.float64)


def _sqnr_db(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> float:
    noise = float(np.sum((reference - candidate) ** 2))
    return float("inf") if noise == 0 else 10 * float(np.log10(np.sum(reference**2) / noise))


def _table(variants: Sequence[Variant], timed: Mapping[int, BenchmarkResult]) -> list[str]:
    speeds = [f"{count} thread{'' if count == 1 else 's'}: ms | speed-up" for count in timed]
    head = f"| variant | {' | '.join(speeds)} | SQNR dB | float | Q | DQ |"
    rows = []
    for index, variant in enumerate(variants):
        cells = []
        for result in timed.values():
            found = result.candidates[index]
            ratio = found.speedup
            cells += [f"{found.latency.median_ms:.1f}", f"{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"]
        counted = [variant.floats, variant.operators["QuantizeLinear"], variant.operators["DequantizeLinear"]]
        exactness = "" if index == 0 else f"{variant.sqnr_db:.1f}"
        rows.append(f"| {variant.name} | {' | '.join(cells)} | {exactness} | {' | '.join(map(str, counted))} |")
    return [head, f"|---|{'---:|' * (head.count('|') - 2)}", *rows]


def _faults(variants: Sequence[Variant]) -> Iterator[str]:
    """Say what our static model lacks that can be checked on any processor."""
    ours = next(variant for variant in variants if variant.name == OURS[0])
    peers = [
        variant.conversions
        for variant in variants
        if variant.name.startswith("ONNX Runtime") and "U8S8" in variant.name
    ]
    convolutions = ours.operators["Conv"] + ours.operators["FusedConv"]
    if convolutions:
        yield f"{convolutions} convolutions are left in float"
    if ours.conversions > min(peers):
        yield f"{ours.conversions} Q and DQ are left, and {min(peers)} in the best of ONNX Runtime's own"


if __name__ == "__main__":
    sys.exit(main())
