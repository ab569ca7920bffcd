"""A half bundle on the CPU, with every rounding of a half engine: the honest side of a comparison.

ONNX Runtime's CPU provider keeps fp16 graphs in float32 between operators, so that a comparison with it
would show a fraction of the error, and it cannot run bf16 graphs at all (docs/precision.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.manifest import ROLES, Manifest
from runtime.options import Options
from runtime.selection import AUTO, candidates, choose
from validate.metrics._base import FloatArray, IntArray, StudentOutput

ENGINE = "onnxruntime, half rounding emulated"
HALVES = ("fp16", "bf16")


class EmulatedBundle:
    """Both graphs of a bundle in a half precision; a `validate.batches.Model`."""

    def __init__(self, root: Path, manifest: Manifest, precision: str, threads: int | None = None) -> None:
        from ddexport.graph.emulate import EmulatedGraph

        self._graphs: dict[str, Any] = {
            role: EmulatedGraph(root / manifest.graph(role, precision).file, threads) for role in ROLES
        }

    def student(self, tokens: FloatArray, label: IntArray, known: IntArray) -> StudentOutput:
        """tokens (B, L, Cv) float32, label (B,), known (B,) int64."""
        outputs = self._graphs["student"].run({"tokens": tokens, "label": label, "known": known})
        return StudentOutput(outputs["sequence"], outputs["logits"])

    def decode(self, sequence: FloatArray) -> FloatArray:
        """sequence (B, L, Cv) float32 -> images (B, 3, H, W) float32 in [0, 1]."""
        images: FloatArray = self._graphs["decoder"].run({"sequence": sequence})["image"]
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

    if precision is not None:
        manifest.graph("student", precision)
    if emulate is False:
        return None
    wanted = precision or manifest.precisions[0]
    if emulate:
        return wanted if wanted in HALVES else None
    if backend not in (AUTO, "onnxruntime"):
        return None
    found = candidates(
        root, manifest, Machine(), backend=backend, precision=precision, options=Options(threads=threads)
    )
    chosen = choose(found, explicit=backend != AUTO)
    if chosen is None:
        return wanted if wanted in HALVES else None
    on_cpu = chosen.backend == "onnxruntime" and chosen.options.provider in (None, "cpu")
    return chosen.precision if on_cpu and chosen.precision in HALVES else None
