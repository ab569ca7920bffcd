"""LlamaGen-DD files and recipes: published keys and shapes, the places of the weights, geometries that do not
fit."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch

from ddexport.families import family
from ddexport.families._base import GeometryError
from ddexport.families._checkpoint import CheckpointError, load_part, published_state, save_part
from ddexport.families._llamagen_blocks import rotary_table
from ddexport.recipe import load_recipe, recipe_from_dict

GOLDEN = Path(__file__).parents[2] / "golden" / "llamagen-dd-small"
KEYS = GOLDEN.with_name("keys-llamagen.txt")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(str(GOLDEN / "recipe.yaml"))


def expanded(key):
    """`layers.{0..2}.w.{weight,bias}` as the keys it stands for."""
    found = re.search(r"\{([^}]*)\}", key)
    if not found:
        return [key]
    first, _, last = found[1].partition("..")
    values = range(int(first), int(last) + 1) if last else found[1].split(",")
    return [k for v in values for k in expanded(key[: found.start()] + str(v) + key[found.end() :])]


def published_keys(part):
    shapes = {}
    for line in KEYS.read_text().splitlines():
        if line.startswith(f"{part} "):
            _, pattern, shape = line.split()
            size = tuple(map(int, shape.split("x")))
            for key in expanded(pattern):
                shapes[key] = size[:1] if "{weight,bias}" in pattern and key.endswith("bias") else size
    return shapes


@pytest.mark.parametrize("name", ["llamagen-b", "llamagen-l"])
@pytest.mark.parametrize("role", ["student", "teacher", "tokenizer"])
def test_keys_and_shapes_are_the_published_ones(name, role):
    """Key by key at the real size. One published buffer carries no information and is not ours."""
    recipe = load_recipe(name)
    wanted = published_keys(role if role == "tokenizer" else f"{role}-{name[-1]}")
    assert len(wanted) > 10
    wanted.pop("quantize.codebook_used", None)
    with torch.device("meta"):
        module = family("llamagen_dd").build(recipe, role)
        assert not any(b.is_meta for k, b in module.named_buffers() if k in ("rotation", "mask"))
        shapes = {k: tuple(v.shape) for k, v in meta_state(module, recipe, role).items()}
    assert shapes == wanted


def meta_state(module, recipe, role):
    """`published_state` without its data: rows cannot be reordered on the meta device."""
    layout = family("llamagen_dd").layout(recipe, role)
    state = {}
    for key, value in module.state_dict().items():
        names = layout.published(key)
        state.update(zip(names, value.chunk(len(names)), strict=True))
    return state


class TestPlaces:
    @pytest.fixture
    def student_state(self):
        return torch.load(GOLDEN / "student.pth", weights_only=True)["ema"]

    @pytest.fixture
    def load(self, recipe, tmp_path):
        def save_and_load(data, role="student", weights=None):
            torch.save(data, tmp_path / "file.pt")
            return load_part(recipe, role, tmp_path / "file.pt", weights)

        return save_and_load

    @pytest.mark.parametrize("weights", ["ema", "model"])
    @pytest.mark.parametrize(
        "wrap", [lambda s: s, lambda s: {"module": s}, lambda s: {"state_dict": s, "steps": 7}]
    )
    def test_a_file_with_one_copy_is_read_wherever_it_is(self, wrap, weights, load, student_state):
        """Flat, or as other trainers store it; then `--weights` has nothing to choose."""
        module = load(wrap(student_state), weights=weights)
        assert torch.equal(module.logits_head.weight, student_state["output.weight"])

    def test_the_chosen_copy_wins_over_other_places(self, load, student_state):
        other = {k: v + 1 for k, v in student_state.items()}
        module = load({"module": other, "ema": student_state})
        assert torch.equal(module.logits_head.weight, student_state["output.weight"])

    def test_a_copy_that_is_not_there_is_not_replaced_by_another(self, load, student_state):
        """The other copy would be a different model: it is named, not taken, unless any is wanted."""
        load({"model": student_state, "steps": 1})
        with pytest.raises(CheckpointError) as caught:
            load({"model": student_state, "steps": 1}, weights="ema")
        assert "has no ema; it holds the student as model" in caught.value.message
        assert caught.value.hint == "choose with --weights model"

    def test_the_teachers_file_is_recognised(self, recipe):
        with pytest.raises(CheckpointError) as caught:
            load_part(recipe, "student", GOLDEN / "teacher.pth")
        assert caught.value.hint == "this looks like the teacher of llamagen-dd-small"

    def test_training_options_beside_the_weights_are_read_past(self, load, student_state):
        """LlamaGen's own training code stores its parsed command line."""
        options = argparse.Namespace(lr=1e-4, nested=argparse.Namespace(a=[1, "x"]))
        module = load({"ema": student_state, "args": options, "steps": 10})
        assert torch.equal(module.logits_head.weight, student_state["output.weight"])

    def test_a_rotary_table_in_a_teachers_file_must_be_ours(self, load, monkeypatch):
        """Older files keep it; half precision is near enough, another base or size is not."""
        state = torch.load(GOLDEN / "teacher.pth", weights_only=True)["model"]
        table = torch.from_numpy(rotary_table(4, 32))
        load({"model": {**state, "freqs_cis": table.bfloat16()}}, "teacher")
        monkeypatch.setattr("ddexport.families._llamagen_blocks.ROTARY_BASE", 9000.0)  # moves it by 0.0103
        wrongs = [torch.from_numpy(rotary_table(side, 32)) for side in (4, 3)]
        monkeypatch.undo()
        for wrong in (*wrongs, table.roll(1, 0), table.flatten()):
            with pytest.raises(CheckpointError, match="freqs_cis is not the value that this family computes"):
                load({"model": {**state, "freqs_cis": wrong}}, "teacher")

    def test_the_tokenizers_statistic_may_be_absent_or_any(self, load):
        state = torch.load(GOLDEN / "vq.pth", weights_only=True)["model"]
        del state["quantize.codebook_used"]
        load({"model": state}, "tokenizer")
        load({"model": {**state, "quantize.codebook_used": torch.arange(5)}}, "tokenizer")

    @pytest.mark.parametrize("role", ["student", "teacher", "tokenizer"])
    def test_safetensors_keep_every_bit(self, role, recipe, tmp_path):
        name = {"student": "student.pth", "teacher": "teacher.pth", "tokenizer": "vq.pth"}[role]
        module = load_part(recipe, role, GOLDEN / name)
        save_part(module, recipe, role, tmp_path / "part.safetensors", torch.float32)
        again = load_part(recipe, role, tmp_path / "part.safetensors")
        own, back = published_state(module, recipe, role), published_state(again, recipe, role)
        assert own.keys() == back.keys() and all(torch.equal(own[k], back[k]) for k in own)


class TestGeometry:
    """A recipe that contradicts itself is refused with the key at fault, not built into another model."""

    @pytest.mark.parametrize(("section", "change", "message"), [
        ("model", {"scales": [1, 4]}, "wrong or missing keys: scales"),
        ("model", {"heads": None}, "wrong or missing keys: heads"),
        ("model", {"heads": 3}, "3 heads do not fit a width of 64"),
        ("model", {"heads": 32}, "32 heads do not fit a width of 64"),
        ("sequence", {"length": 17}, "sequence.length 17 is not a square"),
        ("image", {"size": 128}, "images of side 64, not 128"),
        ("tokenizer", {"latent_channels": None}, "latent_channels"),
        ("tokenizer", {"multipliers": None}, "multipliers"),
        ("tokenizer", {"chanels": 3}, "chanels"),
    ])  # fmt: skip
    def test_refused(self, section, change, message, recipe):
        data = recipe.to_dict()
        data[section].update(change)
        data[section] = {key: value for key, value in data[section].items() if value is not None}
        with pytest.raises(GeometryError, match=re.escape(message)):
            family("llamagen_dd").build(recipe_from_dict(data), "tokenizer")

    @pytest.mark.parametrize(("width", "hidden"), [(64, 256), (768, 2048), (1024, 2816), (1280, 3584)])
    def test_hidden_size_follows_llamas_rule(self, width, hidden, recipe):
        data = recipe.to_dict()
        data["model"]["width"] = width
        assert family("llamagen_dd").geometry(recipe_from_dict(data)).hidden == hidden
