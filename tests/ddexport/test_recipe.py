"""Recipes: each mistake is an error that names its key, and those that ship describe the published files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import yaml

from ddexport.export import WeightRequest, load_parts
from ddexport.families import family
from ddexport.families._base import GeometryError
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


SAMPLING = {"cfg": 2.0, "top_k": 10, "top_p": 1.0, "temperature": 1.0}


def with_teacher(known: list[int], start: int, end: int) -> dict[str, object]:
    return {"known": known, "teacher": {"start": start, "end": end}}


def schedule(steps: Any, **values: object) -> Edit:
    return lambda d: d["schedules"].update({steps: values})


def sampling(**values: object) -> Edit:
    return lambda d: d.update(teacher=SAMPLING | values)


# What is wrong, the place that the message names, and what the hint says besides.
MISTAKES: list[tuple[Edit, str, str]] = [
    (lambda d: d.update(sequense={}), "sequense", "sequence?"),
    (lambda d: d["sequence"].update(lenght=30), "sequence", "length?"),
    (lambda d: d["files"]["student"].update(fiel="x"), "fiel", "file?"),
    (lambda d: d["parity"]["fp32"].update(image_psrn=1), "parity.fp32", "image_psnr?"),
    (lambda d: d["parity"].update(fp61=d["parity"]["fp16"]), "fp61", "fp16?"),
    (lambda d: d.update({7: 1}), "key", ""),
    (lambda d: d.pop("classes"), "classes", "recipes/"),
    (lambda d: d["image"].pop("size"), "size", ""),
    (lambda d: d["parity"]["fp32"].pop("image_max"), "image_max", ""),
    (lambda d: d["parity"]["fp32"].update(token_margin=float("nan")), "parity.fp32.token_margin", ""),
    (lambda d: d["parity"]["fp32"].update(token_margin=float("inf")), "parity.fp32.token_margin", ""),
    (lambda d: d["parity"].update(images=0), "parity.images", ""),
    (lambda d: d.update(classes="10"), "classes", ""),
    (lambda d: d.update(labels=7), "labels", ""),
    (lambda d: d["sequence"].update(split=5.0), "sequence.split", ""),
    (lambda d: d["image"].update(size=True), "image.size", ""),
    (lambda d: d.update(image=64), "image", ""),
    (lambda d: d.update(files=[]), "files", ""),
    (lambda d: d.update(schema=2), "schema", "upgrade"),
    (lambda d: d["sequence"].update(split=31), "sequence.split", ""),
    (lambda d: d["sequence"].update(split=0), "sequence.split", ""),
    (lambda d: d.update(classes=0), "classes", ""),
    (lambda d: d["image"].update(size=-64), "image.size", ""),
    (lambda d: d["model"].update(depth="2"), "model", ""),
    (lambda d: d["model"].update(heads=0), "model", ""),
    (lambda d: d["model"].update(scales=[]), "model", ""),
    (lambda d: d["tokenizer"].update(multipliers=[1, "2"]), "tokenizer", ""),
    (lambda d: d.update(schedules={}), "schedules", ""),
    (lambda d: d.update(schedules=[]), "schedules", ""),
    (schedule("3", known=[0, 5]), "schedules.3.known", ""),
    (schedule("two", known=[0, 5]), "schedules.two", ""),
    (schedule("02", known=[0, 5]), "schedules.02", ""),
    (schedule("1", known=[5]), "schedules.1.known", ""),
    (schedule("3", known=[0, 14, 5]), "schedules.3.known", ""),
    (schedule(2, known=[0, 30]), "schedules.2.known", ""),
    (schedule("0", known=[]), "schedules.0", ""),
    (schedule("1", known=0), "known", ""),
    (schedule("1", known=["0"]), "known[0]", ""),
    (schedule("2", known=[0, 5], split=31), "schedules.2.split", ""),
    (schedule("2", known=[0, 5], split="5"), "split", ""),
    (schedule("4", known=[14], teacher={"begin": 0, "end": 14}), "begin", ""),
    (schedule("4", **with_teacher([14], 0, 14)), "schedules.4", ""),  # there is no teacher
    (sampling(top_k=0), "teacher.top_k", ""),
    (sampling(top_p=1.5), "teacher.top_p", ""),
    (sampling(temperature=0), "teacher.temperature", ""),
    (lambda d: d["files"].pop("student"), "files.student", ""),
    (lambda d: d["files"].update(vae=d["files"]["tokenizer"]), "files.vae", ""),
    (lambda d: d["files"].update(student={}), "files.student", ""),
]


@pytest.mark.parametrize(("edit", "place", "hint"), MISTAKES)
def test_a_mistake_is_named(golden_recipe: Recipe, edit: Edit, place: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        edited(golden_recipe, edit)
    assert caught.value.message.startswith("my.yaml: ")
    assert place in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda gate: gate.update(feature="digits"), "parity.fid"),
        (lambda gate: gate.pop("limits"), "limits"),
        (lambda gate: gate.update(limits=[]), "parity.fid.limits"),
        (lambda gate: gate["limits"].update(fp61=gate["limits"]["fp16"]), "fp61"),
        (lambda gate: gate["limits"]["fp32"].update(fid=1), "fid"),
        (lambda gate: gate["limits"]["fp32"].pop("difference"), "difference"),
        (lambda gate: gate["limits"]["fp32"].update(changed="0.1"), "changed"),
        (lambda gate: gate["limits"]["fp32"].update(difference=-1), "difference"),
        (lambda gate: gate.update(images=0), "parity.fid.images"),
        (lambda gate: gate.update(features=3), "parity.fid.features"),
    ],
)
def test_a_mistake_in_the_gate_of_image_quality_is_named(edit: Edit, place: str) -> None:
    """A typing mistake must not become a gate that holds nothing."""
    with pytest.raises(RecipeError) as caught:
        edited(load_recipe("digits-var"), lambda d: edit(d["parity"]["fid"]))
    assert place in caught.value.message


GEOMETRY: list[tuple[Edit, str]] = [
    (lambda d: [sampling()(d), schedule("4", **with_teacher([0, 14], 2, 14))(d)], "schedules.4.teacher"),
    (lambda d: [sampling()(d), schedule("3", **with_teacher([0, 14], 1, 14))(d)], "schedules.3 has 4 steps"),
    (schedule("2", known=[0, 5], split=6), "split 6"),
    (lambda d: d["model"].update(scales=[1, 2, 3]), "scales"),
    (lambda d: d["sequence"].update(split=6), "split 6"),
    (schedule(2, known=[0, 6]), "known 6"),
    (lambda d: d["model"].update(heads=3), "heads 3"),
    (lambda d: d["model"].update(dpeth=2), "dpeth"),
    (lambda d: d["model"].pop("depth"), "depth"),
    (lambda d: d["image"].update(size=32), "side 64, not 32"),
    (lambda d: d["tokenizer"].update(chanels=1), "chanels"),
    (lambda d: d["tokenizer"].pop("multipliers"), "multipliers"),
]


@pytest.mark.parametrize(("edit", "place"), GEOMETRY)
def test_a_geometry_that_does_not_fit_is_refused(golden_recipe: Recipe, edit: Edit, place: str) -> None:
    recipe = edited(golden_recipe, edit)
    with pytest.raises(GeometryError, match="var-dd-small") as caught:
        for role in ("student", "tokenizer"):
            part(recipe, role)
    assert place in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "known",
    [with_teacher([0, 5], 5, 5), with_teacher([0], 14, 31), with_teacher([0, 5], 1, 14),
     with_teacher([0, 14], 0, 14)],
)  # fmt: skip
def test_a_span_that_no_teacher_could_have_is_refused(
    golden_recipe: Recipe, known: dict[str, object]
) -> None:
    with pytest.raises(RecipeError, match=r"schedules\.4\."):
        edited(golden_recipe, lambda d: [sampling()(d), schedule("4", **known)(d)])


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
    with pytest.raises(RecipeError, match=r"the recipe in bundle b: .*fp61"):
        recipe_of(manifest)  # type: ignore[arg-type]


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
        assert recipe.parity.fp32 is not None
        assert {"weights", "intended_use"} <= set(recipe.licence)
        assert recipe.embedded or {"dataset", "fid"} <= set(recipe.published)

    def test_has_a_gate_of_image_quality(self, name: str) -> None:
        """In float32 with all limits: a bundle that generates other, equally good images must not pass."""
        gate = load_recipe(name).parity.fid
        assert gate is not None
        assert None not in msgspec.structs.astuple(gate.limits["fp32"])
        assert {"fp32", "fp16", "bf16"} <= set(gate.limits)

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
