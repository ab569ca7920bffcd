"""From the Hub to a picture: one command from published checkpoints to a bundle, one more to a picture."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from ddexport.recipe import RecipeError, class_names, load_recipe, recipe_from_dict
from ddexport.runtime.bundle import read_manifest, sha256_of
from tests.conftest import copying
from tests.ddexport.test_cli import failure, invoke
from tests.fake_hub import FakeHub
from tests.goldens import BOTH, VAR, Golden

PLACES = {"student": ("golden/students", "DD/student.pth"), "tokenizer": ("golden/base", "vq.pth"),
          "teacher": ("golden/base", "teacher.pth")}  # fmt: skip

Traced = Callable[[Golden], None]
Published = Callable[[Golden], Path]


@pytest.fixture
def traced(taught_export: Callable[[Golden], Any], monkeypatch: pytest.MonkeyPatch) -> Traced:
    """traced(golden): exports take the graphs of a bundle that was traced before."""
    name = "ddexport.export.onnx_from_module"
    return lambda golden: monkeypatch.setattr(name, copying(taught_export(golden).path))


@pytest.fixture
def published(hub: FakeHub, traced: Traced, tmp_path: Path) -> Published:
    """published(golden): puts its checkpoints on the Hub; the path of a recipe that says where. Exports take
    the graphs that were traced before."""

    def publish(golden: Golden) -> Path:
        traced(golden)
        data, files = golden.taught_recipe.to_dict(), {}
        for role, (repository, path) in PLACES.items():
            files.setdefault(repository, {})[path] = golden.files[role].read_bytes()
            data["files"][role] |= {"repo": repository, "path": path}
        for repository, content in files.items():
            hub.add(repository, content)
        data |= {"licence": {"weights": "MIT", "intended_use": "Research."}}
        (tmp_path / "golden.yaml").write_text(yaml.safe_dump(data))
        return tmp_path / "golden.yaml"

    return publish


@BOTH
def test_from_nothing_to_a_verified_bundle_and_a_picture(
    family: Golden, published: Published, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = published(family)
    bundle = tmp_path / "bundle"
    result = invoke("onnx", "--model", recipe, "--teacher", "hub", "-o", bundle)
    assert result.exit_code == 0, result.stderr
    assert "licence: MIT; intended use: Research." in result.stderr.splitlines()[0]
    assert len(hub.gets()) == len(PLACES)
    for source in read_manifest(bundle).weights.files:
        repository, path = PLACES[source.role]
        [commit] = hub.repositories[repository].keys() - {"main"}
        assert (source.repository, source.commit, source.file) == (repository, commit, path)
        assert source.sha256 == sha256_of(family.files[source.role])
    assert invoke("sample", bundle, "-o", tmp_path / "out.png").exit_code == 0
    # The reference is built from the same commits, which the cache has.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = invoke("validate", "parity", bundle, "--images", 2, "--batch", 2)
    assert "parity holds" in result.stdout, result.output


def test_a_file_that_is_given_is_not_fetched(published: Published, hub: FakeHub, tmp_path: Path):
    recipe = published(VAR)
    cache = tmp_path / "elsewhere"
    options = ("--checkpoint", VAR.files["student"], "--cache-dir", cache, "-o", tmp_path / "bundle")
    assert invoke("onnx", recipe, *options).exit_code == 0
    assert [line.rpartition("/")[2] for line in hub.gets()] == ["vq.pth"]
    assert list(cache.rglob("vq.pth"))


def test_the_revision_is_of_the_students_repository(published: Published, hub: FakeHub, tmp_path: Path):
    recipe = published(VAR)
    tagged = hub.add("golden/students", {"DD/student.pth": VAR.files["student"].read_bytes(), "x": b""}, "v1")
    hub.add("golden/students", {})
    assert "no file DD/student.pth" in failure(invoke("onnx", recipe, "-o", tmp_path / "a"))
    assert "no revision v2" in failure(invoke("onnx", recipe, "--revision", "v2", "-o", tmp_path / "a"))
    assert invoke("onnx", recipe, "--revision", "v1", "-o", tmp_path / "b").exit_code == 0
    commits = [source.commit for source in read_manifest(tmp_path / "b").weights.files]
    assert commits[0] == tagged != commits[1]


def test_offline_and_not_cached(published: Published, hub: FakeHub, tmp_path: Path):
    """In a process of its own: --offline has to come before the first import of huggingface_hub."""
    code = "from ddexport.cli import main; main()"
    command = [sys.executable, "-c", code, "onnx", published(VAR), "--offline", "--cache-dir", "cache"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "hf download golden/students DD/student.pth && hf download golden/base vq.pth" in result.stderr
    assert not hub.asked and [path.name for path in tmp_path.iterdir()] == ["golden.yaml"]


@pytest.fixture
def own_model(traced: Traced, tmp_path: Path) -> Path:
    """A directory with a recipe, names of its own for the classes, and the weights."""
    traced(VAR)
    folder = tmp_path / "my-model"
    folder.mkdir()
    data = VAR.recipe(name="mine", labels=[f"kind {number}" for number in range(10)]).to_dict()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    for role in ("student", "tokenizer"):
        shutil.copy(VAR.files[role], folder)
    return folder


def test_a_directory_is_a_model(own_model: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    assert invoke("onnx", "--model", own_model, "-o", bundle).exit_code == 0
    assert invoke("sample", bundle, "--label", "kind 3", "-o", tmp_path / "out.png").exit_code == 0
    files = ("--checkpoint", own_model / "student.pth", "--vae", own_model / "vae.pth")
    assert invoke("validate", "parity", bundle, *files, "--images", 2, "--batch", 2).exit_code == 0


def test_a_repository_is_a_model(own_model: Path, hub: FakeHub, tmp_path: Path):
    commit = hub.add("someone/model", {path.name: path.read_bytes() for path in own_model.iterdir()})
    assert invoke("onnx", "--model", "hf://someone/model", "-o", tmp_path / "bundle").exit_code == 0
    files = read_manifest(tmp_path / "bundle").weights.files
    assert {(file.repository, file.commit) for file in files} == {("someone/model", commit)}
    wrong = failure(invoke("onnx", "--model", "hf://someone/model@main", "--revision", "main"))
    assert "--revision" in wrong


def test_a_model_that_is_none_is_said(hub: FakeHub, tmp_path: Path):
    assert "no recipe file at" in failure(invoke("onnx", tmp_path))
    hub.add("someone/else", {"model.bin": b""})
    assert "no file recipe.yaml" in failure(invoke("onnx", "hf://someone/else"))
    assert "hf://USER/NAME" in failure(invoke("onnx", "var-d17"))
    with pytest.raises(RecipeError, match="3 names for 10 classes"):
        class_names(VAR.recipe(labels=["a", "b", "c"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../elsewhere"}, "name must be letters"),
        ({"labels": "../../secrets"}, "labels must be a list"),
        (
            {"files": {"student": {"embedded": "../../x"}, "tokenizer": {"file": "x"}}},
            "must be the name of a file",
        ),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]", "has aliases"),
    ],
)
def test_a_recipe_of_a_stranger_reaches_nothing_else(change, message: str, hub: FakeHub, tmp_path: Path):  # type: ignore[no-untyped-def]
    text = change if isinstance(change, str) else yaml.safe_dump(VAR.recipe().to_dict() | change)
    hub.add("a/stranger", {"recipe.yaml": text.encode()})
    assert message in failure(invoke("onnx", "hf://a/stranger"))


def test_the_published_recipes_say_where_everything_is():
    for name in ("var-d16", "var-d20", "var-d24", "llamagen-b", "llamagen-l"):
        recipe = load_recipe(name)
        assert all(source.repo and source.path for source in recipe.files.values())
        assert recipe.parity.fid and recipe.parity.fid.reference.startswith("hf://")
        assert recipe_from_dict(recipe.to_dict()) == recipe
