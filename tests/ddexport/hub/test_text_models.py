"""The published text model from the Hub: teacher, decoder and the directory of the text encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddexport.families._weight_file import fingerprint
from ddexport.recipe import load_recipe
from ddexport.runtime.bundle import read_manifest
from tests.conftest import copying
from tests.ddexport.test_cli import failure, invoke
from tests.fake_hub import FakeHub
from tests.goldens import TEXT

ENCODER = TEXT.folder / "t5-encoder"
ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json")
STUDENT = {"schedules": {"1": {"known": [0]}, "2": {"known": [0, 5]}}, "split": 5, "vector": "last"}


@pytest.fixture
def recipe(hub: FakeHub, text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe that ships, at the golden geometry. Exports take the graphs that were traced before."""
    monkeypatch.setattr("ddexport.export.onnx_from_module", copying(text_bundle))
    golden, data = TEXT.recipe().to_dict(), load_recipe("llamagen-t2i-xl").to_dict()
    data |= {key: golden[key] for key in ("image", "model", "tokenizer", "parity")}
    data["sequence"] = {key: golden["sequence"][key] for key in ("length", "width", "codebook")}
    data["condition"] = {"kind": "text", "tokens": 12, "width": 48}
    data["teacher"]["top_k"] = 1
    data["name"] = "small"
    data["files"]["text_encoder"]["beside"] = list(ENCODER_FILES[1:])
    published = {TEXT.files[role]: data["files"][role] for role in ("tokenizer", "teacher")}
    hub.add("peizesun/llamagen_t2i", {place["path"]: file.read_bytes() for file, place in published.items()})
    hub.add("google/flan-t5-xl", {name: (ENCODER / name).read_bytes() for name in ENCODER_FILES})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "small.yaml"


def test_the_published_model_draws_from_a_sentence(recipe: Path, hub: FakeHub, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    result = invoke("onnx", "--model", recipe, "-o", bundle)
    assert result.exit_code == 0, result.output
    assert len(hub.gets()) == 2 + len(ENCODER_FILES)
    manifest = read_manifest(bundle)
    assert not manifest.schedules and manifest.teacher is not None and manifest.sequence.split == 16
    roles = {graph.role for graph in manifest.graphs}
    assert roles == {"decoder", "teacher", "teacher_prefix", "text_encoder"}
    [source] = [file for file in manifest.weights.files if file.role == "text_encoder"]
    assert source.repository == "google/flan-t5-xl" and source.sha256 == fingerprint(ENCODER)[0]
    assert invoke("sample", bundle, "--prompt", "a red cat", "-o", tmp_path / "out.png").exit_code == 0
    assert "of texts of up to 12 tokens, with its text encoder" in invoke("inspect", bundle).stdout


def test_without_an_encoder_it_is_not_fetched(recipe: Path, hub: FakeHub, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert invoke("onnx", recipe, "--text-encoder", "none", "-o", bundle).exit_code == 0
    assert len(hub.gets()) == 2
    words = ("sample", bundle, "--prompt", "a red cat", "-o", tmp_path / "out.png")
    assert "--features" in failure(invoke(*words))


@pytest.mark.parametrize("settings", [STUDENT, None])
def test_a_student_brings_its_schedules_or_is_refused(
    recipe: Path, tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.load(TEXT.files["student"], weights_only=True)
    torch.save(weights | ({"config": settings} if settings else {}), tmp_path / "student.pth")
    words = ("onnx", recipe, "--checkpoint", tmp_path / "student.pth", "--text-encoder", ENCODER)
    result = invoke(*words, "-o", tmp_path / "bundle")
    if settings is None:
        assert "trained for" in failure(result) and not (tmp_path / "bundle").exists()
        return
    assert result.exit_code == 0, result.output
    assert sorted(read_manifest(tmp_path / "bundle").schedules) == [1, 2]
    assert invoke("sample", tmp_path / "bundle", "--prompt", "", "-o", tmp_path / "out.png").exit_code == 0


def wide_tokenizer() -> str:
    """With more tokens than the encoder has rows."""
    content = json.loads((ENCODER / "tokenizer.json").read_text())
    content["model"]["vocab"] += [[f"word{number}", -9.0] for number in range(96)]
    return json.dumps(content)


def test_what_cannot_be(recipe: Path, tmp_path: Path) -> None:
    for words, named in (
        (("--teacher", "none"), "no student"),
        (("--precision", "int8"), "int8"),
        (("--pipeline", "1"), "texts"),
        (("--text-encoder", tmp_path), "config.json"),
    ):
        assert named in failure(invoke("onnx", recipe, *words, "-o", tmp_path / "bundle")), words
    for tokenizer, named in (('{"a": 1}', "is not a tokenizer"), (wide_tokenizer(), "knows 96")):
        folder = tmp_path / "t5"
        shutil.copytree(ENCODER, folder, dirs_exist_ok=True)
        (folder / "tokenizer.json").write_text(tokenizer)
        words = ("onnx", recipe, "--text-encoder", folder, "-o", tmp_path / "bundle")
        assert named in failure(invoke(*words))
    words = ("onnx", "digits-var", "--text-encoder", ENCODER, "-o", tmp_path / "bundle")
    assert "no text_encoder" in failure(invoke(*words))


def test_a_text_bundle_travels(
    text_bundle: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its tokenizer and what runs once a text are fetched, with the graphs of the steps alone."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)
    assert invoke("push", text_bundle, "someone/text").exit_code == 0
    card = hub.repositories["someone/text"]["main"]["README.md"].decode()
    assert "pipeline_tag: text-to-image" in card and "--prompt" in card
    hub.asked.clear()
    assert invoke("sample", "hf://someone/text", "--prompt", "a cat", "--steps", 2).exit_code == 0
    fetched = {line.rpartition("/")[2] for line in hub.gets()}
    assert {"tokenizer.json", "text_encoder.onnx", "text_prefix.onnx", "student.onnx"} <= fetched
    assert not {file for file in fetched if file.startswith("teacher")}
