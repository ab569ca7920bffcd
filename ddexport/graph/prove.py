"""Proof of all graphs of a bundle before it is let out: float32 and int8 as the runtime will run them, half
by the oracle that rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from ddexport.graph.accuracy import (
    FIND_LAYER,
    Accuracy,
    Arrays,
    check_limits,
    check_sane,
    operator_counts,
    output_errors,
)
from ddexport.graph.emulate import EmulatedGraph
from ddexport.graph.spec import BATCHES, GraphSpec
from ddexport.graph.verify import Agreement, Trial, trial, verify_graph
from ddexport.graph.wrappers import graph_module
from ddexport.precision.policy import FLOAT32, HALVES, INT8
from ddexport.recipe import Limits, Recipe
from ddexport.runtime.backends import CPU, Configuration
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import Graph, Manifest
from ddexport.runtime.errors import VerificationError

Stage = Callable[[str], AbstractContextManager[None]]
ENGINE = "onnxruntime"
REFERENCE = "PyTorch, float32"
REMEDIES = {INT8: "calibrate on more images, --calibration N, or take fp16 or bf16"}
# Without limits of its own precision nothing is excused.
NO_LIMITS = Limits(token_margin=0.0, embedding_error=0.0, image_psnr=0.0, image_max=255)


def prove(
    folder: Path,
    manifest: Manifest,
    parts: Mapping[str, nn.Module],
    specs: Sequence[GraphSpec],
    recipe: Recipe,
    stage: Stage,
) -> tuple[dict[str, Accuracy], tuple[Agreement, ...]]:
    """Runs every graph at batch 1, 2 and 3 and holds it against the float32 module of its role.

    Returns the accuracy of the graphs, by file, and the agreement of the float32 ones.

    Raises:
        VerificationError: an output is not finite or constant, a float32 graph differs from its module, or a
            reduced one by more than the recipe's limits.
    """
    agreement: list[Agreement] = []
    accuracy: dict[str, Accuracy] = {}
    for spec in specs:
        module = graph_module(spec, parts[spec.part], parts["tokenizer"])
        trials: list[Trial] = []
        for graph in (g for g in manifest.graphs if (g.role, g.split) == (spec.role, spec.split)):
            with stage(f"comparing {graph.file} with PyTorch"), _opened(folder, manifest, graph) as run:
                trials = trials or [trial(module, spec, recipe, sizes) for sizes in spec.sizes]
                results = [{batch: run(t.batch(batch)[0]) for batch in BATCHES} for t in trials]
            limits = recipe.parity.limits(graph.precision) or NO_LIMITS
            errors = []
            for expected, by_batch in zip(trials, results, strict=True):
                if graph.precision == FLOAT32:
                    agreement += verify_graph(by_batch, expected, spec)
                for batch, got in by_batch.items():
                    check_sane(_by_row(got, spec), graph.file)
                    _check_tokens(got, graph.file)
                    inputs, wanted = expected.batch(batch)
                    known = inputs.get("known")
                    errors += output_errors(got, _results(wanted, spec), known, limits.token_margin)
            if graph.precision != FLOAT32:
                check_limits(errors, limits, graph.file, REMEDIES.get(graph.precision, FIND_LAYER))
            accuracy[graph.file] = Accuracy(
                oracle(graph.precision), REFERENCE, operator_counts(folder / graph.file), tuple(errors)
            )
    return accuracy, tuple(agreement)


def _check_tokens(got: Arrays, file: str) -> None:
    """Raises `VerificationError` unless a student's tokens are the largest of its logits."""
    if "tokens" in got and not np.array_equal(got["tokens"], got["logits"].argmax(-1)):
        raise VerificationError(f"{file}: tokens are not the largest logits", "nothing was written")


def _by_row(arrays: Arrays, spec: GraphSpec) -> Arrays:
    """The outputs with their batch first: a teacher's new cache has it second."""
    floats = (t for t in spec.outputs if t.dtype == "float32")
    return {t.name: np.moveaxis(arrays[t.name], t.shape.index("batch"), 0) for t in floats}


def _results(arrays: Arrays, spec: GraphSpec) -> Arrays:
    """The outputs that errors are recorded of: not tokens or a cache, whose error shows in the logits."""
    return {t.name: arrays[t.name] for t in spec.outputs if t.shape[0] == "batch" and t.dtype == "float32"}


def oracle(precision: str) -> str:
    """What computes a graph of this precision here, in a few words."""
    return f"{ENGINE}, half rounding emulated" if precision in HALVES else ENGINE


@contextmanager
def _opened(folder: Path, manifest: Manifest, graph: Graph) -> Iterator[Callable[[Arrays], Arrays]]:
    if graph.precision in HALVES:
        yield EmulatedGraph(folder / graph.file).run
        return
    chosen = Configuration(ENGINE, "cpu", graph.precision, graph.precision, CPU)
    engine = OnnxRuntime(folder, manifest, chosen)
    try:
        yield partial(engine.run, graph)
    finally:
        engine.close()
