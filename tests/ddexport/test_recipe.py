"""Recipes: each mistake is an error that names its key, and those that ship are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import yaml

from ddexport.export import WeightRequest, load_parts
from ddexport.recipe import (
    Recipe,
    RecipeError,
    class_names,
    embedded_weights,
    load_recipe,
    manifest_recipe,
    recipe_from_dict,
    recipe_names,
    recipe_of,
    whole_recipe,
)

Edit = Callable[[dict[str, Any]], object]


def edited(recipe: Recipe, edit: Edit) -> Recipe:
    data = recipe.to_dict()
    edit(data)
    return recipe_from_dict(data, "my.yaml")


def schedule(steps: Any, known: Any, start: int = 0, end: int = 0, **values: object) -> Edit:
    """One more schedule; with an end, one in which a teacher draws from `start` to there."""
    span = {"teacher": {"start": start, "end": end}} if end else {}
    return lambda d: d["schedules"].update({steps: {"known": known, **span, **values}})


def sampling(**values: object) -> Edit:
    return lambda d: d.update(teacher={"cfg": 2.0, "top_k": 10, "top_p": 1.0, **values})


def taught(*schedule_of: Any) -> Edit:
    """A schedule with a teacher in a recipe that has one."""
    return lambda d: [sampling()(d), schedule("4", *schedule_of)(d)]


# What is wrong, the place that the message names, and the nearest right key in the hint.
MISTAKES: list[tuple[Edit, str, str]] = [
    (lambda d: d.update(sequense={}), "sequense", "sequence"),
    (lambda d: d["parity"]["fp32"].update(image_psrn=1), "parity.fp32", "image_psnr"),
    (lambda d: d["parity"].update(fp61=d["parity"]["fp16"]), "fp61", "fp16"),
    (lambda d: d.update({7: 1}), "key", ""),
    (lambda d: d.pop("classes"), "classes", ""),
    (lambda d: d["parity"]["fp32"].pop("image_max"), "image_max", ""),
    (lambda d: d["parity"]["fp32"].update(token_margin=float("nan")), "parity.fp32.token_margin", ""),
    (lambda d: d["parity"]["fp32"].update(token_margin=float("inf")), "parity.fp32.token_margin", ""),
    (lambda d: d["parity"].update(images=0), "parity.images", ""),
    (lambda d: d.update(classes="10"), "classes", ""),
    (lambda d: d.update(classes=0), "classes", ""),
    (lambda d: d.update(schema=2), "schema", "upgrade"),
    (lambda d: d["sequence"].update(split=5.0), "sequence.split", ""),
    (lambda d: d["sequence"].update(split=0), "sequence.split", ""),
    (lambda d: d["sequence"].update(split=31), "sequence.split", ""),
    (lambda d: d["model"].update(heads=0), "model", ""),
    (lambda d: d["model"].update(scales=[]), "model", ""),
    (lambda d: d["tokenizer"].update(multipliers=[1, "2"]), "tokenizer", ""),
    (lambda d: d.update(schedules={}), "schedules", ""),
    (schedule("3", [0, 5]), "schedules.3.known", ""),
    (schedule("02", [0, 5]), "schedules.02", ""),
    (schedule("1", [5]), "schedules.1.known", ""),
    (schedule("3", [0, 14, 5]), "schedules.3.known", ""),
    (schedule(2, [0, 30]), "schedules.2.known", ""),
    (schedule("1", ["0"]), "known[0]", ""),
    (schedule("2", [0, 5], split=31), "schedules.2.split", ""),
    (schedule("4", [14], 0, 14), "schedules.4", ""),  # there is no teacher
    (taught([0, 5], 5, 5), "schedules.4.teacher", ""),
    (taught([0], 14, 31), "schedules.4.teacher", ""),
    (taught([0, 5], 1, 14), "schedules.4.known", ""),
    (taught([0, 14], 0, 14), "schedules.4.known", ""),
    (sampling(top_k=0), "teacher.top_k", ""),
    (sampling(top_p=1.5), "teacher.top_p", ""),
    (sampling(temperature=0), "teacher.temperature", ""),
    (lambda d: d["files"].pop("student"), "files.student", ""),
    (lambda d: d["files"].update(vae=d["files"]["tokenizer"]), "files.vae", ""),
    (lambda d: d["files"].update(student={}), "files.student", ""),
    (lambda d: d["parity"]["fid"].update(feature="digits"), "parity.fid", "features"),
    (lambda d: d["parity"]["fid"]["limits"].update(fp61={"difference": 1}), "fp61", ""),
    (lambda d: d["parity"]["fid"]["limits"]["fp32"].update(difference=-1), "difference", ""),
]


@pytest.mark.parametrize(("edit", "place", "hint"), MISTAKES)
def test_a_mistake_is_named(golden_recipe: Recipe, edit: Edit, place: str, hint: str) -> None:
    """A typing mistake must not become another model, or a gate that lets everything pass."""
    fid = load_recipe("digits-var").to_dict()["parity"]["fid"]
    data = edited(golden_recipe, lambda d: d["parity"].update(fid=fid))
    with pytest.raises(RecipeError) as caught:
        edited(data, edit)
    assert caught.value.message.startswith("my.yaml: ")
    assert place in caught.value.message and hint in caught.value.hint


def test_numbers_of_steps_may_be_numbers(golden_recipe: Recipe) -> None:
    """YAML reads `1:` as one."""
    numbers = edited(golden_recipe, lambda d: d.update(schedules={1: {"known": [0]}, 2: {"known": [0, 5]}}))
    assert numbers == golden_recipe


def test_a_manifest_holds_each_key_once(golden_recipe: Recipe) -> None:
    """What stands in the manifest itself is put back, and is what counts."""
    stored = manifest_recipe(golden_recipe)
    assert not {"parity", "licence", "published"} & set(stored)
    data = golden_recipe.to_dict()
    manifest = SimpleNamespace(
        name="b", recipe=stored, parity=data["parity"], licence=golden_recipe.licence, published={}
    )
    assert recipe_of(manifest) == golden_recipe  # type: ignore[arg-type]
    assert whole_recipe(manifest) == data  # type: ignore[arg-type]
    manifest.parity = {"fp61": {}}
    with pytest.raises(RecipeError) as caught:
        recipe_of(manifest)  # type: ignore[arg-type]
    assert "bundle b" in caught.value.message and "fp61" in caught.value.message


@pytest.mark.parametrize(
    "content", [b"a: [1", b"\xff\xfe\x00", b"- 1\n", b"", b"!!python/object/apply:os.mkdir [/nowhere]"]
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes) -> None:
    """Also a YAML tag that would build a Python object is refused: recipes are data."""
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert str(path) in caught.value.message


def test_what_a_recipe_names_has_to_be_there(golden_recipe: Recipe) -> None:
    """A label list of another length than the classes would give images the wrong names."""
    assert class_names(golden_recipe)["names"][3] == "three"
    for labels in ("imagenet", "digitz"):
        with pytest.raises(RecipeError) as caught:
            class_names(edited(golden_recipe, lambda d, labels=labels: d.update(labels=labels)))
        assert labels in caught.value.message
    commands = {
        "a-b-student.safetensors": "a-b",
        "a-b-text-encoder": "a-b",
        "a-b-decoder-small.safetensors": "decoder --model a-b",
    }
    for file, command in commands.items():
        recipe = edited(golden_recipe, lambda d, file=file: d["files"].update(student={"embedded": file}))
        with pytest.raises(RecipeError) as caught:
            embedded_weights(recipe.files["student"])
        assert file in caught.value.message and f"ddexport distill {command} --i" in str(caught.value.hint)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_ships_is_whole(name: str) -> None:
    """It survives a bundle, from which `validate` builds the reference, and has all that the tools print. The
    gate of image quality has every limit in float32: other, equally good images must not pass. Embedded
    weights are there, and are the recipe's model."""
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert len(class_names(recipe)["names"]) == recipe.classes
    assert {"weights", "intended_use"} <= set(recipe.licence)
    assert recipe.embedded or {"dataset", "fid" if recipe.schedules else "teacher_fid"} <= set(
        recipe.published
    )
    assert recipe.parity.fp32 is not None and (recipe.parity.fid is None) == bool(recipe.condition)
    if recipe.parity.fid is not None:
        assert None not in msgspec.structs.astuple(recipe.parity.fid.limits["fp32"])
        assert {"fp32", "fp16", "bf16"} <= set(recipe.parity.fid.limits)
    assert {bool(source.embedded) for source in recipe.files.values()} == {recipe.embedded}
    if recipe.embedded:
        parts = load_parts(recipe, WeightRequest({}))
        assert all(value.isfinite().all() for m in parts.values() for value in m.state_dict().values())


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
