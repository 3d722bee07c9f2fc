"""What speaks against trusting the figures of a benchmark, one sentence each; the rules for engines are trtexec's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from calibrators.protocols import Batch
from trt_int8.gpu_timing import GpuFigures
from trt_int8.stopwatch import Times
from trt_int8.timing import Speedup, disagree, time_ratio

STEADY_CV_PERCENT = 2.5
"""Above this spread trtexec warns of unstable clocks."""

ENQUEUE_BOUND = 0.8
"""From this part of the compute time on, queueing a run holds the GPU up."""

STEADY_CLOCK_PERCENT = 3.0
"""A clock that moves further than that, highest less lowest in per cent of the median, was not held."""


def spread_warnings(names: Sequence[str], times: Sequence[Times]) -> Iterator[str]:
    """Warn where median times wander from round to round; single late calls are the percentiles' business.

    Args:
        names: of the candidates.
        times: of each, shape (rounds, iterations of a turn).
    """
    medians = [np.median(turns, axis=1) for turns in times]
    spreads = [100 * float(values.std() / values.mean()) for values in medians]
    unsteady = [
        f"{name} by {spread:.1f} %" for name, spread in zip(names, spreads, strict=True) if spread > STEADY_CV_PERCENT
    ]
    if unsteady:
        yield (
            f"median times varied from round to round: {', '.join(unsteady)} (coefficient of variation; steady clocks "
            f"stay within {STEADY_CV_PERCENT} %): other work or changing clocks on this machine. "
            "Trust the ratios and their intervals, not the milliseconds"
        )


def median_warnings(names: Sequence[str], times: Sequence[Times], speedups: Sequence[Speedup]) -> Iterator[str]:
    """Warn where medians tell of another speed-up than all the time taken; see `trt_int8.timing.with_all_time`.

    Args:
        names: of the candidates, the reference first.
        times: of each, shape (rounds, iterations of a turn).
        speedups: of each.
    """
    for name, found, speedup in zip(names[1:], times[1:], speedups[1:], strict=True):
        whole = time_ratio(times[0], found)
        if disagree(speedup, whole):
            yield (
                f"{name}: the medians give {speedup.ratio:.2f}x and all the time taken {whole:.2f}x: other work on "
                "this machine falls into the longer inferences more often. The interval spans both; time them again "
                "when the machine is idle"
            )


def engine_warnings(name: str, gpu: GpuFigures) -> Iterator[str]:
    """Warn of an engine whose times are not those of its kernels alone, or not steady.

    Args:
        name: of the engine.
        gpu: its figures.
    """
    compute = gpu.compute_ms
    if gpu.enqueue_ms > ENQUEUE_BOUND * compute:
        remedy = "a larger batch" if gpu.cuda_graph else "a CUDA graph or a larger batch"
        yield (
            f"{name} is bound by the host: queueing a run takes {gpu.enqueue_ms:.3f} ms, computing it {compute:.3f} "
            f"ms. Its time is not its kernels' alone; use {remedy}"
        )
    for what, took in (("inputs", gpu.h2d_ms), ("outputs", gpu.d2h_ms)):
        if took >= compute:
            yield (
                f"{name} is bound by transfers: copying its {what} takes {took:.3f} ms, computing {compute:.3f} ms. "
                "A service gains from faster kernels only if it overlaps the copies or keeps its data on the GPU"
            )
    if gpu.compute_cv_percent > STEADY_CV_PERCENT:
        yield (
            f"the compute times of {name} vary by {gpu.compute_cv_percent:.1f} % (coefficient of variation; steady "
            f"clocks stay within {STEADY_CV_PERCENT} %): lock the clocks with `nvidia-smi -lgc`, and see that nobody "
            "else uses the GPU"
        )


def clock_warnings(figures: Sequence[GpuFigures]) -> Iterator[str]:
    """Warn of a clock that moved while the engines ran.

    Args:
        figures: of all engines.
    """
    spans = [gpu.clock_sm_mhz for gpu in figures if gpu.clock_sm_mhz is not None]
    if not spans:
        return
    low, high = min(span[0] for span in spans), max(span[2] for span in spans)
    median = round(float(np.median([span[1] for span in spans])))
    if 100 * (high - low) > STEADY_CLOCK_PERCENT * median:
        yield (
            f"the GPU's clock moved between {low} and {high} MHz during the runs: lock it with "
            f"`nvidia-smi -lgc {low},{low}`, or trust the ratios and their intervals, not the milliseconds"
        )


def shape_warnings(
    name: str, profiles: Sequence[Mapping[str, Sequence[tuple[int, ...]]]], feeds: Batch
) -> Iterator[str]:
    """Warn of an engine whose kernels were chosen for other shapes than it is timed at.

    Args:
        name: of the engine.
        profiles: its optimization profiles: input name to smallest, optimal and largest shape.
        feeds: the batch that it is fed.
    """

    def differing(profile: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
        return {key: shapes[1] for key, shapes in profile.items() if feeds[key].shape != shapes[1]}

    differences = [differing(profile) for profile in profiles]
    if differences and all(differences):
        key, optimum = next(iter(differences[0].items()))
        yield (
            f"{name} is timed at {feeds[key].shape} for {key!r}, and its kernels were chosen for {optimum}: give "
            "batches of that shape (--batch-size), or build the engine for these"
        )
