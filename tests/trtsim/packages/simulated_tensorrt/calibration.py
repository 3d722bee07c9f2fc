"""The user's calibrator, driven in TensorRT's order. SIMULATED: the scales are not those that TensorRT would find."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import tensorrt_bindings

from simulated_tensorrt import device
from simulated_tensorrt import graph as onnx_graph
from simulated_tensorrt.abi import VERSION, Logger, call_user, text_address
from simulated_tensorrt.graph import Graph

_BATCH_SIZE, _BATCH, _READ_CACHE, _WRITE_CACHE, _ALGORITHM = range(4, 9)  # places in IInt8Calibrator's table
ENTROPY_QUANTILE = 0.9999


class CalibrationError(Exception):
    pass


def calibrate(calibrator: int, graph: Graph, shapes: Mapping[str, Sequence[int]], logger: Logger) -> dict[str, float]:
    """Ask for the algorithm, the batch size and a cache; without a cache, for batches until there are no more.

    Args:
        calibrator: address of the user's IInt8Calibrator.
        graph: the network.
        shapes: of the inputs, as the calibration profile has them.
        logger: the user's.

    Returns:
        Tensor name to scale.
    """
    algorithm = _algorithm_name(call_user(calibrator, _ALGORITHM, ctypes.c_int32))
    call_user(calibrator, _BATCH_SIZE, ctypes.c_int32)
    size = ctypes.c_size_t()
    address = call_user(calibrator, _READ_CACHE, ctypes.c_void_p, ctypes.pointer(size))
    if address:
        logger.log(Logger.INFO, f"Reading Calibration Cache for calibrator: {algorithm}")
        return _read_cache(ctypes.string_at(address, size.value), algorithm)
    scales = _scales_of_batches(calibrator, graph, shapes, algorithm)
    lines = [_header(algorithm), *(f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items())]
    cache = ctypes.create_string_buffer("".join(f"{line}\n" for line in lines).encode())
    logger.log(Logger.INFO, f"Calibration completed. Writing Calibration Cache for calibrator: {algorithm}")
    call_user(calibrator, _WRITE_CACHE, None, ctypes.c_void_p(ctypes.addressof(cache)), ctypes.c_size_t(len(cache) - 1))
    ctypes.memset(cache, 0, len(cache))  # the memory is the user's during the call only
    return scales


def _scales_of_batches(
    calibrator: int, graph: Graph, shapes: Mapping[str, Sequence[int]], algorithm: str
) -> dict[str, float]:
    fetched = [name for name in graph.activations() if name not in graph.inputs]
    session = onnx_graph.open_session(Graph(graph.model, shapes).with_outputs(fetched))
    count = len(graph.inputs)
    names = (ctypes.c_void_p * count)(*map(text_address, graph.inputs))
    amax: dict[str, float] = {}
    while True:
        bindings = (ctypes.c_void_p * count)()
        more = call_user(
            calibrator, _BATCH, ctypes.c_uint8, ctypes.c_void_p(ctypes.addressof(bindings)),
            ctypes.c_void_p(ctypes.addressof(names)), ctypes.c_int32(count),
        )  # fmt: skip
        if not more:
            break
        feeds = {}
        for name, address in zip(graph.inputs, bindings, strict=True):
            kind = onnx_graph.FLOAT if graph.types[name] == onnx_graph.HALF else graph.types[name]
            feeds[name] = device.array_at(address or 0, kind, shapes[name]).astype(
                onnx_graph.NUMPY_TYPES[graph.types[name]]
            )
        values = feeds | dict(zip(fetched, session.run(fetched, feeds), strict=True))
        for name in graph.activations():
            magnitudes = np.abs(values[name])
            top = magnitudes.max() if "MinMax" in algorithm else np.quantile(magnitudes, ENTROPY_QUANTILE)
            amax[name] = max(amax.get(name, 0.0), float(top))
    if not amax:
        raise CalibrationError("Calibration failure occurred with no scaling factors detected.")
    return {name: value / 127 for name, value in amax.items()}


def _read_cache(data: bytes, algorithm: str) -> dict[str, float]:
    header, *lines = data.decode().splitlines()
    if header != _header(algorithm):
        raise CalibrationError(f"Calibration cache {header!r} does not fit, {_header(algorithm)!r} is wanted")
    pairs = (line.rpartition(": ") for line in lines)
    return {name: struct.unpack(">f", bytes.fromhex(digits.zfill(8)))[0] for name, _, digits in pairs}


def _header(algorithm: str) -> str:
    major, minor, patch, _ = VERSION
    return f"TRT-{major * 10000 + minor * 100 + patch}-{algorithm}"


def _algorithm_name(value: int) -> str:
    names = {"ENTROPY_CALIBRATION_2": "EntropyCalibration2", "MINMAX_CALIBRATION": "MinMaxCalibration"}
    name = tensorrt_bindings.CalibrationAlgoType(value).name
    if name not in names:
        raise CalibrationError(f"{name} is not simulated")
    return names[name]
