"""How much memory a calibration takes, told before its first batch, and in how many passes that fits a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calibrators.counter import MOST_COUNTER_BYTES
from engines.activations import CARRIED_BYTES
from engines.graph import PreparedModel
from engines.histogram_kernel import COUNTER_BYTES
from engines.memory import activation_bytes, split_tensors, weight_bytes

_CODE_BYTES = 200 * 2**20
"""What the libraries that prepare graphs and compile loops take, where plain inference loads ONNX Runtime alone."""

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The passes of a calibration, and what the largest of them takes.

    Attributes:
        passes: the tensors of each pass.
        weights: bytes of weights in the graph.
        exposed: bytes of the activations that a batch hands out.
        unknown: number of tensors whose shape the graph does not tell; they are in none of the figures.
        workers: number of batches that are run at a time.
    """

    passes: tuple[tuple[str, ...], ...]
    weights: int
    exposed: int
    unknown: int
    workers: int

    def on_processor(self, *, histograms: bool) -> str:
        """Say the largest amount that one process takes beyond plain inference.

        Args:
            histograms: whether they are kept, and not ranges alone.
        """
        carried = max(CARRIED_BYTES, self.exposed)
        counters = self.workers * MOST_COUNTER_BYTES * self._most_tensors if histograms else 0
        total = _CODE_BYTES + self.weights + self.workers * (self.exposed + carried) + counters
        return (
            f"at most {total / _MIB:.0f} MiB above plain inference: {_CODE_BYTES / _MIB:.0f} of code + "
            f"{self.weights / _MIB:.1f} of weights in the graph + {self.workers} x ({self.exposed / _MIB:.1f} of "
            f"activations for batches like the first{self._unknown} + {carried / _MIB:.1f} between parts of the model) "
            f"+ {counters / _MIB:.1f} of histograms{self._several}"
        )

    def on_gpu(self) -> str:
        """Say what the memory of a GPU holds."""
        counters = COUNTER_BYTES * self._most_tensors
        return (
            f"plain inference ({self.weights / _MIB:.1f} MiB of weights) + {self.exposed / _MIB:.1f} MiB of "
            f"activations for batches like the first{self._unknown} + {counters / _MIB:.1f} MiB of histograms"
            f"{self._several}"
        )

    @property
    def _most_tensors(self) -> int:
        return max(map(len, self.passes))

    @property
    def _unknown(self) -> str:
        return f" + those of {self.unknown} tensors whose shape the graph does not tell" if self.unknown else ""

    @property
    def _several(self) -> str:
        return f"; in {len(self.passes)} passes over the data" if len(self.passes) > 1 else ""


def plan_memory(
    prepared: PreparedModel,
    tensors: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    workers: int,
    limit: int | None,
) -> MemoryPlan:
    """Share the tensors out over passes whose activations fit a limit.

    Args:
        prepared: the model.
        tensors: those to calibrate.
        shapes: model input to the shape of the first batch.
        workers: number of batches that are run at a time.
        limit: bytes that the activations of all these batches may take together; None for one pass.

    Raises:
        ModelError: one tensor alone exceeds the limit.
    """
    # What is fed takes no more memory by being counted.
    found = activation_bytes(prepared, tensors, shapes)
    sizes = {name: 0 if name in shapes else size for name, size in found.items()}
    passes = [list(tensors)] if limit is None else split_tensors(sizes, limit // workers)
    return MemoryPlan(
        tuple(map(tuple, passes)),
        weight_bytes(prepared),
        max(sum(sizes[name] or 0 for name in names) for names in passes),
        sum(size is None for size in sizes.values()),
        workers,
    )
