"""A model so small that it traces in seconds: for what the golden bundle cannot show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from ddexport.recipe import Recipe, recipe_from_dict


@dataclass(frozen=True)
class Tiny:
    """A recipe of one block and two scales, and its bundle of random weights in the oldest opset."""

    recipe: Recipe
    bundle: Path
    seed: int
    opset: int


@pytest.fixture(scope="session")
def tiny_recipe(golden_recipe: Recipe) -> Recipe:
    return recipe_from_dict(
        golden_recipe.to_dict()
        | {
            "name": "tiny",
            "image": {"size": 4, "channels": 3},
            "sequence": {"length": 5, "width": 4, "codebook": 8, "split": 1},
            "schedules": {"1": {"known": [0]}, "2": {"known": [0, 1]}},
            "model": {"depth": 1, "width": 32, "heads": 2, "scales": [1, 2]},
            "tokenizer": {"channels": 32, "multipliers": [1, 1], "residual_blocks": 1},
        }
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe) -> Tiny:
    from ddexport.bundle import WeightRequest, export_bundle
    from ddexport.graph.to_onnx import OPSETS

    target = tmp_path_factory.mktemp("tiny") / "bundle"
    seed, opset = 5, OPSETS.start
    export_bundle(tiny_recipe, target, WeightRequest({}, random_seed=seed), opset=opset)
    return Tiny(tiny_recipe, target, seed, opset)
