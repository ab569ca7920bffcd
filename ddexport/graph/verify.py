"""Proof that a graph computes what its module computes, on random inputs, before a bundle is let out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ddexport.graph.spec import BATCHES, GraphSpec, rows, sample_inputs
from ddexport.recipe import Recipe
from ddexport.runtime.errors import VerificationError

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """The largest difference of one output at one batch size, relative to the output's largest value."""

    role: str
    output: str
    batch: int
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for NaN


@dataclass(frozen=True)
class Trial:
    """Random inputs of a graph and what its float32 module makes of them, at the largest batch size."""

    inputs: Arrays
    wanted: Arrays

    spec: GraphSpec

    def batch(self, size: int) -> tuple[Arrays, Arrays]:
        """The first `size` rows of inputs and outputs: no row of the module depends on another."""
        return rows(self.inputs, self.spec.inputs, size), rows(self.wanted, self.spec.outputs, size)


def trial(
    module: nn.Module, spec: GraphSpec, recipe: Recipe, sizes: Mapping[str, int] | None = None
) -> Trial:
    """Runs the module once, on inputs with mixed `known`: it is slower than its graphs.

    sizes: one of the graph's, the first by default.
    """
    inputs = sample_inputs(spec, recipe, max(BATCHES), seed=1, sizes=sizes)
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(value) for value in inputs.values()))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {t.name: value.numpy() for t, value in zip(spec.outputs, outputs, strict=True)}
    return Trial(inputs, wanted, spec)


def verify_graph(results: Mapping[int, Arrays], expected: Trial, spec: GraphSpec) -> list[Agreement]:
    """Holds the outputs of a float32 graph, by batch size, against the module's.

    Raises:
        VerificationError: an output differs by more than the limit, is not finite, or is constant.
    """
    agreements = []
    for batch, got in results.items():
        agreements += compare(got, expected.batch(batch)[1], spec, batch)
    failed = [a for a in agreements if not a.passed]
    if failed:
        worst = max(failed, key=lambda a: np.nan_to_num(a.error, nan=np.inf))
        raise VerificationError(
            f"{spec.role}: {worst.output} differs from the PyTorch module by {worst.error:.2e}"
            f" at batch {worst.batch}, allowed are {worst.limit:.0e}",
            "nothing was written; please report this with the versions that `ddexport --version` prints",
        )
    return agreements


def compare(got: Arrays, wanted: Arrays, spec: GraphSpec, batch: int) -> list[Agreement]:
    """The agreement of each output.

    A token may flip where the module's two best logits are closer than the tolerance; such positions of the
    sequence are left out of the comparison, all others count.
    """
    result = []
    for name, value in wanted.items():
        difference = np.abs(got[name] - value)
        if name in ("sequence", "tokens") and "logits" in wanted:
            difference[:, : wanted["logits"].shape[1]][
                _ties(got["logits"], wanted["logits"], spec.tolerance)
            ] = 0
        if value.dtype == np.int64:
            result.append(Agreement(spec.role, name, batch, float(difference.any()), spec.tolerance))
            continue
        scale = float(np.abs(value).max())
        constant = scale == 0 or value.min() == value.max()
        error = float("nan") if constant else float(difference.max()) / scale
        result.append(Agreement(spec.role, name, batch, error, spec.tolerance))
    return result


def _ties(got: np.ndarray, wanted: np.ndarray, tolerance: float) -> np.ndarray:
    """Where the argmax differs although the logits agree: [B, S] bool."""
    token = got.argmax(-1)
    best = wanted.max(-1)
    gap = best - np.take_along_axis(wanted, token[..., None], -1)[..., 0]
    return (token != wanted.argmax(-1)) & (gap <= 2 * tolerance * np.abs(wanted).max())
