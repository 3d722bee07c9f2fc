"""Runtime, engine, execution context and inspector. SIMULATED: ONNX Runtime computes, on the CPU."""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from simulated_tensorrt import device, failures
from simulated_tensorrt.abi import MAJOR, Dims, Logger, Simulated, call_user, text_address, write_dims
from simulated_tensorrt.graph import NUMPY_TYPES, TYPE_NAMES, Graph, open_session
from simulated_tensorrt.plan import HostMemory, Plan, PlanError

INPUT, OUTPUT = 1, 2
LAYER_NAMES_ONLY, NO_LAYERS, DETAILED = range(3)  # ProfilingVerbosity
JSON_FORMAT = 1
_ALLOCATE_ASYNC, _NOTIFY_SHAPE = 5, 6  # places in IOutputAllocator's table
_REPORT_LAYER_TIME = 0 if MAJOR == 10 else 4  # place in IProfiler's


class Runtime(Simulated):
    interface = "IRuntime"

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        device.take_context()
        self.host_code_allowed = False

    def deserializeCudaEngine(self, data: int, size: int) -> Engine | None:
        if failures.wanted("deserialize"):
            self.error("Serialization assertion failed (wanted by TRTSIM_FAIL)")
            return None
        try:
            return Engine(self.logger, Plan.from_bytes(ctypes.string_at(data, size)))
        except PlanError as error:
            self.error(str(error))
            return None

    def setEngineHostCodeAllowed(self, allowed: bool) -> None:
        self.host_code_allowed = allowed

    def getEngineHostCodeAllowed(self) -> bool:
        return self.host_code_allowed

    def getMaxThreads(self) -> int:
        return 1

    def getDLACore(self) -> int:
        return 0


class Engine(Simulated):
    interface = "ICudaEngine"

    def __init__(self, logger: Logger, plan: Plan) -> None:
        super().__init__(logger)
        self.plan = plan
        self.io = {tensor["name"]: tensor for tensor in plan.io}
        self.inputs = [tensor["name"] for tensor in plan.io if tensor["mode"] == INPUT]
        self.outputs = [tensor["name"] for tensor in plan.io if tensor["mode"] == OUTPUT]
        self._shapes: dict[tuple[tuple[int, ...], ...], dict[str, tuple[int, ...]]] = {}

    @cached_property
    def session(self) -> Any:
        return open_session(self.plan.model)

    @cached_property
    def _model(self) -> onnx.ModelProto:
        return onnx.ModelProto.FromString(self.plan.model)

    def shapes_for(self, inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors at these shapes of the inputs; a dimension that depends on data is -1."""
        key = tuple(inputs[name] for name in self.inputs)
        if key not in self._shapes:
            self._shapes[key] = Graph(self._model, inputs).shapes
        return self._shapes[key]

    def _tensor(self, name: str) -> dict[str, Any]:
        if name not in self.io:
            self.error(f"the engine has no I/O tensor named {name}")
            return {"mode": 0, "type": 0, "shape": None}
        return self.io[name]

    def getName(self) -> str:
        return self.plan.name

    def getNbLayers(self) -> int:
        return len(self.plan.layers)

    def getNbIOTensors(self) -> int:
        return len(self.io)

    def getIOTensorName(self, index: int) -> str:
        return str(self.plan.io[index]["name"])

    def getTensorIOMode(self, name: str) -> int:
        return int(self._tensor(name)["mode"])

    def getTensorShape(self, name: str) -> Sequence[int] | None:
        shape: Sequence[int] | None = self._tensor(name)["shape"]
        return shape

    def getTensorDataType(self, name: str) -> int:
        return int(self._tensor(name)["type"])

    def getTensorLocation(self, name: str) -> int:
        return 0

    def isShapeInferenceIO(self, name: str) -> bool:
        return False

    def getTensorBytesPerComponent(self, name: str) -> int:
        return np.dtype(NUMPY_TYPES[self._tensor(name)["type"]]).itemsize

    def getTensorComponentsPerElement(self, name: str) -> int:
        return 1

    def getTensorFormat(self, name: str) -> int:
        return 0

    def getTensorFormatV2(self, name: str, profile: int) -> int:
        return 0

    def getTensorFormatDesc(self, name: str) -> str:
        return f"Row major linear {TYPE_NAMES[self._tensor(name)['type']]} format (kLINEAR)"

    def getAliasedInputTensor(self, name: str) -> None:
        return None

    def getTensorVectorizedDim(self, name: str) -> int:
        return -1

    def getNbOptimizationProfiles(self) -> int:
        return len(self.plan.profiles)

    def getProfileShape(self, name: str, profile: int, which: int) -> Sequence[int] | None:
        return self.plan.profiles[profile].get(name, [None, None, None])[which]

    def isRefittable(self) -> bool:
        return self.plan.refittable

    def getEngineCapability(self) -> int:
        return 0

    def getProfilingVerbosity(self) -> int:
        return self.plan.verbosity

    def getHardwareCompatibilityLevel(self) -> int:
        return self.plan.hardware_compatibility

    def hasImplicitBatchDimension(self) -> bool:
        return False

    def getTacticSources(self) -> int:
        return 24

    def getNbAuxStreams(self) -> int:
        return 0

    def getDeviceMemorySize(self) -> int:
        return 1 << 20

    def getDeviceMemorySizeV2(self) -> int:
        return 1 << 20

    def getStreamableWeightsSize(self) -> int:
        return 0

    def serialize(self) -> HostMemory:
        return HostMemory(self.logger, self.plan.to_bytes())

    def createEngineInspector(self) -> Inspector:
        return Inspector(self.logger, self)

    def createExecutionContext(self, strategy: int) -> Context | None:
        if failures.wanted("context"):
            self.error("Requested amount of GPU memory could not be allocated (wanted by TRTSIM_FAIL)")
            return None
        return Context(self.logger, self)


class Inspector(Simulated):
    """Answers in the layout of 10 or of 11."""

    interface = "IEngineInspector"

    def __init__(self, logger: Logger, engine: Engine) -> None:
        super().__init__(logger)
        self.engine = engine
        self.context = 0

    def setExecutionContext(self, context: int) -> bool:
        self.context = context
        return True

    def getExecutionContext(self) -> int:
        return self.context

    def getLayerInformation(self, index: int, layout: int) -> str:
        layer = self._layers()[index]
        return json.dumps(layer) if layout == JSON_FORMAT else f"{layer} SIMULATED\n"

    def getEngineInformation(self, layout: int) -> str:
        layers = self._layers()
        if layout != JSON_FORMAT:
            return "".join(f"{layer} SIMULATED\n" for layer in layers)
        io = self.engine.plan.io
        if MAJOR == 10:
            return json.dumps({"Layers": layers, "Bindings": [tensor["name"] for tensor in io]})
        described = [
            {
                "Name": tensor["name"],
                "IOMode": "Input" if tensor["mode"] == INPUT else "Output",
                "DataType": TYPE_NAMES[tensor["type"]],
                "Dimensions": tensor["shape"],
                "Location": "Device",
                "ProfileInfo": [{"Format": "Row major linear"} for _ in self.engine.plan.profiles],
            }
            for tensor in io
        ]
        return json.dumps({"Layers": layers, "I/O Tensors": described})

    def _layers(self) -> list[Any]:
        plan = self.engine.plan
        if plan.verbosity == NO_LAYERS:
            return []
        return plan.layers if plan.verbosity == DETAILED else [layer["Name"] for layer in plan.layers]


class Context(Simulated):
    interface = "IExecutionContext"

    def __init__(self, logger: Logger, engine: Engine) -> None:
        super().__init__(logger)
        self.engine = engine
        self.profile = 0
        self.name = ""
        self.shapes = self._static_shapes()
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, int] = {}
        self.profiler = 0
        self.emits_profile = True

    def _static_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(self.engine.io[name]["shape"]) for name in self.engine.inputs}
        return {name: shape for name, shape in shapes.items() if -1 not in shape}

    def getEngine(self) -> Engine:
        return self.engine

    def getName(self) -> str:
        return self.name

    def setName(self, name: str) -> None:
        self.name = name

    def getProfiler(self) -> int:
        return self.profiler

    def setProfiler(self, profiler: int) -> None:
        self.profiler = profiler

    def setEnqueueEmitsProfile(self, emits: bool) -> None:
        self.emits_profile = emits

    def getEnqueueEmitsProfile(self) -> bool:
        return self.emits_profile

    def getOptimizationProfile(self) -> int:
        return self.profile

    def setOptimizationProfileAsync(self, profile: int, stream: int) -> bool:
        if not 0 <= profile < len(self.engine.plan.profiles):
            self.error(f"there is no optimization profile {profile}")
            return False
        if profile != self.profile:
            self.profile = profile
            self.shapes = self._static_shapes()
        return True

    def setInputShape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self.engine.inputs:
            self.error(f"the engine has no input named {name}")
            return False
        low, _, high = self.engine.plan.profiles[self.profile][name]
        if len(shape) != len(low) or any(not a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.error(
                f"Set dimension {list(shape)} for tensor {name} does not satisfy any optimization profiles. "
                f"Valid range for profile {self.profile}: {list(low)}..{list(high)}"
            )
            return False
        self.shapes[name] = shape
        return True

    def _missing(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def allInputDimensionsSpecified(self) -> bool:
        return not self._missing()

    def allInputShapesSpecified(self) -> bool:
        return True

    def inferShapes(self, count: int, names: int) -> int:
        missing = self._missing()
        places = (ctypes.c_void_p * count).from_address(names) if names else []
        for place, name in zip(range(count), missing, strict=False):
            places[place] = text_address(name)
        return len(missing)

    def getTensorShape(self, name: str) -> Sequence[int] | None:
        if name in self.shapes:
            return self.shapes[name]
        declared = self.engine.getTensorShape(name)
        if declared is None or self._missing():
            return declared
        return self.engine.shapes_for(self.shapes).get(name, declared)

    def getTensorStrides(self, name: str) -> Sequence[int] | None:
        shape = self.getTensorShape(name)
        return shape and [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]

    def getMaxOutputSize(self, name: str) -> int:
        largest = {key: tuple(dims[2]) for key, dims in self.engine.plan.profiles[self.profile].items()}
        shape = self.engine.shapes_for(largest).get(name, (-1,))
        return -1 if -1 in shape else math.prod(shape) * self.engine.getTensorBytesPerComponent(name)

    def setTensorAddress(self, name: str, address: int) -> bool:
        if name not in self.engine.io:
            self.error(f"the engine has no I/O tensor named {name}")
            return False
        self.addresses[name] = address
        return True

    setInputTensorAddress = setOutputTensorAddress = setTensorAddress

    def getTensorAddress(self, name: str) -> int:
        return self.addresses.get(name, 0)

    getOutputTensorAddress = getTensorAddress

    def setOutputAllocator(self, name: str, allocator: int) -> bool:
        self.allocators[name] = allocator
        return name in self.engine.outputs

    def getOutputAllocator(self, name: str) -> int:
        return self.allocators.get(name, 0)

    def setDebugListener(self, listener: int) -> bool:
        return True  # there are no debug tensors to hear of

    def setAllTensorsDebugState(self, on: bool) -> bool:
        return True

    def executeV2(self, bindings: int) -> bool:
        addresses = (ctypes.c_void_p * len(self.engine.io)).from_address(bindings)
        self.addresses |= {name: address or 0 for name, address in zip(self.engine.io, addresses, strict=True)}
        return self.enqueueV3(0) and device.synchronize(0)

    def enqueueV3(self, stream: int) -> bool:
        device.take_context()
        if failures.wanted("enqueue"):
            self.error("Cask convolution execution (wanted by TRTSIM_FAIL)")
            return False
        if self._missing():
            self.error(f"the dimensions of input(s) {', '.join(self._missing())} were not set")
            return False
        for name in self.engine.io:
            if not self.addresses.get(name) and not self.allocators.get(name):
                self.error(f"Address is not set for tensor {name}")
                return False
        if not stream:
            self.logger.log(Logger.WARNING, "Using default stream in enqueueV3() may lead to performance issues")
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if not device.enqueue(stream, lambda: self._run(shapes, addresses, stream)):
            self.error("the stream is none of this context")
            return False
        if self.profiler or any(self.allocators.values()):  # TensorRT waits for these
            return device.synchronize(stream)
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], stream: int) -> None:
        try:
            if failures.wanted("device"):
                raise device.IllegalAccessError("wanted by TRTSIM_FAIL")
            start = time.perf_counter()
            feeds = {
                name: device.array_at(addresses.get(name, 0), self.engine.io[name]["type"], shape)
                for name, shape in shapes.items()
            }
            values = self.engine.session.run(self.engine.outputs, feeds)
            for name, value in zip(self.engine.outputs, values, strict=True):
                address = self._allocated(name, value, stream) or addresses.get(name, 0)
                device.array_at(address, self.engine.io[name]["type"], value.shape)[...] = value
            self._report(1e3 * (time.perf_counter() - start))
        except device.IllegalAccessError as error:
            device.illegal_access()
            self.error(f"an illegal memory access was encountered: {error}")

    def _allocated(self, name: str, value: Any, stream: int) -> int:
        """Address from the user's IOutputAllocator, which is told the shape; 0 without one."""
        allocator = self.allocators.get(name)
        if not allocator:
            return 0
        text = ctypes.c_void_p(text_address(name))
        size, alignment = ctypes.c_uint64(max(value.nbytes, 1)), ctypes.c_uint64(256)
        old = ctypes.c_void_p(self.addresses.get(name) or None)
        address = call_user(
            allocator, _ALLOCATE_ASYNC, ctypes.c_void_p, text, old, size, alignment, ctypes.c_void_p(stream or None)
        )
        dims = Dims()
        write_dims(ctypes.addressof(dims), value.shape)
        call_user(allocator, _NOTIFY_SHAPE, None, text, ctypes.c_void_p(ctypes.addressof(dims)))
        return address or 0

    def _report(self, milliseconds: float) -> None:
        """Divide the CPU's time evenly: no layer is measured."""
        layers = self.engine.plan.layers
        for layer in layers if self.profiler else ():
            name = ctypes.c_char_p(layer["Name"].encode())
            call_user(self.profiler, _REPORT_LAYER_TIME, None, name, ctypes.c_float(milliseconds / len(layers)))
