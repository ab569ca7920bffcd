"""The recipe's `distill:` section is read strictly: a typing mistake is an error, not another experiment."""

from __future__ import annotations

import pytest

from ddexport.distill.settings import distill_settings, quick
from ddexport.recipe import RecipeError, load_recipe, recipe_from_dict


def test_the_shipped_recipe_reads():
    settings = distill_settings(load_recipe("digits-var"))
    assert settings.student.timesteps[0] == 0 and settings.pairs.count > 0


@pytest.mark.parametrize(
    ("part", "change", "place"),
    [
        ("teacher", {"iteration": 5}, "iteration"),
        ("teacher", {"iterations": "many"}, "teacher.iterations"),
        ("teacher", {"iterations": 1.5}, "teacher.iterations"),
        ("teacher", {"drop_label": 1.1}, "teacher.drop_label"),
        ("tokenizer", {"rate": float("nan")}, "tokenizer.rate"),
        ("tokenizer", {"reseed": 0}, "tokenizer.reseed"),
        ("pairs", {"guidance": -1}, "pairs.guidance"),
        ("student", {"timesteps": [0, 9]}, "student.timesteps"),
        ("student", {"timesteps": []}, "student.timesteps"),
        ("student", {"timesteps": 2}, "student.timesteps"),
        ("augment", [1, 2], "augment"),
        ("studnet", {}, "studnet"),
        ("pairs", None, "pairs"),
    ],
)
def test_a_mistake_is_named(part, change, place):
    data = load_recipe("digits-var").to_dict()
    section = data["distill"].pop(part, {})
    if change is not None:
        data["distill"][part] = section | change if isinstance(change, dict) else change
    with pytest.raises(RecipeError) as caught:
        distill_settings(recipe_from_dict(data))
    assert place in caught.value.message


def test_a_recipe_of_published_weights_cannot_be_trained():
    with pytest.raises(RecipeError, match="distill"):
        distill_settings(load_recipe("var-d16"))


def test_quick_shortens_every_loop_and_keeps_the_rest():
    full = distill_settings(load_recipe("digits-var"))
    short = quick(full)
    loops = (short.tokenizer, short.teacher, short.student)
    assert all(loop.iterations <= 5 for loop in loops) and short.pairs.count <= 100
    assert short.student.timesteps == full.student.timesteps and short.pairs.guidance == full.pairs.guidance
