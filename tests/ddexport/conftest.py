"""Models so small that they trace in seconds, and the embedded models in all precisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ddexport.recipe import Recipe, recipe_from_dict

if TYPE_CHECKING:
    from ddexport.export import Exported

    CachedExport = Callable[[str, Callable[[Path], Exported]], Exported]


@dataclass(frozen=True)
class Tiny:
    """A recipe of one block and two scales, and its bundle of random weights in the oldest opset."""

    recipe: Recipe
    bundle: Path
    seed: int
    opset: int


@pytest.fixture(scope="session")
def tiny(cached_export: CachedExport, tiny_recipe: Recipe) -> Tiny:
    from ddexport.export import WeightRequest, export_bundle
    from ddexport.graph.to_onnx import OPSETS

    request, opset = WeightRequest({}, random_seed=5), OPSETS.start
    made = cached_export("tiny", lambda target: export_bundle(tiny_recipe, target, request, opset=opset))
    return Tiny(tiny_recipe, made.path, 5, opset)


@pytest.fixture(scope="session")
def tiny_llamagen_recipe(tiny_recipe: Recipe) -> Recipe:
    """One block and four tokens."""
    return recipe_from_dict(
        tiny_recipe.to_dict()
        | {
            "name": "tiny-llamagen",
            "family": "llamagen_dd",
            "sequence": {"length": 4, "width": 4, "codebook": 8, "split": 1},
            "model": {"depth": 1, "width": 32, "heads": 2},
            "tokenizer": {
                "channels": 32, "multipliers": [1, 1], "residual_blocks": 1, "latent_channels": 8,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="session", params=["digits-var", "digits-llamagen"])
def half_bundle(request: pytest.FixtureRequest, embedded_bundle: Callable[[str], Path]) -> Path:
    """An embedded model of each family in all precisions. Do not write into it."""
    return embedded_bundle(request.param)
