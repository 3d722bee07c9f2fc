"""How named arrays reach a PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from engines.runner import TensorSpec
from trt_int8.errors import ExportError
from trt_int8.input_binding import bind_to_module, bind_to_program, program_inputs


class Attention(nn.Module):
    """A model with an optional input in the middle and one that goes by keyword alone."""

    def forward(
        self, query: torch.Tensor, mask: torch.Tensor | None = None, *, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the query, scaled."""
        return query if scale is None else query * scale


class Sum(nn.Module):
    """A model with any number of inputs."""

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return torch.stack(values).sum(dim=0)


@pytest.mark.parametrize(
    ("names", "order", "args", "kwargs"),
    [
        (["mask", "query"], ("query", "mask"), (1, 0), {}),
        (["query", "scale"], ("query", "scale"), (0,), {"scale": 1}),
        (["image", "weights"], ("image", "weights"), (0, 1), {}),
        (["image", "mask"], ("image", "mask"), (0, 1), {}),
    ],
)
def test_binding_to_a_module(
    names: Sequence[str], order: tuple[str, ...], args: tuple[int, ...], kwargs: dict[str, int]
) -> None:
    """Inputs go by name, in the order of `forward`, where all are parameters; else by position, in their own order."""
    binding = bind_to_module(Attention(), names)
    values = {name: names.index(name) for name in binding.names}
    assert binding.names == order
    assert binding.arguments(values) == (args, kwargs)


def test_parameters_of_any_number() -> None:
    """Inputs of `forward(*values)` go by position, and their shapes are bound together."""
    binding = bind_to_module(Sum(), ["a", "b"])
    assert binding.arguments({"a": 1, "b": 2}) == ((1, 2), {})
    assert binding.by_parameter({"a": 1, "b": 2}) == {"values": (1, 2)}


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["mask", "image"], "'mask' would be passed as 'query'"),
        (["a", "b", "c"], "too many positional arguments"),
        (["mask"], "missing a required argument: 'query'"),
    ],
)
def test_inputs_that_do_not_fit_a_module(names: Sequence[str], text: str) -> None:
    """The message shows the parameters of `forward`."""
    with pytest.raises(ExportError, match=text) as caught:
        bind_to_module(Attention(), names)
    assert "forward(query: " in str(caught.value)


def test_binding_to_a_program() -> None:
    """A program takes its inputs by their names in any order, or as many by position."""
    samples = (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64))
    program = torch.export.export(
        Attention(), samples, dynamic_shapes={"query": {0: torch.export.Dim.AUTO}, "mask": None}
    )
    assert program_inputs(program) == (
        TensorSpec("query", np.dtype(np.float32), (None, 3)),
        TensorSpec("mask", np.dtype(np.int64), (2, 3)),
    )
    binding = bind_to_program(program, ["mask", "query"])
    assert binding.names == ("query", "mask")
    assert binding.arguments({"query": 0, "mask": 1}) == ((0, 1), {})
    assert bind_to_program(program, ["a", "b"]).names == ("a", "b")
    for names in (["query", "b"], ["a"]):
        with pytest.raises(ExportError, match="the program, which takes query, mask"):
            bind_to_program(program, names)


def test_a_program_with_constants_is_refused() -> None:
    """A number that was passed when the program was made is no input that data could fill."""
    program = torch.export.export(Attention(), (torch.ones(2, 3), 3))
    with pytest.raises(ExportError, match="constants beside its tensors query"):
        bind_to_program(program, ["query"])
