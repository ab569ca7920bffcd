"""One way to load and run a plan, for full TensorRT 10 and 11 and for TensorRT-RTX.

The packages are alike but for their names and for two things: TensorRT-RTX compiles for the GPU when a plan
is first run, and keeps what it compiled in a cache; and it records CUDA graphs by itself.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddexport.runtime.contract import BATCH
from ddexport.runtime.engines import Engine, Profile, SizeRange
from ddexport.runtime.errors import BackendError, OutputError
from ddexport.runtime.machine import MODULES
from ddexport.runtime.manifest import TensorSpec

MAX_CACHE_BYTES = 1 << 30
TYPES = {"float32": "FLOAT", "int64": "INT64"}

logger = logging.getLogger(__name__)


class Context:
    """An execution context: one plan, one profile, and sizes that can be changed."""

    def __init__(self, context: Any, inputs: Sequence[TensorSpec], log: list[str]) -> None:
        self._context, self._inputs, self._log = context, inputs, log
        self._sizes: dict[str, int] = {}

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Tells where on the device the tensors lie. Raises BackendError."""
        for name, address in addresses.items():
            self._must(self._context.set_tensor_address(name, address), f"set_tensor_address({name})")

    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Sets the shapes of the inputs, by the sizes of their dynamic dimensions. Raises BackendError."""
        if sizes == self._sizes:
            return
        self._sizes = {}
        for spec in self._inputs:
            shape = spec.sized(sizes)
            self._must(self._context.set_input_shape(spec.name, shape), f"set_input_shape({spec.name})")
        self._sizes = dict(sizes)

    def enqueue(self, stream: int) -> None:
        """Puts the computation on a stream. Raises BackendError."""
        self._must(self._context.execute_async_v3(stream), "execute_async_v3")

    def close(self) -> None:
        self._context = None  # the package frees a context when nobody refers to it

    def _must(self, done: bool, what: str) -> None:
        _check_done(done, what, self._log)


class Plan:
    """A loaded engine."""

    def __init__(
        self, engine: Engine, content: bytes, *, cuda_graphs: bool = True, cache: Path | None = None
    ) -> None:
        """content: the plan, whose SHA-256 the caller has compared. cuda_graphs: for a package that records
        them itself. cache: the file for what TensorRT-RTX compiles. Raises BackendError."""
        self.engine = engine
        self._trt: Any = importlib.import_module(MODULES[engine.backend])
        self._log: list[str] = []
        self._logger = _logger(self._trt, self._log)
        try:
            runtime = self._trt.Runtime(self._logger)
        except Exception as error:  # bindings raise what they like where the library gives nothing
            raise BackendError(
                f"{engine.backend} cannot start: {_said(self._log)}", "`ddexport doctor` says what is here."
            ) from error
        if engine.version_compatible:
            runtime.engine_host_code_allowed = True  # such a plan brings its own lean runtime
        self._runtime = runtime
        self._engine: Any = runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise BackendError(
                f"{engine.backend} cannot load {engine.file}: {_said(self._log)}",
                "Build the engine again on this machine.",
            )
        self._check()
        self._config: Any = None
        self._cache: Any = None
        self._cache_file, self._cached = cache, b""
        if hasattr(self._engine, "create_runtime_config") and hasattr(self._trt, "CudaGraphStrategy"):
            self._configure(cuda_graphs)

    @property
    def records_itself(self) -> bool:
        """Whether the package makes CUDA graphs, so that nobody else should."""
        return self._config is not None

    @property
    def scratch_bytes(self) -> int:
        """How much device memory a context works in; 0 if it brings its own."""
        return 0 if self._config is not None else int(self._engine.device_memory_size_v2)

    def context(self, profile: int, stream: int, scratch: int) -> Context:
        """A context for a profile. scratch: an address on the device with `scratch_bytes`, which contexts may
        share that never run at once. Raises BackendError."""
        if self._config is not None:
            context = self._engine.create_execution_context(self._config)
        else:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise BackendError(f"{self.engine.file} gives no execution context: {_said(self._log)}")
        if self._config is None and scratch:
            context.set_device_memory(scratch, self.scratch_bytes)
        done = context.set_optimization_profile_async(profile, stream)
        _check_done(done, "set_optimization_profile_async", self._log)
        return Context(context, self.engine.inputs, self._log)

    def close(self) -> None:
        """Keeps what was compiled, and frees the engine; its contexts must be gone."""
        self._save_cache()
        # In this order: an engine must not outlive its runtime.
        self._cache = self._config = None
        self._engine = None
        self._runtime = None

    def _configure(self, cuda_graphs: bool) -> None:
        config = self._engine.create_runtime_config()
        strategy = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategy.DISABLED
        self._config = config
        if self._cache_file is None:
            return
        self._cache = config.create_runtime_cache()
        with suppress(OSError):
            if self._cache_file.stat().st_size <= MAX_CACHE_BYTES:
                self._cached = self._cache_file.read_bytes()
        if self._cached and not self._cache.deserialize(self._cached):
            logger.info("%s is not for this machine and is made anew", self._cache_file)
            self._log.clear()
            self._cached = b""
        config.set_runtime_cache(self._cache)

    def _save_cache(self) -> None:
        from ddexport.runtime.files import atomic_write

        if self._cache is None or self._cache_file is None:
            return
        blob = self._cache.serialize()
        content = bytes(blob) if blob is not None else b""
        if not content or content == self._cached:
            return
        try:
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._cache_file) as stream:
                stream.write(content)
        except (OSError, OutputError) as error:  # a cache that cannot be kept costs time only
            logger.info("what was compiled is not kept: %s", error)

    def _check(self) -> None:
        """The plan must be what its sidecar says: names, types, shapes, profiles."""
        engine, trt = self._engine, self._trt
        names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
        specs = {spec.name: spec for spec in (*self.engine.inputs, *self.engine.outputs)}
        wrong = sorted(names ^ set(specs))
        for name in names & set(specs):
            spec = specs[name]
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            have = (engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name)), is_input)
            want = (
                getattr(trt.DataType, TYPES[spec.dtype]),
                tuple(size if isinstance(size, int) else -1 for size in spec.shape),
                spec in self.engine.inputs,
            )
            if have != want:
                wrong.append(name)
        found = tuple(self._profile(number) for number in range(engine.num_optimization_profiles))
        if wrong or found != self.engine.profiles:
            raise BackendError(
                f"{self.engine.file} is not what its sidecar says: "
                + (
                    f"other tensors {', '.join(wrong)}" if wrong else f"profiles {', '.join(map(str, found))}"
                ),
                "The bundle is damaged: build the engine again.",
            )

    def _profile(self, number: int) -> Profile:
        # In the order of the sidecar, which has all of them once.
        others = [other.name for other in self.engine.profiles[0].others]
        ranges = tuple(SizeRange(name, *self._range(name, number)) for name in others)
        return Profile(*self._range(BATCH, number), ranges)

    def _range(self, size: str, number: int) -> tuple[int, int, int]:
        spec = next(spec for spec in self.engine.inputs if size in spec.shape)
        shapes = self._engine.get_tensor_profile_shape(spec.name, number)
        least, best, most = (int(shape[spec.shape.index(size)]) for shape in shapes)
        return least, best, most


def cache_file(engine: Engine, target: str) -> Path:
    """Where TensorRT-RTX keeps what it compiled of an engine for a GPU: $XDG_CACHE_HOME, else ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ddexport" / "compiled" / f"{engine.sha256[:32]}-{engine.version}-{target}.bin"


def _logger(trt: Any, errors: list[str]) -> Any:
    """The package reports failures by returning nothing and saying why in its log."""
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in severe:
                errors.append(message)
            logger.debug("%s", message)

    return Logger()


def _check_done(done: bool, what: str, log: list[str]) -> None:
    if not done:
        raise BackendError(f"{what} failed: {_said(log)}", "`ddexport doctor` says what fits this machine.")


def _said(log: list[str]) -> str:
    text = "; ".join(dict.fromkeys(" ".join(message.split()) for message in log)) or "it gives no reason"
    log.clear()
    return text[:500]
