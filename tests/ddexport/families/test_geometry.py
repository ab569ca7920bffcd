"""A recipe that contradicts itself is refused with the key at fault, not built into another model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddexport.families import family as family_of
from ddexport.families._base import GeometryError
from ddexport.recipe import recipe_from_dict
from tests.goldens import LLAMAGEN, VAR, Golden


def section(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Other values of a section; None removes a key."""

    def edit(data: dict[str, Any]) -> None:
        data[name] = {k: v for k, v in (data[name] | values).items() if v is not None}

    return edit


def schedule(steps: str, known: list[int], **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["schedules"].update({steps: {"known": known, **values}})


def teacher(steps: str, start: int) -> Callable[[dict[str, Any]], None]:
    """A schedule in which a teacher draws from `start` to 14."""

    def edit(data: dict[str, Any]) -> None:
        data["teacher"] = {"cfg": 2.0, "top_k": 10, "top_p": 1.0}
        schedule(steps, [0, 14], teacher={"start": start, "end": 14})(data)

    return edit


MISTAKES = [
    (VAR, teacher("4", 2), "schedules.4.teacher"),  # 2 is inside a scale
    (VAR, teacher("3", 1), "schedules.3 has 4 steps"),
    (VAR, schedule("2", [0, 5], split=6), "split 6"),
    (VAR, schedule("2", [0, 6]), "known 6"),
    (VAR, section("sequence", split=6), "split 6"),
    (VAR, section("model", scales=[1, 2, 3]), "scales"),
    (VAR, section("model", scales=[4]), "scales"),
    (VAR, section("model", scales=4), "scales"),
    (VAR, section("model", heads=3), "heads 3"),
    (VAR, section("model", dpeth=2), "dpeth"),
    (VAR, section("model", depth=None), "depth"),
    (VAR, section("image", size=32), "side 64, not 32"),
    (LLAMAGEN, section("model", scales=[1, 4]), "scales"),
    (LLAMAGEN, section("model", heads=32), "32 heads"),  # rotary pairs need a multiple of four
    (LLAMAGEN, section("sequence", length=17), "sequence.length"),
    (LLAMAGEN, section("image", size=128), "side 64, not 128"),
    (LLAMAGEN, section("tokenizer", latent_channels=None), "latent_channels"),
]


@pytest.mark.parametrize(("family", "edit", "place"), MISTAKES)
def test_a_geometry_that_does_not_fit_is_refused(
    family: Golden, edit: Callable[[dict[str, Any]], None], place: str
) -> None:
    data = family.recipe().to_dict()
    edit(data)
    recipe = recipe_from_dict(data)
    with pytest.raises(GeometryError) as caught, torch.device("meta"):
        for role in ("student", "tokenizer"):
            family_of(recipe.family).build(recipe, role)
    assert place in caught.value.message and caught.value.hint
