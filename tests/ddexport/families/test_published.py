"""The modules have the published files' tensors: every key, every shape, every parameter; and the files go
through them bit by bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ddexport.families import family as family_of
from ddexport.families._checkpoint import load_part, published_state, save_part
from ddexport.recipe import Recipe, load_recipe
from tests.goldens import BOTH, Golden

FOLDER = Path(__file__).parents[2] / "golden"
ROLES = ("student", "teacher", "tokenizer")
# As the published code's own constructors count them: student, teacher, tokenizer.
PARAMETERS = {
    "var-d16": (328_165_664, 310_283_520, 108_948_355),
    "var-d20": (635_399_088, 600_917_136, 108_948_355),
    "var-d24": (1_092_478_560, 1_033_399_360, 108_948_355),
    "llamagen-b": (98_321_672, 110_888_448, 71_883_403),
    "llamagen-l": (326_155_272, 342_910_976, 71_883_403),
}


def expanded(key: str) -> list[str]:
    """`layers.{0..2}.w.{weight,bias}` as the keys it stands for."""
    found = re.search(r"\{([^}]*)\}", key)
    if not found:
        return [key]
    first, _, last = found[1].partition("..")
    values = map(str, range(int(first), int(last) + 1)) if last else found[1].split(",")
    return [k for value in values for k in expanded(key[: found.start()] + value + key[found.end() :])]


def llamagen_shapes(name: str, role: str) -> dict[str, tuple[int, ...]]:
    """Every key and shape of the published file of a part. One buffer carries no information."""
    part = role if role == "tokenizer" else f"{role}-{name[-1]}"
    shapes = {}
    for line in (FOLDER / "keys-llamagen.txt").read_text().splitlines():
        if line.startswith(f"{part} "):
            _, pattern, shape = line.split()
            size = tuple(map(int, shape.split("x")))
            for key in expanded(pattern):
                shapes[key] = size[:1] if "{weight,bias}" in pattern and key.endswith("bias") else size
    return shapes


def var_shapes(name: str, role: str) -> dict[str, tuple[int, ...]]:
    """The same of VAR, whose sizes follow from the depth."""
    depth = int(name[-2:])
    symbols = {"": 1, "C": 64 * depth, "H": depth, "D": depth, "D+1": depth + 1}

    def size(text: str) -> int:
        factor, symbol = re.fullmatch(r"(\d*)(\D*)", text).groups()  # type: ignore[union-attr]
        return int(factor or 1) * symbols[symbol]

    shapes = {}
    for line in (FOLDER / "keys-var.txt").read_text().splitlines():
        if line.startswith(f"{role}\t"):
            _, key, shape, count = line.split("\t")
            for i in range(symbols[count] if count in symbols else int(count)):
                shapes[key.replace("{i}", str(i))] = tuple(map(size, shape.split("x")))
    return shapes


def our_shapes(recipe: Recipe, role: str) -> tuple[dict[str, list[int]], int]:
    """Published name and shape of every tensor of a part, without axes of one element, and its parameters."""
    with torch.device("meta"):
        module = family_of(recipe.family).build(recipe, role)
    layout, shapes = family_of(recipe.family).layout(recipe, role), {}
    for key, value in module.state_dict().items():
        names = layout.published(key)
        for name, piece in zip(names, value.chunk(len(names)), strict=True):
            assert name not in shapes, "two of our tensors claim one published name"
            shapes[name] = [n for n in piece.shape if n != 1]
    return shapes, sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_keys_shapes_and_counts_are_the_published_ones(name: str) -> None:
    """Key by key at the real size; what else the files hold can be computed."""
    recipe = load_recipe(name)
    for role, count in zip(ROLES, PARAMETERS[name], strict=True):
        published = (var_shapes if name.startswith("var") else llamagen_shapes)(name, role)
        patterns = family_of(recipe.family).layout(recipe, role).recomputable
        computed = {key for key in published if any(re.fullmatch(p, key) for p in patterns)}
        buffers = {"tokenizer": 1}.get(role, 2 + recipe.model["depth"] if name.startswith("var") else 0)
        assert len(computed) == buffers
        wanted = {k: [n for n in v if n != 1] for k, v in published.items() if k not in computed}
        assert our_shapes(recipe, role) == (wanted, count)
        assert recipe.parameters.get(role, count) == count  # which `ddexport models` prints


@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_the_embedded_models_are_counted_right(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.parameters == {role: our_shapes(recipe, role)[1] for role in ("student", "tokenizer")}


@BOTH
@pytest.mark.parametrize("role", ROLES)
def test_the_golden_files_go_back_into_the_published_layout(
    family: Golden, role: str, tmp_path: Path
) -> None:
    """Every tensor, bit by bit, also through safetensors: reordered rows, joined tensors and renamed keys
    undo exactly."""
    recipe, stored = family.recipe(), torch.load(family.files[role], weights_only=True)
    stored = stored.get("trainer", stored)
    stored = next((stored[name] for name in ("ema_parameters", "ema", "model") if name in stored), stored)
    module = family.part(role)
    save_part(module, recipe, role, tmp_path / "part.safetensors", torch.float32)
    for again in (module, load_part(recipe, role, tmp_path / "part.safetensors")):
        back = published_state(again, recipe, role)
        rest = stored.keys() - back.keys()
        patterns = family_of(recipe.family).layout(recipe, role).recomputable
        assert all(any(re.fullmatch(pattern, key) for pattern in patterns) for key in rest)
        assert all(torch.equal(back[key].flatten(), stored[key].float().flatten()) for key in back)
