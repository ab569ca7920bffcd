"""What is exported, as data: one `GraphSpec` a graph, which `to_onnx` traces and `verify` compares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddexport.recipe import Recipe
from ddexport.runtime.bundle import ENCODER, PREFIXES, TEACHER, ImageSize, Teacher, Text
from ddexport.runtime.contract import TensorSpec, contract

BATCHES = (1, 3)
"""What a graph is compared at: one, which traces get wrong, and another than that of the trace, 2."""
LARGEST = 1 << 16  # of any dynamic dimension


@dataclass(frozen=True)
class GraphSpec:
    """One graph: `part` is the module it is traced from, `tolerance` how far its outputs may be from the
    module's.

    The tolerance is relative to the largest value of the output, float32 with float32. split: of a student
    whose split is not the recipe's. sizes: the dynamic dimensions other than the batch, and `filled`, in
    trials; the first ones are traced with.
    """

    role: str
    part: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: float
    split: int | None = None
    sizes: tuple[Mapping[str, int], ...] = ({},)

    @property
    def stem(self) -> str:
        """The name of its file, without precision and suffix."""
        return self.role if self.split is None else f"{self.role}_split{self.split}"


def image_size(recipe: Recipe) -> ImageSize:
    return ImageSize(height=recipe.image.size, width=recipe.image.size, channels=recipe.image.channels)


def graph_specs(
    recipe: Recipe, teacher: Teacher | None = None, decoders: Iterable[str] = (), text: Text | None = None
) -> tuple[GraphSpec, ...]:
    """The graphs of a bundle: student, decoder, those of the roles `decoders`, and with a teacher its own and
    the students of other splits; of a text model those that run once a text, too.

    Schedules that involve a teacher are left out where there is none.
    """
    sequence, image = recipe.sequence, image_size(recipe)

    def spec(role: str, part: str, split: int | None = None, **more: Any) -> GraphSpec:
        tensors = contract(role, sequence, image, teacher, split, text)
        return GraphSpec(role, part, *tensors, tolerance=1e-4, split=split, **more)

    possible = [s for s in recipe.schedules.values() if teacher is not None or s.teacher is None]
    splits = sorted({s.split for s in possible if s.split is not None} - {sequence.split})
    specs = [spec("student", "student")] if recipe.schedules else []
    specs += [spec("decoder", "tokenizer"), *(spec(role, role) for role in decoders)]
    specs += [spec("student", "student", split) for split in splits]
    if teacher is not None:
        specs.append(spec(TEACHER, TEACHER, sizes=_passes(teacher)))
    if text is not None:
        parts = dict.fromkeys(spec.part for spec in specs)
        specs += [spec(role, part) for part, role in PREFIXES.items() if part in parts]
        if text.tokenizer is not None:
            lengths = tuple({"tokens": count} for count in (min(7, text.tokens), text.tokens))
            specs.append(spec(ENCODER, ENCODER, sizes=lengths))
    return tuple(specs)


def _passes(teacher: Teacher) -> tuple[dict[str, int], ...]:
    """Three passes of a teacher: behind cached positions, with a prefix in front, and all that is left."""
    length, half = teacher.starts[-1], teacher.starts[len(teacher.starts) // 2]
    return (
        {"new": min(3, length - half), "capacity": length, "filled": half},
        {"new": half, "capacity": half + 1, "filled": 0},
        {"new": 1, "capacity": half, "filled": half - 1},
    )


def sample_inputs(
    spec: GraphSpec, recipe: Recipe, batch: int, seed: int, sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Random inputs of a graph: Gaussian sequences, labels over all classes, `known` mixed over the
    schedules' steps; tokens over the codebook, a cache of which `filled` positions count; texts of all
    lengths.

    sizes: one of the graph's, the first by default.
    """
    rng = np.random.default_rng(seed)
    sizes = {**(spec.sizes[0] if sizes is None else sizes), "batch": batch}
    steps = sorted({k for schedule in recipe.schedules.values() for k in schedule.known})
    filled = sizes.get("filled", 0)
    integers = {
        "label": rng.integers(0, max(recipe.classes, 1), batch),
        "known": np.resize(np.array(steps), batch),
        "positions": np.arange(filled, filled + sizes.get("new", 0)),
        "filled": np.array([filled]),
    }
    inputs: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.name == "guidance":
            value: np.ndarray = rng.uniform(0, 2, shape)
        elif tensor.name == "log_count":
            value = np.log(np.arange(1, batch + 1))
        elif tensor.name in ("features_mask", "attention_mask"):  # one valid row, all of them, and between
            counts = np.linspace(1, shape[1], batch).round()[:, None]
            value = np.arange(shape[1]) < counts
            value = value[:, ::-1] if tensor.name == "features_mask" else value
        elif tensor.name == "input_ids":
            value = rng.integers(2, 32, shape)
        elif tensor.dtype == "float32":
            value = rng.standard_normal(shape)
            if "capacity" in tensor.shape:  # keys as long as they are: VAR's have unit length
                value /= np.sqrt(shape[-1])
        elif tensor.name == "tokens":
            value = rng.integers(0, recipe.sequence.codebook, shape)
        else:
            value = integers[tensor.name]
        inputs[tensor.name] = value.astype(tensor.dtype)
    return inputs


def rows(
    arrays: Mapping[str, np.ndarray], tensors: tuple[TensorSpec, ...], count: int
) -> dict[str, np.ndarray]:
    """The first `count` rows of a batch: what has no batch stays whole."""
    batched = {t.name: t.shape.index("batch") for t in tensors if "batch" in t.shape}
    return {
        name: np.ascontiguousarray(value.take(np.arange(count), axis=batched[name]))
        if name in batched
        else value
        for name, value in arrays.items()
    }
