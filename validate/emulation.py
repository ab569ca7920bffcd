"""A half bundle on the CPU, with every rounding of a half engine: the honest side of a comparison.

ONNX Runtime's CPU provider keeps fp16 graphs in float32 between operators, so that a comparison with it
would show a fraction of the error, and it cannot run bf16 graphs at all (docs/precision.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy.typing as npt

from runtime.manifest import Manifest
from runtime.options import Options
from runtime.selection import AUTO, candidates, choose
from validate.metrics._base import FloatArray, IntArray, StudentOutput

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]

ENGINE = "onnxruntime, half rounding emulated"
HALVES = ("fp16", "bf16")


class EmulatedBundle:
    """The graphs of a bundle in a half precision, each opened when it is first run.

    A `validate.batches.Model`, and by `run` what `validate.teacher_runs` asks of one side.
    """

    def __init__(self, root: Path, manifest: Manifest, precision: str, threads: int | None = None) -> None:
        self._root, self._threads = root, threads
        self._files = {graph.key: graph.file for graph in manifest.graphs if graph.precision == precision}
        self._graphs: dict[str, Any] = {}

    def run(self, key: str, feeds: Arrays) -> Arrays:
        """Named arrays in and out, of the graph with this key."""
        from ddexport.graph.emulate import EmulatedGraph

        if key not in self._graphs:
            self._graphs[key] = EmulatedGraph(self._root / self._files[key], self._threads)
        found: Arrays = self._graphs[key].run(feeds)
        return found

    def student(self, tokens: FloatArray, label: IntArray, known: IntArray) -> StudentOutput:
        """tokens (B, L, Cv) float32, label (B,), known (B,) int64."""
        outputs = self.run("student", {"tokens": tokens, "label": label, "known": known})
        return StudentOutput(outputs["sequence"], outputs["logits"])

    def decode(self, sequence: FloatArray) -> FloatArray:
        """sequence (B, L, Cv) float32 -> images (B, 3, H, W) float32 in [0, 1]."""
        images: FloatArray = self.run("decoder", {"sequence": sequence})["image"]
        return images


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
    from runtime.machine import Machine

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
