"""Opens a bundle as users do, a half precision on the CPU with every rounding of a half engine.

ONNX Runtime's CPU provider keeps fp16 graphs in float32 between operators, so that a comparison with it would
show a fraction of the error, and it cannot run bf16 graphs at all (docs/precision.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy.typing as npt
from ddexport.runtime.errors import BackendError, VerificationError
from ddexport.runtime.labels import read_labels
from ddexport.runtime.manifest import Manifest, resolve
from ddexport.runtime.options import Options
from ddexport.runtime.pipeline import Pipeline, load
from ddexport.runtime.selection import AUTO, candidates, choose
from ddexport.runtime.teacher import read_codebook

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]

ENGINE = "onnxruntime, half rounding emulated"
HALVES = ("fp16", "bf16")


class EmulatedGraphs:
    """The graphs of a half precision, each opened when it is first run; takes the place of
    `ddexport.runtime.graphs.Graphs`."""

    name, batch_size = ENGINE, None

    def __init__(self, root: Path, manifest: Manifest, precision: str, threads: int | None = None) -> None:
        self._root, self._threads = root, threads
        self._files = {graph.key: graph.file for graph in manifest.graphs if graph.precision == precision}
        self._graphs: dict[str, Any] = {}

    def run(self, key: str, feeds: Arrays) -> Arrays:
        """Named arrays in and out, of the graph with this key."""
        from ddexport.graph.emulate import EmulatedGraph

        if key not in self._graphs:
            self._graphs[key] = EmulatedGraph(self._root / self._files[key], self._threads)
        outputs: Arrays = self._graphs[key].run(feeds)
        return outputs

    def close(self) -> None:
        """Frees the engines."""
        self._graphs.clear()


@contextmanager
def opened(
    root: Path,
    manifest: Manifest,
    backend: str = AUTO,
    precision: str | None = None,
    emulate: bool | None = None,
    threads: int | None = None,
) -> Iterator[Pipeline]:
    """The bundle on the engine that is asked for, or emulated where that engine would not round.

    The hashes of its files are not checked again. Raises DDError where it cannot be run.
    """
    half = emulated_precision(root, manifest, backend, precision, emulate, threads)
    if half is None:
        try:
            loaded = load(root, backend, threads, precision, verify=False)
        except BackendError as error:
            if not error.hint.startswith("The bundle is damaged"):
                raise  # an engine that is not here
            raise VerificationError(f"the bundle does not run: {error.message}", error.hint) from error
        with loaded as pipe:
            yield pipe
        return
    labels = read_labels(resolve(root, manifest.labels.file), manifest.classes)
    codebook = None if manifest.teacher is None else read_codebook(root, manifest)
    graphs: Any = EmulatedGraphs(root, manifest, half, threads)
    with Pipeline(manifest, labels, graphs, half, codebook) as pipe:
        yield pipe


def emulated_precision(
    root: Path,
    manifest: Manifest,
    backend: str,
    precision: str | None,
    emulate: bool | None,
    threads: int | None = None,
) -> str | None:
    """The half precision to emulate, or None where an engine's own arithmetic is to be compared.

    emulate: None emulates what would run in half on the CPU, and leaves GPUs to themselves; True asks for it,
    False forbids it. An unknown backend is left to `load`. Raises BundleError for a missing precision.
    """
    from ddexport.runtime.machine import Machine

    if emulate is False or (not emulate and backend not in (AUTO, "onnxruntime")):
        return None
    if precision is not None:
        manifest.graph("student", precision)
    wanted = precision or manifest.precisions[0]
    if emulate:
        return wanted if wanted in HALVES else None
    found = candidates(
        root, manifest, Machine(), backend=backend, precision=precision, options=Options(threads=threads)
    )
    chosen = choose(found, explicit=backend != AUTO)
    if chosen is None:
        return wanted if wanted in HALVES else None
    on_cpu = chosen.backend == "onnxruntime" and chosen.options.provider in (None, "cpu")
    return chosen.precision if on_cpu and chosen.precision in HALVES else None
