"""The golden checkpoint, and its bundle, exported once a session: tracing is the slow part of these tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from ddexport.bundle import Exported
    from ddexport.recipe import Recipe

settings.register_profile("ddexport", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("ddexport")

GOLDEN = Path(__file__).parent / "golden" / "var-dd-small"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of the golden checkpoint; its README says what it holds."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_recipe() -> Recipe:
    from ddexport.recipe import load_recipe

    return load_recipe(str(GOLDEN / "recipe.yaml"))


@pytest.fixture(scope="session")
def golden_files() -> dict[str, Path]:
    """The golden checkpoints that a bundle is made of, by role."""
    return {"student": GOLDEN / "student.pth", "tokenizer": GOLDEN / "vae.pth"}


@pytest.fixture(scope="session")
def golden_export(
    tmp_path_factory: pytest.TempPathFactory, golden_recipe: Recipe, golden_files: dict[str, Path]
) -> Exported:
    from ddexport.bundle import WeightRequest, export_bundle

    return export_bundle(
        golden_recipe, tmp_path_factory.mktemp("golden") / "bundle", WeightRequest(golden_files)
    )


@pytest.fixture(scope="session")
def golden_bundle(golden_export: Exported) -> Path:
    """The golden checkpoint as a bundle. Do not write into it: make a copy."""
    return golden_export.path


@pytest.fixture
def replayed_trace(monkeypatch: pytest.MonkeyPatch, golden_bundle: Path) -> Callable[[Callable], None]:
    """Exports of this test take the golden bundle's graphs in place of a new trace, which takes seconds.

    Everything around the trace is real: loading, staging, checking, comparing with the module. The fixture
    is a function: give it what shall happen to the path of each graph once it is written.
    """

    def replay(after: Callable[[Path], Any]) -> None:
        def onnx_from_module(module, spec, recipe, path, opset, metadata, weights=None):  # type: ignore[no-untyped-def]
            shutil.copyfile(golden_bundle / path.name, path)
            after(path)
            return [path]

        monkeypatch.setattr("ddexport.bundle.onnx_from_module", onnx_from_module)

    replay(lambda path: None)
    return replay
