"""What calibration costs, as a ratio to plain inference of the same batches, beside ONNX Runtime's and ModelOpt's.

    python benchmarks/calibration.py [--models resnet50 mobilenetv2 bert] [--rounds 5] [--threads 2] [--output FILE.md]

Plain inference is ONNX Runtime on the FP32 model as exported, nothing collected, in two arrangements: one session of
all threads, and one worker of one thread for each. The faster one is 1.0. Rounds are interleaved: on a shared machine
only figures of the same minute can be compared. Set-up (preparing the graph, making sessions) is listed and not in the
ratios. CPU time counts what the process used, other jobs on the machine left out; the table gives both.

Peers run in processes of their own (`calibration_peers.py`) on fewer batches, twice as many the second time, which
shows how their memory grows. ModelOpt is left out where it cannot be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import calibration_models
import onnxruntime
from calibration_peers import PEERS, run_in_threads

from calibrators.calibration import SEARCHES, Calibration, Fingerprint
from calibrators.collector import ActivationStatistics, collect
from engines.activations import OnnxRuntimeActivations
from engines.calibrated_tensors import tensors_to_calibrate
from engines.graph import prepare
from engines.onnxrt import make_session
from trt_int8.machine import read_machine

BATCHES = {"resnet50": 288, "mobilenetv2": 1000, "bert": 500}
"""Batches of a round: what a calibration does once, such as adding up the histograms of its threads, and waiting for
the last of them, is to weigh about as little as with the 1000 batches of a usual one."""

PEER_BATCHES = {"resnet50": 6, "mobilenetv2": 24, "bert": 12}
"""Batches of a peer, which takes ten to forty times as long; and then twice as many, for its memory."""

MEMORY_BATCHES = (50, 1000)


@dataclass(frozen=True, slots=True)
class Batch:
    """One sample, as the collector takes it."""

    feeds: dict[str, Any]
    samples: int = 1


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that one round of a variant took."""

    wall: float
    cpu: float


def main() -> None:
    """Run the benchmark, print its tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=calibration_models.MODELS, choices=calibration_models.MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--output", type=Path, help="a Markdown file for the tables")
    options = parser.parse_args()
    out = Output([])
    with tempfile.TemporaryDirectory() as folder:
        cpu = read_machine().cpu
        out.say("# What calibration costs\n")
        out.say(
            f"{cpu.model}, {cpu.cores_usable} of {cpu.cores_logical} cores, {', '.join(cpu.features)}; "
            f"ONNX Runtime {onnxruntime.__version__}, {options.threads} threads; load of the machine before "
            f"{os.getloadavg()[0]:.1f}. Made by `python benchmarks/calibration.py --rounds {options.rounds}`; ratios "
            "are to plain inference of the same batches in its faster arrangement, median of the rounds (lowest to "
            "highest).\n"
        )
        out.say("| model | variant | wall ms/batch | ratio | CPU ratio |\n|---|---|---|---|---|")
        notes = [measure(name, Path(folder), options.rounds, options.threads, out) for name in options.models]
        out.say("\n" + "\n".join(f"- {note}" for note in notes))
        if not options.no_peers:
            compare(options.models, Path(folder), options.threads, out)
        peaks = [peak_memory(Path(folder), batches) for batches in MEMORY_BATCHES]
    change = 100 * (peaks[1] / peaks[0] - 1)
    out.say(
        f"\nPeak memory of a small model: {peaks[0]:.1f} MiB with {MEMORY_BATCHES[0]} batches, {peaks[1]:.1f} MiB with "
        f"{MEMORY_BATCHES[1]} ({change:+.1f} %); load of the machine at the end {os.getloadavg()[0]:.1f}"
    )
    if options.output is not None:
        options.output.write_text("\n".join(out.lines) + "\n")


@dataclass(frozen=True, slots=True)
class Output:
    """Prints lines, and keeps them."""

    lines: list[str]

    def say(self, line: str) -> None:
        """Print a line."""
        self.lines.append(line)
        print(line, flush=True)


def compare(models: Sequence[str], folder: Path, threads: int, out: Output) -> None:
    """Run ours and the peers in processes of their own."""
    methods = ["ours", "ours-minmax", *PEERS]
    if importlib.util.find_spec("modelopt") is None:
        methods = [method for method in methods if not method.startswith("modelopt")]
        out.say("\nModelOpt is not installed and is left out.")
    out.say(
        "\n| model | calibrator | collecting / plain | searching / plain | set-up s | peak MiB | MiB a batch more |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name in models:
        count = PEER_BATCHES[name]
        plain = _in_process(folder / f"{name}.onnx", name, "plain", str(2 * count), str(threads))
        out.say(f"| {name} | none: plain inference | | | | {plain['peak_mib']:.0f} | |")
        for method in methods:
            file = folder / f"{name}.onnx"
            first = _in_process(file, name, method, str(count), str(threads), "memory")
            second = _in_process(file, name, method, str(2 * count), str(threads))
            growth = (second["peak_mib"] - first["peak_mib"]) / count
            out.say(
                f"| {name} | {method} | {second['collect_s'] / second['plain_s']:.2f} | "
                f"{second['search_s'] / second['plain_s']:.2f} | {second['setup_s']:.1f} | {second['peak_mib']:.0f} | "
                f"{growth:.1f} |"
            )


def _in_process(model: Path, *arguments: str) -> dict[str, float]:
    script = Path(__file__).with_name("calibration_peers.py")
    command = [sys.executable, str(script), str(model), *arguments]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found: dict[str, float] = json.loads(lines[-1])
    return found


def measure(name: str, folder: Path, rounds: int, threads: int, out: Output) -> str:
    """Print the rows of one model; return a line on its set-up and its threshold searches."""
    file = folder / f"{name}.onnx"
    calibration_models.build(name, file)
    feeds = list(calibration_models.batches(name, BATCHES[name]))
    data = [Batch(dict(found)) for found in feeds]
    started = time.perf_counter()
    prepared = prepare(file)
    preparing = time.perf_counter() - started
    whole = make_session(file, execution="native", threads=threads)
    single = make_session(file, execution="native", threads=1)
    tensors = tensors_to_calibrate(prepared)
    fewer = tensors_to_calibrate(prepared, "tensorrt")
    started = time.perf_counter()
    both = OnnxRuntimeActivations(prepared, tensors, data, threads=threads)
    opening = time.perf_counter() - started
    one = OnnxRuntimeActivations(prepared, fewer, data, threads=threads)

    def plain() -> None:
        for batch in data:
            whole.run(None, batch.feeds)

    variants: dict[str, Callable[[], object]] = {
        f"plain, 1 x {threads} threads": plain,
        f"plain, {threads} x 1 thread": lambda: run_in_threads(single, feeds, threads),
        f"calibrate, {len(tensors)} tensors": lambda: collect(both, total=len(data)),
        f"calibrate --tensors tensorrt, {len(fewer)}": lambda: collect(one, total=len(data)),
        f"ranges alone, {len(tensors)} tensors": lambda: collect(both, total=len(data), statistics="minmax"),
        f"ranges alone, --tensors tensorrt, {len(fewer)}": lambda: collect(one, total=len(data), statistics="minmax"),
    }
    times: dict[str, list[Times]] = {variant: [] for variant in variants}
    for run in variants.values():
        run()
    for number in range(rounds):
        order = list(variants.items())
        for variant, run in order if number % 2 == 0 else reversed(order):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[variant].append(Times(time.perf_counter() - wall, time.process_time() - cpu))
    base = min(list(times)[:2], key=lambda variant: statistics.median(found.wall for found in times[variant]))
    for variant, found in times.items():
        pairs = list(zip(found, times[base], strict=True))
        ratios = [mine.wall / plain_time.wall for mine, plain_time in pairs]
        cpu = statistics.median(mine.cpu / plain_time.cpu for mine, plain_time in pairs)
        wall = 1e3 * statistics.median(mine.wall for mine in found) / len(data)
        out.say(
            f"| {name} | {variant} | {wall:.1f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {cpu:.2f} |"
        )
    return f"{name}: graph prepared in {preparing:.1f} s, sessions in {opening:.1f} s; {searches(collect(both))}"


def searches(found: ActivationStatistics) -> str:
    """Say how long each threshold search takes over all tensors."""
    fingerprint = Fingerprint("", "", ("",), "", "", found.batches, found.samples)
    parts, total = [], 0.0
    for method in SEARCHES:
        best = float("inf")
        for _ in range(4):
            calibration = Calibration(found.histograms, fingerprint)
            started = time.perf_counter()
            calibration.amax(method)
            best = min(best, time.perf_counter() - started)
        total += best
        parts.append(f"{method} {1e3 * best / len(calibration.tensors):.2f}")
    return f"searches: {', '.join(parts)} ms a tensor, {1e3 * total:.0f} ms for all methods and tensors"


_CALIBRATION = """
import pathlib, re, sys
import numpy as np
from trt_int8 import calibrate

random = np.random.default_rng(0)
calibrate(sys.argv[1], (
    {"image": random.normal(size=(1, 3, 64, 64)).astype(np.float32)} for _ in range(int(sys.argv[2]))
), threads=2)
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def peak_memory(folder: Path, batches: int) -> float:
    """Calibrate a small model in a process of its own and return the peak of its memory, in MiB.

    The peak that `getrusage` tells is that of the parent process where this had a larger one.
    """
    file = folder / "small.onnx"
    calibration_models.build("small", file)
    command = [sys.executable, "-c", _CALIBRATION, str(file), str(batches)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


if __name__ == "__main__":
    main()
