"""The model zoo that ships inside the `onnx` package: graphs of 2017, opset 9, whose weights are all the same number.

A net of equal weights answers nothing, so they are drawn as those of the other models of the zoo are. Of three of them
the widest layers are made narrower: they would only cost time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from zoo.architecture import Architecture, Promise
from zoo.builder import Builder
from zoo.inputs import Feeds, Input, calibration_batches
from zoo.settling import settle

from trt_int8.machine import read_machine

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"

_AVX512 = "avx512f" in read_machine().cpu.features
"""How values at the edge of two codes are rounded depends on the order in which a processor adds up.

Where one or two probabilities near 1 hold nearly all of the signal, which few samples can do, the SQNR hangs on their
errors alone: 42 dB on one processor, above 50 on another.
"""

Widths = Callable[[int], int]
"""Gives an axis of a weight another size."""


def _narrower(factor: int, **others: int) -> Widths:
    """Divide widths from 32 on by a factor where a multiple of 8 is left; `others` become what is said: w4096=256."""

    def width(size: int) -> int:
        divided = size // factor if size >= 32 and size % (8 * factor) == 0 else size
        return others.get(f"w{size}", divided)

    return width


def _light(name: str, promise: Promise, width: Widths = int, *, size: int = 224) -> Architecture:
    """Declare a file of the folder as an architecture; `size`: of the image, where a global pool allows another one."""
    return promise.of(f"light_{name}", partial(_write, f"light_{name}.onnx", width, size))


def _write(file: str, width: Widths, size: int, path: Path) -> Sequence[Input]:
    model = onnx.load(FOLDER / file)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    given = next(value for value in model.graph.input if value.name not in constants)
    inputs = [Input(given.name, (3, size, size), batch=1)]
    fillers = [node for node in model.graph.node if node.op_type == "ConstantOfShape"]
    others = [node for node in model.graph.node if node.op_type != "ConstantOfShape"]
    shapes = {name: array.shape for name, array in constants.items()}
    shapes |= {node.output[0]: tuple(constants[node.input[0]]) for node in fillers}
    readers = {name: (node, index) for node in others for index, name in enumerate(node.input)}
    scaled = any(node.op_type == "Mul" for node in others)
    builder = Builder(seed=len(file))
    del model.graph.initializer[:], model.graph.input[1:], model.graph.node[:]
    model.graph.node.extend(others)
    for name, shape_of in shapes.items():
        if name in readers:
            drawn = _drawn(
                builder, tuple(width(int(axis)) for axis in shape_of), *_purpose(readers, name), scaled=scaled
            )
            if drawn is None:  # a new shape for Reshape
                drawn = np.asarray([width(int(axis)) for axis in constants[name]])
                drawn[0] = 0 if drawn[0] == 1 else drawn[0]  # the batch, whatever it is
            model.graph.initializer.append(numpy_helper.from_array(drawn, name))
    model.ir_version = 8  # from 4 on a constant need not be an input
    # Statistics of one image are none, so they settle on several, before the batch becomes 1 as in the file.
    images = [replace(inputs[0], batch=None)]
    model.graph.input[0].CopyFrom(images[0].value_info())
    feeds = calibration_batches(images)[0]
    settle(model, feeds)
    _unsaturated(model, feeds)
    model.graph.input[0].CopyFrom(inputs[0].value_info())
    path.write_bytes(model.SerializeToString())
    return inputs


def _purpose(readers: Mapping[str, tuple[onnx.NodeProto, int]], name: str) -> tuple[str, int]:
    """Return the operator that a constant ends in, across Reshape and Unsqueeze, and as which of its inputs."""
    node, index = readers[name]
    moved = node.op_type in ("Reshape", "Unsqueeze") and index == 0
    return _purpose(readers, node.output[0]) if moved else (node.op_type, index)


def _drawn(
    builder: Builder, shape: tuple[int, ...], kind: str, index: int, *, scaled: bool
) -> NDArray[np.float32] | None:
    """Draw what an operator reads at an index; None where that is no weight.

    Where BatchNormalization is followed by a Mul and an Add (`scaled`), those hold the gains and offsets.
    """
    zeros, ones = (partial(constant, dtype=np.float32) for constant in (np.zeros, np.ones))
    makers: dict[tuple[str, int], Callable[[int], NDArray[np.float32]]] = {
        ("BatchNormalization", 1): ones if scaled else builder.gains,
        ("BatchNormalization", 2): zeros if scaled else builder.offsets,
        ("BatchNormalization", 3): zeros,
        ("BatchNormalization", 4): ones,
        ("Conv", 2): builder.offsets,
        ("Gemm", 2): builder.offsets,
        ("Mul", 1): builder.gains,
        ("Add", 1): builder.offsets,
    }
    if kind == "Gemm" and index == 1:  # the matrix may have come with leading axes of 1
        return builder.weights(*shape[-2:], fan_in=shape[-1], spread_axis=0).reshape(shape)
    if kind == "Conv" and index == 1:
        return builder.weights(*shape, fan_in=int(np.prod(shape[1:])), spread_axis=0)
    maker = makers.get((kind, index))
    return None if maker is None else maker(shape[0])


def _unsaturated(model: onnx.ModelProto, feeds: Feeds) -> None:
    """Give the logits before a Softmax at the end a deviation of 1, or it would answer 0 and 1 whatever is fed."""
    last = model.graph.node[-1]
    if last.op_type != "Softmax":
        return
    logits = last.input[0]
    learned = next(node for node in reversed(model.graph.node) if node.op_type in ("Conv", "Gemm"))
    moved = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Reshape"}
    weights = [moved.get(name, name) for name in learned.input[1:]]
    deviation = float(np.std(_run(model, logits, feeds)))
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            values = numpy_helper.to_array(initializer) / np.float32(deviation)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))


def _run(model: onnx.ModelProto, tensor: str, feeds: Feeds) -> NDArray[np.float32]:
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.append(onnx.ValueInfoProto(name=tensor))
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    values: NDArray[np.float32] = session.run(None, dict(feeds))[0]
    return values


# Where the batch is 1 a Gemm is a matrix times a vector, which stays float for TensorRT; the narrowed ones keep their
# numbers of operators.
LIGHT = (
    # 5 convolutions, 3 Gemms.
    _light("bvlc_alexnet", Promise((5, 8), (21, 22)), _narrower(2, w4096=256, w9216=9216 // 2)),
    # 120 convolutions and the 1x1 that classifies.
    _light("densenet121", Promise((121, 121), (19, 11)), _narrower(2), size=128),
    # 57 convolutions, a Gemm.
    _light("inception_v1", Promise((57, 58), (24, 20))),
    # 69 convolutions, a Gemm.
    _light("inception_v2", Promise((69, 70), (12, 12)), _narrower(2)),
    # 53 convolutions, a Gemm.
    _light("resnet50", Promise((53, 54), (14, 14)), _narrower(4)),
    # 49 convolutions, a Gemm.
    _light("shufflenet", Promise((48, 50), (16, 17))),
    # 26 convolutions.
    _light("squeezenet", Promise((26, 26), (39 if _AVX512 else 50, 34)), size=128),
    # 16 convolutions, 3 Gemms.
    _light("vgg19", Promise((16, 19), (15, 13 if _AVX512 else 17)), _narrower(4, w4096=256, w25088=25088 // 4)),
    # 5 convolutions, 3 Gemms.
    _light("zfnet512", Promise((5, 8), (30, 25)), _narrower(2, w4096=256)),
)
