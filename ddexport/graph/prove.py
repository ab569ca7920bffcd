"""Proof of all graphs of a bundle before it is let out: float32 and int8 as the runtime will run them, half
by the oracle that rounds."""

from __future__ import annotations

import dataclasses
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
from ddexport.runtime.manifest import Graph
from ddexport.runtime.registry import load_plugin

Stage = Callable[[str], AbstractContextManager[None]]
ENGINE = "onnxruntime"
REFERENCE = "PyTorch, float32"
REMEDIES = {INT8: "calibrate on more images, --calibration N, or take fp16 or bf16"}
# Without limits of its own precision nothing is excused.
NO_LIMITS = Limits(token_margin=0.0, embedding_error=0.0, image_psnr=0.0, image_max=255)


def prove(
    folder: Path,
    graphs: Sequence[Graph],
    parts: Mapping[str, nn.Module],
    specs: Sequence[GraphSpec],
    recipe: Recipe,
    keep_fp32: Sequence[str],
    stage: Stage,
) -> tuple[list[Graph], tuple[Agreement, ...]]:
    """Runs every graph at batch 1, 2 and 3 and holds it against the float32 module of its role.

    Returns the graphs with their accuracy, in the same order, and the agreement of the float32 ones.

    Raises:
        VerificationError: an output is not finite or constant, a float32 graph differs from its module, or a
            reduced one by more than the recipe's limits.
    """
    agreement: list[Agreement] = []
    proven: dict[str, Graph] = {}
    for spec in specs:
        module = graph_module(spec, parts[spec.part], parts["tokenizer"])
        trials: list[Trial] = []
        for graph in (g for g in graphs if (g.role, g.split) == (spec.role, spec.split)):
            with stage(f"comparing {graph.file} with PyTorch"), _opened(folder, graph) as run:
                trials = trials or [trial(module, spec, recipe, sizes) for sizes in spec.sizes]
                results = [{batch: run(t.batch(batch)[0]) for batch in BATCHES} for t in trials]
            limits = recipe.parity.get(graph.precision, NO_LIMITS)
            errors = []
            for expected, found in zip(trials, results, strict=True):
                if graph.precision == FLOAT32:
                    agreement += verify_graph(found, expected, spec)
                for batch, got in found.items():
                    check_sane(_by_row(got, spec), graph.file)
                    inputs, wanted = expected.batch(batch)
                    known = inputs.get("known")
                    errors += output_errors(got, _results(wanted, spec), known, limits.token_margin)
            if graph.precision != FLOAT32:
                check_limits(errors, limits, graph.file, REMEDIES.get(graph.precision, FIND_LAYER))
            accuracy = Accuracy(
                oracle(graph.precision),
                REFERENCE,
                tuple(keep_fp32) if graph.precision in HALVES else (),
                operator_counts(folder / graph.file),
                tuple(errors),
            )
            proven[graph.file] = dataclasses.replace(graph, accuracy=accuracy.to_dict())
    return [proven[graph.file] for graph in graphs], tuple(agreement)


def _by_row(arrays: Arrays, spec: GraphSpec) -> Arrays:
    """The outputs with their batch first: a teacher's new cache has it second."""
    return {t.name: np.moveaxis(arrays[t.name], t.shape.index("batch"), 0) for t in spec.outputs}


def _results(arrays: Arrays, spec: GraphSpec) -> Arrays:
    """The outputs that errors are recorded of: not a cache, whose error shows in the logits."""
    return {t.name: arrays[t.name] for t in spec.outputs if t.shape[0] == "batch"}


def oracle(precision: str) -> str:
    """What computes a graph of this precision here, in a few words."""
    return f"{ENGINE}, half rounding emulated" if precision in HALVES else ENGINE


@contextmanager
def _opened(folder: Path, graph: Graph) -> Iterator[Callable[[Arrays], Arrays]]:
    if graph.precision in HALVES:
        yield EmulatedGraph(folder / graph.file).run
        return
    with load_plugin("ddexport.runtime.backends", ENGINE).ENGINE(folder, {graph.role: graph}) as backend:
        yield partial(backend.run, graph.role)
