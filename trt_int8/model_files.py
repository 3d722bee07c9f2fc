"""All files that a model lies in, so that a result does not replace one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.onnxrt import load_header
from engines.sidecar import is_engine, read_sidecar, sidecar_path
from engines.size import external_files
from trt_int8.errors import ConfigError, EngineLoadError, FileAccessError, ModelError
from trt_int8.outputs import check_output


def check_result_file(file: Path, *sources: Any) -> None:
    """Check the file of `--json`; see `trt_int8.outputs.check_output`.

    Args:
        file: where the result will be written.
        sources: models, with whatever belongs to them, and data.

    Raises:
        ConfigError: it is one of the files that are read, or would be taken for an engine's sidecar.
        FileAccessError: it cannot be written there.
    """
    models = [Path(source) for source in sources if isinstance(source, Path)]
    others = [source for source in sources if not isinstance(source, Path)]
    check_output(file, *others, *(part for model in models for part in files_of(model)), option="--json")
    engine = file.with_suffix("")
    if file.suffix == ".json" and is_engine(engine) and engine.exists():
        raise ConfigError(
            f"Cannot write {os.fspath(file)!r}: that is where the sidecar of {engine.name!r} belongs, without which it "
            "is not loaded. Name another file with --json."
        )


def files_of(model: str | os.PathLike[str]) -> Iterator[Path]:
    """List the files of a model that may be there: an engine's sidecar and its model, an ONNX file's external data.

    Args:
        model: an engine or an ONNX file, which may be missing or damaged: that is for its reader to say.
    """
    path = Path(model)
    yield path
    if not is_engine(path):
        try:
            yield from (path.parent / name for name in external_files(load_header(path)))
        except (FileAccessError, ModelError):
            return
        return
    yield sidecar_path(path)
    kept = {f"{path.name}.onnx"}
    try:
        sidecar = read_sidecar(path)
        kept |= set() if sidecar is None else {sidecar.model}
    except (EngineLoadError, FileAccessError):
        pass
    for name in sorted(kept):
        yield from files_of(path.with_name(name))
