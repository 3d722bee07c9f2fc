"""NAME.engine.json: what a plan file was built from, by what, and for which GPU; checked before the plan is loaded.

A plan runs only with the TensorRT release and on the kind of GPU that it was built for, and it is executable: loading
one that somebody else prepared can run their code. So a plan is loaded only if its sidecar covers its bytes by their
SHA-256, or if the user vouches for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from calibrators.calibration import METHODS
from calibrators.errors import FileAccessError
from calibrators.files import read_bytes, sha256_of_file, write_text
from engines.device import Device, driver_release
from engines.errors import EngineLoadError
from engines.placement_options import PlacementOptions
from engines.runner import TensorSpec

FORMAT = 1
"""Version of the sidecar's own format."""

OWN_KEYS = "trt_int8."
"""What the keys of a model's metadata begin with that this program writes."""


ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
"""What plan files are called; every other model file is taken for ONNX."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What a plan is bound to.

    Attributes:
        tensorrt: its release: "10.16.1.11".
        gpu: name of the GPU.
        compute_capability: of it: "9.0".
        cuda: newest CUDA that the driver serves: "13.0".
        driver: release of the NVIDIA driver, where the system tells it.
        system: operating system and processor: "Linux x86_64".
    """

    tensorrt: str
    gpu: str
    compute_capability: str
    cuda: str
    driver: str | None
    system: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")

    @classmethod
    def of(cls, trt: Any, device: Device) -> Self:
        """Return what plans are bound to here.

        Args:
            trt: the module `tensorrt`.
            device: the GPU.
        """
        return cls(
            tensorrt=str(trt.__version__),
            gpu=device.name,
            compute_capability=device.compute_capability,
            cuda=device.cuda_version,
            driver=driver_release(),
        )


@dataclass(frozen=True, slots=True)
class Provenance:
    """The calibration that an INT8 engine's scales come from.

    Attributes:
        method: "entropy", "percentile 99.99", "entropy2 (TensorRT)", ...
        sha256: of the calibration, or of the calibration cache; None where its origin is not known.
        placement: with which options Q/DQ was placed; None where TensorRT chose the layers, or nothing tells.
    """

    method: str
    sha256: str | None
    placement: PlacementOptions | None = None


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Everything known about a plan file.

    Attributes:
        plan_bytes: size of the plan.
        plan_sha256: its hash.
        environment: what it was built with and for.
        precision: "fp32", "tf32", "fp16", "int8" or "int8+fp16".
        inputs: the model's inputs, in its order.
        outputs: the model's outputs, in its order.
        profiles: optimization profiles: input name to its smallest, optimal and largest shape.
        model: file name of the ONNX model.
        model_sha256: its hash, external data included.
        calibration: where the scales come from; None for engines without INT8.
        options: the builder's options, by name.
        build_seconds: how long TensorRT built.
        warnings: what it warned of.
        metadata: what the model says of itself: the entries of its metadata that this program wrote.
    """

    plan_bytes: int
    plan_sha256: str
    environment: Environment
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    model: str
    model_sha256: str
    calibration: Provenance | None
    options: Mapping[str, Any]
    build_seconds: float
    warnings: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def version_compatible(self) -> bool:
        """Whether newer TensorRT releases can load the plan."""
        return bool(self.options.get("version_compatible"))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        data = asdict(self)
        for side in ("inputs", "outputs"):
            data[side] = [
                {"name": spec.name, "dtype": spec.dtype.name, "shape": spec.shape} for spec in getattr(self, side)
            ]
        return {"format": FORMAT, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is something else.
        """
        fields = dict(data)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"format {data['format']!r} is not {FORMAT}")
        fields["environment"] = Environment(**fields["environment"])
        if fields["calibration"] is not None:
            origin = dict(fields["calibration"])
            placement = origin.pop("placement", None)
            fields["calibration"] = Provenance(**origin, placement=placement and PlacementOptions(**placement))
        for side in ("inputs", "outputs"):
            fields[side] = tuple(_spec(spec) for spec in fields[side])
        fields["profiles"] = tuple(
            {name: tuple(tuple(shape) for shape in shapes) for name, shapes in profile.items()}
            for profile in fields["profiles"]
        )
        fields["warnings"] = tuple(fields["warnings"])
        fields["metadata"] = {str(key): str(value) for key, value in fields.get("metadata", {}).items()}
        return cls(**fields)


def is_engine(model: str | os.PathLike[str]) -> bool:
    """Tell by a file's name whether it is a TensorRT plan."""
    return Path(model).suffix.lower() in ENGINE_SUFFIXES


def sidecar_path(plan: str | os.PathLike[str]) -> Path:
    """Return where a plan's sidecar lies: NAME.engine.json beside NAME.engine."""
    path = Path(plan)
    return path.with_name(path.name + ".json")


def write_sidecar(plan: str | os.PathLike[str], sidecar: Sidecar) -> Path:
    """Write a plan's sidecar, atomically, and return its path."""
    path = sidecar_path(plan)
    write_text(path, json.dumps(sidecar.to_json(), indent=2) + "\n")
    return path


def read_sidecar(plan: str | os.PathLike[str]) -> Sidecar | None:
    """Read a plan's sidecar; None where it has none.

    Raises:
        EngineLoadError: the file is there and is no sidecar.
        FileAccessError: it cannot be read.
    """
    path = sidecar_path(plan)
    if not path.exists():
        return None
    data = read_bytes(path, "the engine's sidecar")
    try:
        return Sidecar.from_json(json.loads(data))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineLoadError(
            f"Cannot load the engine {os.fspath(plan)!r}: {path.name!r} beside it is not a sidecar of this program "
            f"({type(error).__name__}: {error}). Build the engine again with `trt-int8 build`."
        ) from error


def read_plan(plan: str | os.PathLike[str], *, trust: bool = False) -> tuple[bytes, Sidecar | None]:
    """Read a plan file whose bytes its sidecar covers.

    Args:
        plan: the file.
        trust: the user vouches for the file: it is read though there is no sidecar, or one of another content.

    Returns:
        The bytes, and the sidecar; None in place of a sidecar that does not cover them.

    Raises:
        FileAccessError: the file is missing or cannot be read.
        EngineLoadError: it is truncated, was changed, is empty, or has no sidecar.
    """
    path = Path(plan)
    content = read_bytes(path, "the engine")
    if not content:
        raise EngineLoadError(f"Cannot load the engine {str(path)!r}: the file is empty. Build it again.")
    try:
        sidecar = read_sidecar(path)
    except (EngineLoadError, FileAccessError):
        if not trust:
            raise
        sidecar = None
    if sidecar is None:
        if trust:
            return content, None
        raise EngineLoadError(
            f"Cannot load the engine {str(path)!r}: there is no {sidecar_path(path).name!r} beside it that says what "
            "it is. Loading a plan can run code that is hidden in it: pass --trust if you know where it comes from, or "
            "build it with `trt-int8 build`."
        )
    if hashlib.sha256(content).hexdigest() == sidecar.plan_sha256:
        return content, sidecar
    if trust:
        return content, None
    found = (
        f"it is truncated: {len(content)} of {sidecar.plan_bytes} bytes"
        if len(content) < sidecar.plan_bytes
        else "its content was changed after it was built: the SHA-256 is not the one in its sidecar"
    )
    raise EngineLoadError(
        f"Cannot load the engine {str(path)!r}: {found}. Copy both files again, build the engine again, or pass "
        "--trust if you changed it yourself."
    )


def check_environment(plan: str | os.PathLike[str], sidecar: Sidecar, here: Environment) -> None:
    """Check that a plan can run here.

    Raises:
        EngineLoadError: it was built for another system, TensorRT or GPU; says which, and which is here.
    """
    built = sidecar.environment
    found: str | None = None
    if built.system != here.system:
        found = f"it was built on {built.system}, this is {here.system}"
    elif not _release_fits(sidecar, here):
        found = f"it was built with TensorRT {built.tensorrt}, this is TensorRT {here.tensorrt}"
        if sidecar.version_compatible:
            found += "; a version-compatible plan runs with the same release and newer ones, up to the next major one"
    elif not _gpu_fits(sidecar, here):
        found = (
            f"it was built for {built.gpu} (compute capability {built.compute_capability}), this is {here.gpu} "
            f"({here.compute_capability})"
        )
    if found is not None:
        raise EngineLoadError(
            f"Cannot load the engine {os.fspath(plan)!r}: {found}. Build it here: {build_command(plan, sidecar, here)}"
        )


def build_command(plan: str | os.PathLike[str], sidecar: Sidecar, here: Environment) -> str:
    """Return the command that builds an engine again, for what is here, into a folder of its own.

    It names the model that lies beside the plan, which holds its types, scales and Q/DQ; where none does, the model's
    name alone. Where that was written for this plan and is gone, it names the FP32 model, and with which options that
    was given its Q/DQ. The calibration, or what a calibrator took its scales from, is for the user to fill in.
    """
    folder = Path(plan).parent
    beside = folder / sidecar.model
    written = f".{sidecar.precision}.engine.onnx"
    lost = not beside.is_file() and sidecar.model.endswith(written) and not sidecar.options.get("implicit")
    model = f"{sidecar.model.removesuffix(written)}.onnx" if lost else sidecar.model
    words = ["trt-int8", "build", str(beside) if beside.is_file() else model, "--precision", sidecar.precision]
    if lost and sidecar.precision not in ("fp32", "tf32"):
        words += ["--calibration", "FILE", *_scale_words(sidecar.calibration)]
    if sidecar.options.get("implicit"):
        # From TensorRT 11 on there are no calibrators, and scales have to come from a calibration.
        words += ["--implicit", "--data", "DATA"] if _numbers(here.tensorrt) < (11,) else ["--calibration", "FILE"]
    for profile in sidecar.profiles[:1]:
        for name, shapes in profile.items():
            words += ["--shape", f"{name}={','.join('x'.join(map(str, shape)) for shape in shapes)}"]
    if sidecar.options.get("hardware_compatibility", "none") != "none":
        words += ["--hardware-compatibility", str(sidecar.options["hardware_compatibility"])]
    if sidecar.version_compatible:
        words.append("--version-compatible")
    return shlex.join([*words, "--output", str(folder / "rebuilt")])


def sha256_of_model(files: Sequence[Path]) -> str:
    """Return the hash of a model: that of its file, or where it has external data, one over the hashes of all files.

    Raises:
        FileAccessError: one of them is missing or cannot be read.
    """
    try:
        hashes = [sha256_of_file(path) for path in files]
    except OSError as error:
        raise FileAccessError(f"Cannot read the model's file {error.filename!r}: {error.strerror}.") from error
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _scale_words(origin: Provenance | None) -> list[str]:
    """Return the options of `trt-int8 build` that say what became of a calibration, as far as they are known."""
    if origin is None:
        return []
    method, _, percentile = origin.method.partition(" ")
    told = ["--method", method, *(["--percentile", percentile] if percentile else [])] if method in METHODS else []
    return told + ([] if origin.placement is None else origin.placement.words())


def _release_fits(sidecar: Sidecar, here: Environment) -> bool:
    if sidecar.version_compatible:
        built, found = _numbers(sidecar.environment.tensorrt), _numbers(here.tensorrt)
        return built <= found and found[0] <= built[0] + 1
    return here.tensorrt == sidecar.environment.tensorrt


def _gpu_fits(sidecar: Sidecar, here: Environment) -> bool:
    built = sidecar.environment
    match sidecar.options.get("hardware_compatibility"):
        case "ampere_plus":
            return _numbers(here.compute_capability) >= (8, 0)
        case "same_compute_capability":
            return here.compute_capability == built.compute_capability
        case _:
            return here.gpu == built.gpu and here.compute_capability == built.compute_capability


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _spec(data: Mapping[str, Any]) -> TensorSpec:
    shape = None if data["shape"] is None else tuple(data["shape"])
    return TensorSpec(str(data["name"]), np.dtype(data["dtype"]), shape)
