"""What runs the graphs of a bundle: the engine that users have, or a half engine emulated on the CPU.

ONNX Runtime's CPU provider keeps fp16 graphs in float32 between operators, so that a comparison with it would
show a fraction of the error, and it cannot run bf16 graphs at all (docs/export.md). Each runner has
`run(graph, feeds)`, from named arrays to named arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ddexport.runtime.backends import AUTO, CPU, Arrays, Configuration, configurations
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import Graph, Manifest, resolve
from ddexport.runtime.errors import BackendError, VerificationError
from ddexport.runtime.labels import read_labels
from ddexport.runtime.pipeline import Pipeline, load
from ddexport.runtime.text import trials

HALVES = ("fp16", "bf16")


class Emulated(OnnxRuntime):
    """The graphs of a half precision on the CPU, with every rounding of a half engine."""

    name = "onnxruntime, half rounding emulated"

    def _open(self, graph: Graph, closing: ExitStack) -> Any:
        from ddexport.graph.emulate import EmulatedGraph

        return EmulatedGraph(self.root / graph.file, self.threads)

    def _run(self, session: Any, feeds: Arrays, names: Sequence[str]) -> Arrays:
        outputs = session.run(feeds)
        return {name: outputs[name] for name in names}


def in_batches(run: Callable[[Arrays], Mapping[str, Any]], feeds: Arrays, size: int) -> dict[str, Any]:
    """What `run` gives for any number of rows, which it gets in batches of at most `size`."""
    count = len(next(iter(feeds.values())))
    starts = range(0, count, size)
    parts = [run({name: array[start : start + size] for name, array in feeds.items()}) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
    half = emulated_precision(root, manifest, backend, precision, emulate)
    try:
        if half is None:
            loaded = load(root, backend, threads, precision, verify=False)
        else:
            labels = read_labels(resolve(root, manifest.labels.file), manifest.classes)
            engine = Emulated(root, manifest, Configuration("onnxruntime", "cpu", half, half, CPU), threads)
            loaded = Pipeline(root, manifest, labels, engine)
    except BackendError as error:
        if not error.hint.startswith("The bundle is damaged"):
            raise  # an engine that is not here
        raise VerificationError(f"the bundle does not run: {error.message}", error.hint) from error
    with loaded as pipe, trials():
        yield pipe


def emulated_precision(
    root: Path, manifest: Manifest, backend: str, precision: str | None, emulate: bool | None
) -> str | None:
    """The half precision to emulate, or None where an engine's own arithmetic is to be compared.

    emulate: None emulates what would run in half on the CPU, and leaves GPUs and named engines to themselves;
    True asks for it, False forbids it. Raises BundleError for a missing precision.
    """
    if emulate is False or (not emulate and backend not in (AUTO, "onnxruntime")):
        return None
    wanted = precision or manifest.precisions[0]
    manifest.graph("student" if manifest.schedules else "decoder", wanted)
    if emulate:
        return wanted if wanted in HALVES else None
    able = [c for c in configurations(root, manifest, backend, precision) if not c.obstacle]
    return wanted if wanted in HALVES and (not able or able[0].device == "cpu") else None
