"""Loading a user's PyTorch model and its weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch  # noqa: TID253
from safetensors.torch import save_file
from torch import nn  # noqa: TID253

from trt_int8.errors import ConfigError, ExportError, FileAccessError
from trt_int8.models import load_model

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.module = nn.Linear(width, 2)

    def forward(self, x):
        return self.module(self.first(x))

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.first(x))

ready = Plain()
number = 7

dict = dict  # a factory without a signature

def words():
    return "words"

def fails():
    raise KeyError("the user's own")
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with models; what importing it leaves on the import path is taken back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "net.py"
    file.write_text(SOURCE)
    return str(file)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Weights for `Plain`, none of them as they are initialised."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"first.weight": (4, 3), "first.bias": (4,), "norm.weight": (4,), "norm.bias": (4,)}
    shapes |= {"norm.running_mean": (4,), "norm.running_var": (4,)}
    values = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return {**values, "norm.num_batches_tracked": torch.tensor(3)}


def loaded(source: str, checkpoint: Path, **options: str) -> dict[str, torch.Tensor]:
    """Load a module with a checkpoint and return its state."""
    model = load_model(source, checkpoint=checkpoint, **options)
    assert isinstance(model, nn.Module)
    return dict(model.state_dict())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare two states, names and values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_factory_of_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`package.module:factory` looks in the current folder, calls the factory, and the model is in evaluation mode."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "a_users_net.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    model = load_model("a_users_net:Net", arguments={"width": 5})
    assert isinstance(model, nn.Module)
    assert model.get_parameter("first.weight").shape == (5, 3)
    assert not any(part.training for part in model.modules())


def test_a_module_object_is_a_model(net: str) -> None:
    """What the name stands for may be a module already; it takes no arguments."""
    assert isinstance(load_model(f"{net}:ready"), nn.Module)
    with pytest.raises(ExportError, match="module already"):
        load_model(f"{net}:ready", arguments={"width": 5})


def test_arguments_that_do_not_fit_name_the_signature(net: str) -> None:
    """An argument that the factory does not take is refused with those that it takes."""
    with pytest.raises(ExportError, match=r"'depth'\. It takes \(width=4\); given were depth"):
        load_model(f"{net}:Net", arguments={"depth": 5})


def test_an_error_of_the_factory_passes_through(net: str) -> None:
    """The user's own exception keeps its type and traceback."""
    with pytest.raises(KeyError, match="the user's own"):
        load_model(f"{net}:fails")


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("words", ExportError, "of type str; expected a torch.nn.Module"),
        ("number", ExportError, "of type int"),
        ("dict", ExportError, "of type dict; expected"),
        ("Nte", ConfigError, "did you mean 'Net'"),
    ],
)
def test_what_is_no_model_is_refused(net: str, name: str, error: type[Exception], text: str) -> None:
    """Something else than a module, and a name that is not there, are said to be so."""
    with pytest.raises(error, match=text):
        load_model(f"{net}:{name}")


def test_a_source_of_no_known_form_is_refused() -> None:
    """A plain path is neither an entry point nor a program."""
    with pytest.raises(ExportError, match=r"neither package\.module:factory"):
        load_model("model.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_stripped(net: str, tmp_path: Path, weights: dict[str, torch.Tensor], prefix: str) -> None:
    """Weights saved from DataParallel, torch.compile or both load as those of the module inside."""
    file = tmp_path / "weights.safetensors"
    save_file({f"{prefix}{name}": value for name, value in weights.items()}, file)
    assert_same(loaded(f"{net}:Plain", file), weights)


def test_a_part_called_module_keeps_its_name(net: str, tmp_path: Path) -> None:
    """A prefix that the model's own names bear is none to strip."""
    torch.manual_seed(0)
    model = load_model(f"{net}:Net")
    assert isinstance(model, nn.Module)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    assert_same(loaded(f"{net}:Net", tmp_path / "weights.pt"), state)


def test_nested_weights_are_found(net: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """The one entry of a training checkpoint that is a dict of tensors holds the weights."""
    optimizer = {"state": {0: {"step": torch.tensor(1)}}, "param_groups": [{"lr": 0.1}]}
    file = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "best": 0.9, "state_dict": weights, "optimizer": optimizer}, file)
    assert_same(loaded(f"{net}:Plain", file), weights)


def test_two_sets_of_weights_need_a_choice(net: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Averaged weights beside the plain ones are not chosen silently."""
    averaged = {name: value + 1 for name, value in weights.items()}
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": weights, "ema": averaged, "epoch": 1}, file)
    with pytest.raises(ExportError, match=r"weights under model, ema\. Choose with checkpoint_key"):
        load_model(f"{net}:Plain", checkpoint=file)
    assert_same(loaded(f"{net}:Plain", file, checkpoint_key="ema"), averaged)
    with pytest.raises(ExportError, match=r"'epoch'.*no dict of tensors.*hold weights: model, ema"):
        load_model(f"{net}:Plain", checkpoint=file, checkpoint_key="epoch")
    with pytest.raises(ExportError, match=r"'state_dict'.*there is no such entry"):
        load_model(f"{net}:Plain", checkpoint=file, checkpoint_key="state_dict")


def test_strip_prefix_takes_only_what_bears_it(net: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Weights of a model inside a larger one are chosen by their prefix, with or without its dot."""
    file = tmp_path / "lightning.pt"
    torch.save({"loss.scale": torch.ones(1), **{f"net.{name}": value for name, value in weights.items()}}, file)
    assert_same(loaded(f"{net}:Plain", file, strip_prefix="net."), weights)
    assert_same(loaded(f"{net}:Plain", file, strip_prefix="net"), weights)
    with pytest.raises(ExportError, match=r"no name starts with it. Its names are loss.scale, net.first.weight"):
        load_model(f"{net}:Plain", checkpoint=file, strip_prefix="model.")


def test_names_that_do_not_fit_are_counted_and_named(
    net: str, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    """Missing and unexpected tensors are both told, the first few by name."""
    file = tmp_path / "weights.pt"
    extra = {f"head.{index}": torch.ones(1) for index in range(8)}
    torch.save({**{name: value for name, value in weights.items() if "first" not in name}, **extra}, file)
    with pytest.raises(ExportError) as caught:
        load_model(f"{net}:Plain", checkpoint=file)
    assert "lacks 2 of the model's tensors (first.weight, first.bias)" in str(caught.value)
    assert "no place for 8 of its tensors (head.0, head.1, head.2, head.3, head.4, and 3 more)" in str(caught.value)


def test_shapes_that_do_not_fit_are_named(net: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Both shapes stand in the message."""
    file = tmp_path / "weights.pt"
    torch.save({**weights, "first.weight": torch.ones(8, 3)}, file)
    with pytest.raises(ExportError, match=r"first.weight is \(8, 3\) where the model has \(4, 3\)"):
        load_model(f"{net}:Plain", checkpoint=file)


class Payload:
    """A pickle that runs a command when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_runs_code_is_refused(net: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """What the pickle asked for is named, and was not run."""
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": weights, "payload": Payload(tmp_path / "made")}, file)
    with pytest.raises(ExportError, match=r"wants to import posix.mkdir.*torch.save\(model.state_dict\(\)"):
        load_model(f"{net}:Plain", checkpoint=file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(net: str, tmp_path: Path, name: str) -> None:
    """Bytes of another kind are no checkpoint, whatever the suffix says."""
    (tmp_path / name).write_bytes(b"this is not a checkpoint")
    with pytest.raises(ExportError, match="Cannot read the checkpoint"):
        load_model(f"{net}:Plain", checkpoint=tmp_path / name)
    with pytest.raises(FileAccessError, match="no file"):
        load_model(f"{net}:Plain", checkpoint=tmp_path / f"other-{name}")


@pytest.mark.parametrize(("content", "text"), [([1, 2], "it holds list"), ({"epoch": 1}, "no weights, only epoch")])
def test_a_checkpoint_without_weights_is_refused(net: str, tmp_path: Path, content: object, text: str) -> None:
    """What the file holds instead is told."""
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ExportError, match=text):
        load_model(f"{net}:Plain", checkpoint=tmp_path / "weights.pt")


def test_a_key_without_a_checkpoint_is_refused(net: str) -> None:
    """A key or a prefix belongs to a checkpoint."""
    with pytest.raises(ExportError, match="no checkpoint"):
        load_model(f"{net}:Plain", checkpoint_key="state_dict")


def test_programs(tmp_path: Path) -> None:
    """A .pt2 file loads as a program that computes what the module did; it takes no arguments."""
    linear = nn.Linear(3, 2)
    sample = torch.ones(2, 3)
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(linear, (sample,)), file)
    program = load_model(str(file))
    assert isinstance(program, torch.export.ExportedProgram)
    torch.testing.assert_close(program.module()(sample), linear(sample))
    with pytest.raises(ExportError, match="holds its graph and its weights"):
        load_model(str(file), checkpoint=tmp_path / "weights.pt")
    with pytest.raises(FileAccessError, match="no file"):
        load_model(str(tmp_path / "other.pt2"))
    file.write_bytes(b"this is not a program")
    with pytest.raises(ExportError, match=r"Cannot load .*model\.pt2' as a PyTorch program"):
        load_model(str(file))
