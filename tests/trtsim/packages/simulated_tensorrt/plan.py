"""Plan files: what a build writes and a runtime reads. SIMULATED; no TensorRT reads them."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from simulated_tensorrt.abi import VERSION, Logger, Simulated
from simulated_tensorrt.graph import FLOAT, INT8, Graph

START = b"SIMULATED TensorRT plan\n"


class PlanError(Exception):
    """Why a plan cannot be read."""


class HostMemory(Simulated):
    interface = "IHostMemory"

    def __init__(self, logger: Logger, content: bytes) -> None:
        super().__init__(logger)
        self.content = ctypes.create_string_buffer(content, len(content))

    def data(self) -> int:
        return ctypes.addressof(self.content)

    def size(self) -> int:
        return len(self.content)

    def type(self) -> int:
        return INT8


def io_tensors(graph: Graph) -> list[dict[str, Any]]:
    """Inputs, then outputs; -1 is a dynamic dimension."""
    return [
        {
            "name": name,
            "mode": 1 if name in graph.inputs else 2,
            "type": graph.types.get(name, FLOAT),
            "shape": list(graph.shapes.get(name, ())),
        }
        for name in [*graph.inputs, *graph.outputs]
    ]


@dataclass(frozen=True, slots=True)
class Plan:
    """Content of a plan file: START, the SHA-256 of the rest, and the rest as JSON."""

    name: str
    io: list[dict[str, Any]]
    profiles: list[dict[str, list[tuple[int, ...]]]]
    layers: list[dict[str, Any]]
    verbosity: int
    refittable: bool
    version_compatible: bool
    hardware_compatibility: int
    model: bytes
    version: tuple[int, ...] = VERSION

    def to_bytes(self) -> bytes:
        content = asdict(self) | {"model": base64.b64encode(self.model).decode()}
        payload = json.dumps(content).encode()
        return START + hashlib.sha256(payload).digest() + payload

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a plan.

        Raises:
            PlanError: it is none, or it is damaged, or another version's.
        """
        if not data.startswith(START):
            raise PlanError("Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match")
        digest, payload = data[len(START) :][:32], data[len(START) + 32 :]
        if hashlib.sha256(payload).digest() != digest:
            raise PlanError("The engine plan file is truncated or corrupt")
        content = json.loads(payload)
        version = tuple(content.pop("version"))
        if version != VERSION and not (content["version_compatible"] and version[0] == VERSION[0]):
            found, expected = (".".join(map(str, v)) for v in (version, VERSION))
            raise PlanError(f"The engine plan file is not compatible, expecting library version {expected} got {found}")
        model = base64.b64decode(content.pop("model"))
        return cls(**content, model=model, version=version)
