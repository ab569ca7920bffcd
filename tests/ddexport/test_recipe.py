"""Recipes: each mistake is an error that names its key, and those that ship describe the published files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddexport.bundle import WeightRequest, load_parts
from ddexport.families import family
from ddexport.families._base import GeometryError
from ddexport.recipe import (
    Recipe,
    RecipeError,
    class_names,
    embedded_weights,
    load_recipe,
    recipe_from_dict,
    recipe_names,
)

KEYS = Path(__file__).parents[1] / "golden" / "keys-var.txt"
PUBLISHED = ["var-d16", "var-d20", "var-d24"]
Edit = Callable[[dict[str, Any]], object]


def edited(recipe: Recipe, edit: Edit) -> Recipe:
    data = recipe.to_dict()
    edit(data)
    return recipe_from_dict(data, "my.yaml")


def part(recipe: Recipe, role: str) -> torch.nn.Module:
    with torch.device("meta"):
        return family(recipe.family).build(recipe, role)


DRAWS = {"cfg": 2.0, "top_k": 10, "top_p": 1.0, "temperature": 1.0}


def with_teacher(known: list[int], start: int, end: int) -> dict[str, object]:
    return {"known": known, "teacher": {"start": start, "end": end}}


# Each way to be wrong: the edit, what the message must say, what the hint must say.
MISTAKES: dict[str, tuple[Edit, str, str]] = {
    "unknown key": (lambda d: d.update(sequense={}), "unknown key sequense", "did you mean sequence?"),
    "unknown key inside": (
        lambda d: d["sequence"].update(lenght=30), "sequence: unknown key lenght", "did you mean length?",
    ),
    "unknown key of a file": (
        lambda d: d["files"]["student"].update(url="x"), "files.student: unknown key url", "option",
    ),
    "unknown limit": (lambda d: d["parity"]["fp32"].update(psnr=1), "parity.fp32: unknown key psnr", "image"),
    "missing key": (lambda d: d.pop("classes"), "the key classes is missing", "recipes/"),
    "missing key inside": (lambda d: d["image"].pop("size"), "image: the key size is missing", "recipes/"),
    "missing limit": (lambda d: d["parity"]["fp32"].pop("image_max"), "the key image_max is missing", ""),
    "text for a number": (lambda d: d.update(classes="10"), "classes: '10' is not of type int", "correct"),
    "number for a text": (lambda d: d.update(labels=7), "labels: 7 is not of type str", "correct"),
    "fraction": (lambda d: d["sequence"].update(split=5.0), "split: 5.0 is not of type int", "correct"),
    "yes for a number": (lambda d: d["image"].update(size=True), "size: True is not of type int", "correct"),
    "number for a section": (lambda d: d.update(image=64), "image: expected keys and values", ""),
    "list for a section": (lambda d: d.update(files=[]), "files: [] is not of type keys and values", ""),
    "newer schema": (lambda d: d.update(schema=2), "schema 2 is not 1", "upgrade"),
    "split past the end": (lambda d: d["sequence"].update(split=31), "split 31", "sequence.split"),
    "split of nothing": (lambda d: d["sequence"].update(split=0), "sequence.split: 0 is no size", "1 on"),
    "no classes": (lambda d: d.update(classes=0), "classes: 0 is no size", "from 1 on"),
    "images of no size": (lambda d: d["image"].update(size=-64), "image.size: -64 is no size", "from 1 on"),
    "text for a size": (lambda d: d["model"].update(depth="2"), "model.depth: '2' is no size", "from 1 on"),
    "no heads": (lambda d: d["model"].update(heads=0), "model.heads: 0 is no size", "from 1 on"),
    "no scales": (lambda d: d["model"].update(scales=[]), "model.scales: [] is no size", "from 1 on"),
    "text among sizes": (
        lambda d: d["tokenizer"].update(multipliers=[1, "2"]), "multipliers: [1, '2'] is no size", "1 on",
    ),
    "no schedule": (lambda d: d.update(schedules={}), "no schedules", "known"),
    "another number of steps": (
        lambda d: d["schedules"].update({"3": {"known": [0, 5]}}), "schedule 3 has known [0, 5]", "one num",
    ),
    "steps in words": (
        lambda d: d["schedules"].update(two={"known": [0, 5]}), "schedule two has known [0, 5]", "one number",
    ),
    "a first step that knows": (
        lambda d: d["schedules"].update({"1": {"known": [5]}}), "schedule 1 has known [5]", "the first 0",
    ),
    "a schedule that falls": (
        lambda d: d["schedules"].update({"3": {"known": [0, 14, 5]}}), "known [0, 14, 5]", "rising",
    ),
    "a step that knows everything": (
        lambda d: d["schedules"].update({"2": {"known": [0, 30]}}), "known [0, 30]", "below 30",
    ),
    "no steps": (lambda d: d["schedules"].update({"0": {"known": []}}), "schedule 0", "one number"),
    "a number for a list": (
        lambda d: d["schedules"].update({"1": {"known": 0}}), "schedules.1.known: 0 is not a list", "",
    ),
    "texts in a schedule": (
        lambda d: d["schedules"].update({"1": {"known": ["0"]}}), "known: ['0'] is not a list of pos", "",
    ),
    "a span that ends before it starts": (
        lambda d: d["schedules"].update({"3": with_teacher([0, 5], 5, 5)}), "teacher from 5 to 5", "rising",
    ),
    "a span past the end": (
        lambda d: d["schedules"].update({"3": with_teacher([0], 14, 31)}), "from 14 to 31", "within the 30",
    ),
    "a step that keeps other positions than the teacher's": (
        lambda d: d["schedules"].update({"4": with_teacher([0, 5], 1, 14)}), "known [0, 5] around", "[0, 14]",
    ),
    "a first step that a teacher from 0 makes useless": (
        lambda d: d["schedules"].update({"4": with_teacher([0, 14], 0, 14)}), "known [0, 14] around", "[14]",
    ),
    "a teacher of unknown manners": (
        lambda d: d["schedules"].update({"4": with_teacher([14], 0, 14)}), "involves a teacher", "top_k",
    ),
    "a span with another key": (
        lambda d: d["schedules"].update({"4": {"known": [14], "teacher": {"begin": 0, "end": 14}}}),
        "schedules.4.teacher: unknown key begin", "start",
    ),
    "a split past the end of a schedule": (
        lambda d: d["schedules"].update({"2": {"known": [0, 5], "split": 31}}), "has split 31", "1 to 30",
    ),
    "a split in words": (
        lambda d: d["schedules"].update({"2": {"known": [0, 5], "split": "5"}}), "split: '5' is not a", "",
    ),
    "nothing to draw from": (
        lambda d: d.update(teacher=DRAWS | {"top_k": 0}), "teacher.top_k is 0", "at least 1",
    ),
    "more than all": (
        lambda d: d.update(teacher=DRAWS | {"top_p": 1.5}), "teacher.top_p is 1.5", "at most 1",
    ),
    "no file of the student": (lambda d: d["files"].pop("student"), "files.student is missing", "weights"),
    "an unknown part": (
        lambda d: d["files"].update(vae=d["files"]["tokenizer"]), "unknown part vae", "tokenizer",
    ),
    "a part from nowhere": (lambda d: d["files"].update(student={}), "files.student does not say", "option"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(golden_recipe: Recipe, name: str) -> None:
    """The message names file and key, the hint says what to do."""
    edit, message, hint = MISTAKES[name]
    with pytest.raises(RecipeError) as caught:
        edited(golden_recipe, edit)
    assert message in caught.value.message
    assert caught.value.message.startswith("my.yaml:")
    assert hint in caught.value.hint


GEOMETRY: dict[str, tuple[Edit, str]] = {
    "a span inside a scale": (
        lambda d: d.update(
            teacher=DRAWS, schedules=d["schedules"] | {"4": with_teacher([0, 14], 2, 14)}
        ), "schedule 4 has a teacher from 2 to 14",
    ),
    "another number of AR steps": (
        lambda d: d.update(
            teacher=DRAWS, schedules=d["schedules"] | {"3": with_teacher([0, 14], 1, 14)}
        ), "schedule 3 has 4 steps",
    ),
    "a schedule's split inside a scale": (
        lambda d: d["schedules"].update({"2": {"known": [0, 5], "split": 6}}),
        "split 6 is not the end of a scale",
    ),
    "scales of another length": (lambda d: d["model"].update(scales=[1, 2, 3]), "make 14 positions"),
    "split inside a scale": (lambda d: d["sequence"].update(split=6), "split 6 is not the end of a scale"),
    "known inside a scale": (
        lambda d: d["schedules"].update({"2": {"known": [0, 6]}}), "known 6 is not the end of a scale",
    ),
    "heads that do not divide": (lambda d: d["model"].update(heads=3), "heads 3"),
    "unknown key of the model": (lambda d: d["model"].update(dpeth=2), "wrong or missing keys: dpeth"),
    "missing key of the model": (lambda d: d["model"].pop("depth"), "wrong or missing keys: depth"),
    "another image size": (lambda d: d["image"].update(size=32), "images of side 64, not 32"),
    "unknown key of the tokenizer": (lambda d: d["tokenizer"].update(chanels=1), "chanels"),
    "missing key of the tokenizer": (lambda d: d["tokenizer"].pop("multipliers"), "multipliers"),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRY)
def test_a_geometry_that_does_not_fit_is_refused(golden_recipe: Recipe, name: str) -> None:
    edit, message = GEOMETRY[name]
    recipe = edited(golden_recipe, edit)
    with pytest.raises(GeometryError, match=re.escape(message)) as caught:
        for role in ("student", "tokenizer"):
            part(recipe, role)
    assert "var-dd-small" in caught.value.message
    assert caught.value.hint


def test_unknown_model_and_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no model called var-d61") as caught:
        load_recipe("var-d61")
    assert "did you mean var-d16?" in caught.value.hint
    assert "digits-var" in caught.value.hint
    with pytest.raises(RecipeError, match="no recipe file at"):
        load_recipe(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- 1\n", "holds no keys"),
        (b"", "holds no keys"),
        (b"!!python/object/apply:os.mkdir [/nowhere]", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    """Also a YAML tag that would build a Python object is refused: recipes are data."""
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_label_list(golden_recipe: Recipe) -> None:
    """A list of another length than the classes would give images the wrong names."""
    assert class_names(golden_recipe)["names"][3] == "three"
    with pytest.raises(RecipeError, match="imagenet has 1000 names, the model 10 classes"):
        class_names(edited(golden_recipe, lambda d: d.update(labels="imagenet")))
    with pytest.raises(RecipeError, match="no label list digitz"):
        class_names(edited(golden_recipe, lambda d: d.update(labels="digitz")))


def test_an_embedded_file_that_is_missing(golden_recipe: Recipe) -> None:
    recipe = edited(golden_recipe, lambda d: d["files"].update(student={"embedded": "no.safetensors"}))
    with pytest.raises(RecipeError, match=r"embedded weights no\.safetensors are missing"):
        embedded_weights(recipe.files["student"])


@pytest.mark.parametrize("name", recipe_names())
class TestRecipesThatShip:
    def test_plain_data_and_back(self, name: str) -> None:
        """A bundle carries the recipe as resolved; `validate` builds the reference from it."""
        recipe = load_recipe(name)
        assert recipe_from_dict(recipe.to_dict()) == recipe
        assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
        assert recipe.name == name

    def test_has_all_that_the_tools_print(self, name: str) -> None:
        recipe = load_recipe(name)
        assert len(class_names(recipe)["names"]) == recipe.classes
        assert "fp32" in recipe.parity
        assert {"weights", "intended_use"} <= set(recipe.licence)
        assert recipe.embedded or {"dataset", "fid"} <= set(recipe.published)

    def test_parameters_are_counted_right(self, name: str) -> None:
        """`ddexport models` prints the counts without building anything."""
        recipe = load_recipe(name)
        counts = {
            role: sum(p.numel() for p in part(recipe, role).parameters()) for role in ("student", "tokenizer")
        }
        assert recipe.parameters == counts

    def test_every_part_builds_and_takes_published_names(self, name: str) -> None:
        """No two of our tensors claim one published name."""
        recipe = load_recipe(name)
        for role in family(recipe.family).roles:
            published = [key for key, _ in published_tensors(recipe, role)]
            assert len(published) == len(set(published)) > 10

    def test_embedded_weights_load(self, name: str) -> None:
        """What ships with the project is there, and is the recipe's model."""
        recipe = load_recipe(name)
        for role, source in recipe.files.items():
            assert bool(source.embedded) == recipe.embedded, role
        if recipe.embedded:
            parts = load_parts(recipe, WeightRequest({}))
            assert all(value.isfinite().all() for m in parts.values() for value in m.state_dict().values())


def published_tensors(recipe: Recipe, role: str) -> list[tuple[str, tuple[int, ...]]]:
    """Published name and shape of every tensor that a checkpoint of the part must have."""
    layout = family(recipe.family).layout(recipe, role)
    return [
        (name, tuple(piece.shape))
        for key, value in part(recipe, role).state_dict().items()
        for names in [layout.published(key)]
        for name, piece in zip(names, value.chunk(len(names)), strict=True)
    ]


def golden_shapes(role: str, depth: int) -> dict[str, tuple[int, ...]]:
    """Every key and shape of the published file of a part."""
    symbols = {"": 1, "C": 64 * depth, "H": depth, "D": depth, "D+1": depth + 1}

    def size(text: str) -> int:
        factor, symbol = re.fullmatch(r"(\d*)(\D*)", text).groups()  # type: ignore[union-attr]
        return int(factor or 1) * symbols[symbol]

    shapes = {}
    for line in KEYS.read_text().splitlines():
        if line.startswith(f"{role}\t"):
            _, key, shape, count = line.split("\t")
            for i in range(symbols[count] if count in symbols else int(count)):
                shapes[key.replace("{i}", str(i))] = tuple(map(size, shape.split("x")))
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("role", ["student", "teacher", "tokenizer"])
def test_published_keys_and_shapes(name: str, role: str) -> None:
    """Key by key and shape by shape what the published files hold; all else in them is recomputable."""
    recipe = load_recipe(name)
    golden = golden_shapes(role, recipe.model["depth"])
    ours = dict(published_tensors(recipe, role))
    layout = family(recipe.family).layout(recipe, role)
    rest = {key for key in golden if any(re.fullmatch(p, key) for p in layout.recomputable)}
    assert set(ours) == set(golden) - rest
    for key, shape in ours.items():  # the files carry axes of one element that the modules do not need
        assert [n for n in shape if n != 1] == [n for n in golden[key] if n != 1], key
    buffers = {"student": 2, "teacher": 2}.get(role, 1) + (
        recipe.model["depth"] if role != "tokenizer" else 0
    )
    assert len(rest) == buffers


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("var-d16", 328_165_664, 310_283_520),
        ("var-d20", 635_399_088, 600_917_136),
        ("var-d24", 1_092_478_560, 1_033_399_360),
    ],
)
def test_published_sizes(name: str, student: int, teacher: int) -> None:
    """The parameter counts of the published models, as their own constructors give them."""
    recipe = load_recipe(name)
    assert sum(p.numel() for p in part(recipe, "student").parameters()) == student
    assert sum(p.numel() for p in part(recipe, "teacher").parameters()) == teacher
    assert sum(p.numel() for p in part(recipe, "tokenizer").parameters()) == 108_948_355


def test_published_schedules_with_a_teacher() -> None:
    """Steps, first position of the teacher and split as published; the key is the number of all steps."""
    found = {
        name: {
            steps: (s.teacher.start, s.teacher.end, s.split)
            for steps, s in load_recipe(name).schedules.items()
            if s.teacher is not None
        }
        for name in ("var-d16", "llamagen-l")
    }
    assert found["var-d16"] == {"3": (30, 55, 55), "4": (14, 55, 255), "6": (0, 55, 424)}
    assert found["llamagen-l"] == {"22": (60, 80, 180), "42": (40, 80, 180), "81": (0, 80, 220)}
