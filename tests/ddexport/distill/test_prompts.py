"""A student of a published text model, trained from prompts: it is exported as it is, and draws."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from ddexport.cli import main
from ddexport.distill.conditions import Texts
from ddexport.distill.pairs import read_pairs
from ddexport.families._weight_file import config_of
from ddexport.recipe import load_recipe
from ddexport.runtime.errors import DDError
from ddexport.runtime.text import trial_features

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDER = GOLDEN / "llamagen-t2i-small"
WEIGHTS = ("--vae", GOLDEN / "llamagen-dd-small" / "vq.pth", "--teacher", FOLDER / "teacher.pth")
DISTILL = {
    "schedules": {"1": {"known": [0]}, "2": {"known": [0, 5]}},
    "split": 9,
    "vector": "last",
    "images": 2,
    "pairs": {"count": 8, "guidance": 2.0, "top_k": 8, "steps": 4, "batch": 4},
    "student": {"iterations": 3, "batch": 4, "rate": 1e-3, "warmup": 1, "timesteps": [0, 5]},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the golden model without a student, with settings to train one."""
    data = load_recipe(str(FOLDER / "recipe.yaml")).to_dict()
    data.pop("schedules")
    data["condition"].pop("vector", None)
    data["sequence"].pop("split")
    data["files"].pop("student", None)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(json.dumps(data | {"distill": DISTILL}))
    return path


def invoke(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def outcomes(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [stage["outcome"] for stage in json.loads(result.stdout)["stages"]]


def test_from_prompts_to_a_picture(recipe: Path, tmp_path: Path) -> None:
    """The checkpoint says what the student was trained for, so that its recipe need not."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a red fox\nan owl and a cup\n")
    train = ["distill", "--model", recipe, "--prompts", prompts, "--out", out, "--no-compile", "--json"]
    train += [*WEIGHTS, "--text-encoder", FOLDER / "t5-encoder"]
    assert outcomes(invoke(*train)) == ["trained", "trained"]
    assert outcomes(invoke(*train)) == ["unchanged", "unchanged"]
    student = out / "student.safetensors"
    config = config_of(student)
    assert config == {key: DISTILL[key] for key in ("schedules", "split", "vector")}
    os.mkfifo(tmp_path / "pipe")  # as the shell makes of <(...)
    train[train.index(prompts)] = tmp_path / "pipe"
    Thread(target=(tmp_path / "pipe").write_text, args=("a red fox\n",)).start()
    assert outcomes(invoke(*train)) == ["trained", "trained"]

    export = ["onnx", recipe, "-o", tmp_path / "bundle", "--checkpoint", student, *WEIGHTS]
    result = invoke(*export, "--text-encoder", FOLDER / "t5-encoder")
    assert result.exit_code == 0, result.output
    picture = tmp_path / "fox.png"
    result = invoke("sample", tmp_path / "bundle", "--prompt", "a red fox", "--steps", 2, "-o", picture)
    assert result.exit_code == 0 and picture.stat().st_size > 100, result.output


def test_the_student_learns_the_pairs_of_features(recipe: Path, tmp_path: Path) -> None:
    """Without a text encoder; the loss falls."""
    text = load_recipe(str(recipe)).condition
    assert text is not None
    features = np.random.default_rng(0).standard_normal((3, text.tokens, text.width), np.float32)
    np.savez(tmp_path / "texts.npz", features=features, features_mask=np.ones((3, text.tokens), np.int64))
    data = json.loads(recipe.read_text())
    data["distill"]["student"] |= {"iterations": 100, "rate": 1e-2}
    longer = tmp_path / "longer.yaml"
    longer.write_text(json.dumps(data))
    run = ["distill", longer, "--prompts", tmp_path / "texts.npz", "--out", tmp_path / "run", "--no-compile"]
    assert outcomes(invoke(*run, "--json", *WEIGHTS)) == ["trained", "trained"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digits-var", "--prompts", "p.txt"], "has no student that is trained from prompts"),
        (["llamagen-t2i-xl"], "--prompts FILE"),
        (["llamagen-t2i-xl", "--prompts", "p.txt", "--install"], "--install"),
        (["digits-var", "--device", "cuda"], "--device"),
        (["llamagen-t2i-xl", "--prompts", "p.txt", "--random-weights", "0"], "no text encoder"),
    ],
)
def test_what_cannot_be_trained_says_why(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a fox\n")
    result = invoke("distill", *words)
    assert result.exit_code in (1, 2) and told in result.stderr, result.stderr
    assert not list(tmp_path.glob("runs/*/pairs*"))


@pytest.mark.parametrize("content", [None, b"", b"\xff"])
def test_prompts_are_read_before_weights(recipe: Path, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "none.txt"
    if content is not None:
        file.write_bytes(content)
    result = invoke("distill", recipe, "--prompts", file, "--teacher", "absent.pth", "--out", tmp_path)
    assert result.exit_code == 1 and "none.txt" in result.stderr and "absent" not in result.stderr


def test_features_are_kept_without_padding() -> None:
    known = trial_features(12, 4)
    texts = Texts([known.rows(slice(0, 3)), known.rows(slice(3, None))], images=2)
    assert len(texts.own) == known.mask.sum()
    labels = torch.tensor([5, 0, 7, 5])
    features, mask = texts.inputs({"labels": labels})
    assert np.array_equal(features, known.features[labels]) and np.array_equal(mask, known.mask[labels])


@pytest.mark.parametrize("content", [b"", b"cut off"])
def test_pairs_that_are_damaged(recipe: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pairs.safetensors").write_bytes(content)
    with pytest.raises(DDError, match="is damaged"):
        read_pairs(tmp_path / "pairs.safetensors")


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [("pairs", {"batch": 3}, "multiples of 2"), ("student", {"timesteps": [0, 16]}, "each from 0 to 15")],
)
def test_a_wrong_recipe_is_told_first(
    recipe: Path, tmp_path: Path, part: str, change: dict[str, Any], told: str
) -> None:
    data = json.loads(recipe.read_text())
    data["distill"][part] |= change
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(json.dumps(data))
    result = invoke("distill", wrong, "--prompts", tmp_path / "none.txt", "--out", tmp_path / "run")
    assert result.exit_code == 1 and told in result.stderr
