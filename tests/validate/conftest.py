"""Bundles of real checkpoints, and the toys of `toys.py` for what needs no engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddexport.recipe import Limits
from tests.gates.faults import in_graph
from tests.validate.toys import ToyModel

GOLDEN = Path(__file__).parents[1] / "golden" / "var-dd-small"


@pytest.fixture
def toy() -> type[ToyModel]:
    return ToyModel


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


@pytest.fixture
def planted(golden_bundle: Path, tmp_path: Path) -> Callable[[str, Callable[[Any], None]], Path]:
    """planted(role, edit): a copy of the golden bundle with an edited graph, hash and size made right again.

    Only a comparison with the reference can tell such a bundle from a good one.
    """

    def plant(role: str, edit: Callable[[Any], None]) -> Path:
        bundle = Path(shutil.copytree(golden_bundle, tmp_path / "planted"))
        in_graph(edit, role)(bundle, "fp32")
        return bundle

    return plant
