"""Mend what `engines.lint` finds, where that is safe, into another file.

Safe means: the values stay the same, or move by no more than the rounding of the pairs that are taken away or made one.
What each fix may change is said by its function, and tested by running both models.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from calibrators.errors import FileAccessError
from engines.errors import ModelError
from engines.graph import save_model
from engines.lint import LintReport, lint
from engines.lint_editor import Editor, Outcome
from engines.lint_fixes_placement import (
    move_before_pad,
    take_branch_pairs,
    take_lonely_pairs,
    take_requantization,
    take_split_pairs,
    unify_concats,
)
from engines.lint_fixes_values import (
    float_bias,
    fold_int32,
    fold_parameters,
    halve_scales,
    match_scale_type,
    shift_codes,
    widen_zero_point,
    write_axis,
    write_zero_point,
)
from engines.lint_rules import Release
from engines.placement import Target
from engines.size import external_files

FIXES: tuple[Callable[[Editor], Iterator[Outcome]], ...] = (
    fold_parameters,
    write_axis,
    write_zero_point,
    widen_zero_point,
    shift_codes,
    fold_int32,
    float_bias,
    match_scale_type,
    halve_scales,
    take_split_pairs,
    take_branch_pairs,
    take_requantization,
    take_lonely_pairs,
    move_before_pad,
    unify_concats,
)
"""In this order: what a pair holds before where it stands, and whether it stays before which scale it has."""

_PASSES = 4
"""A fix can uncover another place, such as a pair that only a removed one read. Few stand one behind the other."""


@dataclass(frozen=True, slots=True)
class MendResult:
    """A mended model.

    Attributes:
        path: the file.
        before: what was found in the model.
        after: what is found in the file.
        mended: what was done.
        left: what could not be done, and why.
    """

    path: Path
    before: LintReport
    after: LintReport
    mended: tuple[Outcome, ...]
    left: tuple[Outcome, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: the report on the model, with "fix" for what became of it."""
        return {
            **self.before.to_json(),
            "fix": {
                "output": self.path.name,
                "mended": [
                    {key: value for key, value in asdict(item).items() if key != "mended"} for item in self.mended
                ],
                "left": [{key: value for key, value in asdict(item).items() if key != "mended"} for item in self.left],
                "after": self.after.to_json(),
            },
        }


def mend(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tensorrt: Release | None = None,
    target: Target | None = None,
) -> MendResult:
    """Write a model in which everything is mended that can be, for TensorRT, and lint it again.

    Weights in external data are copied to `OUTPUT.data` piece by piece, never held in memory together.

    Args:
        model: the file; it is not changed.
        output: the file to write; not the model, nor its external data.
        tensorrt: see `engines.lint.lint`.
        target: see `engines.lint.lint`; "cpu" is refused.

    Raises:
        FileAccessError: the model cannot be read, or `output` cannot be written, or is part of the model.
        ModelError: not an ONNX model, or one for the CPU.
    """
    source, path = Path(model), Path(output)
    before = lint(source, tensorrt=tensorrt, target=target)
    if before.target == "cpu":
        raise ModelError(
            f"Cannot mend {str(source)!r} for the target cpu: the fixes are TensorRT's. Quantize the float model again "
            "with `trt-int8 quantize --target cpu`, or name --target tensorrt."
        )
    _check_place(source, path)
    editor = Editor(source)
    mended: list[Outcome] = []
    left: list[Outcome] = []
    for _ in range(_PASSES):
        left = []
        done = len(mended)
        for fix in FIXES:
            outcomes = list(fix(editor))
            mended.extend(outcome for outcome in outcomes if outcome.mended)
            left.extend(outcome for outcome in outcomes if not outcome.mended)
            if any(outcome.mended for outcome in outcomes):
                editor.look_again()
        if len(mended) == done:
            break
    _save(editor, path)
    after = lint(path, tensorrt=tensorrt, target=target)
    return MendResult(path, before, after, tuple(mended), tuple(left))


def _save(editor: Editor, path: Path) -> None:
    """Write the model; the weights of one with external data go to a file of their own again."""
    model = editor.finish()
    if not any(isinstance(tensor, ir.ExternalTensor) for tensor in _tensors(model)):
        save_model(model, path)
        return
    data = path.with_name(path.name + ".data")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
            whole = Path(folder) / path.name
            ir.save(model, whole, external_data=data.name)
            written = whole.with_name(data.name)
            if written.exists():  # without weights above the size that is worth a file there is none
                written.replace(data)
            whole.replace(path)
    except OSError as error:
        raise FileAccessError(
            f"Cannot write {str(path)!r}: {error.strerror or error}. Free space, or choose another folder."
        ) from error


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in [model.graph, *model.graph.subgraphs()]:
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)


def _check_place(source: Path, output: Path) -> None:
    """Refuse to write over the model or the weights that are read."""
    header = onnx.load(source, load_external_data=False)
    read = [source, *(source.parent / name for name in external_files(header))]
    written = [output, output.with_name(output.name + ".data")]
    for old in read:
        for new in written:
            if new.exists() and old.exists() and new.samefile(old):
                raise FileAccessError(
                    f"Cannot write {str(output)!r}: {str(new)!r} is part of the model that is read. Name another file."
                )
