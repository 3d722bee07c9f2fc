"""The builder, its configuration, and what a build checks. SIMULATED: nothing is optimized and nothing is timed."""

from __future__ import annotations

import ctypes
import functools
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorrt_bindings

from simulated_tensorrt import device, failures
from simulated_tensorrt.abi import MAJOR, Logger, Simulated, call_user, simulated, text_address
from simulated_tensorrt.calibration import CalibrationError, calibrate
from simulated_tensorrt.device import IllegalAccessError
from simulated_tensorrt.graph import FLOAT, TYPE_NAMES, WEIGHTED, Graph, fake_quantize, open_session
from simulated_tensorrt.network import Network
from simulated_tensorrt.plan import HostMemory, Plan, io_tensors

MIN, OPT, MAX = range(3)
TIMING_CACHE_START = b"SIMULATED timing cache\n"
_PHASE_START, _STEP_COMPLETE, _PHASE_FINISH = range(4, 7)  # places in IProgressMonitor's table

Profile = dict[str, dict[int, tuple[int, ...]]]


class BuildFailure(Exception):
    """What TensorRT logs as an error, before it returns nothing."""


class OptimizationProfile(Simulated):
    interface = "IOptimizationProfile"

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        self.shapes: Profile = {}

    def setDimensions(self, name: str, which: int, shape: tuple[int, ...]) -> bool:
        others = self.shapes.setdefault(name, {})
        for other, dims in others.items():
            small, large = (dims, shape) if other < which else (shape, dims)
            if len(dims) != len(shape) or any(a > b for a, b in zip(small, large, strict=True)):
                self.error(f"dimensions {shape} of input {name} contradict {dims}")
                return False
        others[which] = shape
        return True

    def getDimensions(self, name: str, which: int) -> tuple[int, ...] | None:
        return self.shapes.get(name, {}).get(which)

    def getNbShapeValues(self, name: str) -> int:
        return -1

    def getShapeValues(self, name: str, which: int) -> int:
        return 0

    def getShapeValuesV2(self, name: str, which: int) -> int:
        return 0

    def isValid(self) -> bool:
        return all(shapes.keys() == {MIN, OPT, MAX} for shapes in self.shapes.values())

    def setExtraMemoryTarget(self, target: float) -> bool:
        return 0 <= target <= 1


class TimingCache(Simulated):
    interface = "ITimingCache"

    def __init__(self, logger: Logger, layers: set[str]) -> None:
        super().__init__(logger)
        self.layers = layers

    def serialize(self) -> HostMemory:
        return HostMemory(self.logger, TIMING_CACHE_START + json.dumps(sorted(self.layers)).encode())

    def combine(self, other: int, ignore_mismatch: bool) -> bool:
        self.layers |= simulated(other).layers
        return True

    def reset(self) -> bool:
        self.layers.clear()
        return True


class BuilderConfig(Simulated):
    """Properties that nothing here depends on are kept under their names: `setMaxAuxStreams`, `getMaxAuxStreams`."""

    interface = "IBuilderConfig"

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        self.reset()

    def reset(self) -> None:
        self.flags = 1 << int(tensorrt_bindings.BuilderFlag.TF32)
        self.values: dict[str, Any] = {
            "AvgTimingIterations": 1, "EngineCapability": 0, "DLACore": -1, "DefaultDeviceType": 0, "ProfileStream": 0,
            "ProfilingVerbosity": 0, "AlgorithmSelector": 0, "BuilderOptimizationLevel": 3,
            "HardwareCompatibilityLevel": 0, "MaxAuxStreams": -1, "ProgressMonitor": 0, "RuntimePlatform": 0,
            "MaxNbTactics": -1, "TilingOptimizationLevel": 0, "L2LimitForTiling": -1, "TacticSources": 24,
            "QuantizationFlags": 0, "RemoteAutoTuningConfig": "", "BuildRoute": "", "Int8Calibrator": 0,
        }  # fmt: skip
        self.profiles: list[Profile] = []
        self.calibration_profile: OptimizationProfile | None = None
        self.pools: dict[int, int] = {}
        self.preview: dict[int, bool] = {}
        self.timed_layers: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name[:3] in ("set", "get") and name[3:] in self.__dict__.get("values", {}):
            return functools.partial(self._set if name[:3] == "set" else self.values.get, name[3:])
        raise AttributeError(name)

    def _set(self, name: str, value: Any) -> bool:
        self.values[name] = value
        return True

    def has(self, flag: str) -> bool:
        """Whether a flag is set; those that this TensorRT does not have are not."""
        number = getattr(tensorrt_bindings.BuilderFlag, flag, None)
        return number is not None and bool(self.flags >> int(number) & 1)

    def setFlags(self, flags: int) -> None:
        self.flags = flags

    def getFlags(self) -> int:
        return self.flags

    def setFlag(self, flag: int) -> None:
        self.flags |= 1 << flag

    def clearFlag(self, flag: int) -> None:
        self.flags &= ~(1 << flag)

    def getFlag(self, flag: int) -> bool:
        return bool(self.flags >> flag & 1)

    def getQuantizationFlag(self, flag: int) -> bool:
        return bool(self.values["QuantizationFlags"] >> flag & 1)

    def setMemoryPoolLimit(self, pool: int, size: int) -> None:
        self.pools[pool] = size

    def getMemoryPoolLimit(self, pool: int) -> int:
        return self.pools.get(pool, 0)

    def setPreviewFeature(self, feature: int, on: bool) -> None:
        self.preview[feature] = on

    def getPreviewFeature(self, feature: int) -> bool:
        return self.preview.get(feature, False)

    def addOptimizationProfile(self, profile: int) -> int:
        shapes = simulated(profile)
        if not shapes.isValid():
            self.error("the optimization profile lacks MIN, OPT or MAX dimensions")
            return -1
        self.profiles.append({name: dict(dims) for name, dims in shapes.shapes.items()})
        return len(self.profiles) - 1

    def getNbOptimizationProfiles(self) -> int:
        return len(self.profiles)

    def setCalibrationProfile(self, profile: int) -> bool:
        self.calibration_profile = simulated(profile)
        return True

    def getCalibrationProfile(self) -> OptimizationProfile | None:
        return self.calibration_profile

    def createTimingCache(self, data: int, size: int) -> TimingCache | None:
        content = ctypes.string_at(data, size) if size else TIMING_CACHE_START + b"[]"
        if not content.startswith(TIMING_CACHE_START):
            self.error("the timing cache is damaged, or another version's")
            return None
        return TimingCache(self.logger, set(json.loads(content.removeprefix(TIMING_CACHE_START))))

    def setTimingCache(self, cache: int, ignore_mismatch: bool) -> bool:
        self.timed_layers = simulated(cache).layers
        return True

    def getTimingCache(self) -> TimingCache:
        return TimingCache(self.logger, self.timed_layers)

    def getNbPluginsToSerialize(self) -> int:
        return 0


class _Monitor:
    """The user's IProgressMonitor, if there is one."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.step = 0

    def start(self, phase: str, steps: int) -> None:
        self.phase = ctypes.c_void_p(text_address(phase))
        if self.address:
            call_user(self.address, _PHASE_START, None, self.phase, ctypes.c_void_p(), ctypes.c_int32(steps))

    def step_done(self) -> None:
        if self.address and not call_user(
            self.address, _STEP_COMPLETE, ctypes.c_uint8, self.phase, ctypes.c_int32(self.step)
        ):
            raise BuildFailure("The build was cancelled by the progress monitor")
        self.step += 1

    def finish(self) -> None:
        if self.address:
            call_user(self.address, _PHASE_FINISH, None, self.phase)


class Builder(Simulated):
    interface = "IBuilder"

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        device.take_context()
        self.profiles: list[OptimizationProfile] = []

    def platformHasFastFp16(self) -> bool:
        return True

    def platformHasFastInt8(self) -> bool:
        return not failures.wanted("no_int8")

    def platformHasTf32(self) -> bool:
        return True

    def getMaxDLABatchSize(self) -> int:
        return 0

    def getNbDLACores(self) -> int:
        return 0

    def getMaxThreads(self) -> int:
        return 1

    def createBuilderConfig(self) -> BuilderConfig:
        return BuilderConfig(self.logger)

    def createNetworkV2(self, flags: int) -> Network:
        return Network(self.logger, self, flags)

    def createOptimizationProfile(self) -> OptimizationProfile:
        self.profiles.append(OptimizationProfile(self.logger))  # the bindings never delete it
        return self.profiles[-1]

    def isNetworkSupported(self, network: int, config: int) -> bool:
        return True

    def buildSerializedNetwork(self, network: int, config: int) -> HostMemory | None:
        monitor = _Monitor(simulated(config).values["ProgressMonitor"])
        try:
            monitor.start("Building Engine", 4)
            plan = _build(simulated(network), simulated(config), self.logger, monitor.step_done)
            return HostMemory(self.logger, plan.to_bytes())
        except IllegalAccessError as error:
            device.illegal_access()
            self.error(f"an illegal memory access was encountered: {error}")
        except (BuildFailure, CalibrationError) as error:
            self.error(str(error))
        except Exception as error:
            traceback.print_exc()
            self.error(f"Could not find any implementation: {error}")
        finally:
            monitor.finish()
        return None


def _build(network: Network, config: BuilderConfig, logger: Logger, step_done: Callable[[], None]) -> Plan:
    graph = network.graph
    if not graph.outputs:
        raise BuildFailure("Network must have at least one output")
    if failures.wanted("build"):
        raise BuildFailure("Could not find any implementation for node (wanted by TRTSIM_FAIL)")
    if failures.wanted("no_int8") and (config.has("INT8") or graph.explicit):
        raise BuildFailure("Networks with INT8 layers require hardware with Int8 support")
    profiles = _profiles(graph, config)
    step_done()
    int8 = config.has("INT8")
    model, int8_nodes = graph.model, _explicit_int8(graph)
    if network.strongly_typed:
        flags = [flag for flag in ("FP16", "INT8", "BF16", "FP8") if config.has(flag)]
        if flags:
            raise BuildFailure(f"Precision flags ({', '.join(flags)}) cannot be set for a strongly typed network")
    elif graph.explicit:
        if not int8:
            raise BuildFailure("Int8 precision has been set for a layer, but int8 is not configured in the builder")
        if config.values["Int8Calibrator"]:
            logger.log(Logger.WARNING, "Calibrator won't be used in explicit quantization mode")
    elif int8:
        model, int8_nodes = _implicit_int8(graph, config, profiles, logger)
    step_done()
    open_session(model)  # what cannot run is found here
    step_done()
    layers = [_layer(graph, node, int8_nodes) for node in graph.model.graph.node]
    known = config.timed_layers & {layer["ParameterType"] for layer in layers}
    logger.log(Logger.INFO, f"{len(known)} kinds of layers were in the timing cache")
    config.timed_layers.update(layer["ParameterType"] for layer in layers)
    step_done()
    return Plan(
        name=network.name,
        io=io_tensors(graph),
        profiles=profiles,
        layers=layers,
        verbosity=config.values["ProfilingVerbosity"],
        refittable=config.has("REFIT"),
        version_compatible=config.has("VERSION_COMPATIBLE"),
        hardware_compatibility=config.values["HardwareCompatibilityLevel"],
        model=model.SerializeToString(),
    )


def _profiles(graph: Graph, config: BuilderConfig) -> list[dict[str, list[tuple[int, ...]]]]:
    """MIN, OPT and MAX shape of every input in every profile."""
    dynamic = [name for name in graph.inputs if -1 in graph.shapes[name]]
    if dynamic and not config.profiles:
        raise BuildFailure("Network has dynamic or shape inputs, but no optimization profile has been defined")
    found = []
    for number, profile in enumerate(config.profiles or [{}]):
        shapes = {}
        for name in graph.inputs:
            own = graph.shapes[name]
            if name in dynamic and name not in profile:
                raise BuildFailure(f"Optimization profile {number} gives no dimensions for input {name}")
            given = [profile[name][which] if name in profile else own for which in (MIN, OPT, MAX)]
            for shape in given:
                if len(shape) != len(own) or any(a not in (-1, b) for a, b in zip(own, shape, strict=True)):
                    raise BuildFailure(f"Optimization profile {number}: {shape} does not fit {own} of input {name}")
            shapes[name] = given
        found.append(shapes)
    return found


def _implicit_int8(
    graph: Graph, config: BuilderConfig, profiles: Sequence[Mapping[str, Sequence[tuple[int, ...]]]], logger: Logger
) -> tuple[Any, list[str]]:
    if not config.values["Int8Calibrator"]:
        logger.log(Logger.WARNING, "Calibrator is not being used. Users must provide dynamic range for all tensors")
        return graph.model, []
    shapes = {name: dims[OPT] for name, dims in profiles[0].items()}
    if config.calibration_profile is not None:
        shapes |= {name: dims[OPT] for name, dims in config.calibration_profile.shapes.items()}
    elif config.profiles:
        logger.log(Logger.WARNING, "Calibration Profile is not defined. Calibrating with Profile 0")
    scales = calibrate(config.values["Int8Calibrator"], graph, shapes, logger)
    model, int8_nodes, missing = fake_quantize(graph, {name: scale for name, scale in scales.items() if scale > 0})
    for name in missing:
        logger.log(
            Logger.WARNING,
            f"Missing scale and zero-point for tensor {name}, expect fall back to non-int8 implementation for any "
            "layer consuming or producing given tensor",
        )
    return model, int8_nodes


def _explicit_int8(graph: Graph) -> list[str]:
    """Layers that read a dequantized tensor and have weights."""
    dequantized = {node.output[0] for node in graph.model.graph.node if node.op_type == "DequantizeLinear"}
    return [
        node.name
        for node in graph.model.graph.node
        if node.op_type in WEIGHTED and dequantized.issuperset(node.input[:2])
    ]


def _layer(graph: Graph, node: Any, int8_nodes: Sequence[str]) -> dict[str, Any]:
    """What the inspector says about a layer; each ONNX node is one here, where TensorRT fuses."""
    int8 = node.name in int8_nodes

    def tensor(name: str, codes: bool) -> dict[str, Any]:
        kind = "Int8" if codes else TYPE_NAMES[graph.types.get(name, FLOAT)]
        described = {"Name": name, "Location": "Device", "Dimensions": list(graph.shapes.get(name, ()))}
        return described | (
            {"Format/Datatype": f"Row major linear {kind} format"}
            if MAJOR == 10
            else {"Format": "Row major linear", "DataType": kind}
        )

    return {
        "Name": node.name,
        "LayerType": node.op_type,
        "Inputs": [tensor(name, int8) for name in graph.inputs_of(node)],
        "Outputs": [tensor(name, False) for name in node.output if name],
        "ParameterType": node.op_type,
        "TacticName": "SIMULATED",
        "StreamId": 0,
        "Metadata": f"[ONNX Layer: {node.name}]",
    }
