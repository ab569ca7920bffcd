"""Float32 graphs to quantise, each exported once a session: tracing is the slow part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ddexport.bundle import Exported
    from ddexport.recipe import Recipe


@pytest.fixture(scope="session")
def llamagen_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llamagen_recipe: Recipe) -> Path:
    """One block and four tokens, random weights. Do not write into it."""
    from ddexport.bundle import WeightRequest, export_bundle

    target = tmp_path_factory.mktemp("llamagen") / "bundle"
    exported: Exported = export_bundle(tiny_llamagen_recipe, target, WeightRequest({}, random_seed=5))
    return exported.path
