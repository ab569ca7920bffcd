"""What an inference engine has to do: open the graphs of a bundle, run them, close them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ddexport.runtime.errors import BackendError
from ddexport.runtime.machine import Machine
from ddexport.runtime.manifest import Graph, Manifest, TensorSpec
from ddexport.runtime.options import Options
from ddexport.runtime.selection import Candidate
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


class Backend(ABC):
    """Runs the graphs of a bundle with one engine; a context manager.

    A plug-in module in `runtime/backends/` imports its engine inside its methods and names its subclass
    `ENGINE`. `run` is public and checks; `_run_impl` computes.
    """

    accepts: ClassVar[frozenset[str]] = frozenset()
    """The fields of `Options` that this engine follows; any other one that is given is refused."""

    def __init__(
        self,
        root: Path,
        graphs: Mapping[str, Graph],
        options: Options | None = None,
        machine: Machine | None = None,
    ) -> None:
        """root: the bundle directory. graphs: one for each role, in one precision. options: the engine's own
        choices if None. machine: what is known of this machine, looked up if None. Raises BackendError."""
        self.root, self.graphs = root, dict(graphs)
        self.options, self.machine = options or Options(), machine or Machine()
        if refused := self.refused(self.options):
            raise BackendError(f"backend {self.name} has no option {', '.join(refused)}", self.option_list())
        self._is_open = False

    @classmethod
    @abstractmethod
    def available(cls) -> str | None:
        """None if the engine can be used here, else why not and what to install, in one sentence."""

    @classmethod
    @abstractmethod
    def candidates(
        cls, root: Path, manifest: Manifest, machine: Machine, options: Options, precision: str | None
    ) -> list[Candidate]:
        """The ways in which this engine could run the bundle on a machine, and what stands in their way.

        options: only such as the engine accepts. precision: the one asked for, None for any. At least one
        candidate, so that `doctor` has something to explain. Nothing is opened.
        """

    @classmethod
    def refused(cls, options: Options) -> list[str]:
        """The names of the given options that this engine does not follow."""
        return [name for name in options.given() if name not in cls.accepts]

    @classmethod
    def option_list(cls) -> str:
        return f"It has: {', '.join(sorted(cls.accepts)) or 'none'}."

    @property
    def batch_size(self) -> int | None:
        """How many images the open engine likes to get at once; None if it does not care."""
        return None

    @abstractmethod
    def _open_impl(self) -> None: ...

    @abstractmethod
    def _close_impl(self) -> None: ...

    @abstractmethod
    def _run_impl(self, role: str, feeds: Arrays) -> Arrays: ...

    @property
    def name(self) -> str:
        """The registered name, which is the module's file name."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def provider(self) -> str | None:
        """Which part of the engine computes, where it has several."""
        return None

    def open(self) -> None:
        """Loads the graphs. Raises BackendError if the engine is not installed or cannot read one."""
        if self._is_open:
            return
        if why := self.available():
            raise BackendError(f"backend {self.name} cannot be used", why)
        self._open_impl()
        self._is_open = True

    def close(self) -> None:
        """Frees what `open` has loaded; may be called twice."""
        if self._is_open:
            self._is_open = False
            self._close_impl()

    def __enter__(self) -> Backend:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, role: str, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Runs the graph of a role on named arrays and returns its named outputs.

        Names, types and shapes of both must be those of the manifest. Raises BackendError.
        """
        if not self._is_open:
            raise BackendError(f"backend {self.name} is closed", "Load the bundle again.")
        if role not in self.graphs:
            raise BackendError(
                f"there is no graph for the role {role!r}", f"There is: {', '.join(self.graphs)}."
            )
        graph = self.graphs[role]
        sizes: dict[str, int] = {}
        _check_arrays(f"the inputs of {graph.file}", feeds, graph.inputs, sizes)
        outputs = dict(self._run_impl(role, feeds))
        _check_arrays(f"the outputs of {graph.file}", outputs, graph.outputs, sizes)
        return outputs


def _check_arrays(what: str, arrays: Arrays, specs: tuple[TensorSpec, ...], sizes: dict[str, int]) -> None:
    """`sizes` binds the names of dynamic dimensions, so that all arrays agree on the batch."""
    names = [spec.name for spec in specs]
    if set(arrays) != set(names):
        raise BackendError(
            f"{what} are {', '.join(names)}, but are given as {', '.join(arrays) or 'nothing'}"
        )
    for spec in specs:
        array = arrays[spec.name]
        if array.dtype != np.dtype(spec.dtype):
            raise BackendError(f"{what}: {spec.name} must be {spec.dtype}, but is {array.dtype}")
        fits = array.ndim == len(spec.shape) and all(
            size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
            for want, size in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise BackendError(
                f"{what}: {spec.name} must have shape {list(spec.shape)}, but has {list(array.shape)}"
                + "".join(f" where {name} is {size}" for name, size in sizes.items())
            )
