"""PyTorch models as ONNX files. PyTorch's exporter takes about a second a model, so what can share one does."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch  # noqa: TID253
from onnx import TensorProto, helper
from torch import nn  # noqa: TID253

from engines.onnxrt import PRECISION_KEY, OnnxRuntimeRunner
from trt_int8.errors import ExportError, FileAccessError, ModelError
from trt_int8.export import ExportResult, export_onnx


class ConvNet(nn.Module):
    """Every place where a BatchNorm folds: after a convolution, a transposed one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)})
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)
        self.head_norm = nn.BatchNorm1d(5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map [N, 2, 8, 8] to [N, 5]."""
        features = self.stem(image)
        features = torch.relu(features + self.block["norm"](self.block["conv"](features)))
        features = torch.relu(self.up_norm(self.up(features))).mean(dim=(2, 3))
        return self.head_norm(self.head(features))


def randomised(model: nn.Module) -> nn.Module:
    """Give BatchNorms statistics that matter, as training would."""
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small convolutional net, left in training mode."""
    torch.manual_seed(0)
    return randomised(ConvNet()).train()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Seven images."""
    return np.random.default_rng(0).standard_normal((7, 2, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def exported(model: nn.Module, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The net exported with four images."""
    return export_onnx(model, {"image": images[:4]}, tmp_path_factory.mktemp("exported") / "model.onnx")


def run(path: Path, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """Run an ONNX file."""
    with OnnxRuntimeRunner(path) as runner:
        return runner.infer(feeds)


def test_the_file_computes_what_the_model_does(exported: ExportResult, model: nn.Module, images: np.ndarray) -> None:
    """At a batch that the export never saw, ONNX Runtime gives PyTorch's outputs."""
    model.eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    model.train()
    np.testing.assert_allclose(run(exported.path, image=images)["output"], expected, rtol=1e-4, atol=1e-5)


def test_the_result_tells_what_was_written(exported: ExportResult) -> None:
    """Specs, differences at both batch sizes, hash, size, and nothing to remark."""
    assert [str(spec) for spec in exported.inputs] == ["image: float32 (batch, 2, 8, 8)"]
    assert [str(spec) for spec in exported.outputs] == ["output: float32 (batch, 5)"]
    assert exported.opset == 20
    assert [(item.output, item.batch) for item in exported.differences] == [("output", 4), ("output", 1)]
    assert all(0 <= item.max_rel < 1e-4 for item in exported.differences)
    content = exported.path.read_bytes()
    assert exported.sha256 == hashlib.sha256(content).hexdigest()
    assert exported.size_bytes == len(content)
    assert (exported.data_path, exported.notes) == (None, ())
    assert exported.to_json()["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 2, 8, 8]}]


def test_nothing_but_the_file_is_left(exported: ExportResult) -> None:
    """The folder in which the file was made and checked is gone."""
    assert list(exported.path.parent.iterdir()) == [exported.path]


def test_batchnorm_is_folded_and_nodes_bear_module_names(exported: ExportResult) -> None:
    """Each layer is one node, named after the module that holds its weights, and so is the tensor it makes."""
    proto = onnx.load(exported.path)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    layers = {node.name: node.output[0] for node in proto.graph.node if node.op_type.startswith(("Conv", "Gemm"))}
    assert layers == {
        "stem.0/Conv": "stem.0/Conv",
        "block.conv/Conv": "block.conv/Conv",
        "up/ConvTranspose": "up/ConvTranspose",
        "head/Gemm": "output",
    }
    assert {"stem.2/Relu", "Add", "Relu", "Relu_1"} <= {node.output[0] for node in proto.graph.node}


def test_shapes_are_inferred_and_no_paths_are_told(exported: ExportResult) -> None:
    """Every activation has a shape with the batch free; source paths of this machine are not in the file."""
    proto = onnx.load(exported.path)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in proto.graph.value_info
    }
    assert shapes["up/ConvTranspose"] == ["batch", 3, 16, 16]
    assert str(Path(__file__).parent).encode() not in exported.path.read_bytes()
    assert {entry.key: entry.value for entry in proto.metadata_props} == {PRECISION_KEY: "fp32"}


def test_the_model_is_left_in_the_mode_it_was_in(exported: ExportResult, model: nn.Module) -> None:
    """A model in training is exported in evaluation mode and goes on training."""
    assert all(part.training for part in model.modules())


class Tokens(nn.Module):
    """Integer inputs, a scalar, one input without use, and outputs in a nest of containers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 3)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, temperature: torch.Tensor, position: torch.Tensor
    ) -> dict[str, torch.Tensor | list[torch.Tensor] | None]:
        """Map [N, L] ids and mask to [N, 3] and the hidden states."""
        hidden = self.table(ids) * mask[..., None]
        further = torch.relu(self.first(hidden))
        logits = self.second(further.sum(dim=1)) / temperature
        return {"logits": logits, "hidden": [hidden, further], "cache": None, "mask": 1 - mask}


def test_integer_inputs_scalars_and_nested_outputs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Inputs go by name in any order, dicts name the outputs, other axes can be free, and nothing is printed."""
    torch.manual_seed(0)
    model = Tokens().eval()
    generator = np.random.default_rng(0)
    feeds = {
        "mask": generator.integers(0, 2, (1, 5)),
        "ids": generator.integers(0, 11, (1, 5)),
        "temperature": np.array(1.5, dtype=np.float32),
        "position": np.arange(3),
    }
    free = {name: {0: "batch", 1: "length"} for name in ("ids", "mask")}
    result = export_onnx(model, feeds, tmp_path / "model.onnx", dynamic=free)
    assert [str(spec) for spec in result.inputs] == [
        "ids: int64 (batch, length)",
        "mask: int64 (batch, length)",
        "temperature: float32 ()",
    ]
    assert [spec.name for spec in result.outputs] == ["logits", "hidden_0", "hidden_1", "mask_output"]
    assert {item.batch for item in result.differences} == {1, 2}
    assert result.notes == ("No output depends on position: left out of the graph.",)
    other = {**feeds, "ids": generator.integers(0, 11, (4, 9)), "mask": generator.integers(0, 2, (4, 9))}
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(value) for name, value in other.items()})
    other.pop("position")
    found = run(result.path, **other)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["hidden_1"], expected["hidden"][1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["mask_output"], 1 - other["mask"])
    assert capfd.readouterr() == ("", "")


class Pair(nn.Module):
    """Two outputs, and a fixed batch inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map two [2, 4] to [2, 4] and [8]."""
        return self.linear(left), (left * right).reshape(2, 2, 2).flatten()


def test_a_fixed_batch_is_kept_on_request(tmp_path: Path) -> None:
    """With `dynamic={}` the shapes are those of the samples, which are checked alone; inputs may go by position."""
    samples = {"a": torch.arange(8.0).reshape(2, 4), "b": torch.ones(2, 4)}
    result = export_onnx(
        Pair(), samples, tmp_path / "model.onnx", dynamic={}, output_names=["mapped", "product"], opset=19
    )
    assert [str(spec) for spec in result.inputs] == ["a: float32 (2, 4)", "b: float32 (2, 4)"]
    assert [spec.name for spec in result.outputs] == ["mapped", "product"]
    assert [(item.output, item.batch) for item in result.differences] == [("mapped", None), ("product", None)]
    assert result.opset == 19
    found = run(result.path, a=samples["a"].numpy(), b=samples["b"].numpy())
    np.testing.assert_array_equal(found["product"], np.arange(8, dtype=np.float32))


class Choosy(nn.Module):
    """Flow that depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Negate x where its sum is negative."""
        if x.sum() > 0:
            return x
        return -x


class Counting(nn.Module):
    """Computes something else at every call, as code with hidden state does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a multiple of x."""
        return x * float(next(self.calls))


class Numbered(nn.Module):
    """Returns what is no tensor."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return x and a number."""
        return x, 3


class Halved(nn.Module):
    """Returns what numpy has no dtype for."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return x in another format."""
        return {"half": x.bfloat16()}


class Silent(nn.Module):
    """Returns nothing."""

    def forward(self, x: torch.Tensor) -> None:
        """Forget to return."""
        x.relu()


class Reluctant(nn.Module):
    """Code that refuses to be traced, with a reason of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, unless asked by an exporter."""
        if torch.compiler.is_exporting():
            raise NotImplementedError("no export of this one.\nAsk its makers.")
        return x


class Eigenvalues(nn.Module):
    """An operator without a counterpart in ONNX."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [N, 4, 4] to [N, 4]."""
        return torch.linalg.eigvalsh(x)


@pytest.mark.parametrize(
    ("model", "shape", "text"),
    [
        (Choosy(), (2, 4), r"flow depends on values.* at test_export.py:\d+: `if x.sum\(\) > 0:`\. .*torch\.where"),
        (Counting(), (2, 4), r"does not reproduce its source at batch 2: output 'output' differs"),
        (Numbered(), (2, 4), r"returns int \(output_1\); expected tensors"),
        (Reluctant(), (2, 4), r"cannot export the model: no export of this one\. Try torch\.export"),
        (Halved(), (2, 4), r"returns torch.bfloat16 \(half\)"),
        (Silent(), (2, 4), r"returns no tensor"),
        (Eigenvalues(), (2, 4, 4), r"no counterpart of the operator aten\._linalg_eigh"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], model: nn.Module, shape: tuple[int, ...], text: str
) -> None:
    """The reason and a way out, nothing printed, no file left."""
    with pytest.raises(ExportError, match=text) as caught:
        export_onnx(model, {"x": np.ones(shape, dtype=np.float32)}, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_written_into_the_code_is_found(tmp_path: Path) -> None:
    """A reshape to two samples is told with the input, its axis, and the number."""
    samples = {"left": np.ones((2, 4), dtype=np.float32), "right": np.ones((2, 4), dtype=np.float32)}
    with pytest.raises(ExportError, match=r"fixes axis 0 of input '(left|right)' at 2.*dynamic=\{\}"):
        export_onnx(Pair(), samples, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("inputs", "options", "text"),
    [
        ({}, {}, "without sample inputs"),
        ({"x": np.ones((2, 5), np.float32)}, {}, r"\(x float32 \(2, 5\)\): RuntimeError: mat1 and mat2"),
        ({"x": np.ones((2, 4), np.float64)}, {}, r"x float64 .*dtype"),
        ({"x": np.ones((0, 4), np.float32)}, {}, "'batch' is 0 in 'x'"),
        ({"x": np.ones((2, 4), np.float32)}, {"dynamic": {"y": {0: "n"}}}, "'y' free: there is no such input.* are x"),
        ({"x": np.ones((2, 4), np.float32)}, {"dynamic": {"x": {2: "n"}}}, r"axis 2 of 'x' free: .* shape \(2, 4\)"),
        ({"x": np.ones((2, 4), np.float32)}, {"output_names": ["a", "b"]}, r"outputs a, b: the model has 1 \(output\)"),
        ({"x": np.ones((2, 4), np.float32)}, {"opset": 28}, "Runtime refuses the exported model"),
        ({"x": np.ones((2, 4), np.float32)}, {"opset": 99}, "cannot write opset 99"),
    ],
)
def test_samples_and_options_that_do_not_fit(
    tmp_path: Path, inputs: dict[str, np.ndarray], options: dict[str, object], text: str
) -> None:
    """What does not fit is told with what would."""
    with pytest.raises(ExportError, match=text):
        export_onnx(nn.Linear(4, 2), inputs, tmp_path / "model.onnx", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_samples_must_agree_on_the_batch(tmp_path: Path) -> None:
    """Inputs that share an axis need the same number of samples."""
    samples = {"left": np.ones((2, 4), dtype=np.float32), "right": np.ones((3, 4), dtype=np.float32)}
    with pytest.raises(ExportError, match="'batch' is 2 in 'left' and 3 in 'right'"):
        export_onnx(Pair(), samples, tmp_path / "model.onnx")


def test_weights_must_be_fp32_and_on_the_cpu(tmp_path: Path) -> None:
    """A half-precision model is not a calibration's starting point, and samples would not meet it on another device."""
    with pytest.raises(ExportError, match=r"lies on meta \(weight\)\. Move it with model\.cpu\(\)"):
        export_onnx(nn.Linear(4, 2, device="meta"), {"x": np.ones((2, 4), np.float32)}, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"'weight' of torch.float16.*model.float\(\)"):
        export_onnx(nn.Linear(4, 2).half(), {"x": np.ones((2, 4), np.float32)}, tmp_path / "model.onnx")


def test_programs_keep_their_axes(tmp_path: Path) -> None:
    """A program's free batch is called "batch", whatever PyTorch calls it; it brings samples of its own."""
    linear = nn.Linear(4, 2)
    free = {"input": {0: torch.export.Dim("n", min=1)}}
    program = torch.export.export(linear, (torch.ones(3, 4),), dynamic_shapes=free)
    sample = np.ones((1, 4), dtype=np.float32)
    result = export_onnx(program, {"x": sample}, tmp_path / "model.onnx")
    assert [str(spec) for spec in (*result.inputs, *result.outputs)] == [
        "x: float32 (batch, 4)",
        "output: float32 (batch, 2)",
    ]
    assert [item.batch for item in result.differences] == [1, 2]
    with torch.no_grad():
        np.testing.assert_allclose(run(result.path, x=sample)["output"], linear(torch.from_numpy(sample)), rtol=1e-5)
    torch.export.save(program, tmp_path / "model.pt2")
    alone = export_onnx(tmp_path / "model.pt2", {}, tmp_path / "model.onnx")
    assert [spec.name for spec in alone.inputs] == ["input"]
    assert [item.batch for item in alone.differences] == [3, 1]
    with pytest.raises(ExportError, match="free axes of a program"):
        export_onnx(program, {"x": sample}, tmp_path / "model.onnx", dynamic={})


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """A foreign file: BatchNorm before and after a convolution, opset 13, more than a kilobyte of weights."""
    generator = np.random.default_rng(0)
    weights = {"weight": generator.standard_normal((40, 2, 1, 5)).astype(np.float32)}
    for name, channels in (("before", 2), ("after", 40)):
        for statistic in ("scale", "shift", "mean", "variance"):
            weights[f"{name}.{statistic}"] = generator.random(channels, dtype=np.float32) + 0.5
    nodes = [
        helper.make_node("BatchNormalization", ["x", *(name for name in weights if "before" in name)], ["a"], "first"),
        helper.make_node("Conv", ["a", "weight"], ["b"], "conv"),
        helper.make_node("BatchNormalization", ["b", *(name for name in weights if "after" in name)], ["y"], "second"),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 40, 8, 4])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    path = tmp_path / "foreign.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_an_onnx_file_is_simplified_and_compared_with_itself(
    onnx_file: Path, images: np.ndarray, tmp_path: Path
) -> None:
    """The BatchNorm behind the convolution is folded; the one before it stays, which is told."""
    result = export_onnx(onnx_file, {"x": images}, tmp_path / "model.onnx")
    assert [node.op_type for node in onnx.load(result.path).graph.node] == ["BatchNormalization", "Conv"]
    assert [item.batch for item in result.differences] == [7, 1]
    assert result.opset == 13
    assert [note.split(":")[0] for note in result.notes] == [
        "No PyTorch model to compare with",
        "BatchNorm stays where it follows no layer with weights",
    ]
    np.testing.assert_allclose(run(result.path, x=images)["y"], run(onnx_file, x=images)["y"], rtol=1e-4, atol=1e-5)


def test_an_onnx_file_needs_no_samples(onnx_file: Path, tmp_path: Path) -> None:
    """Without samples it is checked and not run; without simplification it keeps its nodes."""
    result = export_onnx(str(onnx_file), {}, tmp_path / "model.onnx", simplify=False)
    assert [node.name for node in onnx.load(result.path).graph.node] == ["first", "conv", "second"]
    assert result.differences == ()
    assert result.notes[0].startswith("Nothing to compare with")


def test_large_weights_lie_beside_the_model(onnx_file: Path, images: np.ndarray, tmp_path: Path) -> None:
    """Above the limit the weights get a file of their own; a later export that needs none takes it away."""
    folder = tmp_path / "out"
    result = export_onnx(onnx_file, {"x": images}, folder / "model.onnx", external_data_above=100)
    data = folder / "model.onnx.data"
    assert result.data_path == data
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert result.size_bytes == data.stat().st_size + result.path.stat().st_size
    assert "model.onnx.data: keep it beside" in result.notes[-1]
    np.testing.assert_allclose(run(result.path, x=images)["y"], run(onnx_file, x=images)["y"], rtol=1e-4, atol=1e-5)
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(result.path.read_bytes())
    with pytest.raises(ModelError, match=r"Cannot read the model .*alone\.onnx.*model\.onnx\.data"):
        export_onnx(alone, {}, tmp_path / "copy.onnx")
    export_onnx(onnx_file, {}, folder / "model.onnx")
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def test_an_invalid_graph_is_refused(onnx_file: Path, tmp_path: Path) -> None:
    """A node that the standard does not have is named, a cycle is told, and the old file stays."""
    proto = onnx.load(onnx_file)
    proto.graph.node[1].op_type = "Konv"
    broken, output = tmp_path / "broken.onnx", tmp_path / "model.onnx"
    onnx.save(proto, broken)
    output.write_bytes(b"an older model")
    with pytest.raises(ExportError, match=r"not valid ONNX: .*Konv"):
        export_onnx(broken, {}, output, simplify=False)
    proto.graph.node[1].op_type = "Conv"
    proto.graph.node[0].input[0] = "y"
    onnx.save(proto, broken)
    with pytest.raises(ExportError, match=r"onnxslim cannot simplify the graph: .*simplify=False"):
        export_onnx(broken, {}, output)
    assert output.read_bytes() == b"an older model"


def test_files_that_cannot_be_read_or_written(onnx_file: Path, tmp_path: Path) -> None:
    """Something else than ONNX, no file at all, and a folder that is a file."""
    text = tmp_path / "text.onnx"
    text.write_text("this is not a model")
    with pytest.raises(ModelError, match="not an ONNX model"):
        export_onnx(text, {}, tmp_path / "model.onnx")
    with pytest.raises(FileAccessError, match="no file"):
        export_onnx(tmp_path / "other.onnx", {}, tmp_path / "model.onnx")
    with pytest.raises(FileAccessError, match="Cannot write"):
        export_onnx(onnx_file, {}, text / "model.onnx")
