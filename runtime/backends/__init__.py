"""Inference engines, one file an engine: what each can run here, which one runs a bundle, and why no other.

`configurations` lists what could run a bundle in the order of preference, with what stands in its way: a
TensorRT engine of the bundle that fits this machine (building it was naming its precision), ONNX Runtime
on CUDA, the CPU engine that `ddexport bench --save` found fastest here, ONNX Runtime on the CPU unless it
is int8, and last what is left. All but the first compute in the bundle's first precision unless another one
is named.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.backends._saved import fastest
from ddexport.runtime.bundle import Graph, Manifest
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.errors import BackendError
from ddexport.runtime.registry import load_plugin, plugins

AUTO = "auto"
ENGINE, CUDA, SAVED, CPU, OTHER, SLOW, UNSUPPORTED = range(7)  # ranks of configurations

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Configuration:
    """An engine, where it computes and how.

    device: "cpu", or "cuda:N". precision: that of the arithmetic. graphs: the precision of the graphs that
    are read. obstacle: what stands in the way, "" if nothing. rank: the order of preference. note: what is
    worth knowing. folder: of a TensorRT engine, in the bundle.
    """

    backend: str
    device: str
    precision: str
    graphs: str
    rank: int
    obstacle: str = ""
    note: str = ""
    folder: str = ""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.backend, self.device, self.precision, self.folder) if part)

    @property
    def gpu(self) -> int:
        """The number of the GPU."""
        return int(self.device.partition(":")[2] or 0)


class Backend(ABC):
    """Runs the graphs of a bundle with one engine; each is opened when it is first run. Thread-safe.

    A plug-in module in `runtime/backends/` imports its engine inside its methods, and names its class
    `ENGINE`.
    """

    name: ClassVar[str]

    def __init__(
        self, root: Path, manifest: Manifest, configuration: Configuration, threads: int | None = None
    ) -> None:
        """root: the bundle directory. threads: of the CPU, None for the engine's own choice."""
        self.root, self.manifest, self.configuration, self.threads = root, manifest, configuration, threads
        self._lock = threading.RLock()
        self._sessions: dict[str, Any] | None = {}
        self._closing = ExitStack()

    @classmethod
    @abstractmethod
    def configurations(
        cls, root: Path, manifest: Manifest, precision: str | None, device: str | None
    ) -> list[Configuration]:
        """How this engine could run the bundle here, and what stands in the way; nothing is opened.

        precision: None leaves it to the engine. device: "cpu", "cuda:N", or None for any. At least one if
        the engine computes on such a device at all.
        """

    @abstractmethod
    def _open(self, graph: Graph, closing: ExitStack) -> Any:
        """The graph in the engine; `closing` is told how to free it. Raises BackendError."""

    @abstractmethod
    def _run(self, session: Any, feeds: Arrays, names: Sequence[str]) -> Arrays:
        """The named outputs of an open graph."""

    def _prepare(self, session: Any, batch: int) -> None:  # noqa: B027
        """Makes an open graph ready for so many images, where an engine compiles for a size."""

    @property
    def max_batch(self) -> int | None:
        """How many images the engine takes at once; None if it does not care."""
        return None

    def open(self, graph: Graph, batch: int = 1) -> Any:
        """The open graph, ready for so many images, opened now if it was not. Raises BackendError."""
        with self._lock:
            if self._sessions is None:
                raise BackendError(f"backend {self.name} is closed", "Load the bundle again.")
            if graph.file not in self._sessions:
                with ExitStack() as closing:
                    self._sessions[graph.file] = self._open(graph, closing)
                    self._closing.push(closing.pop_all())
            session = self._sessions[graph.file]
        self._prepare(session, batch)
        return session

    def run(self, graph: Graph, feeds: Arrays, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Runs a graph on named arrays and returns the named outputs, all if None.

        Names, types and shapes of both must be those of the contract. Raises BackendError.
        """
        inputs, outputs = self.manifest.tensors(graph)
        wanted = [spec for spec in outputs if names is None or spec.name in names]
        sizes: dict[str, int] = {}
        check_arrays(f"the inputs of {graph.file}", feeds, inputs, sizes)
        session = self.open(graph, len(next(iter(feeds.values()))))
        try:
            results = dict(self._run(session, feeds, [spec.name for spec in wanted]))
        except BackendError:
            raise
        except Exception as error:  # engines' exceptions share no base class
            raise BackendError(
                f"{self.name} failed on {graph.file}: {said(error)}",
                "If memory is short, ask for a smaller batch size.",
            ) from error
        check_arrays(f"the outputs of {graph.file}", results, wanted, sizes)
        return results

    def close(self) -> None:
        """Frees everything, also if freeing one part fails; may be called twice."""
        with self._lock:
            self._sessions = None
            self._closing.close()


def backend_class(name: str) -> type[Backend]:
    """The engine of that name. Raises BackendError, which lists those there are."""
    engine: type[Backend] = load_plugin(__name__, name, kind="backend", error=BackendError).ENGINE
    return engine


def configurations(
    root: Path,
    manifest: Manifest,
    backend: str = AUTO,
    precision: str | None = None,
    device: str | None = None,
) -> list[Configuration]:
    """What could run the bundle here within the arguments, the most preferred first, obstacles included.

    Raises BackendError for an unknown backend or device.
    """
    device = checked_device(device)
    names = plugins(__name__) if backend == AUTO else [backend]
    listed = [
        c for name in names for c in backend_class(name).configurations(root, manifest, precision, device)
    ]
    saved = fastest(root, manifest)
    if saved and precision in (None, manifest.precisions[0]):
        name, milliseconds = saved
        note = f"the fastest on this CPU: {milliseconds:.3g} ms per image (ddexport bench --save)"
        listed = [
            replace(c, rank=SAVED, note=note) if (c.backend, c.device) == (name, "cpu") else c for c in listed
        ]
    return sorted(listed, key=lambda c: c.rank)


def choose(
    root: Path,
    manifest: Manifest,
    backend: str = AUTO,
    precision: str | None = None,
    device: str | None = None,
) -> Configuration:
    """The first configuration without an obstacle. Raises BackendError with the obstacles of all."""
    listed = configurations(root, manifest, backend, precision, device)
    for configuration in listed:
        if not configuration.obstacle:
            return configuration
    reasons = "; ".join(f"{c}: {c.obstacle}" for c in listed) or f"backend {backend} does not run on {device}"
    what = f"{manifest.name}{f' in {precision}' if precision else ''}"
    has = f"The bundle has graphs in: {', '.join(manifest.precisions)}. `ddexport doctor` says more."
    raise BackendError(f"no engine here can run {what}: {reasons}", has)


def open_backend(
    root: Path, manifest: Manifest, configuration: Configuration, threads: int | None = None
) -> Backend:
    """The engine of a configuration; its graphs are opened when they are run."""
    return backend_class(configuration.backend)(root, manifest, configuration, threads)


def checked_device(device: str | None) -> str | None:
    """ "cpu", "cuda:N", or None; "cuda" is "cuda:0". Raises BackendError for anything else."""
    name, _, number = (device or "cpu").partition(":")
    if name not in ("cpu", "cuda") or (number and (name == "cpu" or not number.isdecimal())):
        raise BackendError(f"there is no device {device!r}", "Give cpu, cuda, or cuda:1 and so on.")
    return device and (f"cuda:{int(number or 0)}" if name == "cuda" else "cpu")


def check_arrays(what: str, arrays: Arrays, specs: Iterable[TensorSpec], sizes: dict[str, int]) -> None:
    """Raises BackendError unless names, types and shapes are those of the specs; arrays that lie on a device
    are taken as they are. `sizes` binds the names of dynamic dimensions, so that all agree on the batch."""
    wanted = {spec.name: spec for spec in specs}
    if set(arrays) != set(wanted):
        names = ", ".join(arrays) or "nothing"
        raise BackendError(f"{what} are {', '.join(wanted)}, but are given as {names}")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            continue
        spec = wanted[name]
        shape = [
            sizes.setdefault(n, s) if isinstance(n, str) else n
            for n, s in zip(spec.shape, array.shape, strict=False)
        ]
        if (
            array.dtype != np.dtype(spec.dtype)
            or array.ndim != len(spec.shape)
            or tuple(shape) != array.shape
        ):
            raise BackendError(
                f"{what}: {name} must be {spec.dtype} {list(spec.shape)}, but is {array.dtype}"
                f" {list(array.shape)}" + "".join(f" where {n} is {size}" for n, size in sizes.items())
            )


def check_signature(
    file: str, side: str, reported: Iterable[TensorSpec], promised: Sequence[TensorSpec]
) -> None:
    """Raises BackendError unless an open graph has the tensors of the contract. side: "inputs" or "outputs".

    reported: what the engine says of the graph; a dimension that is no number is dynamic, and any size fits.
    """
    have = {spec.name: spec for spec in reported}

    def same(spec: TensorSpec) -> bool:
        tensor = have.get(spec.name, TensorSpec("", "", ()))
        fits = (not isinstance(h, int) or h == w for h, w in zip(tensor.shape, spec.shape, strict=False))
        return tensor.dtype == spec.dtype and len(tensor.shape) == len(spec.shape) and all(fits)

    if len(have) != len(promised) or not all(map(same, promised)):
        listed = ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in have.values())
        raise BackendError(
            f"the {side} of {file} are not those that the manifest promises: {listed}",
            "The bundle is damaged: export it again.",
        )


def said(error: BaseException) -> str:
    """What an engine said, in a line: the last one, for those before it say where in its source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:300]
