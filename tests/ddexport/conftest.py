"""A model so small that it traces in seconds: for what the golden bundle cannot show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ddexport.recipe import Recipe, recipe_from_dict

if TYPE_CHECKING:
    from ddexport.bundle import Exported


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


@pytest.fixture(scope="session", params=["var_dd", "llamagen_dd"])
def half_export(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_recipe: Recipe,
    tiny_llamagen_recipe: Recipe,
) -> Exported:
    """A tiny bundle of each family in all precisions, asked for in another order. Do not write into it."""
    from ddexport.bundle import WeightRequest, export_bundle

    recipe = tiny_recipe if request.param == "var_dd" else tiny_llamagen_recipe
    target = tmp_path_factory.mktemp(recipe.name) / "bundle"
    precisions = ("bf16", "fp32", "fp16")
    return export_bundle(recipe, target, WeightRequest({}, random_seed=5), precisions=precisions)
