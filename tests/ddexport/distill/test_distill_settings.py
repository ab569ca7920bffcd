"""The recipe's `distill:` section is read strictly: a typing mistake is an error, not another experiment."""

from __future__ import annotations

import copy

import pytest
from ddexport.runtime.errors import DDError

from ddexport.distill.settings import distill_settings, quick
from ddexport.recipe import load_recipe, recipe_from_dict


@pytest.fixture
def plain():
    return load_recipe("digits-var").to_dict()


def changed(plain, *path, to):
    data = copy.deepcopy(plain)
    place = data["distill"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return recipe_from_dict(data)


def test_the_shipped_recipe_reads():
    settings = distill_settings(load_recipe("digits-var"))
    assert settings.student.timesteps[0] == 0 and settings.pairs.count > 0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("studnet",), {}, "unknown key studnet"),
        (("teacher", "iteration"), 5, "unknown key iteration"),
        (("teacher", "iterations"), "many", "distill.teacher.iterations"),
        (("teacher", "iterations"), 1.5, "distill.teacher.iterations"),
        (("pairs", "guidance"), -1, "distill.pairs.guidance"),
        (("student", "timesteps"), [0, 9], "not numbers of AR steps"),
        (("student", "timesteps"), 2, "not a list"),
        (("augment",), [1, 2], "expected keys and values"),
    ],
)
def test_a_wrong_key_or_value_is_named(plain, path, value, message):
    with pytest.raises(DDError) as caught:
        distill_settings(changed(plain, *path, to=value))
    assert message in caught.value.message


def test_a_missing_key_is_named(plain):
    del plain["distill"]["pairs"]["count"]
    with pytest.raises(DDError, match="the key count is missing"):
        distill_settings(recipe_from_dict(plain))


def test_a_recipe_of_published_weights_cannot_be_trained():
    with pytest.raises(DDError, match="no distill section"):
        distill_settings(load_recipe("var-d16"))


def test_quick_shortens_every_loop_and_keeps_the_rest():
    full = distill_settings(load_recipe("digits-var"))
    short = quick(full)
    loops = (short.tokenizer, short.teacher, short.student)
    assert all(loop.iterations <= 5 for loop in loops) and short.pairs.count <= 100
    assert short.student.timesteps == full.student.timesteps and short.pairs.guidance == full.pairs.guidance
