"""The bundle's TensorRT engines, of full TensorRT 10 and 11 and of TensorRT-RTX: `ddexport trt` builds them.

The packages are alike but for two things: TensorRT-RTX compiles for the GPU when an engine is first run, and
keeps what it compiled in a file; and it records CUDA graphs by itself.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime import backends, machine
from ddexport.runtime.backends import Arrays, Backend, Configuration, check_signature
from ddexport.runtime.backends._cuda import CudaStream, host_view
from ddexport.runtime.bundle import Graph, Manifest
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.engines import MODULES, PRECISIONS, Engine, Profile, build_command, find_engines, fit
from ddexport.runtime.errors import BackendError, BundleError, OutputError
from ddexport.runtime.files import atomic_write

Tensors: TypeAlias = tuple[Sequence[TensorSpec], Sequence[TensorSpec]]

MAX_CONTEXTS = 16  # one a profile and batch size: a CUDA graph forbids to change the context it was made from
REBUILD = "Build the engine again on this machine; `ddexport doctor` says what is here."

logger = logging.getLogger(__name__)


class TensorRt(Backend):
    """The engines of one folder in one precision, on one stream of one GPU."""

    name = "tensorrt"

    def __init__(
        self, root: Path, manifest: Manifest, configuration: Configuration, threads: int | None = None
    ) -> None:
        super().__init__(root, manifest, configuration, threads)
        chosen = (configuration.folder, configuration.precision)
        sets = (s for s in find_engines(root)[0] if (s.folder.name, s.precision) == chosen)
        self._folder, _, self._engines = next(sets)
        self._gpu: CudaStream | None = None
        if configuration.note:
            logger.warning("%s: %s", configuration, configuration.note)

    @classmethod
    def configurations(
        cls, root: Path, manifest: Manifest, precision: str | None, device: str | None
    ) -> list[Configuration]:
        if device == "cpu":
            return []
        place = partial(Configuration, cls.name, device or "cuda:0")
        index = int((device or "cuda:0").partition(":")[2])
        sets, errors = find_engines(root)
        configurations = []
        for engines in sets:
            if precision in (None, engines.precision):
                obstacle, note, supported = fit(root, manifest, engines, index)
                rank = backends.ENGINE if supported else backends.UNSUPPORTED
                both = (engines.precision, engines.precision)  # of the arithmetic and of the graphs
                configurations.append(place(*both, rank, obstacle, note, engines.folder.name))
        asked = precision or ""
        configurations += [place(asked, asked, backends.ENGINE, error.message) for error in errors]
        if not configurations:
            best = precision or next((p for p in PRECISIONS if p in manifest.precisions), "")
            obstacle = f"engines are built in {', '.join(PRECISIONS)}"
            if best in PRECISIONS:
                obstacle = f"no engines are built: {build_command(root, index, best)}"
            configurations = [place(best, best, backends.ENGINE, obstacle)]
        return configurations

    @property
    def max_batch(self) -> int:
        """The largest batch that all engines take; larger ones are split."""
        return min(engine.max_batch for engine in self._engines.values())

    def _open(self, graph: Graph, closing: ExitStack) -> Session:
        engine = self._engines.get((graph.role, graph.split))
        if engine is None:
            command = build_command(self.root, self.configuration.gpu, graph.precision)
            raise BackendError(f"{self._folder.name} has no engine of {graph.file}", f"Build it: {command}")
        if self._gpu is None:
            self._gpu = CudaStream(self.configuration.gpu)
            self._closing.callback(self._gpu.close)
        self._gpu.use()
        path = self._folder / engine.file
        session = Session(engine, path, self.manifest.tensors(graph), self._gpu, closing)
        closing.callback(self._gpu.use)  # comes first: another thread may close
        return session

    def _run(self, session: Session, feeds: Arrays, names: Sequence[str]) -> Arrays:
        with self._lock:  # stream and buffers are shared
            if self._sessions is None:
                raise BackendError(f"backend {self.name} is closed", "Load the bundle again.")
            session.gpu.use()
            return session.run(feeds, names)


class Session:
    """A loaded engine, its buffers and execution contexts, on one stream; not for several threads at once."""

    def __init__(
        self, engine: Engine, plan: Path, tensors: Tensors, gpu: CudaStream, closing: ExitStack
    ) -> None:
        """tensors: inputs and outputs of the contract. `closing` frees everything. Raises BackendError."""
        self._name, self._profiles, self._max_batch = engine.file, engine.profiles, engine.max_batch
        self._trt: Any = import_module(MODULES[engine.backend])
        self.gpu = gpu
        self._errors: list[str] = []
        # By profile, and by batch size where graphs are recorded; those used last come last.
        self._contexts: dict[tuple[int, int], Any] = {}
        self._graphs: dict[tuple[int, int], Any] = {}
        self._closing = closing = closing.enter_context(ExitStack())  # its own: host memory joins it later
        closing.callback(self._release)
        self._load(engine, _read_plan(plan, engine.sha256))
        self._check(*tensors)
        self._config: Any = None
        self._scratch: tuple[int, int] | None = None
        if hasattr(self._trt, "CudaGraphStrategy"):  # TensorRT-RTX
            self._config = self._engine.create_runtime_config()
            self._config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            closing.callback(use_compiled(self._config, engine, machine.cuda().gpus[gpu.index].target))
        elif size := int(self._engine.device_memory_size_v2):
            # Contexts take turns, so that they can work in the same memory.
            self._scratch = (gpu.allocate(size), size)
            closing.callback(gpu.free, self._scratch[0])
        self._records = self._config is None
        self._inputs, self._outputs = (
            {spec.name: Buffer(spec, self._max_batch, gpu, closing) for spec in side} for side in tensors
        )
        closing.callback(self._drop_contexts)
        self._errors.clear()

    def run(self, feeds: Arrays, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The named outputs for a batch of any size, which is split to the largest that the engine takes."""
        count = len(next(iter(feeds.values())))
        wanted = {name: self._outputs[name] for name in names}
        results = {n: np.empty((count, *buffer.shape[1:]), buffer.dtype) for n, buffer in wanted.items()}
        for start in range(0, count, self._max_batch):
            part = slice(start, min(start + self._max_batch, count))
            profile, batch = pick_profile(part.stop - start, self._profiles)
            try:
                for name, buffer in self._inputs.items():
                    buffer.upload(feeds[name][part], batch)
                self._execute(profile, batch)
                for buffer in wanted.values():
                    buffer.download(part.stop - start)
            except BaseException:
                with suppress(BackendError):
                    self.gpu.wait()  # what is under way uses the buffers
                raise
            self.gpu.wait()
            for name, buffer in wanted.items():
                results[name][part] = buffer.host[: part.stop - start]
        return results

    def _execute(self, profile: int, batch: int) -> None:
        key = (profile, batch if self._records else 0)
        if context := self._contexts.pop(key, None):
            self._contexts[key] = context
        # The first run prepares what a recording must not contain. A size that never returns is not recorded.
        if context and self._records:
            try:
                if key not in self._graphs:
                    self._graphs[key] = self.gpu.record(partial(self._enqueue, context))
            except BackendError as error:
                logger.warning("CUDA graphs are not used for %s: %s", self._name, error.message)
                self._records = False
                self._drop_contexts()
                return self._execute(profile, batch)
            return self.gpu.replay(self._graphs[key])
        context = context or self._new_context(profile)
        shapes = {name: (batch, *buffer.shape[1:]) for name, buffer in self._inputs.items()}
        self._check_done(all(itertools.starmap(context.set_input_shape, shapes.items())), "set_input_shape")
        self._enqueue(context)
        self._contexts[key] = context

    def _enqueue(self, context: Any) -> None:
        self._check_done(context.execute_async_v3(self.gpu.stream), "execute_async_v3")

    def _new_context(self, profile: int) -> Any:
        while len(self._contexts) >= MAX_CONTEXTS:
            self._drop_context(next(iter(self._contexts)))
        how = self._config or self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(how)
        self._check_done(context is not None, "create_execution_context")
        if self._scratch:
            context.set_device_memory(*self._scratch)
        done = context.set_optimization_profile_async(profile, self.gpu.stream)
        self._check_done(done, "set_optimization_profile_async")
        buffers = (self._inputs | self._outputs).items()
        done = all(context.set_tensor_address(name, buffer.address) for name, buffer in buffers)
        self._check_done(done, "set_tensor_address")
        return context

    def _drop_context(self, key: tuple[int, int]) -> None:
        del self._contexts[key]  # the package frees a context when nobody refers to it
        if key in self._graphs:
            self.gpu.free_graph(self._graphs.pop(key))

    def _drop_contexts(self) -> None:
        with ExitStack() as closing:
            for key in self._contexts:
                closing.callback(self._drop_context, key)

    def _load(self, engine: Engine, plan: bytes) -> None:
        try:
            self._runtime: Any = self._trt.Runtime(logger_to(self._trt, self._errors))
        except Exception:  # bindings raise what they like where the library gives nothing
            self._check_done(False, f"starting {engine.backend}")
        if engine.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such a plan brings its own lean runtime
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        self._check_done(self._engine is not None, f"loading {engine.file}")

    def _check(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """The plan must have the tensors of the contract and the profiles of its sidecar."""
        engine, trt = self._engine, self._trt
        dtypes = {trt.DataType.FLOAT: "float32", trt.DataType.INT64: "int64"}
        sides: tuple[list[TensorSpec], list[TensorSpec]] = ([], [])
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            dtype = engine.get_tensor_dtype(name)
            shape = tuple(size if size >= 0 else "dynamic" for size in engine.get_tensor_shape(name))
            side = sides[engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT]
            side.append(TensorSpec(name, dtypes.get(dtype, str(dtype)), shape))
        check_signature(self._name, "inputs", sides[0], inputs)
        check_signature(self._name, "outputs", sides[1], outputs)
        numbers = range(engine.num_optimization_profiles)
        shapes = [engine.get_tensor_profile_shape(inputs[0].name, number) for number in numbers]
        batches = ["/".join(str(shape[0]) for shape in profile) for profile in shapes]
        if batches != list(map(str, self._profiles)):
            other = ", ".join(batches)
            raise BackendError(f"{self._name} has other profiles than its sidecar: {other}", REBUILD)

    def _check_done(self, done: bool, what: str) -> None:
        """The package reports failures by returning nothing and saying why in its log."""
        if not done:
            text = "; ".join(dict.fromkeys(" ".join(message.split()) for message in self._errors))
            self._errors.clear()
            raise BackendError(f"{what} failed: {text[:500] or 'it gives no reason'}", REBUILD)

    def _release(self) -> None:
        self._config = self._engine = None  # before the runtime, which an engine must not outlive
        self._runtime = None


class Buffer:
    """A tensor of the largest batch on the device, and in page-locked host memory once that is needed."""

    def __init__(self, spec: TensorSpec, batch: int, gpu: CudaStream, closing: ExitStack) -> None:
        self.shape, self.dtype = (batch, *map(int, spec.shape[1:])), np.dtype(spec.dtype)
        self._gpu, self._closing, self._bytes = gpu, closing, prod(self.shape) * self.dtype.itemsize
        self.address = gpu.allocate(self._bytes)
        closing.callback(gpu.free, self.address)

    @cached_property
    def host(self) -> NDArray[Any]:
        address = self._gpu.allocate_host(self._bytes)
        self._closing.callback(self._gpu.free_host, address)
        return host_view(address, self._bytes).view(self.dtype).reshape(self.shape)

    def upload(self, images: NDArray[Any], batch: int) -> None:
        """Sends images, padded to the batch size with the last one: a real one, so that none is odd."""
        self.host[: len(images)] = images
        self.host[len(images) : batch] = images[-1]
        self._gpu.upload(self.address, self.host.ctypes.data, self.host[:batch].nbytes)

    def download(self, count: int) -> None:
        self._gpu.download(self.host.ctypes.data, self.address, self.host[:count].nbytes)


def use_compiled(config: Any, engine: Engine, target: str) -> Callable[[], None]:
    """Gives TensorRT-RTX what it compiled of an engine for a GPU before; returns what keeps that in its file.

    The file lies in $XDG_CACHE_HOME, else ~/.cache; without a home it is not kept. Losing it costs time only.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    path = base / "ddexport" / "compiled" / f"{engine.sha256[:32]}-{engine.version}-{target}.bin"
    cache, content = config.create_runtime_cache(), b""
    with suppress(OSError):
        content = path.read_bytes()
    if content:
        cache.deserialize(content)  # gives False for what is of another machine, which is then made anew
    config.set_runtime_cache(cache)

    def save() -> None:
        compiled = bytes(cache.serialize() or b"")
        if base.is_absolute() and compiled not in (b"", content):
            with suppress(OSError, OutputError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as stream:
                    stream.write(compiled)

    return save


def pick_profile(count: int, profiles: Sequence[Profile]) -> tuple[int, int]:
    """The number of the profile for so many images, and the batch size that they are run in.

    The one that pads least, and of those the one tuned for the nearest size. count: at most their largest.
    """
    sizes = {n: max(count, p.minimum) for n, p in enumerate(profiles) if count <= p.maximum}
    best = min(sizes, key=lambda number: (sizes[number], abs(profiles[number].optimum - sizes[number])))
    return best, sizes[best]


def logger_to(trt: Any, errors: list[str]) -> Any:
    """A logger for TensorRT, which keeps errors in a list, and passes all but verbose messages on."""
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in severe:
                errors.append(message)
            if severity != trt.ILogger.VERBOSE:  # thousands of lines
                logger.debug("%s", message)

    return Logger()


def _read_plan(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", "Check its rights.") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        hint = "Do not trust this engine: build it again with ddexport trt, and --force."
        raise BundleError(f"the SHA-256 of {path.name} is not the one in its sidecar", hint)
    return content


ENGINE = TensorRt
