"""Text-conditional LlamaGen computes what the published code computes (tests/golden/llamagen-t2i-small), and
its collapsed text what the padded, masked one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddexport.distill.trainers import trainer
from ddexport.families._checkpoint import CheckpointError, connect, load_part, save_part
from ddexport.families._llamagen_text import TextSize
from ddexport.families._weight_file import config_of
from ddexport.recipe import Recipe, RecipeError, load_recipe, recipe_from_dict, with_student
from tests.goldens import close

FOLDER = Path(__file__).parents[2] / "golden" / "llamagen-t2i-small"
VQ = FOLDER.parent / "llamagen-dd-small" / "vq.pth"
TOLERANCE, GUIDED = 3e-5, 2e-4  # of the golden file's README
RECIPE = load_recipe(str(FOLDER / "recipe.yaml"))
with np.load(FOLDER / "expected.npz") as arrays:
    EXPECTED = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
TEXT = EXPECTED["features"], EXPECTED["features_mask"]


def student(split: int = 5, weights: str | None = None) -> Any:
    sequence = RECIPE.to_dict()["sequence"] | {"split": split}
    recipe = recipe_from_dict(RECIPE.to_dict() | {"sequence": sequence})
    part = load_part(recipe, "student", FOLDER / "student.pth", weights)
    connect(part, load_part(RECIPE, "tokenizer", VQ))
    return part


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_part(RECIPE, "teacher", FOLDER / "teacher.pth")


def known(count: int) -> Tensor:
    return torch.full((3,), count)


@torch.no_grad()
def test_the_teacher_reads_text_and_null_text(teacher: Any) -> None:
    tokens = EXPECTED["teacher_tf_tokens"]
    close(teacher(tokens, *TEXT), EXPECTED["teacher_tf_cond_logits"], TOLERANCE)
    pair = teacher.pair(*TEXT)
    close(teacher(tokens.repeat(2, 1), *pair)[3:], EXPECTED["teacher_tf_uncond_logits"], TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "guidance"), [("teacher_ar", 7.5), ("teacher_ar_nocfg", 1.0)])
def test_the_teacher_draws_the_published_tokens(teacher: Any, name: str, guidance: float) -> None:
    logits: list[Tensor] = []

    def greedy(step: Tensor, positions: slice) -> Tensor:
        logits.append(step)
        return step.argmax(-1)

    tokens = trainer("llamagen_dd").generate(teacher, None, TEXT, greedy, guidance)  # type: ignore[arg-type]
    assert torch.equal(tokens, EXPECTED[f"{name}_tokens"])
    stored = EXPECTED[f"{name}_{'cfglogits' if guidance > 1 else 'logits'}"]
    close(torch.cat(logits, 1), stored, GUIDED if guidance > 1 else TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(("case", "count"), [("onestep_step0", 0), ("twostep_step1", 5)])
def test_the_student_draws_what_the_repaired_code_draws(case: str, count: int) -> None:
    part = student()
    inputs = EXPECTED[f"{case}_input"], *TEXT, known(count)
    logits, embeddings = part.heads(*inputs)
    close(logits, EXPECTED[f"{case}_raw_logits"], TOLERANCE)
    close(embeddings, EXPECTED[f"{case}_raw_conti"], TOLERANCE)
    sequence, tokens, _ = part(*inputs)
    close(sequence, EXPECTED[f"{case}_sequence"], TOLERANCE)
    assert torch.equal(tokens[:, count:], EXPECTED[f"{case}_final_logits"].argmax(-1)[:, count:5])


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "split", "weights"),
    [("twostep_split9", 9, None), ("twostep_split3", 3, None), ("nonema_onestep", 5, "model")],
)
def test_other_splits_and_the_other_weights(case: str, split: int, weights: str | None) -> None:
    part, noise = student(split, weights), EXPECTED["noise"]
    sequence = part(noise, *TEXT, known(0))[0]
    if split != 5:
        close(sequence, EXPECTED[f"{case}_step0_sequence"], TOLERANCE)
        sequence = part(torch.cat([sequence[:, :5], noise[:, 5:]], 1), *TEXT, known(5))[0]
    close(sequence, EXPECTED[f"{case}_step{int(split != 5)}_sequence"], TOLERANCE)


@torch.no_grad()
def test_the_prefix_is_the_published_mean_of_values(teacher: Any) -> None:
    values, log_count, condition = student().prefix(*TEXT)
    close(values.transpose(0, 1), EXPECTED["student_prefix_values"], TOLERANCE)
    close(condition, EXPECTED["student_condition"], TOLERANCE)
    close(log_count.exp(), EXPECTED["n"].float(), TOLERANCE)
    text, null = teacher.prefix(*TEXT)[0].unbind(1)
    close(text.transpose(0, 1), EXPECTED["teacher_cond_prefix_values"], TOLERANCE)
    close(null.transpose(0, 1), EXPECTED["teacher_uncond_prefix_values"], TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("vector", ["last", "mean"])
def test_behind_the_prefix_a_student_draws_what_it_draws_behind_the_padded_text(vector: str) -> None:
    """In float64, where nothing but a fault can differ; prompts of 3, 7 and 12 tokens, and mixed known."""
    part = student().double()
    part.condition_embedding.size = TextSize(12, 48, vector)
    features, mask, noise = TEXT[0].double(), TEXT[1], EXPECTED["noise"].double()
    counts = torch.tensor([0, 5, 16])
    whole = part(noise, features, mask, counts)
    collapsed = part.behind(noise, *part.prefix(features, mask), counts)
    for got, wanted in zip(collapsed, whole, strict=True):
        close(got, wanted, 1e-12)
    unseen = features + (1 - mask)[:, :, None] * 100.0  # rows that are not the text's
    for got, wanted in zip(part.prefix(unseen, mask), part.prefix(features, mask), strict=True):
        close(got, wanted, 1e-12)


@torch.no_grad()
def test_images_in_a_row_may_share_a_text(teacher: Any) -> None:
    """For training: what is seen of the text is computed once."""
    part, tokens, counts = student(), EXPECTED["teacher_tf_tokens"], torch.tensor([0, 5])
    text = tuple(rows[:1] for rows in TEXT)
    twice = tuple(rows.repeat(2, *[1] * (rows.ndim - 1)) for rows in text)
    close(teacher(tokens[:2], *text), teacher(tokens[:2], *twice), TOLERANCE)
    shared = part.heads(EXPECTED["noise"][:2], *text, counts)
    for got, wanted in zip(shared, part.heads(EXPECTED["noise"][:2], *twice, counts), strict=True):
        close(got, wanted, TOLERANCE)


@torch.no_grad()
def test_the_first_token_comes_from_the_last_row_whatever_a_student_is_conditioned_on(teacher: Any) -> None:
    data = RECIPE.to_dict()
    mean = recipe_from_dict(data | {"condition": data["condition"] | {"vector": "mean"}})
    other = load_part(mean, "teacher", FOLDER / "teacher.pth")
    for got, wanted in zip(other.prefix(*TEXT), teacher.prefix(*TEXT), strict=True):
        close(got, wanted, 1e-7)


def test_weights_are_read_strictly_and_the_null_text_is_never_made_up(tmp_path: Path, teacher: Any) -> None:
    weights = torch.load(FOLDER / "teacher.pth", weights_only=True)["model"]
    stored = weights["cls_embedding.uncond_embedding"]
    assert torch.equal(teacher.condition_embedding.null, stored)
    del weights["cls_embedding.uncond_embedding"]
    torch.save({"module": weights}, tmp_path / "no-null.pt")
    with pytest.raises(CheckpointError, match=r"missing cls_embedding\.uncond_embedding"):
        load_part(RECIPE, "teacher", tmp_path / "no-null.pt")
    save_part(teacher, RECIPE, "teacher", tmp_path / "again.safetensors", torch.float32)
    again = load_part(RECIPE, "teacher", tmp_path / "again.safetensors")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in teacher.state_dict().items())


SETTINGS = {"schedules": {"1": {"known": [0]}}, "split": 7, "vector": "mean"}


@pytest.fixture
def unknown_student() -> Recipe:
    """A recipe without a student, as that of the published model."""
    data = RECIPE.to_dict()
    del data["schedules"], data["files"]["student"], data["sequence"]["split"], data["condition"]["vector"]
    return recipe_from_dict(data)


def test_what_a_student_was_trained_for_is_read_from_its_checkpoint(
    unknown_student: Recipe, tmp_path: Path
) -> None:
    assert unknown_student.sequence.split == 16  # every position of a teacher is a token
    torch.save({"ema": {}, "config": SETTINGS}, tmp_path / "student.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "student.safetensors", {"config": json.dumps(SETTINGS)})
    (tmp_path / "folder").mkdir()
    (tmp_path / "student.safetensors").rename(tmp_path / "folder" / "model.safetensors")
    for name in ("student.pth", "folder", "folder/model.safetensors"):
        recipe = with_student(unknown_student, config_of(tmp_path / name), name)
        assert recipe.schedules.keys() == {"1"} and recipe.sequence.split == 7
        assert recipe.condition is not None and recipe.condition.vector == "mean"
    assert with_student(RECIPE, SETTINGS, "file") == RECIPE  # the recipe's own come first


WRONG = [
    None, [], {}, {**SETTINGS, "split": 99}, {"split": 5, "vector": "last"}, {**SETTINGS, "schedules": {}},
    {**SETTINGS, "schedules": torch.zeros(2)}, {**SETTINGS, "vector": "first"},
]  # fmt: skip


@pytest.mark.parametrize("settings", WRONG)
def test_a_student_of_unknown_training_is_refused(unknown_student: Recipe, settings: Any) -> None:
    with pytest.raises(RecipeError):
        with_student(unknown_student, settings, "student.pth")


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[" * 20_000):
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"config": text})
        with pytest.raises(CheckpointError, match="not JSON"):
            config_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data.update(classes=10, labels="digits"), "classes"),
        (lambda data: data.update(labels="digits"), "classes"),
        (lambda data: data.pop("condition"), "classes"),
        (lambda data: data["condition"].pop("vector"), "vector"),
        (lambda data: data["condition"].update(kind="image"), "kind"),
        (lambda data: data["condition"].update(tokens=0), "tokens"),
        (lambda data: data["files"].pop("teacher"), "teacher"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(
    change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    data = RECIPE.to_dict()
    change(data)
    with pytest.raises(RecipeError, match=named):
        recipe_from_dict(data)
