"""A bundle of random weights, and limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddexport.recipe import Limits

GOLDEN = Path(__file__).parents[1] / "golden" / "var-dd-small"


@pytest.fixture
def limits() -> Limits:
    return Limits(1e-3, 1e-4, 60.0, 2, 1e-4, 0.0, 1e-4, 60.0, 0.1)


@pytest.fixture(scope="session")
def random_bundle(cached_export: Callable[..., Any]) -> Path:
    """A custom recipe that does not ship with the project, with random weights, a teacher, and a student of
    another split. Do not write into it.
    """
    from ddexport.export import WeightRequest, export_bundle
    from ddexport.recipe import load_recipe, recipe_from_dict

    content = load_recipe(str(GOLDEN / "recipe.yaml")).to_dict() | {
        "name": "tiny",
        "image": {"size": 6, "channels": 3},
        "sequence": {"length": 14, "width": 8, "codebook": 16, "split": 1},
        "schedules": {
            "1": {"known": [0]},
            "3": {"known": [5], "split": 5, "teacher": {"start": 0, "end": 5}},
        },
        "model": {"depth": 1, "width": 64, "heads": 2, "scales": [1, 2, 3]},
        "tokenizer": {"channels": 32, "multipliers": [1, 1]},
        "teacher": {"cfg": 2.0, "top_k": 12, "top_p": 0.95},
    }
    recipe, request = recipe_from_dict(content, "tiny"), WeightRequest({}, random_seed=3, teacher=True)
    return Path(cached_export("random", lambda target: export_bundle(recipe, target, request)).path)
