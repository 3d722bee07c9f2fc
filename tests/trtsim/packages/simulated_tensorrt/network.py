"""Networks, and the parser that fills them from ONNX. SIMULATED."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import onnx
import tensorrt_bindings

from simulated_tensorrt import graph as onnx_graph
from simulated_tensorrt.abi import MAJOR, Logger, Simulated
from simulated_tensorrt.graph import Graph, ParseFailure

_LAYER_TYPES = {
    "Conv": "CONVOLUTION", "Relu": "ACTIVATION", "Sigmoid": "ACTIVATION", "Clip": "ACTIVATION", "MaxPool": "POOLING",
    "AveragePool": "POOLING", "GlobalAveragePool": "REDUCE", "Add": "ELEMENTWISE", "Mul": "ELEMENTWISE",
    "Gemm": "MATRIX_MULTIPLY", "MatMul": "MATRIX_MULTIPLY", "Flatten": "SHUFFLE", "Reshape": "SHUFFLE",
    "Transpose": "SHUFFLE", "Softmax": "SOFTMAX", "Concat": "CONCATENATION", "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
}  # fmt: skip


class Tensor(Simulated):
    interface = "ITensor"

    def __init__(self, logger: Logger, network: Network, name: str) -> None:
        super().__init__(logger)
        self.network = network
        self.name = name
        self.formats = 1

    def getName(self) -> str:
        return self.name

    def getDimensions(self) -> Sequence[int] | None:
        return self.network.graph.shapes.get(self.name)

    def getType(self) -> int:
        return self.network.graph.types.get(self.name, onnx_graph.FLOAT)

    def getDimensionName(self, axis: int) -> str | None:
        return None

    def getLocation(self) -> int:
        return 0

    def isNetworkInput(self) -> bool:
        return self.name in self.network.graph.inputs

    def isNetworkOutput(self) -> bool:
        return self.name in self.network.graph.outputs

    def isShapeTensor(self) -> bool:
        return False

    def isExecutionTensor(self) -> bool:
        return True

    def dynamicRangeIsSet(self) -> bool:
        return False

    def getAllowedFormats(self) -> int:
        return self.formats

    def setAllowedFormats(self, formats: int) -> None:
        self.formats = formats


class Layer(Simulated):
    """One for each ONNX node; TensorRT's own networks have more, and fewer after fusion."""

    interface = "ILayer"

    def __init__(self, logger: Logger, network: Network, node: onnx.NodeProto) -> None:
        super().__init__(logger)
        self.network = network
        self.node = node
        self.inputs = network.graph.inputs_of(node)
        self.outputs = [name for name in node.output if name]

    def getName(self) -> str:
        return self.node.name

    def getType(self) -> int:
        return int(getattr(tensorrt_bindings.LayerType, _LAYER_TYPES.get(self.node.op_type, "IDENTITY")))

    def getNbInputs(self) -> int:
        return len(self.inputs)

    def getInput(self, index: int) -> Tensor | None:
        return self.network.tensor(self.inputs[index]) if index < len(self.inputs) else None

    def getNbOutputs(self) -> int:
        return len(self.outputs)

    def getOutput(self, index: int) -> Tensor | None:
        return self.network.tensor(self.outputs[index]) if index < len(self.outputs) else None

    def getOutputType(self, index: int) -> int:
        return self.network.graph.types.get(self.outputs[index], onnx_graph.FLOAT)

    def getMetadata(self) -> str:
        return f"[ONNX Layer: {self.node.name}]"

    def precisionIsSet(self) -> bool:
        return False

    def outputTypeIsSet(self, index: int) -> bool:
        return False


class Network(Simulated):
    interface = "INetworkDefinition"

    def __init__(self, logger: Logger, builder: Simulated, flags: int) -> None:
        super().__init__(logger)
        self.builder = builder
        self.flags = flags
        strongly_typed = int(tensorrt_bindings.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.strongly_typed = MAJOR >= 11 or bool(flags >> strongly_typed & 1)
        self.name = "Unnamed Network 0"
        self.graph = Graph(onnx.ModelProto())
        self.layers: list[Layer] = []
        self._tensors: dict[str, Tensor] = {}

    def fill(self, model: onnx.ModelProto) -> None:
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"node_{index}_{node.op_type}"
        self.graph = Graph(model)
        self.name = model.graph.name
        self.layers = [Layer(self.logger, self, node) for node in self.graph.model.graph.node]

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = Tensor(self.logger, self, name)
        return self._tensors[name]

    def destroy(self) -> None:
        for part in (*self.layers, *self._tensors.values()):
            part.destroy()
        super().destroy()

    def getBuilder(self) -> Simulated:
        return self.builder

    def getName(self) -> str:
        return self.name

    def setName(self, name: str) -> None:
        self.name = name

    def getFlags(self) -> int:
        return self.flags

    def getFlag(self, flag: int) -> bool:
        return bool(self.flags >> flag & 1)

    def hasImplicitBatchDimension(self) -> bool:
        return False

    def getNbInputs(self) -> int:
        return len(self.graph.inputs)

    def getInput(self, index: int) -> Tensor:
        return self.tensor(self.graph.inputs[index])

    def getNbOutputs(self) -> int:
        return len(self.graph.outputs)

    def getOutput(self, index: int) -> Tensor:
        return self.tensor(self.graph.outputs[index])

    def getNbLayers(self) -> int:
        return len(self.layers)

    def getLayer(self, index: int) -> Layer:
        return self.layers[index]


class ParserError(Simulated):
    interface = "IParserError"
    public: ClassVar = False

    def __init__(self, logger: Logger, failure: ParseFailure) -> None:
        super().__init__(logger)
        self.failure = failure

    def code(self) -> int:
        return int(tensorrt_bindings.ErrorCode.UNSUPPORTED_NODE)

    def desc(self) -> str:
        return f"{self.failure.text} [SIMULATED]"

    def file(self) -> str:
        return "SIMULATED"

    def func(self) -> str:
        return "parse"

    def line(self) -> int:
        return 0

    def node(self) -> int:
        return self.failure.index

    def nodeName(self) -> str:
        return self.failure.node_name

    def nodeOperator(self) -> str:
        return self.failure.operator

    def localFunctionStack(self) -> int:
        return 0

    def localFunctionStackSize(self) -> int:
        return 0


class Parser(Simulated):
    interface = "IParser"
    public: ClassVar = False

    def __init__(self, logger: Logger, network: Network) -> None:
        super().__init__(logger)
        self.network = network
        self.flags = 1
        self.errors: list[ParserError] = []

    def parse(self, data: int, size: int, path: str | None) -> bool:
        return self._parse(ctypes.string_at(data, size), path)

    def parseFromFile(self, path: str, verbosity: int) -> bool:
        try:
            return self._parse(Path(path).read_bytes(), path)
        except OSError as error:
            return self._fail(ParseFailure(f"Failed to open file: {error}"))

    def _parse(self, data: bytes, path: str | None) -> bool:
        try:
            self.network.fill(onnx_graph.load(data, path))
        except ParseFailure as failure:
            return self._fail(failure)
        return True

    def _fail(self, failure: ParseFailure) -> bool:
        self.errors.append(ParserError(self.logger, failure))
        self.error(f"node {failure.index} [{failure.operator} -> {failure.node_name!r}]: {failure.text}")
        return False

    def getNbErrors(self) -> int:
        return len(self.errors)

    def getError(self, index: int) -> ParserError:
        return self.errors[index]

    def clearErrors(self) -> None:
        self.errors.clear()

    def setBuilderConfig(self, config: int) -> bool:
        return True  # what it would tell is DLA's

    def supportsOperator(self, name: str) -> bool:
        return name not in onnx_graph.UNSUPPORTED

    def getFlags(self) -> int:
        return self.flags

    def setFlags(self, flags: int) -> None:
        self.flags = flags

    def getFlag(self, flag: int) -> bool:
        return bool(self.flags >> flag & 1)

    def setFlag(self, flag: int) -> None:
        self.flags |= 1 << flag

    def clearFlag(self, flag: int) -> None:
        self.flags &= ~(1 << flag)
