"""The entry `parity.fid` of a recipe, read as strictly as the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from ddexport.recipe import FidGate, RecipeError, load_recipe, recipe_from_dict, recipe_names

MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown key": (lambda gate: gate.update(feature="digits"), "parity.fid: unknown key feature"),
    "missing limits": (lambda gate: gate.pop("limits"), "parity.fid: the key limits is missing"),
    "unknown limit": (
        lambda gate: gate["limits"]["fp32"].update(fid=1),
        "parity.fid.limits.fp32: unknown key fid",
    ),
    "missing limit": (
        lambda gate: gate["limits"]["fp32"].pop("difference"),
        "parity.fid.limits.fp32: the key difference is missing",
    ),
    "text for a limit": (
        lambda gate: gate["limits"]["fp32"].update(changed="0.1"),
        "limits.fp32: changed: '0.1' is no limit",
    ),
    "a limit below zero": (
        lambda gate: gate["limits"]["fp32"].update(difference=-1),
        "limits.fp32: difference: -1 is no limit",
    ),
    "no images": (lambda gate: gate.update(images=0), "parity.fid: images: 0 is no size"),
    "a number for the features": (lambda gate: gate.update(features=3), "features: 3 is not of type str"),
    "a list for the limits": (lambda gate: gate.update(limits=[]), "limits: [] is not of type keys"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    """A typing mistake must not become a gate that holds nothing."""
    edit, message = MISTAKES[name]
    data = copy.deepcopy(load_recipe("digits-var").to_dict())
    edit(data["parity"]["fid"])
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(data, "my.yaml")
    assert message in caught.value.message


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_gate(name: str) -> None:
    """In float32 with all three limits: a bundle that draws other, equally good images must not pass."""
    gate = load_recipe(name).parity["fid"]
    assert isinstance(gate, FidGate)
    assert None not in vars(gate.limits["fp32"]).values()
    assert {"fp32", "fp16", "bf16"} <= set(gate.limits)


def test_a_recipe_without_the_entry_is_read() -> None:
    """Custom recipes need not name a gate."""
    data = load_recipe("digits-var").to_dict()
    del data["parity"]["fid"]
    assert "fid" not in recipe_from_dict(data).parity
