"""One calibration in a process of its own, so that its peak memory is its own; prints a line of JSON.

    python benchmarks/calibration_peers.py MODEL.onnx NAME METHOD BATCHES THREADS [memory]

METHOD is "plain" (no calibration), "ours", "ours-minmax", "ort-minmax", "ort-entropy", "ort-percentile", "modelopt-max"
or "modelopt-entropy". With "memory" nothing but the peak of memory is measured. Else plain inference of the same
batches, in both arrangements, is timed before and after a second calibration; of either the faster one counts.
Peers run with their own defaults, ModelOpt at its lowest: of its call only collecting and searching are counted.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import calibration_models
import numpy as np
import onnxruntime

PEERS = ("ort-minmax", "ort-entropy", "ort-percentile", "modelopt-max", "modelopt-entropy")

Feeds = Mapping[str, Any]


class Reader:
    """Batches for ONNX Runtime's calibrators."""

    def __init__(self, data: Sequence[Feeds]) -> None:
        self._data: Iterator[Feeds] = iter(data)

    def get_next(self) -> Feeds | None:
        """Return the next batch; None at the end."""
        return next(self._data, None)


class Plain:
    """Plain inference in its two arrangements."""

    def __init__(self, model: Path, threads: int) -> None:
        self.whole, self.single = (_session(model, count) for count in (threads, 1))
        self.threads = threads

    def seconds(self, data: Sequence[Feeds]) -> float:
        """Return the time of the faster arrangement."""
        return min(
            _seconds(lambda: self._in_turn(data)), _seconds(lambda: run_in_threads(self.single, data, self.threads))
        )

    def _in_turn(self, data: Sequence[Feeds]) -> None:
        for feeds in data:
            self.whole.run(None, dict(feeds))


def main() -> None:
    """Measure one method."""
    model, name, method, batches, threads = (
        Path(sys.argv[1]),
        sys.argv[2],
        sys.argv[3],
        int(sys.argv[4]),
        int(sys.argv[5]),
    )
    data = list(calibration_models.batches(name, batches))
    found: dict[str, float] = {}
    if method == "plain":
        session = _session(model, threads)
        for feeds in data:
            session.run(None, dict(feeds))
    else:
        found = _calibrate(model, name, method, data, threads)
    found["peak_mib"] = peak_mib()
    if method != "plain" and "memory" not in sys.argv[6:]:
        plain = Plain(model, threads)
        plain.seconds(data[:2])
        before = plain.seconds(data)
        again = _calibrate(model, name, method, data, threads)
        found |= {what: min(found[what], again[what]) for what in again}
        found["plain_s"] = min(before, plain.seconds(data))
    print(json.dumps(found))


def run_in_threads(session: onnxruntime.InferenceSession, data: Sequence[Feeds], threads: int) -> None:
    """Run the model on all batches, several at a time."""
    batches, lock = iter(data), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                feeds = next(batches, None)
            if feeds is None:
                return
            session.run(None, dict(feeds))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def peak_mib() -> float:
    """Return the peak of this process's memory; `getrusage` tells the parent's where that was larger."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def _session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    from engines.onnxrt import make_session

    return make_session(model, execution="native", threads=threads)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _calibrate(model: Path, name: str, method: str, data: Sequence[Feeds], threads: int) -> dict[str, float]:
    """Return the seconds of setting up, collecting and searching."""
    if method.startswith("ours"):
        return _ours(model, data, threads, minmax=method == "ours-minmax")
    if method.startswith("ort-"):
        return _onnxruntime(model, method.removeprefix("ort-"), data)
    return _modelopt(model, name, method.removeprefix("modelopt-"), data)


def _ours(model: Path, data: Sequence[Feeds], threads: int, *, minmax: bool) -> dict[str, float]:
    from calibration import Batch

    from calibrators.calibration import Calibration, Fingerprint
    from calibrators.collector import collect
    from engines.activations import OnnxRuntimeActivations
    from engines.calibrated_tensors import tensors_to_calibrate
    from engines.graph import prepare

    started = time.perf_counter()
    prepared = prepare(model)
    batches = [Batch(dict(feeds)) for feeds in data]
    source = OnnxRuntimeActivations(prepared, tensors_to_calibrate(prepared), batches, threads=threads)
    opened = time.perf_counter()
    found = collect(source, total=len(batches), statistics="minmax" if minmax else "histogram")
    collected = time.perf_counter()
    fingerprint = Fingerprint("", "", ("",), "", "", found.batches, found.samples)
    calibration = Calibration(found.ranges or found.histograms, fingerprint)
    calibration.amax("minmax" if minmax else "entropy")
    searched = time.perf_counter()
    return {"setup_s": opened - started, "collect_s": collected - opened, "search_s": searched - collected}


def _onnxruntime(model: Path, method: str, data: Sequence[Feeds]) -> dict[str, float]:
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    kind = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }[method]
    options = {} if method == "percentile" else {"symmetric": True}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        calibrator: Any = create_calibrator(
            str(model),
            sorted({*QDQRegistry, *QLinearOpsRegistry}),
            f"{folder}/exposed.onnx",
            kind,
            extra_options=options,
        )
        opened = time.perf_counter()
        calibrator.collect_data(Reader(data))
        collected = time.perf_counter()
        calibrator.compute_data()
        searched = time.perf_counter()
    return {"setup_s": opened - started, "collect_s": collected - opened, "search_s": searched - collected}


def _modelopt(model: Path, name: str, method: str, data: Sequence[Feeds]) -> dict[str, float]:
    warnings.filterwarnings("ignore")
    import modelopt.onnx.quantization.ort_patching as patching
    import onnxruntime.quantization.calibrate as calibrate
    from modelopt.onnx.quantization import quantize

    spent = {"collect_s": 0.0, "search_s": 0.0}

    def timed(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[what] += time.perf_counter() - started

        return call

    places = [
        (patching, "_collect_data_histogram_calibrator", "collect_s"),
        (patching, "_collect_data_minmax_calibrator", "collect_s"),
        (calibrate.HistogramCalibrater, "compute_data", "search_s"),
    ]
    originals = [getattr(place, attribute) for place, attribute, _ in places]
    entry = "ids" if name == "bert" else "image"
    joined = {entry: np.concatenate([feeds[entry] for feeds in data])}
    started = time.perf_counter()
    try:
        for place, attribute, what in places:
            setattr(place, attribute, timed(getattr(place, attribute), what))
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            copy = Path(folder) / "model.onnx"
            copy.write_bytes(model.read_bytes())
            quantize(
                str(copy),
                quantize_mode="int8",
                calibration_data=joined,
                calibration_method=method,
                calibration_eps=["cpu"],
                output_path=f"{folder}/int8.onnx",
                high_precision_dtype="fp32",
                log_level="ERROR",
            )
    finally:
        for (place, attribute, _), original in zip(places, originals, strict=True):
            setattr(place, attribute, original)
    return {**spent, "setup_s": time.perf_counter() - started - sum(spent.values())}


if __name__ == "__main__":
    main()
