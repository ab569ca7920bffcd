"""The graphs of a bundle in one precision, each opened in an engine when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ddexport.runtime.backends._base import Arrays, Backend
from ddexport.runtime.errors import BackendError
from ddexport.runtime.manifest import Graph, Manifest, Schedule
from numpy.typing import NDArray


class Graphs:
    """Runs graphs by key: `student`, `student@255` of another split, `teacher`, `decoder`.

    A bundle may hold three students and a teacher, of which a request needs one or two: what is not asked for
    takes no time and no memory.
    """

    def __init__(self, graphs: Mapping[str, Graph], engine: Callable[[Mapping[str, Graph]], Backend]) -> None:
        """graphs: by key. engine: a backend, not yet open, for some of them."""
        self.graphs, self._engine = dict(graphs), engine
        self._backends: list[Backend] = []
        self._closed = False

    @property
    def name(self) -> str:
        """The engine's registered name."""
        return self._backends[0].name

    @property
    def provider(self) -> str | None:
        """Which part of the engine computes, where it has several."""
        return self._backends[0].provider

    @property
    def batch_size(self) -> int | None:
        """How many images the open engines like to get at once; None if they do not care."""
        sizes = [backend.batch_size for backend in self._backends]
        return min((size for size in sizes if size is not None), default=None)

    @property
    def precision(self) -> str:
        return next(iter(self.graphs.values())).precision

    def open(self, keys: Iterable[str]) -> None:
        """Opens what is not open yet. Raises BackendError."""
        wanted = [key for key in dict.fromkeys(keys) if self._opened(key) is None]
        if self._closed:
            raise BackendError(f"backend {self.name} is closed", "Load the bundle again.")
        for key in wanted:
            if key not in self.graphs:
                have = ", ".join(self.graphs)
                raise BackendError(f"there is no graph for the role {key!r}", f"There is: {have}.")
        if wanted:
            backend = self._engine({key: self.graphs[key] for key in wanted})
            backend.open()
            self._backends.append(backend)

    def run(self, key: str, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """As `Backend.run`, by key. Raises BackendError."""
        self.open([key])
        backend = self._opened(key)
        assert backend is not None
        return backend.run(key, feeds)

    def close(self) -> None:
        """Frees the engines; may be called twice."""
        self._closed = True
        for backend in self._backends:
            backend.close()

    def _opened(self, key: str) -> Backend | None:
        return next((backend for backend in self._backends if key in backend.graphs), None)


def keys_of(manifest: Manifest, schedule: Schedule) -> tuple[str, ...]:
    """The keys of the graphs that a schedule runs."""
    student = (student_key(manifest, schedule),) if schedule.known else ()
    return (*student, *(("teacher",) if schedule.teacher else ()), "decoder")


def student_key(manifest: Manifest, schedule: Schedule) -> str:
    """The key of the student with the schedule's split."""
    other = schedule.split is not None and schedule.split != manifest.sequence.split
    return f"student@{schedule.split}" if other else "student"
