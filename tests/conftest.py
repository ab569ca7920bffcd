"""The golden checkpoint, and bundles, exported once a run: tracing is the slow part of these tests."""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.fake_hub import HUB, FakeHub

if TYPE_CHECKING:
    from ddexport.export import Exported
    from ddexport.recipe import Recipe
    from tests.goldens import Golden

# Read when huggingface_hub is imported: a test reaches no other Hub, and has no token of the user.
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=tempfile.mkdtemp(), HF_HUB_DISABLE_XET="1", HF_TOKEN="")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

settings.register_profile("ddexport", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("ddexport")

# Under nohup, and in a shell's background, Ctrl-C is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "var-dd-small"
CachedExport = Callable[[str, Callable[[Path], "Exported"]], "Exported"]


def pytest_collection_finish() -> None:
    """What is there now stays: the collector need not walk over torch again while a graph is traced."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without Chromium what needs it is skipped, but not in CI."""
    if item.get_closest_marker("web") and os.environ.get("CI") != "true":
        from ddexport.runtime.errors import BackendError
        from ddexport.validate.browser import program

        try:
            program()
        except BackendError as error:
            pytest.skip(error.message)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    """The Hub that this process reaches, empty, with a cache of its own; nothing waits between retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    HUB.reset()
    return HUB


@pytest.fixture(scope="session")
def cached_export(tmp_path_factory: pytest.TempPathFactory) -> CachedExport:
    """cached_export(name, make): what `make(target)` returned, called once a run for a name, by whichever
    worker asks first; the others wait for it, and get the same bundle. Nobody may write into it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    root.mkdir(exist_ok=True)

    def export(name: str, make: Callable[[Path], Exported]) -> Exported:
        result = root / f"{name}.pickle"
        with FileLock(root / f"{name}.lock"):
            if not result.exists():
                result.write_bytes(pickle.dumps(make(root / name / "bundle")))
            return pickle.loads(result.read_bytes())

    return export


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
def taught_export(cached_export: CachedExport) -> Callable[[Golden], Exported]:
    """taught_export(golden): the bundle of a golden checkpoint with its teacher and two student splits."""
    from ddexport.export import WeightRequest, export_bundle

    def export(golden: Golden) -> Exported:
        request = WeightRequest(golden.files)
        name = f"taught-{golden.name}"
        return cached_export(name, lambda target: export_bundle(golden.taught_recipe, target, request))

    return export


@pytest.fixture(scope="session")
def text_bundle(cached_export: CachedExport) -> Path:
    """The golden text model with student, teacher and text encoder."""
    from ddexport.export import WeightRequest, export_bundle
    from tests.goldens import TEXT

    request = WeightRequest(TEXT.files | {"text_encoder": TEXT.folder / "t5-encoder"})
    return cached_export(TEXT.name, lambda target: export_bundle(TEXT.recipe(), target, request)).path


@pytest.fixture(scope="session")
def golden_export(
    cached_export: CachedExport,
    golden_recipe: Recipe,
    golden_files: dict[str, Path],
    taught_export: Callable[[Golden], Exported],
) -> Exported:
    """Without the teacher. Its graphs are not traced again: they are those of the bundle that has one."""
    from ddexport.export import WeightRequest, export_bundle
    from tests.goldens import VAR

    def make(target: Path) -> Exported:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ddexport.export.onnx_from_module", copying(taught_export(VAR).path))
            return export_bundle(golden_recipe, target, WeightRequest(golden_files))

    return cached_export("golden", make)


def copying(bundle: Path, after: Callable[[Path], Any] = lambda path: None) -> Callable[..., list[Path]]:
    """Stands in for `onnx_from_module`: takes the graph of that name of a bundle, its weights inside.

    after: what happens to the path of each graph once it is written.
    """

    def onnx_from_module(module, spec, recipe, path, opset, metadata, weights=None):  # type: ignore[no-untyped-def]
        if any(bundle.glob("*.data")):
            import onnx_ir as ir

            model = ir.load(bundle / path.name)
            ir.save(ir.external_data.load_to_model(model), path)
        else:
            shutil.copyfile(bundle / path.name, path)
        after(path)
        return [path]

    return onnx_from_module


@pytest.fixture(scope="session")
def golden_bundle(golden_export: Exported) -> Path:
    """The golden checkpoint as a bundle. Do not write into it: make a copy."""
    return golden_export.path


@pytest.fixture(scope="session")
def tiny_recipe(golden_recipe: Recipe) -> Recipe:
    """A VAR of one block and two scales."""
    from ddexport.recipe import recipe_from_dict

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
def embedded_bundle(cached_export: CachedExport) -> Callable[[str], Path]:
    """embedded_bundle(model): a model that ships with the project, in all precisions, with its teacher.

    It is a copy of `build/precisions/<model>` (`make bundles`) where that is whole, newer than all code and
    made by the same tools. Do not write into it.
    """
    from ddexport.card import ACCURACY_FILE
    from ddexport.export import Exported, WeightRequest, export_bundle, tool_versions
    from ddexport.recipe import load_recipe
    from ddexport.runtime.bundle import read_manifest
    from ddexport.runtime.errors import DDError

    precisions = ("fp32", "fp16", "bf16", "int8")

    def copied(built: Path, target: Path) -> bool:
        try:
            manifest = read_manifest(built)
        except (DDError, OSError):
            return False
        files = (file for part in ("ddexport", "runtime", "recipes") for file in (ROOT / part).rglob("*.*"))
        newest = max(
            file.stat().st_mtime for file in files if file.suffix not in (".pyc", ".js", ".css", ".html")
        )
        if newest > (built / "bundle.json").stat().st_mtime or manifest.tools != tool_versions():
            return False
        if not set(precisions) <= set(manifest.precisions):
            return False
        (target / ACCURACY_FILE).parent.mkdir(parents=True)
        for name in ("bundle.json", "README.md", ACCURACY_FILE, *(info.file for info in manifest.files())):
            shutil.copyfile(built / name, target / name)
        return True

    def make(model: str, target: Path) -> Exported:
        if copied(ROOT / "build" / "precisions" / model, target):
            return Exported(target, read_manifest(target))
        return export_bundle(load_recipe(model), target, WeightRequest({}), precisions=precisions)

    return lambda model: cached_export(model, lambda target: make(model, target)).path


@pytest.fixture
def replayed_trace(monkeypatch: pytest.MonkeyPatch, golden_bundle: Path) -> Callable[[Callable], None]:
    """Exports of this test take the golden bundle's graphs in place of a new trace, which takes seconds.

    Everything around the trace is real: loading, staging, checking, comparing with the module. The fixture
    is a function: give it what shall happen to the path of each graph once it is written.
    """

    def replay(after: Callable[[Path], Any]) -> None:
        monkeypatch.setattr("ddexport.export.onnx_from_module", copying(golden_bundle, after))

    replay(lambda path: None)
    return replay
