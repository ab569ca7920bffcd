"""A bundle travels: `ddexport push`, and hf://USER/NAME wherever a bundle is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from msgspec import structs
from PIL import Image

import ddexport
from ddexport.hub.bundle import local_bundle
from ddexport.hub.errors import HubError
from ddexport.runtime.bundle import FILE_NAME, read_manifest, sha256_of
from ddexport.runtime.errors import BundleError
from tests.ddexport.test_cli import failure, invoke
from tests.fake_hub import HUB, FakeHub, Files

NAME = "someone/digits"


@pytest.fixture
def bundle(embedded_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_bundle("digits-var"), tmp_path / "digits"))


@pytest.fixture(scope="module")
def pushed(embedded_bundle: Callable[[str], Path]) -> dict[str, Files]:
    """The repository that `ddexport push` makes, by revision."""
    HUB.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", HUB.token)
        assert invoke("push", embedded_bundle("digits-var"), NAME).exit_code == 0
    return HUB.repositories[NAME]


@pytest.fixture
def published(
    pushed: dict[str, Files], hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> FakeHub:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)  # where `sample` writes out.png
    hub.repositories[NAME] = dict(pushed)
    return hub


def test_what_was_published_is_what_was_there(published: FakeHub, bundle: Path, tmp_path: Path):
    files = published.repositories[NAME]["main"]
    manifest = read_manifest(bundle)
    for file in (FILE_NAME, *(info.file for info in manifest.files())):
        assert files[file] == (bundle / file).read_bytes()
    _, header, text = files["README.md"].decode().split("---\n", 2)
    assert {"license", "library_name", "tags", "pipeline_tag"} <= yaml.safe_load(header).keys()
    assert f"hf://{NAME}" in text and "![" in text and "Licence" in text
    (tmp_path / "sample.png").write_bytes(files["sample.png"])
    with Image.open(tmp_path / "sample.png") as picture:
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 100


def test_the_card_has_the_figures_that_were_measured(
    hub: FakeHub, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of this manifest: those of another are left out."""
    report = {"title": "digits", "rows": [{"name": "FID, bundle", "scope": "1 step", "value": 0.51}]}
    for name, digest in (("fid-fp32", sha256_of(bundle / FILE_NAME)), ("fid-fp16", "0" * 64)):
        content = json.dumps(report | {"manifest": digest, "verdict": f"{name} holds"})
        (bundle / "parity" / f"{name}.json").write_text(content)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    invoke("push", bundle, NAME)
    text = hub.repositories[NAME]["main"]["README.md"].decode()
    assert "fid-fp32 holds\n  - FID, 1 step: 0.51" in text and "fid-fp16" not in text


def test_nothing_is_published_in_vain(published: FakeHub, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    """Not a damaged bundle, nor in another's repository, nor without a token."""
    published.add("someone/else", {"model.bin": b"1"})
    assert "model.bin" in failure(invoke("push", bundle, "someone/else"))
    (bundle / "decoder.onnx").write_bytes(b"x")
    assert "decoder.onnx" in failure(invoke("push", bundle, NAME))
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN" in failure(invoke("push", f"hf://{NAME}", NAME))
    assert not [line for line in published.asked if "/commit/" in line]


def test_it_draws_the_same_pictures(published: FakeHub, bundle: Path, tmp_path: Path):
    for name in (f"hf://{NAME}", f"hf://{NAME}@main", bundle):
        assert invoke("sample", name, "--seed", 1, "-o", tmp_path / f"{len(str(name))}.png").exit_code == 0
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 1
    with ddexport.load(f"hf://{NAME}", steps=2) as pipe:
        assert len(pipe("seven", steps=2).images) == 1


def test_only_the_graphs_that_are_asked_for_are_fetched(published: FakeHub, monkeypatch: pytest.MonkeyPatch):
    graphs = ["student_int8.onnx", "student_int8.onnx.data", "decoder_int8.onnx", "decoder_small_int8.onnx"]
    asked = [*graphs, "labels.json", "bundle.json"]
    assert invoke("sample", f"hf://{NAME}", "--precision", "int8", "--steps", 1).exit_code == 0
    assert sorted(line.rpartition("/")[2] for line in published.gets()) == sorted(asked)
    monkeypatch.setattr("ddexport.hub.bundle.FileLock", None)  # what is there may be read-only
    assert invoke("sample", f"hf://{NAME}", "--precision", "int8", "--steps", 1).exit_code == 0
    assert len(published.gets()) == len(asked)


@pytest.mark.parametrize(
    ("precision", "steps", "graphs"),
    [
        ("fp16", 1, "student_fp16 decoder_fp16"),
        ("fp16", 4, "student_fp16 student_split14_fp16 decoder_fp16 teacher_fp16"),
        # Its teacher is not reduced.
        ("int8", 4, "student student_split14 decoder teacher student_int8 student_split14_int8 decoder_int8"),
        ("bf16", 2, "student decoder student_bf16 decoder_bf16"),  # OpenVINO computes it from fp32
    ],
)
def test_the_part_of_a_bundle(precision: str, steps: int, graphs: str, published: FakeHub):
    manifest = read_manifest(local_bundle(f"hf://{NAME}", (precision,), (steps,)))
    small = {name.replace("decoder", "decoder_small") for name in graphs.split() if "decoder" in name}
    assert {graph.file.removesuffix(".onnx") for graph in manifest.graphs} == {*graphs.split(), *small}
    assert steps in manifest.schedules


def test_without_a_choice_it_is_whole(published: FakeHub, bundle: Path):
    """As doctor needs it, whose images are of this very manifest."""
    whole = local_bundle(f"hf://{NAME}", (), ())
    assert (whole / FILE_NAME).read_bytes() == (bundle / FILE_NAME).read_bytes()
    assert read_manifest(whole) == read_manifest(bundle)
    (whole / "decoder.onnx").unlink()
    assert read_manifest(local_bundle(f"hf://{NAME}", (), ()))


def test_a_copy_that_was_killed_or_damaged_is_made_again(published: FakeHub, bundle: Path):
    whole = local_bundle(f"hf://{NAME}", (), ())
    (whole / ".ddexport-0.part").touch()
    (whole / "decoder.onnx").write_bytes(b"")
    (whole / FILE_NAME).write_bytes(b"{}")
    assert read_manifest(local_bundle(f"hf://{NAME}", (), ())) == read_manifest(bundle)
    assert not list(whole.glob("*.part"))


def test_a_fetch_that_fails_leaves_no_bundle(published: FakeHub, tmp_path: Path):
    published.lies = {"decoder.onnx"}
    assert "decoder.onnx" in failure(invoke("sample", f"hf://{NAME}"))
    assert not list((tmp_path / "assets").rglob(FILE_NAME))


def test_offline_it_is_what_was_fetched(published: FakeHub, monkeypatch: pytest.MonkeyPatch):
    invoke("sample", f"hf://{NAME}", "--steps", 1)
    published.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert invoke("sample", f"hf://{NAME}", "--steps", 1).exit_code == 0
    assert "teacher.onnx" in failure(invoke("sample", f"hf://{NAME}", "--steps", 3))
    assert not published.asked


def test_a_path_asks_nobody(published: FakeHub):
    for name in ("build/var-d16", NAME, f"./{NAME}", "no-such-bundle"):
        failure(invoke("sample", name))
    assert "hf://" in failure(invoke("sample", f"s3://{NAME}"))
    assert not published.asked


def test_what_is_no_bundle_is_said(published: FakeHub, bundle: Path):
    published.add("golden/model", {"recipe.yaml": b"name: golden"})
    assert "no file bundle.json" in failure(invoke("sample", "hf://golden/model"))
    assert "no revision v9" in failure(invoke("inspect", f"hf://{NAME}@v9"))
    with pytest.raises(HubError):
        local_bundle(f"hf://{NAME}/parity", (), ())
    manifest = read_manifest(bundle)
    outside = structs.replace(manifest, labels=structs.replace(manifest.labels, file="../labels.json"))
    published.add("evil/bundle", {FILE_NAME: outside.to_json().encode()})
    with pytest.raises(BundleError, match="outside"):
        local_bundle("hf://evil/bundle", (), ())
