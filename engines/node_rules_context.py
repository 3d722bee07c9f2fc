"""What the rules about weighted nodes see: one graph, and the options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from engines.node_facts import is_embedding
from engines.node_rules_detection import detection_heads
from engines.placement import Target
from engines.placement_options import Attention


@dataclass(frozen=True)
class NodeContext:
    """One graph as the rules see it. What is derived from it is computed once, in time linear in its size.

    Attributes:
        model: a prepared model; it is not changed.
        target: whose kernels.
        attention: whether products of two activations may be quantized.
        amax: largest magnitude that calibration saw, by tensor name; empty where nothing is known.
    """

    model: ir.Model
    target: Target
    attention: Attention
    amax: Mapping[str, float]

    @cached_property
    def nodes(self) -> list[ir.Node]:
        """The nodes of the main graph, producers before consumers."""
        return list(self.model.graph)

    @cached_property
    def tables(self) -> Mapping[str, str]:
        """Names of the constants that a Gather looks up in, and the name of the first such Gather."""
        found: dict[str, str] = {}
        for node in self.nodes:
            if is_embedding(node):
                value = node.inputs[0]
                if value is not None and value.name is not None:
                    found.setdefault(value.name, node.name or "")
        return found

    @cached_property
    def detection_heads(self) -> Mapping[str, str]:
        """The last convolutions of a detector, by name, and why they are taken for that."""
        return detection_heads(self.nodes, self.amax)
