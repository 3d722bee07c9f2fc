"""TensorRT plan files as runners."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calibrators.protocols import Array
from engines.device import SIMULATED, Device, DeviceLibrary, open_device
from engines.errors import DeviceError, EngineLoadError, InferenceError
from engines.onnxrt import check_feeds
from engines.optional import require
from engines.profiles import Shape, dynamic_inputs
from engines.runner import TensorSpec
from engines.sidecar import Environment, check_environment, read_plan
from engines.trt_checks import check_driver
from engines.trt_log import tensorrt_log
from engines.trt_session import EngineSession
from engines.trt_types import numpy_dtype

_log = logging.getLogger(__name__)


class TensorRTRunner:
    """Runs a plan file on the GPU. Implements `engines.runner.Runner`.

    Args:
        plan: the file: NAME.engine, its sidecar beside it.
        name: name in tables; the file's name where None.
        trust: load it though no sidecar covers its bytes.
        cuda_graph: launch each run as a CUDA graph, where it can be captured; see `graph_fallback`.
        library: the package for device memory; see `engines.device.open_device`.
        device: the GPU, which stays open afterwards; one is opened where None.
        fetched: outputs that are copied to the host; None for all.

    Attributes:
        sidecar: what is known about the plan; None where only the user vouches for it.
        metadata: what the model that it was built from says of itself, as far as the sidecar tells.
        profiles: its optimization profiles: name of a dynamic input to its smallest, optimal and largest shape.
        graph_fallback: why runs are not launched as a CUDA graph though that was asked for; None where they are, or
            before the first run.

    Raises:
        FileAccessError: the file is missing or cannot be read.
        EngineLoadError: it is truncated, was changed, has no sidecar; without a sidecar also: TensorRT refuses it.
    """

    execution = "native"

    def __init__(
        self,
        plan: str | os.PathLike[str],
        *,
        name: str | None = None,
        trust: bool = False,
        cuda_graph: bool = False,
        library: DeviceLibrary | None = None,
        device: Device | None = None,
        fetched: Collection[str] | None = None,
    ) -> None:
        self.path = Path(plan)
        self.name = name or self.path.name
        self.graph_fallback: str | None = None
        self._trust = trust
        self._cuda_graph = cuda_graph
        self._library = library
        self._device = device
        self._fetched = fetched
        self._stack: ExitStack | None = None
        self._session: EngineSession | None = None
        _, self.sidecar = read_plan(self.path, trust=trust)
        self.metadata: Mapping[str, str] = {} if self.sidecar is None else self.sidecar.metadata
        if self.sidecar is not None:
            self.inputs, self.outputs = self.sidecar.inputs, self.sidecar.outputs
            self.profiles: Sequence[Mapping[str, Sequence[Shape]]] = self.sidecar.profiles
            self.simulated = self.sidecar.environment.gpu == SIMULATED
        else:
            with self._engine() as (trt, engine, device):
                self.inputs, self.outputs = engine_specs(trt, engine)
                self.profiles = engine_profiles(engine, dynamic_inputs(self.inputs))
                self.simulated = device.simulated

    @property
    def session(self) -> EngineSession:
        """The live engine, between `__enter__` and `__exit__`; for those who time its steps one by one."""
        if self._session is None:
            raise RuntimeError("infer() outside of `with runner:`")
        return self._session

    def __enter__(self) -> Self:
        """Open the GPU, load the plan, make its context.

        Raises:
            MissingDependencyError: TensorRT, or a package for the GPU, is not installed.
            DeviceError: there is no GPU, or out of device memory.
            EngineLoadError: the plan was built for another system, TensorRT or GPU; or TensorRT refuses it.
        """
        with ExitStack() as stack:
            trt, engine, device = stack.enter_context(self._engine())
            log = stack.enter_context(tensorrt_log(trt).listen())
            self._session = EngineSession(trt, engine, device, self.name, log, fetched=self._fetched)
            stack.callback(self._close_session)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give everything back: context, engine, memory, in that order."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see `engines.runner.Runner.infer`."""
        session = self.session
        check_feeds(self.name, self.inputs, feeds)
        try:
            session.bind({name: value.shape for name, value in feeds.items()})
            session.copy_in(feeds)
            session.execute()
            session.copy_out()
            session.synchronize()
        except DeviceError as error:  # a kernel's error comes up in whatever call is next
            raise InferenceError(f"{self.name} failed on the GPU: {error}") from error
        results = session.results()
        if self._cuda_graph and not session.captured and self.graph_fallback is None:
            self.graph_fallback = session.capture()
            if self.graph_fallback is not None:
                _log.info("%s runs without a CUDA graph: %s", self.name, self.graph_fallback)
        return results

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
            if self._device is not None:
                session.free_buffers()

    @contextmanager
    def _engine(self) -> Iterator[tuple[Any, Any, Device]]:
        """Load the plan; the device is closed after the engine is gone."""
        trt = require("tensorrt", f"run the engine {self.name}")
        content, sidecar = read_plan(self.path, trust=self._trust)
        own = open_device(self._library) if self._device is None else nullcontext(self._device)
        with own as device, tensorrt_log(trt).listen() as log:
            check_driver(device)
            if sidecar is not None:
                check_environment(self.path, sidecar, Environment.of(trt, device))
            try:
                runtime = trt.Runtime(tensorrt_log(trt).logger)
            except TypeError as error:  # the bindings' word for "TensorRT returned nothing"
                raise EngineLoadError(
                    f"TensorRT {trt.__version__} cannot start to load the engine {str(self.path)!r}: {log.quote()}. "
                    "Check the driver with `trt-int8 doctor`."
                ) from error
            if sidecar is not None and sidecar.version_compatible:
                # Such a plan brings code for the host along. The sidecar covers it, so it is the plan that we built.
                runtime.engine_host_code_allowed = True
            engine = runtime.deserialize_cuda_engine(content)
            del content
            if engine is None:
                raise EngineLoadError(
                    f"TensorRT {trt.__version__} cannot load the engine {str(self.path)!r}: {log.quote()}. Expected a "
                    "plan of this release, built for this GPU; build it again with `trt-int8 build`."
                )
            try:
                yield trt, engine, device
            finally:
                del engine, runtime


def engine_specs(trt: Any, engine: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Describe an engine's inputs and outputs; the names of dynamic axes are not in a plan."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = numpy_dtype(trt, name, engine.get_tensor_dtype(name))
        shape = tuple(int(length) if length >= 0 else None for length in engine.get_tensor_shape(name))
        side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        side.append(TensorSpec(name, dtype, shape))
    return tuple(inputs), tuple(outputs)


def engine_profiles(engine: Any, inputs: Iterable[TensorSpec]) -> tuple[dict[str, tuple[Shape, ...]], ...]:
    """Read an engine's optimization profiles for these inputs, as a sidecar holds them."""
    return tuple(
        {
            spec.name: tuple(
                tuple(int(length) for length in shape) for shape in engine.get_tensor_profile_shape(spec.name, index)
            )
            for spec in inputs
        }
        for index in range(engine.num_optimization_profiles)
    )
