"""What the quantised products of a model read, over samples that need no data: noise, labels, both steps.

Why not the library: ONNX Runtime's calibrator reads the inputs of one graph from a list, and observes every
product. A decoder's inputs are what the student generates, and a student's second step starts from its first:
here both graphs run in turn, once, and note the chosen values alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ddexport.graph.emulate import session_of
from ddexport.recipe import Recipe
from ddexport.runtime.noise import gaussian_noise
from ddexport.runtime.text import TRIAL_TEXTS, trial_features

SEED = 80_808  # of the noise; figures of accuracy are taken from other seeds
BATCH = 2

Arrays = Mapping[str, NDArray[Any]]
Ranges = Mapping[str, tuple[float, float]]


class Observed:
    """A float32 graph that notes the smallest and the largest number of some of its values.

    `ranges` holds them by name; only values that were computed at least once are in it.
    """

    def __init__(self, path: Path, values: Sequence[str]) -> None:
        """values: names of values of the graph at `path`, in its order; its weights may lie beside it."""
        model = ir.load(path)
        self._outputs = [str(value.name) for value in model.graph.outputs]
        # ONNX Runtime first computes what the last node needs: in this order no value waits to be read.
        self._values = list(dict.fromkeys(values))[::-1]
        _add_extremes(model.graph, self._values)
        self._session = session_of(model, path.parent)
        self.ranges: dict[str, tuple[float, float]] = {}

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """The graph's own outputs by name."""
        results = self._session.run(None, dict(feeds))
        extremes = results[len(self._outputs) :]
        for name, low, high in zip(self._values, extremes[::2], extremes[1::2], strict=True):
            before = self.ranges.get(name, (math.inf, -math.inf))
            self.ranges[name] = (min(before[0], float(low)), max(before[1], float(high)))
        return dict(zip(self._outputs, results, strict=False))


def calibrate(
    student: Observed,
    decoders: Sequence[Observed],
    recipe: Recipe,
    images: int,
    text_prefix: Observed | None = None,
) -> None:
    """Draws `images` images and lets the graphs note what they see. text_prefix: of a text model.

    Every image passes the student once for each `known` of the schedules: first with noise alone, then with
    as many of its own positions kept. A decoder sees the sequence of one of these passes, in turn.
    """
    passes = student_passes(recipe)
    table: Arrays = {"label": np.arange(recipe.classes)}
    if text_prefix is not None and recipe.condition is not None:
        trial = trial_features(recipe.condition.tokens, recipe.condition.width)
        table = text_prefix.run({"features": trial.features, "features_mask": trial.mask})
    for noise, labels, first in _batches(recipe, images):
        drawn: NDArray[np.float32] | None = None
        sequences = []
        for known in passes:
            tokens = noise
            if drawn is not None:
                tokens = np.concatenate([drawn[:, :known], noise[:, known:]], axis=1)
            counts = np.full(len(labels), known, dtype=np.int64)
            condition = {name: rows[labels] for name, rows in table.items()}
            outputs = student.run({"latents": tokens, **condition, "known": counts})
            drawn = outputs["sequence"] if drawn is None else drawn
            sequences.append(outputs["sequence"])
        turn = (first + np.arange(len(labels))) % len(passes)
        for decoder in decoders:
            decoder.run({"sequence": np.stack(sequences)[turn, np.arange(len(labels))]})


def student_passes(recipe: Recipe) -> tuple[int, ...]:
    """How many positions hold data in the student's passes, 0 first."""
    return tuple(sorted({0, *(k for schedule in recipe.schedules.values() for k in schedule.known)}))


def _batches(recipe: Recipe, images: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64], int]]:
    """Noise (B, L, Cv), labels (B,) spread over the classes, and the number of the first image."""
    sequence = recipe.sequence
    for first in range(0, images, BATCH):
        indices = np.arange(first, min(first + BATCH, images))
        labels = indices * (recipe.classes or TRIAL_TEXTS) // images
        noise = gaussian_noise(SEED, indices.tolist(), sequence.length, sequence.width)
        yield noise, labels.astype(np.int64), first


def _add_extremes(graph: ir.Graph, names: Sequence[str]) -> None:
    """Two more outputs for each value: its least and its largest number."""
    values = {value.name: value for node in graph for value in node.outputs}
    for name in names:
        for operator in ("ReduceMin", "ReduceMax"):
            node = ir.node(operator, [values[name]], {"keepdims": 0})
            output = node.outputs[0]
            output.name = f"{name}.{operator}"
            output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape(())
            graph.append(node)
            graph.outputs.append(output)
