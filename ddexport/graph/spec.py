"""What is exported, as data: one `GraphSpec` a role. `to_onnx` and `verify` read it; neither knows a role by
name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddexport.recipe import Recipe
from runtime.manifest import ImageSize, SequenceSize, TensorSpec, contract

BATCHES = (1, 2, 3)


@dataclass(frozen=True)
class GraphSpec:
    """One graph: `part` is the module it is traced from, `tolerance` how far its outputs may be from the
    module's.

    The tolerance is relative to the largest value of the output, float32 with float32.
    """

    role: str
    part: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: float


def image_size(recipe: Recipe) -> ImageSize:
    return ImageSize(recipe.image.size, recipe.image.size, recipe.image.channels)


def sequence_size(recipe: Recipe) -> SequenceSize:
    s = recipe.sequence
    return SequenceSize(length=s.length, width=s.width, codebook=s.codebook, split=s.split)


def graph_specs(recipe: Recipe) -> tuple[GraphSpec, ...]:
    """The graphs of a bundle."""
    parts = (("student", "student", 1e-4), ("decoder", "tokenizer", 1e-4))
    return tuple(
        GraphSpec(role, part, *contract(role, sequence_size(recipe), image_size(recipe)), tolerance)
        for role, part, tolerance in parts
    )


def sample_inputs(spec: GraphSpec, recipe: Recipe, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Random inputs of a graph: Gaussian sequences, labels over all classes, `known` mixed over the
    schedules' steps."""
    rng = np.random.default_rng(seed)
    steps = sorted({k for schedule in recipe.schedules.values() for k in schedule.known})
    integers = {
        "label": rng.integers(0, recipe.classes, batch),
        "known": np.resize(np.array(steps), batch),
    }
    inputs: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = [batch if size == "batch" else int(size) for size in tensor.shape]
        value = integers[tensor.name] if tensor.dtype == "int64" else rng.standard_normal(shape)
        inputs[tensor.name] = value.astype(tensor.dtype)
    return inputs
