"""Facts about `engines.size`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibrators.errors import FileAccessError
from engines.errors import ModelError
from engines.graph import prepare, save_model
from engines.placement_cpu import place_for_cpu
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import insert_qdq
from engines.size import external_files, measure_sizes


def test_bytes_by_type_and_file(tiny_model: Path) -> None:
    """The tiny net holds 8*3*3*3 + 8 + 16*512 + 16 floats, and its file a little more than their bytes."""
    (size,) = measure_sizes([tiny_model])

    assert size.weight_bytes == {"FLOAT": 4 * (216 + 8 + 8192 + 16)}
    assert size.file_bytes == tiny_model.stat().st_size
    assert size.ratio == 1.0
    assert size.to_json() == {
        "name": "tiny.onnx", "file_bytes": size.file_bytes, "weight_bytes": size.weight_bytes, "ratio": 1.0
    }  # fmt: skip


def test_external_data_counts(tiny_model: Path, tmp_path: Path) -> None:
    """Model and weights in two files are as large as both together, named once."""
    path = tmp_path / "external" / "m.onnx"
    path.parent.mkdir()
    onnx.save_model(onnx.load(tiny_model), path, save_as_external_data=True, location="m.weights", size_threshold=0)
    whole, split = measure_sizes([tiny_model, path])

    assert external_files(onnx.load(path, load_external_data=False)) == ["m.weights"]
    assert split.file_bytes == sum(file.stat().st_size for file in path.parent.iterdir())
    assert split.weight_bytes == whole.weight_bytes
    assert split.ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("place", [place_for_tensorrt, place_for_cpu])
def test_int8_files_are_nearly_four_times_smaller(place: Any, graph_builder: Any, tmp_path: Path) -> None:
    """Weights dominate: 1 byte for 4; scales, biases and Q/DQ nodes cost a few per cent."""
    graph = graph_builder()
    x = graph.node("Relu", [graph.conv(graph.input("x", ("N", 64, 8, 8)), (64, 96))])
    x = graph.node("GlobalAveragePool", [graph.node("Relu", [graph.conv(x, (96, 96))])])
    graph.gemm(graph.node("Flatten", [x]), (96, 200), "y")
    path = graph.save(tmp_path / "fp32.onnx", ["y"])
    prepared = prepare(path)
    placement = place(prepared.ir())
    result = insert_qdq(prepared, placement, dict.fromkeys(placement.tensors, 0.1))
    save_model(ir.to_proto(result.model), tmp_path / "int8.onnx")
    reference, quantized = measure_sizes([path, tmp_path / "int8.onnx"])

    weights = 96 * 64 * 9 + 96 * 96 * 9 + 200 * 96
    assert quantized.ratio == reference.file_bytes / quantized.file_bytes
    assert 3.7 < quantized.ratio < 4
    assert next(iter(quantized.weight_bytes)) == "INT8"  # the largest comes first
    assert quantized.weight_bytes["INT8"] == pytest.approx(weights, rel=0.01)


def test_types_of_less_than_a_byte_and_scalars(graph_builder: Any, tmp_path: Path) -> None:
    """Two INT4 values share a byte; a scalar is one element, an empty tensor none."""
    graph = graph_builder()
    packed = onnx.helper.make_tensor("packed", onnx.TensorProto.INT4, [10], np.arange(10) % 8)
    graph.initializers.append(packed)
    graph.constant(np.float64(3), "scalar")
    graph.constant(np.zeros((0, 3), np.float16), "empty")
    graph.node("Relu", [graph.input()], "y")
    (size,) = measure_sizes([graph.save(tmp_path / "m.onnx", ["y"], opset=21)])

    assert size.weight_bytes == {"DOUBLE": 8, "INT4": 5, "FLOAT16": 0}


def test_files_that_are_missing_or_no_models(tiny_model: Path, tmp_path: Path) -> None:
    """A missing model, missing external data, and a file of another kind each give one clear error."""
    path = tmp_path / "e.onnx"
    onnx.save_model(onnx.load(tiny_model), path, save_as_external_data=True, location="e.data", size_threshold=0)
    (tmp_path / "e.data").unlink()
    (tmp_path / "text.onnx").write_text("no model")

    with pytest.raises(FileAccessError, match=r"no file .*nothing\.onnx"):
        measure_sizes([tmp_path / "nothing.onnx"])
    with pytest.raises(FileAccessError, match=r"e\.onnx': its external data 'e\.data' cannot be read"):
        measure_sizes([path])
    with pytest.raises(ModelError, match="is not an ONNX model"):
        measure_sizes([tmp_path / "text.onnx"])
